"""Which KoboldCpp is here: where, which version, which flags that version accepts, which backends it carries.

KoboldCpp (https://github.com/LostRuins/koboldcpp) comes as one file made by PyInstaller, or as a folder with
`koboldcpp.py` and a library for each backend. Nothing is believed that it does not say itself: version and flags are
read from its `--help`, the libraries from the folder or from the one file's own table of contents.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.host.cache import Memo
from nkat.host.console import note
from nkat.host.environment import users_environment
from nkat.host.programs import folders_on_path, is_current, shell_line

ENVIRONMENT = "KOBOLDCPP"
SOURCE = "koboldcpp.py"
DOWNLOAD = "https://github.com/LostRuins/koboldcpp/releases/latest/download/"
_HELP_SECONDS = 180  # the one-file program unpacks some hundred megabytes first, and a virus scanner reads them
_LIBRARY = re.compile(r"(?:^|[/\\])(?:precompiled_)?koboldcpp_(\w+)\.(?:so|dll)$")
_NOT_PROGRAMS = {".py", ".sh", ".so", ".dll", ".kcpps", ".kcppt", ".txt", ".md", ".log", ".zip", ".json", ".gguf"}
# The end of a file made by PyInstaller (PyInstaller/archive/readers.py): magic, length of the archive, position and
# length of its table of contents, Python's version, name of Python's library; big-endian.
_COOKIE = struct.Struct("!8sIIII64s")
_COOKIE_MAGIC = b"MEI\x0c\x0b\x0a\x0b\x0e"
_COOKIE_SEARCH = 1 << 20  # a signature can follow it
_ENTRY = struct.Struct("!IIIIBc")  # length of the entry, position, two sizes, compressed, kind; then the name


@dataclass(frozen=True, slots=True)
class Kobold:
    """A KoboldCpp that answers.

    path: the one-file program, or koboldcpp.py
    version: as it says, or None for one so old that it does not
    flags: the long flags it accepts, with their dashes
    libraries: the backends' libraries it carries, such as "default" or "cublas"; None: cannot be told
    """

    path: Path
    version: str | None
    flags: frozenset[str]
    libraries: frozenset[str] | None

    @property
    def is_source(self) -> bool:
        return self.path.name == SOURCE

    @property
    def label(self) -> str:
        return f"KoboldCpp {self.version or '(version unknown)'}"

    def prefix(self) -> list[str]:
        """The command that starts it, without flags."""
        return command_prefix(self.path)

    def flag(self, *names: str) -> str | None:
        """The first of these flags that it accepts: names changed between versions."""
        return next((name for name in names if name in self.flags), None)

    def has_library(self, name: str) -> bool:
        """Whether it carries a backend's library; where that cannot be told, its start-up log will."""
        return self.libraries is None or name in self.libraries


def command_prefix(path: Path) -> list[str]:
    """The command that starts the KoboldCpp at `path`: a source folder's script runs in this Python."""
    return [sys.executable, str(path)] if path.name == SOURCE else [str(path)]


def find_kobold(given: Path | None) -> Path:
    """The one-file program or the `koboldcpp.py` to use.

    What the user names (`given`, else the environment variable KOBOLDCPP), else the first in `places`. Raises NKATError
    when there is none, or when what was named is none.
    """
    named = given or (Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None)
    if named is not None:
        try:
            return _check_named(named.expanduser())
        except RuntimeError:
            raise NKATError(f"{named}: there is no such user's home folder") from None
    found = next((program for folder in places() for program in programs_in(folder)), None)
    here = _in_current_folder()
    if here is None or (found is not None and found.samefile(here)):
        unasked = ""
    else:
        unasked = f"{here} is in the current folder and was not run; --kobold {shell_line([here])} names it"
    if found is None:
        raise NKATError(
            f"no KoboldCpp found in {', '.join(str(p) for p in places()[:3])}, … or on the PATH; "
            + (f"{unasked}; " if unasked else "")
            + f"download it with: {download_command()}; or name yours with --kobold PATH"
        )
    if unasked:
        note(f"note: {unasked}")
    return found


def places() -> list[Path]:
    """Folders to look in, in this order: the toolkit's, the PATH, the user's own. Never the current folder, whose
    programs are run when they are named only, unless it is one that is there for KoboldCpp.
    """
    toolkit, home = Path(__file__).resolve().parents[2], _home()
    own = [] if home is None else [home / "koboldcpp", home / "KoboldCpp", home / "Downloads", home / "Desktop", home]
    installed = {toolkit / "koboldcpp", *own[:2]}
    found = dict.fromkeys([toolkit, toolkit / "koboldcpp", *folders_on_path(), *own])
    return [folder for folder in found if folder.is_absolute() and (folder in installed or not is_current(folder))]


def _home() -> Path | None:
    """None for a user without one, as in a container that runs under any number."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def _in_current_folder() -> Path | None:
    """A KoboldCpp in the current folder or its `koboldcpp`, by a name that can be given to --kobold."""
    for folder in (Path(os.curdir), Path("koboldcpp")):
        for program in programs_in(folder):
            return program
    return None


def programs_in(folder: Path) -> Iterator[Path]:
    """KoboldCpp in a folder: the source's script first, then one-file programs by name."""
    if (folder / SOURCE).is_file():
        yield folder / SOURCE
    try:
        found = sorted(path for path in folder.glob("koboldcpp*") if _is_program(path))
    except OSError:  # a folder on the PATH that may not be read
        return
    yield from found


