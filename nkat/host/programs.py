"""Other programs: where they are looked for, and commands as a user's shell reads them.

Nothing of the current folder is run unless the user names it: who unpacks an archive, or works in a shared folder, has
not asked for the programs in it. The setup check uses this where nothing else is installed: standard library alone.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def is_current(folder: Path) -> bool:
    """Whether this is the current folder, by whatever name."""
    try:
        return folder.samefile(os.curdir)
    except (OSError, ValueError):  # not there; ValueError: a NUL in the PATH
        return False


def folders_on_path() -> list[Path]:
    """The PATH's folders without the current one: an empty entry, "." and relative names mean wherever the user is."""
    entries = [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep)]
    return [entry for entry in entries if entry.is_absolute() and not is_current(entry)]


def find_program(name: str) -> str | None:
    """The full path of a program on the PATH; None where there is none."""
    file = f"{name}.exe" if os.name == "nt" else name
    found = (folder / file for folder in folders_on_path())
    return next((str(path) for path in found if path.is_file() and os.access(path, os.X_OK)), None)


def shell_line(words: Sequence[object]) -> str:
    """A command, or a part of one, as it can be pasted into this system's shell."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if sys.platform == "win32" else shlex.join(texts)
