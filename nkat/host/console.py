"""What a terminal shows: remarks, progress bars, tables, sizes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

from nkat.host.streams import printable


def bar(total: int, what: str, unit: str) -> tqdm:
    """A progress bar with ETA on stderr, for anything that turns out to take longer than a second."""
    return tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", delay=1, leave=False)


def format_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Columns padded to their widest cell; the first is left-aligned, the others right-aligned.

    Cells may hold what a file says: control characters in them are shown as escapes.
    """
    lines = [[printable(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def join(line: list[str]) -> str:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([join(lines[0]), rule, *[join(line) for line in lines[1:]]])


def format_bytes(count: float) -> str:
    """12.3 MB; decimal units, as file managers and model pages use."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def counted(count: int, noun: str) -> str:
    """1 trial, 2 trials."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def note(text: str) -> None:
    """A remark or warning, on stderr: stdout is for results."""
    print("\n".join(printable(line) for line in text.split("\n")), file=sys.stderr, flush=True)