def download_command(old_processor: bool = False) -> str:
    """The command that gets KoboldCpp for this system, to where it is looked for."""
    build = "-oldpc" if old_processor and sys.platform != "darwin" else ""
    folder = (_home() or Path(__file__).resolve().parents[2]) / "koboldcpp"
    if os.name == "nt":
        program = f"koboldcpp{build}.exe"
        return f"curl.exe --create-dirs -fLo {shell_line([folder / program])} {DOWNLOAD}{program}"
    name = "koboldcpp-mac-arm64" if sys.platform == "darwin" else f"koboldcpp-linux-x64{build}"
    program = shell_line([folder / "koboldcpp"])
    return f"curl --create-dirs -fLo {program} {DOWNLOAD}{name} && chmod +x {program}"


def probe_kobold(path: Path, remember: bool = True) -> Kobold:
    """Asks the KoboldCpp at `path` for its version and flags. Raises NKATError when it does not answer.

    The answer of a one-file program, which unpacks itself each time, is remembered in the cache until the file changes;
    `remember` = False leaves the cache alone.
    """
    path = path.resolve()
    if path.name == SOURCE:
        return _ask(path, _libraries_of_folder(path.parent))
    memo, key = Memo.open("kobold/programs.json"), _key(path)
    known = memo.get(lambda programs: _remembered(path, programs[key]))
    if known is not None:
        return known
    kobold = _ask(path, libraries_in_program(path))
    if remember:
        libraries = None if kobold.libraries is None else sorted(kobold.libraries)
        memo.set({key: {"version": kobold.version, "flags": sorted(kobold.flags), "libraries": libraries}})
    return kobold


def parse_help(text: str) -> tuple[str | None, frozenset[str]]:
    """Version and long flags from argparse's help.

    Flags count only where an option's own line begins: the descriptions mention others.
    """
    version = re.search(r"^KoboldCpp Server - Version (\S+)", text, re.MULTILINE)
    flags = set()
    for line in text.splitlines():
        if re.match(r"  -", line):
            flags.update(re.findall(r"(?:^|[\s,])(--[A-Za-z][\w-]*)", re.split(r" {2,}", line.strip())[0]))
    return version.group(1) if version else None, frozenset(flags)


def libraries_in_program(path: Path) -> frozenset[str] | None:
    """The backends' libraries in a one-file program, from PyInstaller's table of contents; None when it has none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            tail_start = max(0, size - _COOKIE_SEARCH)
            file.seek(tail_start)
            tail = file.read()
            at = tail.rfind(_COOKIE_MAGIC)
            if at < 0 or at + _COOKIE.size > len(tail):
                return None
            _, length, toc, toc_length, _, _ = _COOKIE.unpack_from(tail, at)
            start = tail_start + at + _COOKIE.size - length
            if start < 0 or start + toc + toc_length > size:
                return None
            file.seek(start + toc)
            names = _entry_names(file.read(toc_length))
    except OSError as error:
        raise NKATError(f"{path}: cannot be read: {error.strerror or error}") from None
    return _libraries(names)


def _entry_names(contents: bytes) -> list[str]:
    names, position = [], 0
    while position + _ENTRY.size <= len(contents):
        length = _ENTRY.unpack_from(contents, position)[0]
        if length <= _ENTRY.size:
            break
        name = contents[position + _ENTRY.size : position + length]
        names.append(name.partition(b"\0")[0].decode("utf-8", "replace"))
        position += length
    return names


def _libraries_of_folder(folder: Path) -> frozenset[str]:
    return _libraries([path.name for path in folder.iterdir()])


def _libraries(names: Sequence[str]) -> frozenset[str]:
    return frozenset(match.group(1) for name in names if (match := _LIBRARY.search(name)))


def _check_named(path: Path) -> Path:
    if path.is_dir():
        found = next(programs_in(path), None)
        if found is None:
            raise NKATError(f"{path}: no KoboldCpp in this folder (neither {SOURCE} nor a program koboldcpp*)")
        return found
    if not path.is_file():
        on_path = shutil.which(str(path))
        if on_path is None:
            raise NKATError(f"{path}: no such file")
        return Path(on_path)
    if path.name != SOURCE and os.name != "nt" and not os.access(path, os.X_OK):
        raise NKATError(f"{path}: may not be executed; allow it with: chmod +x {path}")
    return path


def _is_program(path: Path) -> bool:
    if path.suffix.lower() in _NOT_PROGRAMS or not path.is_file():
        return False
    return path.suffix.lower() == ".exe" if os.name == "nt" else os.access(path, os.X_OK)


def _ask(path: Path, libraries: frozenset[str] | None) -> Kobold:
    environment = {
        **users_environment(),
        "COLUMNS": "500",
        "PYTHONIOENCODING": "utf-8",
    }  # argparse folds lines at COLUMNS
    try:
        done = subprocess.run(
            [*command_prefix(path), "--help"],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_HELP_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise NKATError(f"{path}: did not answer --help within {_HELP_SECONDS} seconds") from None
    except OSError as error:
        raise NKATError(f"{path}: cannot be started: {error.strerror or error}") from None
    version, flags = parse_help(done.stdout)
    if done.returncode != 0 or not {"--model", "--port", "--contextsize"} <= flags:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise NKATError(f"{path}: is not a KoboldCpp that runs here (--help: status {done.returncode}, {said})")
    return Kobold(path, version, flags, libraries)


def _key(path: Path) -> str:
    found = path.stat()
    return f"{path}|{found.st_size}|{found.st_mtime_ns}"


def _remembered(path: Path, answer: Mapping[str, Any]) -> Kobold:
    libraries = None if answer["libraries"] is None else frozenset(answer["libraries"])
    return Kobold(path, answer["version"], frozenset(answer["flags"]), libraries)
