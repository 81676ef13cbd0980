"""Puts Θ behind a model file and takes it off again, without copying the model.

The base's bytes are never written to. Whenever an append is cut short, what is left opens as the base model, and the
next run finds the marker (see `nkat.theta.modelfile`) and clears the remains away.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from nkat.errors import NKATError
from nkat.gguf.writer import Part, part_size, write_parts
from nkat.host.files import disk_errors


def append(path: Path, base_end: int, parts: Sequence[Part]) -> None:
    """Cuts the file to its base and writes `parts` behind it. If that fails, the file is left as the base alone."""
    size = sum(part_size(part) for part in parts)
    # Reserving the space would leave zeros where the marker belongs if the process died; so the space is only asked.
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise NKATError(f"{path}: needs {size:,} more bytes but the disk has {free:,} free (nothing was changed)")
    with disk_errors(path), path.open("r+b") as file:
        try:
            file.truncate(base_end)
            file.seek(base_end)
            write_parts(file, parts)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(base_end)
            raise


def truncate(path: Path, base_end: int) -> None:
    """Cuts the file to its base."""
    with disk_errors(path), path.open("r+b") as file:
        file.truncate(base_end)
        os.fsync(file.fileno())
