"""Opens a GGUF file: metadata, and tensors as memory-mapped bytes. Every bound of the format is checked here.

The file is treated as hostile: whatever its bytes are, opening it either succeeds or raises `GGUFError` naming the
field and its byte offset, in time and memory bounded by the file's size. Long arrays (tokens, merges, scores) are
skipped while opening and decoded when first asked for.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
gguf-py gives the enumerations and serves as the tests' oracle; its reader is not used because it needs seconds for a
large vocabulary.
"""

from __future__ import annotations

import itertools
import mmap
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from nkat.errors import NKATError
from nkat.gguf.foreign import foreign_type, what_it_is

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 21  # the largest usual page of memory; padding is written, and searched for Θ's marker
MAX_DIMENSIONS = 4  # ggml's GGML_MAX_DIMS
MAX_NAME_BYTES = 65535
MAX_NESTING = 4
# Far above any real model; they keep what a hostile header makes Python allocate, or loop over, within reason.
MAX_METADATA = 1 << 16
MAX_TENSORS = 1 << 17
MAX_STRINGS = 1 << 24  # in all arrays of one file together; the largest vocabulary in use has 2^18
MAX_NESTED_ARRAYS = 1 << 16

_MIN_METADATA_BYTES = 8 + 1 + 4 + 1  # key length, one character, type, a bool
_MIN_TENSOR_INFO_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, one character, n_dims, one dimension, type, offset

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_SCALARS: dict[GGUFValueType, tuple[struct.Struct, np.dtype]] = {
    GGUFValueType.UINT8: (struct.Struct("<B"), np.dtype("<u1")),
    GGUFValueType.INT8: (struct.Struct("<b"), np.dtype("<i1")),
    GGUFValueType.UINT16: (struct.Struct("<H"), np.dtype("<u2")),
    GGUFValueType.INT16: (struct.Struct("<h"), np.dtype("<i2")),
    GGUFValueType.UINT32: (_U32, np.dtype("<u4")),
    GGUFValueType.INT32: (struct.Struct("<i"), np.dtype("<i4")),
    GGUFValueType.FLOAT32: (struct.Struct("<f"), np.dtype("<f4")),
    GGUFValueType.UINT64: (_U64, np.dtype("<u8")),
    GGUFValueType.INT64: (struct.Struct("<q"), np.dtype("<i8")),
    GGUFValueType.FLOAT64: (struct.Struct("<d"), np.dtype("<f8")),
    GGUFValueType.BOOL: (struct.Struct("<B"), np.dtype("<u1")),
}


class GGUFError(NKATError):
    """The file is not a GGUF this toolkit can read; the message names the field and the offset."""


Piece = bytes | tuple[Path, int, int]  # bytes that stand in no file, or a file's bytes [start, end)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's place in the file.

    shape: row-major, i.e. GGUF's `ne` reversed; a linear layer's weight is (out_features, in_features)
    offset: absolute byte position in the file; nbytes: packed size
    info_span: where its entry stands in the header, absolute
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int
    info_span: tuple[int, int]

    @property
    def type_name(self) -> str:
        return self.type.name


_LONG = 4096


class Metadata(Mapping[str, Any]):
    """Key → value in file order. Values are decoded on first access and kept, but for long lists of strings (a
    vocabulary takes many megabytes, and its user keeps what it needs).

    Scalars are Python bool, int, float or str; numeric arrays read-only numpy arrays; string arrays list[str].
    """

    def __init__(self, spans: dict[str, tuple[int, int]], decoders: dict[str, Callable[[], Any]]) -> None:
        self.spans = spans  # key → (start, end) of the whole entry, absolute: a writer copies these bytes
        self._decoders = decoders
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key in self._values:
            return self._values[key]
        value = self._decoders[key]()
        if not (isinstance(value, list) and len(value) > _LONG):
            self._values[key] = value
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.spans)

    def __len__(self) -> int:
        return len(self.spans)

    def __contains__(self, key: object) -> bool:  # Mapping's own would decode the value
        return key in self.spans


