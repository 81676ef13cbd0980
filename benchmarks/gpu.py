"""Everything that a GPU is to show: whether it computes rightly, how fast, in how much memory. Ends in a page.

    python -m benchmarks.gpu                                 all parts, at most 9 minutes, docs/results/cuda.md
    python -m benchmarks.gpu --only kernels decode           some parts; the others' figures stay from an earlier run
    python -m benchmarks.gpu --blocks 8 --folder /dev/shm    a quarter of a 7B model, its files in main memory

Models are written here with random weights; nothing is fetched. Each part, and each piece of a part that has pieces, is
a process of its own: a fault on the device or a lack of time ends that one, is written down in a line, and the next
begins. After each part the page and the record beside it (FILE.json) are written. The last line of stdout is JSON.
The status is 0 when all parts ran and every target was met, else 1; without a GPU it is 2.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.gpu")

import datetime
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from benchmarks.gpu_figures import keeper, kept, page, problems
from benchmarks.shapes import BLOCKS
from nkat.errors import NKATError
from nkat.host import commandline, hardware
from nkat.host.console import note
from nkat.host.files import atomic_output
from nkat.host.programs import shell_line
from nkat.host.record import parse_json, recorded, toolkit_version, write_json
from nkat.kernels.cuda.planes import FORMATS

LIMIT = 540  # seconds for everything
_WORKERS = 6  # pieces of a part at once: they compile most of the time


@dataclass(frozen=True, slots=True)
class Part:
    """function: of a Job and what keeps its figures, as module:name; seconds: it may take; units: pieces, if any"""

    title: str
    function: str
    seconds: int
    units: tuple[str, ...] = ("",)


PARTS = {
    "kernels": Part(
        "Kernels against float64", "benchmarks.gpu_checks:kernels", 150, tuple(qtype.name for qtype in FORMATS)
    ),
    "step": Part(
        "Operations of a decode step against torch",
        "benchmarks.gpu_checks:step",
        100,
        ("llama", "qwen2", "qwen3", "gemma3", "7B"),
    ),
    "graph": Part("Recorded steps against the model's own", "benchmarks.gpu_checks:graph", 80),
    "first-use": Part(
        "The kernels' checks at their first use",
        "benchmarks.gpu_first_use:checks",
        90,
        ("7B", "7B unchecked", "wrong product", "wrong step", *(qtype.name for qtype in FORMATS)),
    ),
    "decode": Part("Decoding a 7B shape, Q4_K_M", "benchmarks.gpu_speed:decoding", 120),
    "prompt": Part("Prompts against float32", "benchmarks.gpu_checks:prompt", 60),
    "prefill": Part("Prompts of a 7B shape, Q4_K_M", "benchmarks.gpu_speed:prompts", 80),
    "fit": Part("Five steps of a fit", "benchmarks.gpu_checks:learning", 60),
    "image": Part("The image model's training step", "benchmarks.gpu_checks:image", 120),
    "formats": Part("Each format's kernels", "benchmarks.gpu_speed:formats", 90),
    "profile": Part("Where a decode step's time goes", "benchmarks.gpu_speed:steps", 60),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a piece left: its figures, and in a line what went wrong, if anything."""

    figures: list[dict[str, Any]]
    error: str | None


def run_piece(command: list[str], into: Path, seconds: float, label: str) -> Outcome:
    """Runs a process that keeps figures in `into`; what it says on stderr goes on to ours, under its label."""
    said: deque[str] = deque(maxlen=30)
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, bufsize=1)
    except OSError as error:
        return Outcome([], f"{command[0]}: cannot be run: {error.strerror}")

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip() and "\r" not in line:
                said.append(line.strip())
                note(f"  {label}: {line.rstrip()}")

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        status = process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return Outcome(kept(into), f"not done after {seconds:.0f} s")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    listener.join(timeout=5)
    if status == 0:
        return Outcome(kept(into), None)
    return Outcome(kept(into), said[-1] if said else f"ended with status {status} and said nothing")


