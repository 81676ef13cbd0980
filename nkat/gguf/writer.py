"""Lays out GGUF files to write, with everything taken from a base file byte for byte.

A new file is a list of parts (bytes, arrays, or ranges of an existing file) that are streamed, so peak memory does
not depend on its size. gguf-py's writer is not used here because it encodes metadata anew and so cannot keep a base's
bytes; its enumerations are, and the tests read every file back with gguf-py.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType

from nkat.errors import NKATError
from nkat.gguf.file import DEFAULT_ALIGNMENT, MAGIC, GGUFFile, TensorInfo
from nkat.host.files import atomic_output

GGUF_VERSION = 3
_COPY_BYTES = 8 << 20

MetadataValue = bool | int | float | np.float32 | str | tuple[str, ...]
Progress = Callable[[int], object]  # called with the number of bytes just done


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write: `data` is C-contiguous and its shape is row-major (GGUF's `ne` reversed).

    shape: the tensor's own, where `data` holds packed blocks and so has another
    """

    name: str
    type: GGMLQuantizationType
    data: np.ndarray
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes [start, end) of an existing file."""

    path: Path
    start: int
    end: int


Part = bytes | np.ndarray | FileRange


def range_parts(file: GGUFFile, start: int, end: int) -> list[Part]:
    """Bytes [start, end) of an open GGUF, wherever they are."""
    return [piece if isinstance(piece, bytes) else FileRange(*piece) for piece in file.pieces(start, end)]


def part_size(part: Part) -> int:
    """Bytes the part takes in the output."""
    if isinstance(part, FileRange):
        return part.end - part.start
    return part.nbytes if isinstance(part, np.ndarray) else len(part)


def encode_metadata(values: Mapping[str, MetadataValue]) -> bytes:
    """Metadata entries in the file's form: bool, uint32 or uint64 (int), float64 (float), float32, string, strings."""
    return b"".join(_string(key) + _value(key, value) for key, value in values.items())


@dataclass(frozen=True, slots=True)
class BaseView:
    """The part of an open GGUF that is the base model: its first metadata entries, first tensors and first data.

    metadata_end, data_end: absolute positions in the file; version: the base's own GGUF version
    tensors: those first tensors, by name, in the file's order
    """

    file: GGUFFile
    version: int
    metadata_count: int
    metadata_end: int
    tensor_count: int
    data_end: int
    tensors: Mapping[str, TensorInfo] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", dict(islice(self.file.tensors.items(), self.tensor_count)))

    @classmethod
    def whole(cls, file: GGUFFile, data_end: int | None = None) -> BaseView:
        """Everything up to `data_end` (default: the end of the file)."""
        end = file.end if data_end is None else data_end
        return cls(file, file.version, len(file.metadata), file.metadata_span[1], len(file.tensors), end)

    def parts(self) -> list[Part]:
        """The base model's bytes."""
        return [_header(self, self.version), *self.data()]

    @property
    def data_start(self) -> int:
        """Where the tensor data begins, in the file: at `data_end` where the file ends before it."""
        return min(self.file.data_start, self.data_end)

    def data(self) -> list[Part]:
        """The tensor data with its gaps and whatever follows the last tensor."""
        return range_parts(self.file, self.data_start, self.data_end)

    def is_exact(self) -> bool:
        """Whether `parts` gives the base's own bytes: true unless the padding before the data holds non-zeros.

        A base among Θ's tensors has no header to compare with any more; that was done when Θ was put there.
        """
        if self.metadata_count < len(self.file.metadata):
            return True
        header = self.file.read(self.file.start, self.data_start).tobytes()
        return _header(self, self.version)[: len(header)] == header and len(header) == self.file.data_start


def gguf_parts(
    metadata: Mapping[str, MetadataValue], tensors: Sequence[NewTensor], base: BaseView | None = None
) -> list[Part]:
    """The parts of a GGUF v3 file holding the base's metadata and tensors unchanged and in order, then the new ones.

    The base's tensor data is one range, gaps and trailing bytes included, so that every offset in the base's tensor
    entries stays true and the base can be cut out again exactly.
    """
    alignment = base.file.alignment if base else DEFAULT_ALIGNMENT
    offset = base.data_end - base.data_start if base else 0
    infos: list[bytes] = []
    tail: list[Part] = []
    for tensor in tensors:
        padding = -offset % alignment
        infos.append(_tensor_info(tensor, offset + padding))
        tail += [bytes(padding), tensor.data]
        offset += padding + tensor.data.nbytes
    new = len(metadata), encode_metadata(metadata), len(infos), b"".join(infos)
    return [_header(base, GGUF_VERSION, new), *(base.data() if base else []), *tail]


