"""Block formats of ggml: packed bytes → float32 weights, bit-identical to gguf-py's dequantisation and faster.

A row of a quantised tensor is a chain of blocks. A block holds `block_size` weights in `block_bytes` bytes: integers q
of 2 to 8 bits and, per group of 16 to 32 of them, a scale d and in some formats an offset m, so that w = d·q + m.

Each format is one `BlockFormat` below, and its docstring draws the bits: bytes are numbered from the start of the
block, bits from the least significant one, and q[a:b] is a half-open range. These are the only drawings:
`nkat.kernels.cpu.formats` and `nkat.kernels.cuda.planes`, which read the same bytes in their own ways, point here.

The arithmetic keeps gguf-py's order of float32 roundings. NaN and infinite scales give NaN and infinity in the same
places; only the sign and payload of a NaN may differ.

Only torch operations are used, so CPU and CUDA share the code. On a CPU tensors are unpacked in tiles that stay in the
cache, and the threads meet after every short operation. GNU OpenMP, which torch uses on Linux, waits there by spinning:
where other programs keep the cores busy, that makes several threads ten times slower than one, unless the process was
started with OMP_WAIT_POLICY=PASSIVE in its environment.

Limits: little-endian machines; no IQ1, IQ2, IQ3 or ternary types, no NVFP4.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from nkat.errors import NKATError

# Weights in a tile, per thread: 2 MiB of float32, about a core's L2 cache. Smaller tiles lose to the cost of starting
# an operation.
_CPU_TILE = 1 << 19
# A GPU wants few large kernels; the limit bounds the memory that the integers take.
_GPU_TILE = 1 << 25

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


class BlockFormat:
    """One block format: a subclass, which is its type's entry in `BLOCK_FORMATS` and never instantiated.

    The subclass's docstring says what a weight is, and draws where in a block each number lies.

    qtype: the type that a file gives such a tensor
    block_size: weights of a block, neighbours in a row
    block_bytes: bytes of a block
    halves: where in a block its float16 numbers start: d, which every q is multiplied with, then what m is made of
    """

    qtype: ClassVar[GGMLQuantizationType]
    block_size: ClassVar[int]
    block_bytes: ClassVar[int]
    halves: ClassVar[tuple[int, ...]]

    def __init_subclass__(cls, qtype: GGMLQuantizationType, halves: tuple[int, ...]) -> None:
        cls.qtype, cls.halves = qtype, halves
        cls.block_size, cls.block_bytes = GGML_QUANT_SIZES[qtype]

    @classmethod
    def scales(cls, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """d and m of w = d·q + m for uint8 [n, block_bytes]; m is None where there is no offset.

        float32 [n, groups]: each is that of block_size / groups neighbouring weights
        """
        raise NotImplementedError

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        """q of uint8 [n, block_bytes] in the order of the weights: contiguous uint8 or int8, n·block_size of them."""
        raise NotImplementedError

    @classmethod
    def dequantise(cls, blocks: Tensor, out: Tensor) -> None:
        """Writes the weights of uint8 [n, block_bytes] to `out`, contiguous float32 of n·block_size weights."""
        scale, offset = cls.scales(blocks)
        groups = scale.shape[1]
        # one row a scale, so that scales broadcast along it
        weights, scale = out.view(-1, cls.block_size // groups), scale.view(-1, 1)
        offset = None if offset is None else offset.view(-1, 1)
        tile = _CPU_TILE * torch.get_num_threads() if out.device.type == "cpu" else _GPU_TILE
        step = tile // cls.block_size
        for first in range(0, len(blocks), step):
            part = slice(first * groups, (first + step) * groups)
            tile_weights = weights[part]
            tile_weights.copy_(cls.quants(blocks[first : first + step]).view_as(tile_weights)).mul_(scale[part])
            if offset is not None:
                tile_weights.add_(offset[part])


def _halves(cls: type[BlockFormat], blocks: Tensor) -> tuple[Tensor, ...]:
    """The float16 numbers of each block, as float32 (n, 1) each."""
    halves = blocks.view(torch.float16)
    return tuple(halves[:, byte // 2].float().unsqueeze(1) for byte in cls.halves)


def _one_scale(cls: type[BlockFormat], blocks: Tensor) -> tuple[Tensor, None]:
    """d alone, and no offset."""
    (d,) = _halves(cls, blocks)
    return d, None


def _scale_and_offset(cls: type[BlockFormat], blocks: Tensor) -> tuple[Tensor, Tensor]:
    """d and m."""
    d, m = _halves(cls, blocks)
    return d, m


def _copy(part: Tensor) -> Tensor:
    """Some bytes of each block in new memory, aligned so that wider numbers can be viewed."""
    return part.clone(memory_format=torch.contiguous_format)  # .contiguous() of a single block would not copy


def _fields(part: Tensor, group: int, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Cuts each byte into the fields (byte >> shift) & mask, one for each shift; a negative one shifts left.

    Returns bytes as a flat int64 view: the first field of `group` bytes, then the second field of the same bytes, and
    so on. `group` is a multiple of 16. Eight bytes are shifted at once, so `mask` must drop what comes in from the
    neighbouring byte.
    """
    words = _copy(part).view(torch.int64)
    shifted = [words >> shift if shift >= 0 else words << -shift for shift in shifts]
    # torch copies short rows of 16-byte elements several times faster than the same rows of smaller elements
    rows = [field.view(torch.complex128).view(-1, group // 16) for field in shifted]
    return torch.stack(rows, dim=1).view(torch.int64).view(-1).bitwise_and_(mask * 0x0101_0101_0101_0101)


def _nibbles(part: Tensor, group: int) -> Tensor:
    """Bits 0-3 of `group` bytes, then bits 4-7 of the same bytes, and so on: bytes as a flat int64 view."""
    return _fields(part, group, (0, 4), 0x0F)


def _unsigned(words: Tensor) -> Tensor:
    return words.view(torch.uint8)


def _signed(words: Tensor, zero: int) -> Tensor:
    """Bytes, less the value that stands for zero, as int8."""
    return words.view(torch.int8).sub_(zero)


class Q4_0(BlockFormat, qtype=GGMLQuantizationType.Q4_0, halves=(0,)):
    """w = d·(q - 8): 32 weights in 18 bytes.

    bytes  0-1    float16 d
           2-17   byte i: q[i] in bits 0-3, q[16 + i] in bits 4-7
    """

    scales = classmethod(_one_scale)

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return _signed(_nibbles(blocks[:, 2:], 16), 8)


class Q4_1(BlockFormat, qtype=GGMLQuantizationType.Q4_1, halves=(0, 2)):
    """w = d·q + m: 32 weights in 20 bytes.

    bytes  0-1    float16 d
           2-3    float16 m
           4-19   byte i: q[i] in bits 0-3, q[16 + i] in bits 4-7
    """

    scales = classmethod(_scale_and_offset)

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return _unsigned(_nibbles(blocks[:, 4:], 16))


@functools.cache
def _fifth_bits(device: torch.device) -> Tensor:
    """int64 (256,): byte i of entry b is bit i of b, moved to bit 4."""
    byte = torch.arange(256, device=device).unsqueeze(1)
    bit = torch.arange(8, device=device)
    return ((byte >> bit & 1) << 4).to(torch.uint8).view(torch.int64).squeeze(1)


def _with_fifth_bits(nibbles: Tensor, blocks: Tensor, byte: int) -> Tensor:
    """Bit i of the 32-bit word at `byte` of a block becomes bit 4 of the block's i-th nibble, in place."""
    halves = blocks.view(torch.int16)  # blocks of 22 bytes cannot be viewed as 32-bit words
    word = torch.stack([halves[:, byte // 2], halves[:, byte // 2 + 1]], dim=1).view(torch.uint8)
    return nibbles.bitwise_or_(_fifth_bits(blocks.device).index_select(0, word.to(torch.int32).view(-1)))


class Q5_0(BlockFormat, qtype=GGMLQuantizationType.Q5_0, halves=(0,)):
    """w = d·(q - 16): 32 weights in 22 bytes.

    bytes  0-1    float16 d
           2-5    bit i of this 32-bit word: bit 4 of q[i]
           6-21   byte i: bits 0-3 of q[i] in bits 0-3, of q[16 + i] in bits 4-7
    """

    scales = classmethod(_one_scale)

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return _signed(_with_fifth_bits(_nibbles(blocks[:, 6:], 16), blocks, 2), 16)


class Q5_1(BlockFormat, qtype=GGMLQuantizationType.Q5_1, halves=(0, 2)):
    """w = d·q + m: 32 weights in 24 bytes.

    bytes  0-1    float16 d
           2-3    float16 m
           4-7    bit i of this 32-bit word: bit 4 of q[i]
           8-23   byte i: bits 0-3 of q[i] in bits 0-3, of q[16 + i] in bits 4-7
    """

    scales = classmethod(_scale_and_offset)

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return _unsigned(_with_fifth_bits(_nibbles(blocks[:, 8:], 16), blocks, 4))


class Q8_0(BlockFormat, qtype=GGMLQuantizationType.Q8_0, halves=(0,)):
    """w = d·q: 32 weights in 34 bytes.

    bytes  0-1    float16 d
           2-33   int8 q[i]
    """

    scales = classmethod(_one_scale)

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return _copy(blocks[:, 2:]).view(torch.int8)


class Q2_K(BlockFormat, qtype=GGMLQuantizationType.Q2_K, halves=(80, 82)):
    """w = d·s·q - dmin·t: 256 weights in 84 bytes, 4-bit s and t for each 16.

    bytes  0-15   byte g: s[g] in bits 0-3, t[g] in bits 4-7
          16-47   byte i: q[i], q[32 + i], q[64 + i], q[96 + i] in bits 0-1, 2-3, 4-5, 6-7
          48-79   the same for q[128:256]
          80-81   float16 d
          82-83   float16 dmin
    """

    @classmethod
    def scales(cls, blocks: Tensor) -> tuple[Tensor, Tensor]:
        d, dmin = _halves(cls, blocks)
        packed = _copy(blocks[:, :16])
        return d * (packed & 0x0F).float(), -dmin * (packed >> 4).float()

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return _unsigned(_fields(blocks[:, 16:80], 32, (0, 2, 4, 6), 0x03))


class Q3_K(BlockFormat, qtype=GGMLQuantizationType.Q3_K, halves=(108,)):
    """w = d·(s - 32)·(q - 4): 256 weights in 110 bytes, a 6-bit s for each 16.

    bytes  0-31   byte i, bit j: bit 2 of q[32·j + i]
          32-63   byte i: bits 0-1 of q[i], q[32 + i], q[64 + i], q[96 + i] in bits 0-1, 2-3, 4-5, 6-7
          64-95   the same for q[128:256]
          96-103  byte g: bits 0-3 of s[g] in bits 0-3, of s[8 + g] in bits 4-7
         104-107  byte g: bits 4-5 of s[g], s[4 + g], s[8 + g], s[12 + g] in bits 0-1, 2-3, 4-5, 6-7
         108-109  float16 d
    """

    @classmethod
    def scales(cls, blocks: Tensor) -> tuple[Tensor, None]:
        (d,) = _halves(cls, blocks)
        low, middle, high = _copy(blocks[:, 96:108]).view(torch.int32).unbind(1)  # four bytes at once
        s = [
            (low & 0x0F0F0F0F) | (high << 4 & 0x30303030),
            (middle & 0x0F0F0F0F) | (high << 2 & 0x30303030),
            (low >> 4 & 0x0F0F0F0F) | (high & 0x30303030),
            (middle >> 4 & 0x0F0F0F0F) | (high >> 2 & 0x30303030),
        ]
        return d * _signed(torch.stack(s, dim=1), 32).float(), None

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        low = _fields(blocks[:, 32:96], 32, (0, 2, 4, 6), 0x03)
        return _signed(low.bitwise_or_(_fields(blocks[:, :32], 32, (-2, -1, 0, 1, 2, 3, 4, 5), 0x04)), 4)


def _k_scales(cls: type[BlockFormat], blocks: Tensor) -> tuple[Tensor, Tensor]:
    """d·s and -dmin·t of Q4_K and Q5_K."""
    d, dmin = _halves(cls, blocks)
    s, t, low = _copy(blocks[:, 4:16]).view(torch.int32).unbind(1)  # four bytes at once
    s = torch.stack([s & 0x3F3F3F3F, (low & 0x0F0F0F0F) | (s >> 2 & 0x30303030)], dim=1)
    t = torch.stack([t & 0x3F3F3F3F, (low >> 4 & 0x0F0F0F0F) | (t >> 2 & 0x30303030)], dim=1)
    return d * _unsigned(s).float(), -dmin * _unsigned(t).float()


class Q4_K(BlockFormat, qtype=GGMLQuantizationType.Q4_K, halves=(0, 2)):
    """w = d·s·q - dmin·t: 256 weights in 144 bytes, 6-bit s and t for each 32.

    bytes  0-1    float16 d
           2-3    float16 dmin
           4-7    byte g: s[g] in bits 0-5, bits 4-5 of s[4 + g] in bits 6-7
           8-11   byte g: t[g] in bits 0-5, bits 4-5 of t[4 + g] in bits 6-7
          12-15   byte g: bits 0-3 of s[4 + g] in bits 0-3, of t[4 + g] in bits 4-7
          16-47   byte i: q[i] in bits 0-3, q[32 + i] in bits 4-7
          48-143  the same for q[64:128], q[128:192] and q[192:256]
    """

    scales = classmethod(_k_scales)

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return _unsigned(_nibbles(blocks[:, 16:], 32))


class Q5_K(BlockFormat, qtype=GGMLQuantizationType.Q5_K, halves=(0, 2)):
    """w = d·s·q - dmin·t: 256 weights in 176 bytes, 6-bit s and t for each 32.

    bytes  0-15   d, dmin, s and t as in Q4_K
          16-47   byte i, bit j: bit 4 of q[32·j + i]
          48-79   byte i: bits 0-3 of q[i] in bits 0-3, of q[32 + i] in bits 4-7
          80-175  the same for q[64:128], q[128:192] and q[192:256]
    """

    scales = classmethod(_k_scales)

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        low = _nibbles(blocks[:, 48:], 32)
        return _unsigned(low.bitwise_or_(_fields(blocks[:, 16:48], 32, (-4, -3, -2, -1, 0, 1, 2, 3), 0x10)))


class Q6_K(BlockFormat, qtype=GGMLQuantizationType.Q6_K, halves=(208,)):
    """w = d·s·(q - 32): 256 weights in 210 bytes, an 8-bit s for each 16.

    bytes  0-63   byte i: bits 0-3 of q[i] in bits 0-3, of q[64 + i] in bits 4-7
          64-127  the same for q[128:256]
         128-159  byte i: bits 4-5 of q[i], q[32 + i], q[64 + i], q[96 + i] in bits 0-1, 2-3, 4-5, 6-7
         160-191  the same for q[128:256]
         192-207  int8 s[g]
         208-209  float16 d
    """

    @classmethod
    def scales(cls, blocks: Tensor) -> tuple[Tensor, None]:
        (d,) = _halves(cls, blocks)
        return d * blocks[:, 192:208].view(torch.int8).float(), None

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        low = _nibbles(blocks[:, :128], 64)
        return _signed(low.bitwise_or_(_fields(blocks[:, 128:192], 32, (-4, -2, 0, 2), 0x30)), 32)


# ggml's kvalues_iq4nl: what the 16 values of a nibble stand for in the two IQ4 formats
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


# ggml's kvalues_fp4: what the 16 values of FP4 (E2M1) stand for, doubled so that they are whole numbers
FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@functools.cache
def _level_pairs(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """int16 (0x1000,): the two bytes of entry a + 256·b are the levels of nibbles a and b."""
    index = torch.arange(0x1000, device=device)
    table = torch.tensor(levels, dtype=torch.int8, device=device)
    return torch.stack([table[index & 0x0F], table[index >> 8]], dim=1).view(torch.int16).squeeze(1)


def _levels(levels: tuple[int, ...], nibbles: Tensor) -> Tensor:
    """The level of each nibble as int8, two to a look-up."""
    pairs = nibbles.view(torch.int16).to(torch.int32)
    return _level_pairs(levels, nibbles.device).index_select(0, pairs).view(torch.int8)


class IQ4_NL(BlockFormat, qtype=GGMLQuantizationType.IQ4_NL, halves=(0,)):
    """w = d·level[k], level = `IQ4_LEVELS`: 32 weights in 18 bytes.

    bytes  0-1    float16 d
           2-17   byte i: k[i] in bits 0-3, k[16 + i] in bits 4-7
    """

    scales = classmethod(_one_scale)

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return _levels(IQ4_LEVELS, _nibbles(blocks[:, 2:], 16))


class IQ4_XS(BlockFormat, qtype=GGMLQuantizationType.IQ4_XS, halves=(0,)):
    """w = d·(s - 32)·level[k], level = `IQ4_LEVELS`: 256 weights in 136 bytes, a 6-bit s for each 32.

    bytes  0-1    float16 d
           2-3    bits 2·g and 2·g + 1 of this 16-bit word: bits 4-5 of s[g]
           4-7    bits 4·g to 4·g + 3 of this 32-bit word: bits 0-3 of s[g]
           8-23   byte i: k[i] in bits 0-3, k[16 + i] in bits 4-7
          24-135  the same for k[32:64] up to k[224:256]
    """

    @classmethod
    def scales(cls, blocks: Tensor) -> tuple[Tensor, None]:
        (d,) = _halves(cls, blocks)
        group = torch.arange(8, dtype=torch.int32, device=blocks.device)
        high = blocks.view(torch.int16)[:, 1, None].to(torch.int32) >> 2 * group & 0x03
        low = blocks.view(torch.int32)[:, 1, None] >> 4 * group & 0x0F
        return d * (low + 16 * high - 32).float(), None

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return _levels(IQ4_LEVELS, _nibbles(blocks[:, 8:], 16))


class MXFP4(BlockFormat, qtype=GGMLQuantizationType.MXFP4, halves=()):
    """w = 2^(e - 128)·level[k], level = `FP4_LEVELS`: 32 weights in 17 bytes.

    byte   0      e, 0 to 255
    bytes  1-16   byte i: k[i] in bits 0-3, k[16 + i] in bits 4-7
    """

    @staticmethod
    def scales(blocks: Tensor) -> tuple[Tensor, None]:
        e = blocks[:, :1].to(torch.int32)
        # the bits of a float32: from 2 on e - 1 is the exponent; what lies below is subnormal
        return torch.where(e > 1, (e - 1) << 23, (e + 1) << 21).view(torch.float32), None

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return _levels(FP4_LEVELS, _nibbles(blocks[:, 1:], 16))


BLOCK_FORMATS: Mapping[GGMLQuantizationType, type[BlockFormat]] = {
    block.qtype: block for block in BlockFormat.__subclasses__()
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
