"""Where a program that serves models is on this machine; nothing is run that the user has not put in a usual place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nkat.errors import NKATError
from nkat.host.console import note
from nkat.host.programs import folders_on_path, is_current, shell_line
from nkat.kobold.program import SOURCE


@dataclass(frozen=True, slots=True)
class Sought:
    """What is looked for.

    title: what people call it
    environment: the variable that names it; flag: of ours that does
    folders: names of the folders that are there for it, in the toolkit's and in the home folder
    below: folders in those where it may lie as well
    programs_in: those in a folder, the best first
    how_to_get: what to do where there is none
    """

    title: str
    environment: str
    flag: str
    folders: tuple[str, ...]
    below: tuple[str, ...]
    programs_in: Callable[[Path], Iterator[Path]]
    how_to_get: Callable[[], str]


def find_program(sought: Sought, given: Path | None) -> Path:
    """The program to use.

    What the user names (`given`, else the environment's variable), else the first in `places`. Raises NKATError when
    there is none, or when what was named is none.
    """
    from_environment = os.environ.get(sought.environment)
    named = given or (Path(from_environment) if from_environment else None)
    if named is not None:
        try:
            return _check_named(sought, named.expanduser())
        except RuntimeError:
            raise NKATError(f"{named}: there is no such user's home folder") from None
    found = next((program for folder in places(sought) for program in sought.programs_in(folder)), None)
    here = _in_current_folder(sought)
    if here is None or (found is not None and found.samefile(here)):
        unasked = ""
    else:
        unasked = f"{here} is in the current folder and was not run; {sought.flag} {shell_line([here])} names it"
    if found is None:
        raise NKATError(
            f"no {sought.title} found in {', '.join(str(p) for p in places(sought)[:3])}, … or on the PATH; "
            + (f"{unasked}; " if unasked else "")
            + f"{sought.how_to_get()}; or name yours with {sought.flag} PATH"
        )
    if unasked:
        note(f"note: {unasked}")
    return found


def places(sought: Sought) -> list[Path]:
    """Folders to look in, in this order: the toolkit's, the PATH, the user's own. Never the current folder, whose
    programs are run when they are named only, unless it is one that is there for this program.
    """
    toolkit, home = toolkit_folder(), home_folder()
    own = [] if home is None else [home / name for name in sought.folders]
    usual = [] if home is None else [home / "Downloads", home / "Desktop", home]
    meant = [toolkit / sought.folders[0], *own]
    meant += [folder / name for folder in meant for name in sought.below]
    found = dict.fromkeys([toolkit, *meant[:1], *folders_on_path(), *meant[1:], *usual])
    installed = set(meant)
    return [folder for folder in found if folder.is_absolute() and (folder in installed or not is_current(folder))]


def toolkit_folder() -> Path:
    """Where this toolkit's scripts are."""
    return Path(__file__).resolve().parents[2]


def home_folder() -> Path | None:
    """None for a user without one, as in a container that runs under any number."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def is_program(path: Path) -> bool:
    """Whether the system would run this file."""
    if not path.is_file():
        return False
    return path.suffix.lower() == ".exe" if os.name == "nt" else os.access(path, os.X_OK)


def _in_current_folder(sought: Sought) -> Path | None:
    """One in the current folder, or in that of its name there, by a name that can be given to the flag."""
    for folder in (Path(os.curdir), Path(sought.folders[0])):
        for program in sought.programs_in(folder):
            return program
    return None


def _check_named(sought: Sought, path: Path) -> Path:
    if path.is_dir():
        folders = [path, *(path / name for name in sought.below)]
        found = next((program for folder in folders for program in sought.programs_in(folder)), None)
        if found is None:
            raise NKATError(f"{path}: no {sought.title} in this folder")
        return found
    if not path.is_file():
        on_path = shutil.which(str(path))
        if on_path is None:
            raise NKATError(f"{path}: no such file")
        return Path(on_path)
    if path.name != SOURCE and os.name != "nt" and not os.access(path, os.X_OK):
        raise NKATError(f"{path}: may not be executed; allow it with: chmod +x {path}")
    return path