class GGUFFile:
    """An open GGUF file, or a GGUF that stands at bytes [start, end) of a file. Use it as a context manager."""

    def __init__(self, path: Path, buffer: mmap.mmap | bytes, start: int, end: int) -> None:
        self.path = path
        self.start, self.end = start, end
        self._buffer: mmap.mmap | bytes | None = buffer
        self.part_count = 0  # of a split model, of which this is one part; below 2: it is whole
        self.version = 0
        self.alignment = DEFAULT_ALIGNMENT
        self.metadata: Metadata
        self.metadata_span = (0, 0)
        self.tensors: dict[str, TensorInfo] = {}
        self.data_start = 0  # first byte of the tensor data, absolute
        _parse(self, _Cursor(path, buffer, start, end))

    @classmethod
    def open(cls, path: str | Path, start: int = 0, end: int | None = None, *, part: bool = False) -> GGUFFile:
        """Maps and checks the file. Raises GGUFError (or NKATError where the file cannot be read at all).

        part: one part of a split model is taken as well; `nkat.gguf.split.open_gguf` gives the whole
        """
        path = Path(path)
        buffer = map_file(path)
        size = len(buffer)
        end = size if end is None else end
        if not 0 <= start <= end <= size:
            raise GGUFError(f"{path}: bytes {start}..{end} lie outside the file of {size} bytes")
        file = GGUFFile(path, buffer, start, end)
        if file.part_count > 1 and not part:
            raise GGUFError(f"{path}: split.count says that this is one part of a split model")
        return file

    @property
    def files(self) -> list[Path]:
        """The files that it is in."""
        return [self.path]

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """Where the bytes [start, end) are."""
        yield self.path, start, end

    def place(self, name: str) -> tuple[Path, int]:
        """The file that a tensor's bytes are in, and where they begin there."""
        return self.path, self.tensors[name].offset

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the map. Arrays from `raw` stay valid: the pages live until the last of them is gone."""
        self._buffer = None

    @property
    def data_end(self) -> int:
        """One past the last byte of the last tensor, absolute; the file may go on after it."""
        return max((t.offset + t.nbytes for t in self.tensors.values()), default=min(self.data_start, self.end))

    def raw(self, name: str) -> np.ndarray:
        """A tensor's packed bytes: uint8 [nbytes], memory-mapped, read-only, not copied."""
        info = self.tensors.get(name)
        if info is None:
            raise GGUFError(f"{self.path}: there is no tensor named {name!r}")
        return self.read(info.offset, info.offset + info.nbytes)

    def read(self, start: int, end: int) -> np.ndarray:
        """Bytes [start, end) of the file as a read-only uint8 view."""
        if self._buffer is None:
            raise ValueError(f"{self.path} is closed")
        return np.frombuffer(self._buffer, np.uint8, end - start, start)

    def release(self, name: str) -> None:
        """Tells the system that a tensor's pages are not needed for now, so that they leave the resident set.

        Does nothing on systems without madvise (Windows); the pages are read again when next touched.
        """
        if not isinstance(self._buffer, mmap.mmap) or not hasattr(self._buffer, "madvise"):
            return
        info = self.tensors[name]
        page = mmap.PAGESIZE
        first = info.offset // page * page
        self._buffer.madvise(mmap.MADV_DONTNEED, first, info.offset + info.nbytes - first)


def map_file(path: Path) -> mmap.mmap:
    """The whole file as a read-only memory map. Raises NKATError where that is impossible."""
    try:
        if path.is_fifo():  # opening one waits for somebody to write, perhaps for ever
            raise NKATError(f"{path}: this is a pipe, and a model must be a file")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise NKATError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise NKATError(f"{path}: this is a folder, not a GGUF file") from None
    except ValueError:  # mmap's word for an empty file
        raise GGUFError(f"{path}: the file is empty, not a GGUF") from None
    except OSError as error:
        raise NKATError(f"{path}: cannot be read: {error.strerror or error}") from None


