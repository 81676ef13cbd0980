"""What a run leaves behind: one JSON record."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.host import output, streams
from nkat.host.files import atomic_output, check_output
from nkat.host.programs import find_program
from nkat.version import __version__


def check_record(target: str | None, force: bool, inputs: Iterable[Path | None] = ()) -> None:
    """Raises NKATError when `write_json` could not write there, or would replace an input: before hours are spent."""
    if target == "-" and not output.is_for_people():
        raise NKATError(f"--json -: stdout is for the {output.form()} alone; give --json a file")
    if target not in (None, "-"):
        check_output(Path(target), force, [path for path in inputs if path is not None])


def write_json(record: Mapping[str, Any], target: str, force: bool = False) -> None:
    """Writes the record to a file, atomically, or to stdout as one line when `target` is "-"."""
    if target == "-":
        print(json.dumps(plain(record), ensure_ascii=not streams.is_unicode()), flush=True)
        if lost := streams.lost_output():
            raise NKATError(f"stdout: the record could not be written: {lost.strerror or lost}")
        return
    # A file name that is not UTF-8 has characters that only an escape can write.
    data = (json.dumps(plain(record), indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
    with atomic_output(Path(target), len(data), force) as file:
        file.write(data)


def print_record(record: Mapping[str, Any]) -> None:
    """A record as stdout's last line; nowhere, where stdout is for tables alone, which have its figures."""
    if output.is_for_people():
        write_json(record, "-")


@contextlib.contextmanager
def recorded(record: Mapping[str, Any], target: str | None, force: bool = False) -> Iterator[None]:
    """Around the printing of a result: a file has the record before it, stdout, for target "-", as its last line."""
    if target not in (None, "-"):
        write_json(record, target, force)
    yield
    if target == "-":
        write_json(record, target)


class Recorder:
    """A record that grows: a file has it from the first moment there is something to lose, stdout at the end.

    common: what is in it whatever else is
    """

    def __init__(self, target: str | None, force: bool, common: Mapping[str, Any] | None = None) -> None:
        self._target, self._force, self._common = target, force, common or {}

    def add(self, common: Mapping[str, Any]) -> None:
        """More of what is in every record from now on."""
        self._common = {**self._common, **common}

    def keep(self, record: Mapping[str, Any]) -> None:
        """Writes the file, or replaces what was written before. To be called before what is new in it is printed."""
        if self._target not in (None, "-"):
            write_json({**record, **self._common}, self._target, self._force)
            self._force = True

    def finish(self, record: Mapping[str, Any]) -> None:
        """Prints the last line."""
        if self._target == "-":
            write_json({**record, **self._common}, self._target)


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says. Raises ValueError for whatever is none, brackets without end among them."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets without end") from None


def toolkit_version() -> dict[str, str | None]:
    """For a record: which toolkit made it."""
    return {"nkat_version": __version__, "git_commit": git_commit()}


def git_commit() -> str | None:
    """The toolkit's own commit, or None where it is not a git checkout or git is missing."""
    folder = Path(__file__).resolve().parents[2]
    git = find_program("git")
    if git is None or not (folder / ".git").exists():  # installed: an environment often lies in another checkout
        return None
    try:
        out = subprocess.run([git, "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()


def plain(value: Any) -> Any:
    """NaN and infinity are no JSON: they become null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
