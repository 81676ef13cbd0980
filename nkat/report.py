"""What a run leaves behind: one JSON record, and tables for people."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nkat.atomic import atomic_output, check_output


def check_record(target: str | None, force: bool) -> None:
    """Raises NKATError when `write_json` could not write there: to be known before hours are spent."""
    if target not in (None, "-"):
        check_output(Path(target), force)


def write_json(record: Mapping[str, Any], target: str, force: bool = False) -> None:
    """Writes the record to a file, atomically, or to stdout as one line when `target` is "-"."""
    if target == "-":
        print(json.dumps(_plain(record), ensure_ascii=False), flush=True)
        return
    data = (json.dumps(_plain(record), indent=2, ensure_ascii=False) + "\n").encode()
    with atomic_output(Path(target), len(data), force) as file:
        file.write(data)


def format_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Columns padded to their widest cell; the first is left-aligned, the others right-aligned."""
    lines = [list(header), *[list(row) for row in rows]]
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


def git_commit() -> str | None:
    """The toolkit's own commit, or None where it is not a git checkout or git is missing."""
    try:
        out = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()


def note(text: str) -> None:
    """A remark or warning, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def _plain(value: Any) -> Any:
    """NaN and infinity are no JSON: they become null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
