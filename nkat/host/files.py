"""Output files that appear whole or not at all, and the system's refusals as one-line errors."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nkat.errors import NKATError
from nkat.host.console import bar, format_bytes, note
from nkat.host.locks import try_lock
from nkat.host.processes import identity, is_alive

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

_SUFFIX = ".tmp"
_LEFTOVER = re.compile(r"\.nkat-(\d+-\d+)-[^.]*\.tmp$")


_finished: list[Path] = []


def note_output(path: Path) -> None:
    """Remembers an output that is whole, for what an interrupted command says. `atomic_output` does it by itself."""
    if path not in _finished:
        _finished.append(path)


def taken_outputs() -> list[Path]:
    """The outputs that were finished since this was last asked for."""
    found = list(_finished)
    _finished.clear()
    return found


def check_apart(outputs: Mapping[str, Path | str | None]) -> None:
    """Raises NKATError when two of the outputs, by the flags that name them, are one file. None, "-": not a file."""
    seen: dict[str, str] = {}
    for flag, path in outputs.items():
        if path in (None, "-"):
            continue
        other = seen.setdefault(os.path.realpath(path), flag)
        if other != flag:
            raise NKATError(f"{path}: {other} and {flag} are the same file")


def check_output(path: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Raises NKATError when `path` is one of the inputs, cannot be created, or exists and `force` is not given.

    What is no file (a device, a pipe, a socket) is never replaced. Of a symbolic link, what it points to counts.
    """
    found, target = _kind(path)
    for source in inputs:
        if found is not None and source.exists() and path.samefile(source):
            raise NKATError(f"{path}: the output is the same file as the input")
    if not target.parent.is_dir():
        raise NKATError(f"{path}: the folder {target.parent} does not exist")
    if found is not None and stat.S_ISDIR(found):
        raise NKATError(f"{path}: this is a folder, give a file name")
    if found is not None and not stat.S_ISREG(found):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        raise NKATError(f"{path}: this is {kinds.get(stat.S_IFMT(found), 'no file')}, which is not replaced by a file")
    if found is not None and not force:
        raise NKATError(f"{path}: exists already; give --force to replace it")
    if found is not None and not _may_replace(target):
        raise NKATError(f"{path}: belongs to another user, and in {target.parent} only its owner may replace it")
    if not os.access(target.parent, os.W_OK):
        raise NKATError(f"{path}: the folder {target.parent} is not writable")


def _may_replace(path: Path) -> bool:
    """In a folder with the sticky bit, as /tmp has it, not what is another user's."""
    if os.name == "nt":
        return True
    folder = path.parent.stat()
    return not folder.st_mode & stat.S_ISVTX or os.geteuid() in (0, folder.st_uid, path.stat().st_uid)


def _kind(path: Path) -> tuple[int | None, Path]:
    """The mode of what is there (None: nothing), and the path without symbolic links in its last part."""
    try:
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        return path.stat().st_mode, target
    except FileNotFoundError:
        return None, target
    except NotADirectoryError:
        raise NKATError(f"{path}: the folder {path.parent} does not exist") from None
    except (OSError, ValueError) as error:  # a name that is too long, links in a circle, a zero in the name
        raise NKATError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; one that is there already is as good. Raises NKATError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NKATError(f"{path}: cannot be made a folder: {error.strerror}") from None


@contextlib.contextmanager
def output_folder(path: Path) -> Iterator[None]:
    """Makes a folder and those above it for what the block writes. Those that were made go again if they stay empty."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    make_folder(path)
    try:
        yield
    finally:
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # something is in it
                break


@contextlib.contextmanager
def atomic_output(
    path: Path, size: int, force: bool = False, inputs: Iterable[Path] = (), *, cache: bool = False
) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` in one step when the block ends, and leaves nothing behind when it fails.

    A symbolic link stays one, and what it points to is replaced. What killed processes left in the folder is removed.

    Written beside the target, so that the rename stays within one file system, and flushed to the disk first.
    cache: it is no output that a user asked for
    `size` bytes are reserved before the first is written, so that a full disk is known at the start.
    """
    check_output(path, force, inputs)
    _, target = _kind(path)
    _remove_leftovers(target.parent)
    with disk_errors(path):
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=_temporary_prefix(target), suffix=_SUFFIX)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file, disk_errors(path):
            try_lock(file.fileno())
            _reserve(file, size, path)
            yield file
            file.truncate()  # what was reserved and not needed
            file.flush()
            os.fsync(file.fileno())
        check_output(path, force, inputs)  # somebody may have made it meanwhile
        with disk_errors(path):
            temporary.chmod(0o666 & ~_umask())  # mkstemp makes it private
            temporary.replace(target)
        sync_folder(target.parent)
        if not cache:
            note_output(path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_prefix(target: Path) -> str:
    """The name says who writes, so that what a killed process left is told from what a living one writes."""
    # At most 255 bytes are a name; a character's bytes that are cut in two stay as they are.
    return f".{os.fsdecode(os.fsencode(target.name)[:180])}.nkat-{identity()}-"


def _remove_leftovers(folder: Path) -> None:
    """Removes the unfinished outputs that killed processes left in a folder, and says so."""
    with contextlib.suppress(OSError):  # a folder that may be written to and not be read
        for path in folder.glob(f".*.nkat-*{_SUFFIX}"):
            writer = _LEFTOVER.search(path.name)
            if writer is None or is_alive(writer[1]):
                continue
            with contextlib.suppress(OSError):  # another process was faster, or it is another user's
                found = path.lstat()
                if not stat.S_ISREG(found.st_mode):
                    continue
                # A process in another container or on another machine has a number of its own, but keeps its lock.
                with path.open("r+b") as file:
                    if not try_lock(file.fileno()):
                        continue
                path.unlink()
                note(f"note: removed {path}, which a process that was killed had left ({format_bytes(found.st_size)})")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the system's refusals to write into one-line errors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NKATError(f"{path}: cannot be written: {error.strerror} (nothing was changed)") from None
        if error.errno in (errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM):
            raise NKATError(f"{path}: cannot be written: {error.strerror}") from None
        raise


def _reserve(file: BinaryIO, size: int, path: Path) -> None:
    """Reserves `size` bytes from the file's position on; raises NKATError when the disk has not that many."""
    if size == 0:
        return
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), file.tell(), size)
        return
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise NKATError(f"{path}: needs {size:,} bytes but the disk has {free:,} free")


def sync_folder(folder: Path) -> None:
    """Makes a rename durable; systems that cannot open a folder (Windows) have no such step."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):  # a folder that may be written to and not be read
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_digest(path: Path, digest: Hash, what: str) -> str:
    """The digest over a whole file, in hexadecimal. what: for the progress bar"""
    with path.open("rb") as file, bar(path.stat().st_size, what, "B") as progress:
        while block := file.read(1 << 20):
            digest.update(block)
            progress.update(len(block))
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
