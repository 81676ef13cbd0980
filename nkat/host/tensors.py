"""Files of tensors, numbers and strings that torch writes: read whole or not at all, and nothing in them is run.

torch writes a CRC-32 of every tensor and does not look at it when it loads; here all of them are compared first, so
that no flipped bit becomes a number. What torch says of a file it refuses is for programmers, and tells how to load it
all the same: a user is told what is wrong with the file.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from nkat.errors import NKATError
from nkat.host.files import atomic_output


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Replaces `path` in one step."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_output(path, buffer.tell(), force=True) as file:
        file.write(buffer.getbuffer())


def load_tensors(path: Path, what: str) -> Any:
    """What was saved, on the processor. Raises NKATError for a file that is absent, cut, damaged or another one.

    what: the file ought to be, for messages: "a checkpoint"
    """
    if not path.exists():
        raise NKATError(f"{path}: there is no such file, where {what} should be")
    if not path.is_file():  # a pipe would wait for ever
        raise NKATError(f"{path}: is no file, and so not {what}")
    data = _checked_bytes(path, what)
    try:
        return torch.load(data, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except pickle.UnpicklingError:
        raise NKATError(
            f"{path}: is not {what}: it holds more than tensors, numbers and strings, and loading that could run code"
        ) from None
    except Exception:  # whatever torch can raise for contents that it did not write
        raise NKATError(f"{path}: is not {what}: what it holds cannot be read") from None


def _checked_bytes(path: Path, what: str) -> io.BytesIO:
    """The file, once every checksum in it is found right."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise NKATError(f"{path}: cannot be read: {error.strerror}") from None
    if not raw.startswith(b"PK"):
        raise NKATError(f"{path}: is not {what}: it does not begin as torch's archives do")
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            bad = None if packed else archive.testzip()
    except Exception as error:  # a cut archive has no table of contents; a damaged one can raise nearly anything
        raise NKATError(f"{path}: is cut or damaged: {str(error) or type(error).__name__}") from None
    if packed:  # torch packs nothing; small files that unpack to no end are no tensors
        raise NKATError(f"{path}: is not {what}: parts of it are compressed")
    if bad is not None:
        raise NKATError(f"{path}: is damaged: the checksum of {bad} in it is wrong")
    return io.BytesIO(raw)
