"""Tensors of a GGUF, packed bytes → float32 weights, bit-identical to gguf-py's dequantisation and faster.

The block formats are described in `nkat.gguf.blocks` and drawn in the modules beside it; `BLOCK_FORMATS` has all.

The arithmetic keeps gguf-py's float32 roundings. NaN and infinite scales give NaN and infinity in the same places; only
the sign and payload of a NaN may differ.

Only torch operations are used, so CPU and CUDA share the code. On a CPU tensors are unpacked in tiles that stay in the
cache, and the threads meet after every short operation. GNU OpenMP, which torch uses on Linux, waits there by spinning:
where other programs keep the cores busy, that makes several threads ten times slower than one, unless the process was
started with OMP_WAIT_POLICY=PASSIVE in its environment.

Limits: little-endian machines; no Q1_0, which gguf-py cannot unpack.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from nkat.errors import NKATError
from nkat.gguf import grid_formats, integer_formats, level_formats
from nkat.gguf.blocks import BlockFormat

_FLOAT_TYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_WARNING_FILTERS = threading.Lock()


class QuantError(NKATError):
    """Packed bytes, a shape or row numbers that do not fit the tensor's type; the message names the type."""


class UnsupportedTypeError(QuantError):
    """A tensor type that cannot be unpacked; the message lists those that can."""


def packed_tensor(raw: np.ndarray) -> Tensor:
    """A tensor over a tensor's packed bytes, uint8 [nbytes], not copied. It must never be written to.

    torch has no read-only tensors and warns about a read-only memory map; only that warning is held back. The lock is
    there because the filters of warnings are one for all threads.
    """
    with _WARNING_FILTERS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        return torch.from_numpy(raw)


BLOCK_FORMATS: Mapping[GGMLQuantizationType, type[BlockFormat]] = {
    block.qtype: block for block in (*integer_formats.FORMATS, *level_formats.FORMATS, *grid_formats.FORMATS)
}
SUPPORTED_TYPES: frozenset[GGMLQuantizationType] = frozenset(_FLOAT_TYPES) | frozenset(BLOCK_FORMATS)


def packed_nbytes(qtype: GGMLQuantizationType, shape: tuple[int, ...], *, name: str = "") -> int:
    """Bytes of a tensor of this type and row-major shape. `name` is the tensor's, for error messages.

    Raises UnsupportedTypeError, or QuantError for a shape that is not 1-D to 4-D, has a dimension below 1, or has rows
    that are not a whole number of blocks.
    """
    if qtype not in SUPPORTED_TYPES:
        supported = ", ".join(supported.name for supported in sorted(SUPPORTED_TYPES))
        raise UnsupportedTypeError(f"{_subject(name)}type {qtype.name} is not supported (supported: {supported})")
    if not 1 <= len(shape) <= 4 or min(shape) < 1:
        raise QuantError(f"{_subject(name)}{qtype.name} shape {shape} needs 1 to 4 dimensions, each at least 1")
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    if shape[-1] % block_size:
        raise QuantError(
            f"{_subject(name)}rows of {shape[-1]} weights are not whole {qtype.name} blocks of {block_size}"
        )
    return math.prod(shape) // block_size * type_size


def dequantise(packed: Tensor, qtype: GGMLQuantizationType, shape: tuple[int, ...], *, name: str = "") -> Tensor:
    """The weights of a tensor: float32 of `shape` on the device of `packed`.

    packed: uint8 (nbytes,), as in the file. Never written to, so it may lie in a read-only memory map. An F32 tensor is
            returned as a view of `packed`, not a copy: do not write to the result.
    shape:  row-major, rows along the last dimension: (out_features, in_features) for a linear weight.
    name:   the tensor's, for error messages.

    Raises UnsupportedTypeError, or QuantError where `packed` and `shape` do not fit. The formats are those of
    ggml-quants.c in ggml-org/llama.cpp and of gguf-py's quants.py.
    """
    packed = _checked(packed, qtype, shape, name)
    if qtype == GGMLQuantizationType.F32:
        return packed.view(torch.float32).view(shape)
    return _unpack(packed, qtype, shape)


def dequantise_rows(
    packed: Tensor, qtype: GGMLQuantizationType, shape: tuple[int, ...], rows: Tensor, *, name: str = ""
) -> Tensor:
    """Some rows of a tensor, without unpacking the others (embedding look-up): float32 (len(rows), shape[-1]).

    packed, qtype, shape, name: as for `dequantise`. The leading dimensions count as one, in row-major order.
    rows: int32 or int64 (len(rows),) on the device of `packed`; any order, repeats allowed, none negative.

    Raises UnsupportedTypeError, or QuantError where `packed` and `shape` do not fit or a row is out of range.
    """
    packed = _checked(packed, qtype, shape, name)
    count = math.prod(shape[:-1])
    if rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise QuantError(
            f"{_subject(name)}row numbers of a {qtype.name} tensor must be 1-D int32 or int64, "
            f"not {rows.dtype} of shape {tuple(rows.shape)}"
        )
    if len(rows):  # checked here because a wrong index ends the whole process on CUDA
        lowest, highest = int(rows.min()), int(rows.max())
        if lowest < 0 or highest >= count:
            wrong = lowest if lowest < 0 else highest
            raise QuantError(f"{_subject(name)}row {wrong} is outside the {count} rows of a {qtype.name} tensor")
    return _unpack(packed.view(count, -1).index_select(0, rows).view(-1), qtype, (len(rows), shape[-1]))


def _subject(name: str) -> str:
    return f"tensor {name!r}: " if name else ""


def _checked(packed: Tensor, qtype: GGMLQuantizationType, shape: tuple[int, ...], name: str) -> Tensor:
    """`packed` if it fits type and shape, aligned so that the wider numbers in it can be viewed."""
    needed = packed_nbytes(qtype, shape, name=name)
    if packed.dtype != torch.uint8 or packed.shape != (needed,):
        raise QuantError(
            f"{_subject(name)}{qtype.name} of shape {shape} takes {needed} bytes of 1-D uint8, "
            f"not {packed.dtype} of shape {tuple(packed.shape)}"
        )
    # slices at odd offsets, and files whose alignment is that small
    alignment = math.gcd(GGML_QUANT_SIZES[qtype][1], 4)
    if packed.stride() != (1,) or packed.storage_offset() % alignment or packed.data_ptr() % alignment:
        return packed.clone(memory_format=torch.contiguous_format)
    return packed


def _empty(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Uninitialised float32. On CPU from numpy, which asks Linux for huge pages where torch's allocator does not:
    touching 64 MiB for the first time takes less than half as long."""
    if device.type == "cpu":
        return torch.from_numpy(np.empty(shape, dtype=np.float32))
    return torch.empty(shape, dtype=torch.float32, device=device)


def _unpack(packed: Tensor, qtype: GGMLQuantizationType, shape: tuple[int, ...]) -> Tensor:
    """Checked bytes → float32 of `shape`, in new memory."""
    out = _empty(shape, packed.device)
    if qtype in _FLOAT_TYPES:
        out.view(-1).copy_(packed.view(_FLOAT_TYPES[qtype]))
        return out
    block = BLOCK_FORMATS[qtype]
    block.dequantise(packed.view(-1, block.block_bytes), out)
    return out