class _Cursor:
    """Reads forward within [pos, end); every read is checked against the bytes that are really there."""

    def __init__(self, path: Path, buffer: mmap.mmap | bytes, pos: int, end: int) -> None:
        self.path, self.buffer, self.pos, self.end = path, buffer, pos, end
        self.strings_left = MAX_STRINGS
        self.nested_arrays_left = MAX_NESTED_ARRAYS

    def error(self, field: str, problem: str, at: int | None = None) -> GGUFError:
        return GGUFError(f"{self.path}: {field} at byte {self.pos if at is None else at}: {problem}")

    def need(self, size: int, field: str) -> None:
        if size > self.end - self.pos:
            raise self.error(field, f"needs {size} bytes but only {self.end - self.pos} are left (truncated file?)")

    def number(self, layout: struct.Struct, field: str) -> Any:
        self.need(layout.size, field)
        value = layout.unpack_from(self.buffer, self.pos)[0]
        self.pos += layout.size
        return value

    def string(self, field: str, limit: int | None = None) -> str:
        at = self.pos
        length = self.number(_U64, f"length of {field}")
        if limit is not None and length > limit:
            raise self.error(f"length of {field}", f"{length} bytes, more than the allowed {limit}", at)
        self.need(length, field)
        raw = self.buffer[self.pos : self.pos + length]
        self.pos += length
        return self.text(raw, field, at + 8)

    def lenient(self, raw: bytes, field: str) -> str:
        """A value's text. Nothing here computes with it, so that bytes that are not UTF-8 are shown as U+FFFD."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            warnings.warn(
                f"{self.path}: metadata {field} is not valid UTF-8; its other bytes are shown as \ufffd", stacklevel=2
            )
            return raw.decode("utf-8", errors="replace")

    def text(self, raw: bytes, field: str, at: int) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(field, f"not valid UTF-8 ({error.reason})", at + error.start) from None

    def value_type(self, field: str) -> GGUFValueType:
        at = self.pos
        code = self.number(_U32, f"type of {field}")
        try:
            return GGUFValueType(code)
        except ValueError:
            raise self.error(f"type of {field}", f"unknown value type {code}", at) from None


def _parse(file: GGUFFile, cursor: _Cursor) -> None:
    cursor.need(4, "magic")
    magic = cursor.buffer[cursor.pos : cursor.pos + 4]
    if magic != MAGIC:
        beginning = cursor.buffer[cursor.pos : min(cursor.end, cursor.pos + 512)]
        raise cursor.error("magic", f"not a GGUF file{what_it_is(beginning)}")
    cursor.pos += 4
    at = cursor.pos
    file.version = cursor.number(_U32, "version")
    if file.version not in VERSIONS:
        swapped = int.from_bytes(file.version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            raise cursor.error("version", "big-endian GGUF files are not supported", at)
        raise cursor.error("version", f"GGUF version {file.version} is not supported, only 2 and 3", at)
    at = cursor.pos
    tensor_count = cursor.number(_U64, "tensor count")
    metadata_count = cursor.number(_U64, "metadata count")
    left = cursor.end - cursor.pos
    for field, count, smallest, limit, where in (
        ("tensor count", tensor_count, _MIN_TENSOR_INFO_BYTES, MAX_TENSORS, at),
        ("metadata count", metadata_count, _MIN_METADATA_BYTES, MAX_METADATA, at + 8),
    ):
        if count * smallest > left:
            raise cursor.error(field, f"{count} entries cannot fit into {left} bytes (truncated file?)", where)
        if count > limit:
            raise cursor.error(field, f"{count} is more than the allowed {limit}", where)

    start = cursor.pos
    file.metadata = _parse_metadata(cursor, metadata_count)
    file.metadata_span = (start, cursor.pos)
    file.alignment = _alignment(file.metadata, cursor)
    parts = file.metadata.get("split.count", 0)
    if not isinstance(parts, int) or parts < 0:
        at = file.metadata.spans["split.count"][0]
        raise cursor.error("split.count", f"must be a number of parts, got {parts!r:.80}", at)
    file.part_count = parts

    entries = [_parse_tensor_info(cursor) for _ in range(tensor_count)]
    header_bytes = cursor.pos - file.start
    file.data_start = file.start + header_bytes + -header_bytes % file.alignment
    if entries and file.data_start > file.end:
        raise cursor.error("tensor data", f"would start at byte {file.data_start}, beyond the end (truncated file?)")
    for name, shape, tensor_type, relative, span in entries:
        if name in file.tensors:
            raise cursor.error(f"tensor {name!r}", "the name appears twice", span[0])
        info = TensorInfo(name, shape, tensor_type, file.data_start + relative, _packed_size(shape, tensor_type), span)
        if relative % file.alignment:
            raise cursor.error(
                f"offset of tensor {name!r}", f"{relative} is no multiple of the alignment {file.alignment}", span[0]
            )
        if info.offset + info.nbytes > file.end:
            raise cursor.error(
                f"data of tensor {name!r}",
                f"ends at byte {info.offset + info.nbytes} but the file has {file.end} (truncated file?)",
                info.offset,
            )
        file.tensors[name] = info
    _check_overlaps(file, cursor)


def _check_overlaps(file: GGUFFile, cursor: _Cursor) -> None:
    by_offset = sorted(file.tensors.values(), key=lambda t: t.offset)
    for first, second in itertools.pairwise(by_offset):
        if second.offset < first.offset + first.nbytes:
            raise cursor.error(
                f"data of tensor {second.name!r}", f"overlaps the data of tensor {first.name!r}", second.offset
            )


def _alignment(metadata: Metadata, cursor: _Cursor) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        at = metadata.spans["general.alignment"][0]
        raise cursor.error("general.alignment", f"must be a positive integer, got {value!r:.80}", at)
    if value > MAX_ALIGNMENT:
        at = metadata.spans["general.alignment"][0]
        raise cursor.error("general.alignment", f"{value} is more than the allowed {MAX_ALIGNMENT}", at)
    return value


def _packed_size(shape: tuple[int, ...], tensor_type: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[tensor_type]
    return prod(shape) // block * size


def _parse_tensor_info(
    cursor: _Cursor,
) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int, tuple[int, int]]:
    start = cursor.pos
    name = cursor.string("tensor name", MAX_NAME_BYTES)
    if not name:
        raise cursor.error("tensor name", "is empty", start)
    field = f"tensor {name!r}"
    at = cursor.pos
    n_dims = cursor.number(_U32, f"number of dimensions of {field}")
    if not 1 <= n_dims <= MAX_DIMENSIONS:
        raise cursor.error(f"number of dimensions of {field}", f"{n_dims} is not within 1..{MAX_DIMENSIONS}", at)
    at = cursor.pos
    dimensions = [cursor.number(_U64, f"dimension {i} of {field}") for i in range(n_dims)]
    if not all(dimensions):
        raise cursor.error(f"dimensions of {field}", f"{dimensions} hold a zero", at)
    if prod(dimensions) >= 1 << 63:
        raise cursor.error(f"dimensions of {field}", f"{dimensions} overflow 64 bits", at)
    at = cursor.pos
    code = cursor.number(_U32, f"type of {field}")
    try:
        tensor_type = GGMLQuantizationType(code)
    except ValueError:
        raise cursor.error(f"type of {field}", foreign_type(code), at) from None
    block = GGML_QUANT_SIZES[tensor_type][0]
    if dimensions[0] % block:
        raise cursor.error(
            f"dimensions of {field}",
            f"a row of {dimensions[0]} is no multiple of {tensor_type.name}'s block of {block}",
            at,
        )
    offset = cursor.number(_U64, f"offset of {field}")
    return name, tuple(reversed(dimensions)), tensor_type, offset, (start, cursor.pos)


def _parse_metadata(cursor: _Cursor, count: int) -> Metadata:
    spans: dict[str, tuple[int, int]] = {}
    decoders: dict[str, Callable[[], Any]] = {}
    for _ in range(count):
        start = cursor.pos
        key = cursor.string("metadata key", MAX_NAME_BYTES)
        if not key:
            raise cursor.error("metadata key", "is empty", start)
        if key in spans:
            raise cursor.error(f"metadata key {key!r}", "appears twice", start)
        decoders[key] = _parse_value(cursor, cursor.value_type(key), key, 0)
        spans[key] = (start, cursor.pos)
    return Metadata(spans, decoders)


def _parse_value(cursor: _Cursor, value_type: GGUFValueType, field: str, depth: int) -> Callable[[], Any]:
    """Moves past the value and returns what decodes it; scalars are decoded and checked at once."""
    if value_type == GGUFValueType.ARRAY:
        return _parse_array(cursor, field, depth)
    if value_type == GGUFValueType.STRING:
        length = cursor.number(_U64, f"length of {field}")
        cursor.need(length, field)
        text = cursor.lenient(cursor.buffer[cursor.pos : cursor.pos + length], field)
        cursor.pos += length
        return lambda: text
    at = cursor.pos
    number = cursor.number(_SCALARS[value_type][0], field)
    if value_type == GGUFValueType.BOOL:
        if number > 1:
            raise cursor.error(field, f"a bool must be 0 or 1, found {number}", at)
        number = bool(number)
    return lambda: number


def _parse_array(cursor: _Cursor, field: str, depth: int) -> Callable[[], Any]:
    element = cursor.value_type(f"elements of {field}")
    at = cursor.pos
    count = cursor.number(_U64, f"length of {field}")
    if element in _SCALARS:
        dtype = _SCALARS[element][1]
        start = cursor.pos
        cursor.need(count * dtype.itemsize, field)
        cursor.pos += count * dtype.itemsize
        return lambda: _numbers(cursor, element, start, count, field)

    smallest = 8 if element == GGUFValueType.STRING else 12  # a string's length; an array's type and length
    if count * smallest > cursor.end - cursor.pos:
        raise cursor.error(f"length of {field}", f"{count} elements cannot fit into the rest of the file", at)
    if element == GGUFValueType.STRING:
        cursor.strings_left -= count
        if cursor.strings_left < 0:
            raise cursor.error(f"length of {field}", f"more than {MAX_STRINGS} strings in one file", at)
        start = cursor.pos
        _skip_strings(cursor, count, field)
        return lambda: _strings(cursor, start, count)
    cursor.nested_arrays_left -= count
    if depth + 1 >= MAX_NESTING or cursor.nested_arrays_left < 0:
        raise cursor.error(field, f"arrays nested deeper than {MAX_NESTING} or more than {MAX_NESTED_ARRAYS}", at)
    decoders = [_parse_array(cursor, f"{field}[{i}]", depth + 1) for i in range(count)]
    return lambda: [decode() for decode in decoders]


def _skip_strings(cursor: _Cursor, count: int, field: str) -> None:
    """The one loop that decides how fast a file opens: a quarter of a million rounds for a large vocabulary."""
    buffer, pos, unpack = cursor.buffer, cursor.pos, _U64.unpack_from
    end, last = cursor.end, cursor.end - 8  # `last`: where a string's length can stand at the latest
    for index in range(count):
        if pos > last:
            raise cursor.error(f"{field}[{index}]", "lies beyond the end (truncated file?)", pos)
        previous = pos
        pos += 8 + unpack(buffer, pos)[0]
        if pos > end:
            length = pos - previous - 8
            raise cursor.error(f"{field}[{index}]", f"{length} bytes reach beyond the end (truncated file?)", previous)
    cursor.pos = pos


def _strings(cursor: _Cursor, pos: int, count: int) -> list[str]:
    buffer, unpack = cursor.buffer, _U64.unpack_from
    values = []
    for _ in range(count):
        (length,) = unpack(buffer, pos)
        pos += 8
        # A vocabulary's tokens may be parts of characters: their bytes are kept (PEP 383), for `Tokenizer` to take.
        values.append(buffer[pos : pos + length].decode("utf-8", errors="surrogateescape"))
        pos += length
    return values


def _numbers(cursor: _Cursor, element: GGUFValueType, start: int, count: int, field: str) -> np.ndarray:
    values = np.frombuffer(cursor.buffer, _SCALARS[element][1], count, start)
    if element != GGUFValueType.BOOL:
        return values
    if count and values.max() > 1:
        raise cursor.error(field, "a bool must be 0 or 1", start + int(values.argmax()))
    return values.view(np.bool_)