def run_part(name: str, part: Part, command: Callable[[str, Path], list[str]], seconds: float) -> dict[str, Any]:
    """A part's record: the figures and errors of its pieces, side by side where it has several."""
    began = monotonic()
    with tempfile.TemporaryDirectory() as folder:

        def piece(number: int, unit: str) -> Outcome:
            into = Path(folder) / f"{number}.jsonl"
            left = seconds - (monotonic() - began)
            if left < 1:
                return Outcome([], f"not begun: {seconds:.0f} s were over")
            return run_piece(command(unit, into), into, left, f"{name} {unit}".strip())

        workers = max(1, min(_WORKERS, (os.cpu_count() or 1) // 2, len(part.units)))
        with ThreadPoolExecutor(workers) as pool:
            outcomes = list(pool.map(piece, range(len(part.units)), part.units))
    return {
        "figures": [figure for outcome in outcomes for figure in outcome.figures],
        "errors": [
            f"{unit}: {outcome.error}" if unit else outcome.error
            for unit, outcome in zip(part.units, outcomes, strict=True)
            if outcome.error
        ],
        "seconds": monotonic() - began,
    }


def run_parts(
    names: list[str],
    command: Callable[[str, str, Path], list[str]],
    limit: float,
    save: Callable[[str, dict[str, Any]], None],
) -> None:
    """The parts one after another within the limit; each is saved as soon as it is there."""
    began = monotonic()
    for place, name in enumerate(names):
        part = PARTS[name]
        left = limit - (monotonic() - began)
        most = min(float(part.seconds), left)
        rest = min(left, sum(PARTS[later].seconds for later in names[place:]))
        note(f"[{place + 1}/{len(names)}] {name}: {part.title}: at most {most:.0f} s; all that is left: {rest:.0f} s")
        if most < 5:
            record: dict[str, Any] = {"figures": [], "seconds": 0.0}
            record["errors"] = [f"not begun: the limit of {limit:.0f} s is reached"]
        else:
            record = run_part(name, part, lambda unit, into: command(name, unit, into), most)  # noqa: B023
        save(name, record)
        wrong = problems({"parts": {name: record}})
        note(f"    {record['seconds']:.0f} s, " + (f"{len(wrong)} wrong" if wrong else "all right"))
        for line in wrong:
            note(f"    {line}")


def earlier_parts(path: Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """The parts in a record of an earlier run on the same device with the same versions; else none, and a note why."""
    if not path.exists():
        return {}
    try:
        found = parse_json(path.read_bytes())
        parts, before = dict(found["parts"]), dict(found["machine"])
    except (ValueError, LookupError, TypeError):
        note(f"{path}: is no record of this benchmark: it is replaced")
        return {}
    changed = [key for key in machine if before.get(key) != machine[key]]
    if changed:
        note(f"{path}: its figures are of another {changed[0]} ({before.get(changed[0])}): they are not kept")
        return {}
    return {name: part for name, part in parts.items() if name in PARTS}


def main() -> None:
    parser = commandline.parser(__doc__.splitlines()[0], "  python -m benchmarks.gpu --only kernels graph --blocks 8")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, default=Path("docs/results/cuda.md"), metavar="FILE", help="the page")
    parser.add_argument(
        "--blocks", type=commandline.positive_int, default=BLOCKS, metavar="N", help=f"of the 7B shape ({BLOCKS})"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="for the models that are written (a temporary one)"
    )
    parser.add_argument("--limit", type=commandline.seconds, default=LIMIT, metavar="SECONDS", help=f"in all ({LIMIT})")
    parser.add_argument(
        "--piece", nargs=3, metavar=("PART", "UNIT", "INTO"), help="one piece, as the benchmark starts it"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise NKATError("torch finds no CUDA device here, and this benchmark is of nothing else")
    device = hardware.pick_device(True)
    if options.piece:
        name, unit, into = options.piece
        _work(PARTS[name], unit, Path(into), device, options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        sys.exit(_run(options, device, Path(folder)))


def _work(part: Part, unit: str, into: Path, device: torch.device, options: Any) -> None:
    from benchmarks.gpu_checks import Job

    module, _, function = part.function.partition(":")
    torch.cuda.set_device(device)
    getattr(import_module(module), function)(Job(unit, device, options.folder, options.blocks), keeper(into))


def _run(options: Any, device: torch.device, folder: Path) -> int:
    began = monotonic()
    machine = hardware.describe_cuda(device)
    beside = options.output.with_suffix(".json")
    record: dict[str, Any] = {"benchmark": "gpu", "blocks": options.blocks, "machine": machine}
    record |= {"date": datetime.date.today().isoformat(), "seconds": 0.0, **toolkit_version()}
    record["parts"] = earlier_parts(beside, machine)
    note(f"{machine['device_name']}, driver {machine['driver']}, torch {machine['torch']}, Triton {machine['triton']}")

    def command(name: str, unit: str, into: Path) -> list[str]:
        words = [sys.executable, "-m", "benchmarks.gpu", "--piece", name, unit, into]
        return [str(word) for word in [*words, "--folder", folder, "--blocks", options.blocks]]

    def save(name: str, part: dict[str, Any]) -> None:
        words = ["python", "-m", "benchmarks.gpu", "--only", name]
        words += ["--blocks", str(options.blocks)] if options.blocks != BLOCKS else []
        record["parts"][name] = {"command": shell_line(words), **part}
        record["seconds"] = monotonic() - began
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, str(beside), force=True)
        data = page(record, {key: value.title for key, value in PARTS.items()}).encode()
        with atomic_output(options.output, len(data), force=True) as file:
            file.write(data)

    run_parts([name for name in PARTS if name in options.only], command, options.limit, save)
    with recorded(record, "-"):
        print(f"{options.output}\n" + "\n".join(problems(record) or ["nothing failed and every target was met"]))
    return 1 if problems(record) else 0
