"""Puts Θ behind a model file and takes it off again, without copying the model.

The base's bytes are never written to. Whenever an append is cut short, what is left opens as the base model, and the
next run finds the marker (see `nkat.theta.modelfile`) and clears the remains away. The marker is on the disk before
anything is written behind it, so that it is there whatever a power cut leaves of the rest. One process at a time
changes a file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from nkat.errors import NKATError
from nkat.gguf.writer import Part, part_size, write_parts
from nkat.host.files import disk_errors, note_output
from nkat.host.locks import try_lock
from nkat.theta.modelfile import MARKER_SIZE

_held: set[tuple[int, int]] = set()  # device and number of the files that this process has locked


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """No other process changes the file in the block, which reads what it changes. Raises NKATError when one does so.

    Within a block of the same process, such as `append` in the converter's, this does nothing.
    """
    with disk_errors(path):
        file = path.open("r+b")
    with file:
        found = os.fstat(file.fileno())
        key = (found.st_dev, found.st_ino)
        if key in _held:
            yield
            return
        if try_lock(file.fileno()) is False:
            raise NKATError(f"{path}: another process is changing this file; try again when it has ended")
        _held.add(key)
        try:
            yield
        finally:
            _held.remove(key)


def append(path: Path, base_end: int, parts: Sequence[Part]) -> None:
    """Cuts the file to its base and writes `parts` behind it. If that fails, the file is left as the base alone."""
    size = sum(part_size(part) for part in parts)
    # Reserving the space would leave zeros where the marker belongs if the process died; so the space is only asked.
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise NKATError(f"{path}: needs {size:,} more bytes but the disk has {free:,} free (nothing was changed)")
    head, *rest = parts
    assert isinstance(head, bytes)
    with exclusive(path), disk_errors(path), path.open("r+b") as file:
        try:
            file.truncate(base_end)
            file.seek(base_end)
            file.write(head[:MARKER_SIZE])
            file.flush()
            os.fsync(file.fileno())
            write_parts(file, [head[MARKER_SIZE:], *rest])
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(base_end)
            raise
    note_output(path)


def truncate(path: Path, base_end: int) -> None:
    """Cuts the file to its base."""
    with exclusive(path), disk_errors(path), path.open("r+b") as file:
        file.truncate(base_end)
        os.fsync(file.fileno())
    note_output(path)
