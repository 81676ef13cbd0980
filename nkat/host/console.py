"""What a terminal shows: words, remarks, progress, tables, sizes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from time import monotonic
from typing import Any

from tqdm import tqdm

from nkat.host import output
from nkat.host.streams import printable

FIRST_LINE_SECONDS, LINE_SECONDS = 2.0, 5.0  # until the first line of progress, and between two of them
_LINE = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} to go, {rate_fmt}{postfix}"


class _Lines(tqdm):  # type: ignore[misc]  # tqdm has no types
    """Progress where nothing can move, in a file or a pipe: a line every few seconds, and a last one."""

    monitor_interval = 0  # no thread: every update looks at the clock

    def __init__(self, **more: Any) -> None:
        self.disable = False
        self._next, self._told = monotonic() + FIRST_LINE_SECONDS, -1.0
        super().__init__(**{"bar_format": _LINE, **more, "delay": 0, "mininterval": 0, "miniters": 0})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if monotonic() >= self._next:
            self._tell()

    def clear(self, nolock: bool = False) -> None:
        """There is nothing to clear."""

    def close(self) -> None:
        if self.disable:
            return
        self.disable = True
        self._decr_instances(self)
        if self._told >= 0 and (self._told != self.n or not self.total):
            self._ema_dt = lambda: None  # the last line has the rate of the whole
            self._tell()

    def _tell(self) -> None:
        self._next, self._told = monotonic() + LINE_SECONDS, self.n
        print(printable(str(self).rstrip(", ")), file=sys.stderr, flush=True)


def bar(
    total: int | None,
    what: str | None,
    unit: str = "it",
    *,
    enabled: bool = True,
    at_once: bool = False,
    form: str | None = None,
) -> tqdm:
    """Progress with ETA on stderr, of anything that turns out to take longer than a second or two.

    A bar in a terminal, elsewhere lines; neither with --quiet. at_once: the bar does not wait for the first second,
    because a step may take minutes;  form: tqdm's `bar_format`, where there is no total
    """
    disable = output.is_quiet() or not enabled
    shape = {} if form is None else {"bar_format": form}
    kind = tqdm if _can_move() else _Lines
    delay = 0 if at_once else 1
    return kind(
        total=total, desc=what, unit=unit, unit_scale=unit == "B", delay=delay, leave=False, disable=disable, **shape
    )


def _can_move() -> bool:
    """Whether stderr is a terminal in which a line can be written anew."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def say(text: str = "") -> None:
    """Words that belong to a result: on stdout beside its table; on stderr where stdout is for tables alone."""
    if output.is_for_people():
        print(text, flush=True)
    elif not output.is_quiet():
        print(text.lstrip("\n"), file=sys.stderr, flush=True)


def remark(text: str) -> None:
    """Words that nobody misses who asked for the results alone: as `say`, and nowhere with --quiet."""
    if not output.is_quiet():
        say(text)


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


def note(text: str, always: bool = False) -> None:
    """A remark or warning, on stderr: stdout is for results. --quiet leaves warnings: a result is not what it seems.

    always: --quiet leaves it too, because nobody can go on without it
    """
    if output.is_quiet() and not always and not text.lstrip().startswith("warning:"):
        return
    print("\n".join(printable(line) for line in text.split("\n")), file=sys.stderr, flush=True)