def replaced_parts(
    parts: Iterable[Part], file: GGUFFile, names: Iterable[str], packed: Callable[[TensorInfo], np.ndarray]
) -> Iterator[Part]:
    """The parts of an existing model with other bytes in some of its tensors, asked for one at a time, as they come.

    names: of tensors of `file`, whose data lies in one of the parts that are ranges
    packed: as many bytes as the tensor has
    """
    waiting = sorted((*file.place(name), name) for name in names)
    for part in parts:
        if not isinstance(part, FileRange):
            yield part
            continue
        position = part.start
        for path, offset, name in waiting:
            info = file.tensors[name]
            if path == part.path and part.start <= offset and offset + info.nbytes <= part.end:
                yield FileRange(path, position, offset)
                yield packed(info)
                position = offset + info.nbytes
        yield FileRange(part.path, position, part.end)


def write_gguf(
    path: Path, parts: Sequence[Part], force: bool, inputs: Iterable[Path] = (), progress: Progress | None = None
) -> None:
    """Writes the parts to `path`, atomically (see `nkat.host.files.atomic_output` for `force` and `inputs`)."""
    with atomic_output(path, sum(part_size(part) for part in parts), force, inputs) as file:
        write_parts(file, parts, progress)


def write_parts(file: BinaryIO, parts: Iterable[Part], progress: Progress | None = None) -> None:
    """Streams the parts into an open file, 8 MiB at a time."""
    for part in parts:
        for block in _blocks(part):
            file.write(block)
            if progress:
                progress(len(block))


def sha256_of_parts(parts: Iterable[Part], progress: Progress | None = None) -> str:
    """SHA-256, in hexadecimal, of what `write_parts` would write."""
    digest = hashlib.sha256()
    for part in parts:
        for block in _blocks(part):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def _blocks(part: Part) -> Iterator[memoryview]:
    if isinstance(part, FileRange):
        if part.end > part.start:
            with part.path.open("rb") as source:
                source.seek(part.start)
                yield from _read_blocks(source, part)
        return
    view = memoryview(part).cast("B") if part_size(part) else memoryview(b"")
    for start in range(0, len(view), _COPY_BYTES):
        yield view[start : start + _COPY_BYTES]


def _read_blocks(source: io.BufferedReader, part: FileRange) -> Iterator[memoryview]:
    left = part.end - part.start
    buffer = memoryview(bytearray(min(left, _COPY_BYTES)))
    while left:
        count = source.readinto(buffer[: min(left, len(buffer))])
        if not count:
            raise NKATError(f"{part.path}: became shorter while it was being read")
        left -= count
        yield buffer[:count]


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: MetadataValue) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", GGUFValueType.BOOL, value)
    if isinstance(value, int):
        if not 0 <= value < 1 << 64:
            raise ValueError(f"{key}: {value} does not fit into an unsigned 64-bit integer")
        if value < 1 << 32:
            return struct.pack("<II", GGUFValueType.UINT32, value)
        return struct.pack("<IQ", GGUFValueType.UINT64, value)
    if isinstance(value, np.float32):
        return struct.pack("<If", GGUFValueType.FLOAT32, value)
    if isinstance(value, float):  # 64 bits: gamma = 0.97 reads back as 0.97
        return struct.pack("<Id", GGUFValueType.FLOAT64, value)
    if isinstance(value, tuple):
        head = struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, len(value))
        return head + b"".join(_string(one) for one in value)
    return struct.pack("<I", GGUFValueType.STRING) + _string(value)


def _header(base: BaseView | None, version: int, new: tuple[int, bytes, int, bytes] = (0, b"", 0, b"")) -> bytes:
    """Header with the base's entries byte for byte and `new` (metadata count and bytes, tensor count and bytes)."""
    metadata_count, metadata, tensor_count, infos = new
    alignment = DEFAULT_ALIGNMENT
    if base:
        file = base.file
        alignment = file.alignment
        metadata = file.read(file.metadata_span[0], base.metadata_end).tobytes() + metadata
        spans = [t.info_span for t in base.tensors.values()]
        infos = (file.read(spans[0][0], spans[-1][1]).tobytes() if spans else b"") + infos
        metadata_count += base.metadata_count
        tensor_count += base.tensor_count
    header = struct.pack("<4sIQQ", MAGIC, version, tensor_count, metadata_count) + metadata + infos
    return header + bytes(-len(header) % alignment)


def _tensor_info(tensor: NewTensor, offset: int) -> bytes:
    dimensions = tuple(reversed(tensor.shape or tensor.data.shape))
    return _string(tensor.name) + struct.pack(
        f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, tensor.type, offset
    )
