"""stdout and stderr that never stop the work: any code page, a reader who has left, a full disk, hostile characters.

The setup check uses this before anything else can be imported: the standard library alone, and no newer syntax.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

# All control characters, and those that turn the direction of what follows: what moves the cursor, changes colours or
# titles, or shows another text than there is. Line breaks and tabs are text.
_CONTROLS = "[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
_HOSTILE = re.compile(_CONTROLS)
_HOSTILE_BESIDE_BARS = re.compile(r"(?!\r|\x1b\[A)(?<!\x1b\[A)" + _CONTROLS)  # progress bars go back, and a line up
_LINE_BREAKS = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_MOST_SHOWN = 1000  # characters of a message or a cell; what a file says may be as long as the file


def printable(text: str) -> str:
    """The text on one line, with control characters as escapes: for what a file says, in a table or a message.

    The middle of a very long one is left out.
    """
    if len(text) > _MOST_SHOWN:
        half = _MOST_SHOWN // 2
        text = f"{text[:half]} … ({len(text) - 2 * half:,} characters) … {text[-half:]}"
    return re.sub(_CONTROLS + "|[\n\t\u2028\u2029]", lambda found: _LINE_BREAKS.get(found[0]) or _escape(found), text)


def shown(text: str) -> str:
    """The text as stdout shows it: line breaks and tabs are text, other control characters escapes."""
    return _HOSTILE.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"  # as in JSON, of which it may be a part


class Stream:
    """A text stream whose write never fails: the first failure is kept in `error`, and what follows it is dropped."""

    def __init__(self, stream: TextIO, hostile: re.Pattern[str] = _HOSTILE) -> None:
        self._stream = stream
        self._hostile = hostile
        self.error: OSError | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                self._stream.write(self._hostile.sub(_escape, text))
            except OSError as error:
                self._give_up(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.error = error
        # What is still buffered would fail again when Python ends, with a message and a status of its own.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """sys.stdout and sys.stderr are such streams during the block."""
    _open_closed()
    before = sys.stdout, sys.stderr
    # Python's types say that there always are both; pythonw.exe, and a shell's `>&-`, say otherwise.
    if sys.stdout is not None and not isinstance(sys.stdout, Stream):
        sys.stdout = cast(TextIO, Stream(sys.stdout))
    if sys.stderr is None:  # progress bars write to what is there
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if not isinstance(sys.stderr, Stream):
        sys.stderr = cast(TextIO, Stream(sys.stderr, _HOSTILE_BESIDE_BARS))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


def lost_output() -> OSError | None:
    """Why stdout did not take all that was printed, or None when it did."""
    stream: Any = sys.stdout
    if stream is None:
        return OSError("it is closed")
    stream.flush()
    return stream.error if isinstance(stream, Stream) else None


def is_unicode() -> bool:
    """Whether stdout can show every character."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # a StringIO has None
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8", "utf-16", "utf-32")


def _open_closed() -> None:
    """Without this, the first file a program opens would become its stdout or stderr where the shell closed those.

    So would it in the processes that it starts.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
