"""Importance matrices: what llama-imatrix writes and llama-quantize reads, in both of their forms.

For each weight the sums of its inputs' squares, Σ x_j² over the rows of a text, and how many rows they are; of a
mixture's experts each has its own. (https://github.com/ggml-org/llama.cpp, tools/imatrix)

GGUF       general.type = "imatrix", imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size; for each weight `X`:
           X.in_sum2 F32 [experts, n] = Σ x², X.counts F32 [experts, 1] = rows, X.in_sum F32 [experts, n] = Σ x
old form   i32 entries, then of each: i32 length and bytes of its name, i32 calls, i32 n·experts, f32 [n·experts] = mean
           of x² · calls; at the end i32 chunks, i32 length and bytes of the text's name, which may be missing
           (calls: chunks that were seen; an expert that was never asked has 1 for its means)
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from nkat.errors import NKATError
from nkat.gguf.file import MAGIC, GGUFError, GGUFFile, map_file
from nkat.gguf.writer import MetadataValue, NewTensor, Part, gguf_parts

OLD_SUFFIX = ".dat"
_TYPE = "imatrix"
_SUMS, _SQUARES, _COUNTS = ".in_sum", ".in_sum2", ".counts"
_MAX_ENTRIES = 1 << 17
_MAX_NAME = 1 << 16


@dataclass(frozen=True, slots=True)
class Importance:
    """One weight's inputs on a text, of each of its experts.

    squares: float32 [experts, n], Σ x_j²; counts: int64 [experts], rows that they are the sums of
    sums: float32 [experts, n], Σ x_j; None where the file does not say
    """

    squares: np.ndarray
    counts: np.ndarray
    sums: np.ndarray | None = None

    @property
    def means(self) -> np.ndarray:
        """E[x_j²], float32 [experts, n]; 1 of an expert that no row went to, as llama-quantize takes it."""
        counts = self.counts[:, None]
        means: np.ndarray = np.where(counts > 0, self.squares / np.maximum(counts, 1), 1.0).astype(np.float32)
        return means


@dataclass(frozen=True, slots=True)
class Imatrix:
    """entries: by weight name;  datasets: names of the texts;  chunks: how many of `chunk_size` tokens (0: unknown)"""

    entries: Mapping[str, Importance]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int


def read_imatrix(path: Path) -> Imatrix:
    """Reads either form. Raises NKATError naming what is wrong with the file."""
    head = map_file(path)[: len(MAGIC)]
    return _read_gguf(path) if head == MAGIC else _read_old(path)


def imatrix_parts(imatrix: Imatrix, old: bool = False) -> list[Part]:
    """The bytes of a file of the GGUF form, or of the old one, which holds no sums."""
    return [_old_bytes(imatrix)] if old else _new_parts(imatrix)


def _read_gguf(path: Path) -> Imatrix:
    file = GGUFFile.open(path)
    kind = file.metadata.get("general.type")
    squares = [name for name in file.tensors if name.endswith(_SQUARES)]
    if kind != _TYPE or not squares:
        what = "without entries" if kind == _TYPE else f"of general.type {kind!r}"
        raise GGUFError(f"{path}: is no importance matrix but a GGUF {what}")
    entries = {}
    for name in squares:
        stem = name.removesuffix(_SQUARES)
        values, counts = _floats(file, name), _floats(file, stem + _COUNTS)
        sums = _floats(file, stem + _SUMS) if stem + _SUMS in file.tensors else None
        if counts.size == 0 or values.size % counts.size or (sums is not None and sums.size != values.size):
            raise GGUFError(f"{path}: {stem}: {values.size} sums do not go with {counts.size} counts")
        shape = counts.size, values.size // counts.size
        rows = _checked_counts(path, stem, counts.reshape(-1))
        entries[stem] = _checked(
            path, stem, Importance(values.reshape(shape), rows, None if sums is None else sums.reshape(shape))
        )
    found = file.metadata.get("imatrix.datasets")
    datasets = tuple(str(one) for one in found) if isinstance(found, list) else ()
    sizes = [file.metadata.get(f"imatrix.{key}") for key in ("chunk_count", "chunk_size")]
    chunks, chunk_size = (value if isinstance(value, int) else 0 for value in sizes)
    return Imatrix(entries, datasets, chunks, chunk_size)


def _floats(file: GGUFFile, name: str) -> np.ndarray:
    info = file.tensors.get(name)
    if info is None or info.type != GGMLQuantizationType.F32:
        raise GGUFError(f"{file.path}: tensor {name!r} is missing or is not F32")
    return file.raw(name).view("<f4").astype(np.float32).reshape(-1)


class _Old:
    """A cursor through the old form; whatever lies beyond the file's end is an error that says where."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, map_file(path), 0

    def take(self, count: int, what: str) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise NKATError(
                f"{self.path}: is neither a GGUF nor an importance matrix of the old form: byte {self.at}: {what} does "
                "not fit into the file"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])

    @property
    def ended(self) -> bool:
        return self.at == len(self.data)


