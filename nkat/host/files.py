"""Output files that appear whole or not at all, and the system's refusals as one-line errors."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from nkat.errors import NKATError


def check_output(path: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Raises NKATError when `path` is one of the inputs, cannot be created, or exists and `force` is not given."""
    for source in inputs:
        if path.exists() and source.exists() and path.samefile(source):
            raise NKATError(f"{path}: the output is the same file as the input")
    if not path.parent.is_dir():
        raise NKATError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise NKATError(f"{path}: this is a folder, give a file name")
    if path.exists() and not force:
        raise NKATError(f"{path}: exists already; give --force to replace it")
    if not os.access(path.parent, os.W_OK):
        raise NKATError(f"{path}: the folder {path.parent} is not writable")


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; one that is there already is as good. Raises NKATError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NKATError(f"{path}: cannot be made a folder: {error.strerror}") from None


@contextlib.contextmanager
def atomic_output(path: Path, size: int, force: bool = False, inputs: Iterable[Path] = ()) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` in one step when the block ends, and leaves nothing behind when it fails.

    Written beside the target, so that the rename stays within one file system, and flushed to the disk first.
    `size` bytes are reserved before the first is written, so that a full disk is known at the start.
    """
    check_output(path, force, inputs)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise NKATError(f"{path}: cannot be written: {error.strerror or error}") from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file, disk_errors(path):
            _reserve(file, size, path)
            yield file
            file.truncate()  # what was reserved and not needed
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it private
        check_output(path, force, inputs)  # somebody may have made it meanwhile
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
