"""What `backend_selector.py` shows on a terminal and asks there: backends in order, and which model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nkat.errors import NKATError
from nkat.host.console import format_bytes, format_table
from nkat.kobold.choose import Choice
from nkat.kobold.neighbours import files_in

MODELS_SHOWN = 9


def choice_table(found: Sequence[Choice]) -> str:
    """Backends in order, with the reason at the end of the line."""
    rows = []
    for number, choice in enumerate(found, 1):
        layers = "" if choice.all_layers is None else f"{choice.layers} of {choice.all_layers}"
        rows.append([f"{number}  {choice.backend.name}", "yes" if choice.lacks is None else "no", layers])
    lines = format_table(rows, ["backend", "runs", "GPU layers"]).splitlines()
    width = max(len(line) for line in lines)
    remarks = ["why", "---", *(choice.reason for choice in found)]
    return "\n".join(f"{line.ljust(width)}  {remark}" for line, remark in zip(lines, remarks, strict=True))


def ask_backend(found: Sequence[Choice], how_to_get: str) -> Choice | None:
    """The menu: Enter takes the first, a number another; None: the user does not want any."""
    check_usable(found, how_to_get)
    usable = [choice for choice in found if choice.lacks is None]
    number = _ask_number(f"Enter starts {usable[0].backend.name}, a number another, q ends: ", len(usable))
    return None if number is None else usable[number]


def check_usable(found: Sequence[Choice], how_to_get: str) -> None:
    """Raises NKATError when the best choice cannot run either, with what to do for another program."""
    if found[0].lacks is not None:
        raise NKATError(f"nothing can run here: {found[0].reason}; for another program: {how_to_get}")


def models_here() -> list[Path]:
    """Models in the usual folders: `.nkat` before `.gguf`, the newest first."""
    folders = [Path(), Path("models"), Path("output"), *(p for p in Path("output").glob("*") if p.is_dir())]
    found: list[Path] = []
    for suffix in (".nkat", ".gguf"):
        files = [path for folder in folders for path in files_in(folder, suffix)]
        found += sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)
    return found


def ask_model(found: Sequence[Path]) -> Path | None:
    """The model the user picks; None: the user does not want any."""
    for number, path in enumerate(found[:MODELS_SHOWN], 1):
        print(f"{number}  {path} ({format_bytes(path.stat().st_size)})")
    picked = _ask_number("Enter takes 1, a number another, q ends: ", min(len(found), MODELS_SHOWN))
    return None if picked is None else found[picked]


def _ask_number(question: str, count: int) -> int | None:
    """An index below `count`; Enter is the first, q or the end of input is None."""
    while True:
        try:
            answer = input(question).strip().lower()
        except EOFError:
            return None
        if answer in ("q", "quit"):
            return None
        if not answer:
            return 0
        if answer.isdigit() and 1 <= int(answer) <= count:
            return int(answer) - 1
        print(f"a number from 1 to {count}, Enter, or q")
