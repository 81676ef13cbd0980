"""Models in a folder, as they are looked for without having been named: what cannot be read is skipped with a word."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from nkat.errors import NKATError
from nkat.gguf.split import is_later_part
from nkat.host.console import note

_Found = TypeVar("_Found")
_told: set[tuple[Path, str]] = set()  # a folder may be looked through for several reasons, and one line is enough


def files_in(folder: Path, *suffixes: str) -> list[Path]:
    """Files by these endings, sorted, of a model in several files the first. A folder of such a name is passed by; of
    what is no file else, a line says so.
    """
    found = sorted(path for suffix in suffixes for path in folder.glob(f"*{suffix}") if not is_later_part(path))
    return [path for path in found if _is_file(path)]


def readable(paths: list[Path], read: Callable[[Path], _Found]) -> Iterator[_Found]:
    """What `read` makes of each; those that it cannot read are skipped with its words."""
    for path in paths:
        try:
            found = read(path)
        except NKATError as error:
            _skipped(path, str(error).removeprefix(f"{path}: "))
        except OSError as error:
            _skipped(path, error.strerror or str(error))
        else:
            yield found


def _is_file(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError as error:  # a link to nowhere, or a folder in which nothing may be looked at
        _skipped(path, error.strerror or str(error))
        return False
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        _skipped(path, "it is no file")
    return stat.S_ISREG(mode)


def _skipped(path: Path, why: str) -> None:
    if (path, why) not in _told:
        _told.add((path, why))
        note(f"note: {path} was skipped: {why}")
