"""Walks through a guide and the README as a new user does: every command, its exit status, seconds and last lines.

    python -m examples.walk --guide NKAT_GUIDE.md --output docs/walk.md

Runs them in an empty folder for each page, on SmolLM2 under the names of the models that the pages use. What ran is
kept there, and the same command goes on behind it. Nothing is judged here: the page says what happened.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("examples.walk")

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

from nkat.host import commandline, hardware
from nkat.host.console import bar, counted, note
from nkat.host.files import atomic_output, check_output, make_folder
from nkat.host.record import toolkit_version
from nkat.models import fetch

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"^```(bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_MODELS = ("models/llama-7b-q4_k_m.gguf", "models/smollm2.gguf", "your_model.gguf")
# What "..." stands for in a guide's commands.
_REST = {
    "nkat_gguf_converter.py": "--input models/llama-7b-q4_k_m.gguf --output models/again.nkat --force",
    "nkat_inference_engine.py": "--model models/llama-7b-q4_k_m.nkat --perplexity --chunks 2",
    "nkat_auto_optimizer.py": "--model models/llama-7b-q4_k_m.gguf --mode custom --trials 4",
}
_LAST_LINES = 6


def main() -> None:
    parser = commandline.parser(
        "Run every command of a guide and of the README, and write what happened.",
        "  python -m examples.walk --guide NKAT_GUIDE.md --output docs/walk.md",
    )
    parser.add_argument("--guide", type=Path, metavar="FILE", help="a guide in Markdown (default: the README alone)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the page to write")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what the pages call wiki.test.raw")
    parser.add_argument("--folder", type=Path, default=Path("output/walk"), metavar="DIR", help="default output/walk")
    parser.add_argument("--limit", type=commandline.positive_int, default=3600, metavar="SECONDS", help="a command")
    parser.add_argument(
        "--remark", default="", metavar="TEXT", help="for the page's head: what else the machine did, say"
    )
    parser.add_argument("--force", action="store_true", help="replace the page")
    options = parser.parse_args()
    check_output(options.output, options.force)
    pages = [*([options.guide] if options.guide else []), ROOT / "README.md"]
    asked = [(page.name, command) for page in pages for command in commands(page.read_text(encoding="utf-8"))]
    for page in pages:
        prepare(options.folder / page.stem, options.text)
    done = options.folder / "walk.json"
    rows: list[dict[str, Any]] = json.loads(done.read_text(encoding="utf-8")) if done.exists() else []
    if [(row["page"], row["command"]) for row in rows] != asked[: len(rows)]:
        rows = []
    with bar(len(asked), "walking", "command") as progress:
        progress.update(len(rows))
        for page, command in asked[len(rows) :]:
            note(f"$ {command}")
            rows.append(
                {"page": page, "command": command, **run(command, options.folder / Path(page).stem, options.limit)}
            )
            done.write_text(json.dumps(rows), encoding="utf-8")
            progress.update()
    data = describe(rows, f"{place()}{options.remark and f'; {options.remark}'}").encode()
    with atomic_output(options.output, len(data), options.force) as file:
        file.write(data)


def commands(page: str) -> list[str]:
    """What a user types, of its shell blocks: comments left out, continued lines put together, `py -3` as python."""
    found = []
    for kind, block in _BLOCK.findall(page):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if kind == "console" and not line.startswith("$ "):
                continue
            typed = re.sub(r"(^|\s+)#\s.*", "", line.removeprefix("$ ")).strip().replace("py -3 ", "python ")
            if typed:
                found.append(re.sub(r"\s+", " ", typed))
    return found


def prepare(folder: Path, text: Path | None) -> None:
    """The models and the text that the pages name, where they are not there."""
    model = fetch("smollm2")
    for name in _MODELS:
        target = folder / name
        make_folder(target.parent)
        if not target.exists():
            shutil.copyfile(model, target)
    if text is not None:
        shutil.copyfile(text, folder / "wiki.test.raw")


def run(command: str, folder: Path, limit: int) -> dict[str, Any]:
    """Exit status (None: not run, or stopped at the limit), seconds, last lines without this machine's paths."""
    words = shlex.split(command)
    if words[0] == "make":
        return _run(words, ROOT, folder, limit)
    if words[0] != "python":
        return {"status": None, "seconds": 0.0, "lines": ["not run: it changes this Python, or takes what does"]}
    script = words[1]
    if "..." in words:
        at = words.index("...")
        words[at : at + 1] = shlex.split(_REST[script])
        if script == "nkat_auto_optimizer.py":
            words += ["--output-dir", f"output/again-{words[-1]}"]  # each its own study
    if script != "-m":
        words[1] = str(ROOT / script)
    return _run([sys.executable, *words[1:]], folder, folder, limit)


def _run(words: list[str], where: Path, folder: Path, limit: int) -> dict[str, Any]:
    """Runs it in `where`; `folder` is called "." in what it says."""
    started = time.perf_counter()
    python = {} if words[0] == "make" else {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    try:
        ended = subprocess.run(
            words,
            cwd=where,
            env={**os.environ, **python},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
            check=False,
        )
        status, said = ended.returncode, ended.stdout
    except subprocess.TimeoutExpired as stopped:
        status, said = None, stopped.stdout or b""
    lines = [line.rpartition("\r")[2].rstrip() for line in said.decode("utf-8", "replace").splitlines()]
    places = {str(folder.resolve()): ".", str(ROOT): "nkat", sys.executable: "python", str(Path.home()): "~"}
    shown = [line for line in lines if line and "it/s" not in line][-_LAST_LINES:]
    for path, name in places.items():
        shown = [line.replace(path, name) for line in shown]
    return {"status": status, "seconds": round(time.perf_counter() - started, 1), "lines": shown}


def place() -> str:
    """The machine, the day and the version."""
    machine, version = hardware.describe(hardware.pick_device(allow_cuda=False)), toolkit_version()
    commit = (version["git_commit"] or "")[:7]
    return f"{date.today():%d %B %Y}, {machine['device_name']}, nkat {version['nkat_version']} {commit}".rstrip()


def describe(rows: list[dict[str, Any]], where: str) -> str:
    """The page. where: on which machine, when, which version"""
    ended = Counter("not run or stopped" if row["status"] is None else f"status {row['status']}" for row in rows)
    parts = [
        "# The walk\n",
        "Every command of the guide and the README, as a new user types it, on SmolLM2 under the names of the models\n"
        "that the pages use, in an empty folder: status, seconds, last lines. Made by `python -m examples.walk`.\n",
        f"{where}.\n",
        f"{counted(len(rows), 'command')}: {', '.join(f'{n} {how}' for how, n in sorted(ended.items()))}.\n",
    ]
    for page in dict.fromkeys(row["page"] for row in rows):
        parts.append(f"## {page}\n")
        for row in (row for row in rows if row["page"] == page):
            ended = "no exit status" if row["status"] is None else f"exit status {row['status']}"
            said = "\n".join([row["command"], f"→ {ended}, {row['seconds']} s", *row["lines"]])
            parts.append(f"```text\n{said}\n```\n")
    return "\n".join(parts)