def _read_old(path: Path) -> Imatrix:
    cursor = _Old(path)
    count = cursor.integer("the number of entries")
    if not 0 < count <= _MAX_ENTRIES:
        raise NKATError(f"{path}: is neither a GGUF nor an importance matrix of the old form")
    entries = {}
    for _ in range(count):
        length = cursor.integer("the length of a name")
        name = cursor.take(length if length <= _MAX_NAME else -1, "a name").decode("utf-8", "replace")
        calls, size = cursor.integer("the number of calls"), cursor.integer("the number of values")
        if calls < 0 or size < 1:
            raise NKATError(f"{path}: {name!r} has {size} values of {calls} calls: the file is damaged")
        values = np.frombuffer(cursor.take(4 * size, f"{name!r}"), "<f4").astype(np.float32)
        entries[name] = _checked(path, name, Importance(values[None], np.array([calls], np.int64)))
    chunks, datasets = 0, tuple[str, ...]()
    if not cursor.ended:
        chunks = max(0, cursor.integer("the number of chunks"))
        length = 0 if cursor.ended else cursor.integer("the length of the text's name")
        text = cursor.take(length, "the text's name").decode("utf-8", "replace")
        datasets = (text,) if text else ()
    return Imatrix(entries, datasets, chunks, 0)


def _checked_counts(path: Path, name: str, counts: np.ndarray) -> np.ndarray:
    if not (np.isfinite(counts).all() and (counts >= 0).all() and (counts < 2**53).all()):
        raise NKATError(f"{path}: {name}: a count is NaN, infinite or negative")
    rows: np.ndarray = np.rint(counts).astype(np.int64)
    return rows


def _checked(path: Path, name: str, entry: Importance) -> Importance:
    if not (np.isfinite(entry.squares).all() and (entry.squares >= 0).all()):
        raise NKATError(f"{path}: {name}: a sum of squares is NaN, infinite or negative")
    return entry


def _new_parts(imatrix: Imatrix) -> list[Part]:
    metadata: dict[str, MetadataValue] = {
        "general.type": _TYPE,
        "imatrix.datasets": imatrix.datasets,
        "imatrix.chunk_count": imatrix.chunks,
        "imatrix.chunk_size": imatrix.chunk_size,
    }
    f32 = GGMLQuantizationType.F32
    tensors = []
    for name, entry in sorted(imatrix.entries.items()):
        tensors.append(NewTensor(name + _SQUARES, f32, _contiguous(entry.squares)))
        tensors.append(NewTensor(name + _COUNTS, f32, _contiguous(entry.counts[:, None])))
        if entry.sums is not None:
            tensors.append(NewTensor(name + _SUMS, f32, _contiguous(entry.sums)))
    return gguf_parts(metadata, tensors)


def _old_bytes(imatrix: Imatrix) -> bytes:
    """Entries without any row are left out, as llama-imatrix leaves them out."""
    seen = {name: entry for name, entry in sorted(imatrix.entries.items()) if entry.counts.any()}
    out = [struct.pack("<i", len(seen))]
    for name, entry in seen.items():
        calls = -(-int(entry.counts.max()) // imatrix.chunk_size)
        raw = name.encode()
        values = (entry.means * np.float32(calls)).astype("<f4")
        out += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", calls, values.size), values.tobytes()]
    text = (imatrix.datasets[-1] if imatrix.datasets else "").encode()
    out += [struct.pack("<ii", imatrix.chunks, len(text)), text]
    return b"".join(out)


def _contiguous(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)
