"""Which KoboldCpp this is: its version, the flags that version accepts, the backends it carries.

KoboldCpp (https://github.com/LostRuins/koboldcpp) comes as one file made by PyInstaller, or as a folder with
`koboldcpp.py` and a library for each backend. Nothing is believed that it does not say itself: version and flags are
read from its `--help`, the libraries from the folder or from the one file's own table of contents.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.host.cache import Memo
from nkat.host.programs import shell_line
from nkat.kobold.find import Sought, find_program, home_folder, is_program, toolkit_folder
from nkat.kobold.program import SOURCE, Program, ask, last_words

DOWNLOAD = "https://github.com/LostRuins/koboldcpp/releases/latest/download/"
_LIBRARY = re.compile(r"(?:^|[/\\])(?:precompiled_)?koboldcpp_(\w+)\.(?:so|dll)$")
_NOT_PROGRAMS = {".py", ".sh", ".so", ".dll", ".kcpps", ".kcppt", ".txt", ".md", ".log", ".zip", ".json", ".gguf"}
# The end of a file made by PyInstaller (PyInstaller/archive/readers.py): magic, length of the archive, position and
# length of its table of contents, Python's version, name of Python's library; big-endian.
_COOKIE = struct.Struct("!8sIIII64s")
_COOKIE_MAGIC = b"MEI\x0c\x0b\x0a\x0b\x0e"
_COOKIE_SEARCH = 1 << 20  # a signature can follow it
_ENTRY = struct.Struct("!IIIIBc")  # length of the entry, position, two sizes, compressed, kind; then the name


def programs_in(folder: Path) -> Iterator[Path]:
    """KoboldCpp in a folder: the source's script first, then one-file programs by name."""
    if (folder / SOURCE).is_file():
        yield folder / SOURCE
    try:
        found = sorted(
            path for path in folder.glob("koboldcpp*") if path.suffix.lower() not in _NOT_PROGRAMS and is_program(path)
        )
    except OSError:  # a folder on the PATH that may not be read
        return
    yield from found


def download_command(old_processor: bool = False) -> str:
    """The command that gets KoboldCpp for this system, to where it is looked for."""
    build = "-oldpc" if old_processor and sys.platform != "darwin" else ""
    folder = (home_folder() or toolkit_folder()) / "koboldcpp"
    if os.name == "nt":
        program = f"koboldcpp{build}.exe"
        return f"curl.exe --create-dirs -fLo {shell_line([folder / program])} {DOWNLOAD}{program}"
    name = "koboldcpp-mac-arm64" if sys.platform == "darwin" else f"koboldcpp-linux-x64{build}"
    program = shell_line([folder / "koboldcpp"])
    return f"curl --create-dirs -fLo {program} {DOWNLOAD}{name} && chmod +x {program}"


SOUGHT = Sought(
    title="KoboldCpp",
    environment="KOBOLDCPP",
    flag="--kobold",
    folders=("koboldcpp", "KoboldCpp"),
    below=(),
    programs_in=programs_in,
    how_to_get=lambda: f"download it with: {download_command()}",
)


def find_kobold(given: Path | None) -> Path:
    """The one-file program or the `koboldcpp.py` to use."""
    return find_program(SOUGHT, given)


def probe_kobold(path: Path, remember: bool = True) -> Program:
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
    program = _ask(path, libraries_in_program(path))
    if remember:
        answer = {
            "version": program.version,
            "flags": sorted(program.flags),
            "libraries": None if program.libraries is None else sorted(program.libraries),
            "cache_types": list(program.cache_types),
        }
        memo.set({key: answer})
    return program


def parse_help(text: str) -> tuple[str | None, frozenset[str], tuple[str, ...]]:
    """Version, long flags and the KV cache's types from argparse's help.

    Flags count only where an option's own line begins: the descriptions mention others. The types are numbers in old
    versions and names in newer ones.
    """
    version = re.search(r"^KoboldCpp Server - Version (\S+)", text, re.MULTILINE)
    flags = set()
    for line in text.splitlines():
        if re.match(r"  -", line):
            flags.update(re.findall(r"(?:^|[\s,])(--[A-Za-z][\w-]*)", re.split(r" {2,}", line.strip())[0]))
    types = re.search(r"^  --quantkv \[quantization level ([\w/]+)\]", text, re.MULTILINE)
    return version.group(1) if version else None, frozenset(flags), tuple(types.group(1).split("/")) if types else ()


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


def _ask(path: Path, libraries: frozenset[str] | None) -> Program:
    # argparse folds lines at COLUMNS
    status, out, err = ask(path, "--help", environment={"COLUMNS": "500", "PYTHONIOENCODING": "utf-8"})
    version, flags, cache_types = parse_help(out)
    if status != 0 or not {"--model", "--port", "--contextsize"} <= flags:
        said = last_words([err, out])
        raise NKATError(f"{path}: is not a KoboldCpp that runs here (--help: status {status}, {said})")
    return Program(path, version, flags, libraries, cache_types)


def _key(path: Path) -> str:
    found = path.stat()
    return f"{path}|{found.st_size}|{found.st_mtime_ns}"


def _remembered(path: Path, answer: Mapping[str, Any]) -> Program:
    libraries = None if answer["libraries"] is None else frozenset(answer["libraries"])
    return Program(path, answer["version"], frozenset(answer["flags"]), libraries, tuple(answer["cache_types"]))
