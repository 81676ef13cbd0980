"""Bytes of the image sets' archives → NumPy arrays. Everything is checked; nothing in a file is ever executed.

IDX (MNIST and its kin): two zero bytes, 8 (uint8), the number of dimensions, each as big-endian uint32, the data.
CIFAR-10 binary: 10,000 records of one label byte and 3,072 pixel bytes (red, green, blue planes of 32 × 32).
CIFAR-10 python: a pickle of protocol 2 with the same data. `pickle` would run what a file tells it to, so that the
unpickler here knows three names, all of them harmless stand-ins.
"""

from __future__ import annotations

import io
import pickle
import struct
from typing import Any

import numpy as np

from nkat.errors import NKATError

CIFAR_RECORD = 1 + 3 * 32 * 32


def read_idx(data: bytes, name: str) -> np.ndarray:
    """A uint8 array from the bytes of an (uncompressed) IDX file; `name` is for error messages."""
    if len(data) < 4 or data[:3] != b"\0\0\x08" or data[3] not in (1, 3):
        raise NKATError(f"{name}: this is no IDX file of bytes (its first four bytes are {data[:4].hex(' ')})")
    dimensions = data[3]
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise NKATError(f"{name}: the file ends inside its header")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    expected = start
    size = 1
    for length in shape:
        size *= length
    expected += size
    if len(data) != expected:
        raise NKATError(f"{name}: the header promises {expected:,} bytes, the file has {len(data):,}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_cifar_binary(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 3, 32, 32] and labels uint8 [n] of a batch in the binary version."""
    if not data or len(data) % CIFAR_RECORD:
        raise NKATError(f"{name}: {len(data):,} bytes are no whole number of CIFAR-10 records of {CIFAR_RECORD}")
    records = np.frombuffer(data, np.uint8).reshape(-1, CIFAR_RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def read_cifar_pickle(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The same of a batch in the python version."""
    try:
        batch = _Unpickler(io.BytesIO(data), encoding="latin1").load()
        pixels, labels = batch["data"].array, batch["labels"]
        if pixels.shape != (len(labels), CIFAR_RECORD - 1):
            raise ValueError(f"{len(labels)} labels and pixels of shape {pixels.shape}")
        return pixels.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.uint8)
    except NKATError:
        raise
    except Exception as error:  # whatever a damaged pickle can raise
        raise NKATError(f"{name}: this is no CIFAR-10 batch: {error}") from None


class _Dtype:
    """Stands in for numpy.dtype: bytes and nothing else."""

    def __init__(self, code: str, align: object = None, copy: object = None) -> None:
        if code != "u1":
            raise ValueError(f"data of type {code!r}, expected bytes")

    def __setstate__(self, state: object) -> None:
        """Byte order and the like: meaningless for single bytes."""


class _Array:
    """Stands in for numpy.ndarray; `array` is made from the state's raw bytes."""

    array: np.ndarray

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, str | bytes]) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Dtype) or fortran:
            raise ValueError("pixels are not plain bytes in C order")
        data = raw.encode("latin1") if isinstance(raw, str) else raw
        self.array = np.frombuffer(data, np.uint8).reshape(shape)


def _reconstruct(kind: type, shape: object, code: object) -> _Array:
    if kind is not _Array:
        raise ValueError("an array of an unknown kind")
    return _Array()


class _Unpickler(pickle.Unpickler):
    """Knows the three names of a CIFAR-10 batch and refuses all others before anything of theirs is imported."""

    _known = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Called for each name in the pickle."""
        if (module, name) not in self._known:
            raise NKATError(f"this CIFAR-10 batch asks for {module}.{name}, which no such file does: not opened")
        return self._known[module, name]
