"""A GGUF weight as the CUDA kernels read it: the file's integers in planes, from which each thread loads 16 bytes.

A file's blocks are 18 to 210 bytes long, so neighbouring threads would read misaligned bytes. Here every format becomes
*chunks* of 32 weights, numbered row after row, and what belongs together lies together: w = scale·q + offset. Nothing
is rounded: the planes hold the file's integers and float16 numbers, and `PlaneWeight.dequantise` gives the file's
weights back bit by bit.

Weight k of a chunk is k = 16·f + 4·j + b, f of 2, j and b of 4. b is always a byte of a 32-bit word, so that one
instruction moves the bits of four weights.

    plane    32-bit words a chunk   where weight (f, j, b) is      holds
    8 bits   8                      word 4·f + j, byte b           Q8_0
    4 bits   4                      word j, bits 8·b + 4·f ...     Q4_*, Q5_*, IQ4_*; bits 0-3 of Q6_K
    2 bits   2                      word f, bits 8·b + 2·j ...     Q2_K; bits 0-1 of Q3_K, bits 4-5 of Q6_K
    1 bit    1                      bit 8·b + 4·f + j              bit 4 of Q5_*, bit 2 of Q3_K

    scales   d: float16              s: a chunk                             scale     offset
    half     d of each chunk         none                                   d         none: q counts from `zero`
    pair     d, m of each chunk      none                                   d         m
    k32      d, dmin of each 256     s in the low byte, t in the high one   d·s       -dmin·t
    k16      d, dmin of each 256     byte f: s in bits 0-3, t in bits 4-7   d·s       -dmin·t
    s16      d of each 256           byte f: int8 s                         d·s       none
    s32      d of each 256           one byte, int8 s                       d·s       none

Memory is the file's, plus 2.8 % (Q4_K), 2.3 % (Q5_K), 3.6 % (Q3_K) or 1.5 % (IQ4_XS): 6-bit scales become bytes.
Pure torch, on any device. Where the bits of a block are is drawn where the format is, in `nkat.gguf.integer_formats` or
beside it; the byte numbers below are those of a `Format.block`. `nkat.kernels.cuda.matmul` has the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeAlias

import torch
from gguf.constants import GGMLQuantizationType as QType
from torch import Tensor

from nkat.gguf import formats, integer_formats, level_formats
from nkat.gguf.blocks import BlockFormat
from nkat.kernels.reference import packed_rows

CHUNK = 32  # weights
_TILE = 1 << 24  # weights repacked at a time: the integers on the way take several bytes each


@dataclass(frozen=True, slots=True)
class Format:
    """How planes are made of one block format. `blocks` is uint8 [blocks, bytes of one].

    block: the format, with the drawing of its bits
    bits: of q; 3, 5 and 6 take two planes
    zero: the q that stands for 0
    scales: a line of the module's second table
    integers(blocks): q, uint8 [blocks, weights of one], in the order of the weights
    factors(blocks): the block's part of the planes d, float16, and s, bytes or None
    levels: q is the number of an entry of `level_formats.IQ4_LEVELS`
    """

    block: type[BlockFormat]
    bits: int
    zero: int
    scales: str
    integers: Callable[[Tensor], Tensor]
    factors: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    levels: bool = False

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of each plane; the first holds the low bits of q."""
        return {3: (2, 1), 5: (4, 1), 6: (4, 2)}.get(self.bits, (self.bits,))


@dataclass(frozen=True, slots=True, eq=False)
class PlaneWeight:
    """Rows of a weight on a device, in planes: its format is one of `FORMATS`.

    shape: (m, n); row 0 is row `first_row` of the `plane_rows` in the planes
    low, high: int32, the planes of q; high is None where one holds all bits
    d, s: float16 and int16 (int8 for "s32") planes of the scales; s is None for the kinds without
    """

    qtype: QType
    shape: tuple[int, int]
    low: Tensor
    high: Tensor | None
    d: Tensor
    s: Tensor | None
    plane_rows: int
    first_row: int = 0

    @property
    def format(self) -> Format:
        return FORMATS[self.qtype]

    @property
    def device(self) -> torch.device:
        return self.low.device

    @property
    def nbytes(self) -> int:
        """Bytes of these rows."""
        return sum(plane.nbytes for plane in self.own_planes() if plane is not None)

    def own_planes(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """These rows' part of low, high, d and s."""
        high, s = (None if plane is None else self._own_rows(plane) for plane in (self.high, self.s))
        return self._own_rows(self.low), high, self._own_rows(self.d), s

    def _own_rows(self, plane: Tensor) -> Tensor:
        a_row = plane.numel() // self.plane_rows
        return plane[self.first_row * a_row : (self.first_row + self.shape[0]) * a_row]

    def rows(self, start: int, stop: int) -> PlaneWeight:
        """Rows [start, stop), sharing memory."""
        return replace(self, shape=(stop - start, self.shape[1]), first_row=self.first_row + start)

    def dequantise(self) -> Tensor:
        """The weights, float32 [m, n], equal to `nkat.gguf.formats.dequantise` of the file's bytes."""
        layout, widths = self.format, self.format.planes
        low, high, d, s = self.own_planes()
        q = _unplane(low, widths[0])
        if high is not None:
            q |= _unplane(high, widths[1]) << widths[0]
        if layout.levels:
            q = torch.tensor(level_formats.IQ4_LEVELS, device=q.device)[q.long()]
        else:
            q = q.to(torch.int16) - layout.zero
        scale, offset = _scales(layout.scales, d, s)
        weights = q.float().view(*scale.shape, -1) * scale[..., None]
        return (weights if offset is None else weights + offset[..., None]).view(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class FileWeight:
    """Rows of a weight on a device as the file has them: its format has no planes.

    raw: uint8 [nbytes], the bytes of the rows
    """

    qtype: QType
    shape: tuple[int, int]
    raw: Tensor

    @property
    def device(self) -> torch.device:
        return self.raw.device

    @property
    def nbytes(self) -> int:
        """Bytes of these rows."""
        return self.raw.nbytes

    def rows(self, start: int, stop: int) -> FileWeight:
        """Rows [start, stop), sharing memory."""
        part = packed_rows(self.raw, self.shape[0], start, stop)
        return replace(self, shape=(stop - start, self.shape[1]), raw=part)

    def dequantise(self) -> Tensor:
        """The weights, float32 [m, n]."""
        return formats.dequantise(self.raw, self.qtype, self.shape)


PackedWeight: TypeAlias = PlaneWeight | FileWeight


def pack(packed: Tensor, qtype: QType, shape: tuple[int, int]) -> PackedWeight:
    """Repacks a weight [m, n] = `shape` from the file's bytes, uint8 [nbytes], on the device where they are.

    Formats not in `FORMATS` keep the bytes as they are. Raises QuantError where bytes and shape do not fit.
    """
    expected = formats.packed_nbytes(qtype, shape)
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise formats.QuantError(
            f"{qtype.name} of shape {shape} takes {expected} bytes of 1-D uint8, "
            f"not {packed.dtype} of shape {tuple(packed.shape)}"
        )
    if qtype not in FORMATS:
        return FileWeight(qtype, shape, packed)
    layout = FORMATS[qtype]
    tiles = packed.view(-1, layout.block.block_bytes).split(_TILE // layout.block.block_size)
    parts = [_pack_blocks(blocks, layout) for blocks in tiles]
    low, high, d, s = zip(*parts, strict=True)
    return PlaneWeight(qtype, shape, torch.cat(low), _joined(high), torch.cat(d), _joined(s), plane_rows=shape[0])


def concatenate(weights: Sequence[PlaneWeight]) -> PlaneWeight:
    """One weight with the rows of all, which are of one format and one row length.

    In new memory, except when they follow each other in the same planes already.
    """
    first = weights[0]
    ends = list(accumulate(weight.shape[0] for weight in weights))
    shape = (ends[-1], first.shape[1])
    places = [first.first_row, *(first.first_row + end for end in ends[:-1])]
    if all(w.low is first.low and w.first_row == place for w, place in zip(weights, places, strict=True)):
        return replace(first, shape=shape)
    low, high, d, s = zip(*(weight.own_planes() for weight in weights), strict=True)
    return PlaneWeight(first.qtype, shape, torch.cat(low), _joined(high), torch.cat(d), _joined(s), plane_rows=shape[0])


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The parts of a plane as one; None where the format does not have that plane, and so no part is there."""
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _pack_blocks(blocks: Tensor, layout: Format) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    q = layout.integers(blocks).view(-1, CHUNK)
    planes, shift = [], 0
    for width in layout.planes:
        planes.append(_plane(q >> shift & (1 << width) - 1, width))
        shift += width
    d, s = layout.factors(blocks)
    if s is not None:
        s = s.contiguous().view(-1).view(torch.int8 if layout.scales == "s32" else torch.int16)
    return planes[0], planes[1] if len(planes) == 2 else None, d.contiguous().view(-1), s


def _plane(q: Tensor, width: int) -> Tensor:
    """Integers of `width` bits, uint8 [chunks, 32] → int32 [words], as in the module's first table."""
    fields = q.view(-1, 8 // width, 16 if width == 4 else 4)  # (f), (j) or (f, j) is the field of a byte
    packed = fields[:, 0].clone()
    for i in range(1, 8 // width):
        packed |= fields[:, i] << width * i
    return packed.view(-1).view(torch.int32)


def _unplane(plane: Tensor, width: int) -> Tensor:
    """The reverse: int32 [words] → uint8 [chunks, 32]."""
    packed = plane.view(torch.uint8).view(-1, 16 if width == 4 else 4)
    fields = [packed >> width * i & (1 << width) - 1 for i in range(8 // width)]
    return torch.stack(fields, dim=1).view(-1, CHUNK)


def _scales(kind: str, d: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scale and offset, float32 [chunks, 1 or 2]: one for each 32 or each 16 weights."""
    if s is None:  # half, pair
        if kind == "half":
            return d.float().view(-1, 1), None
        return d.view(-1, 2)[:, :1].float(), d.view(-1, 2)[:, 1:].float()
    d = d.view(-1, 2 if kind in ("k32", "k16") else 1).float().repeat_interleave(8, dim=0)
    if kind in ("s16", "s32"):
        return d * s.view(torch.int8).view(len(d), -1).float(), None
    s = s.view(torch.uint8).view(-1, 2)
    if kind == "k32":
        return d[:, :1] * s[:, :1].float(), -(d[:, 1:] * s[:, 1:].float())
    return d[:, :1] * (s & 15).float(), -(d[:, 1:] * (s >> 4).float())


def _fields(part: Tensor, group: int, width: int) -> Tensor:
    """Cuts bytes [blocks, bytes] into fields of `width` bits: the lowest of `group` bytes, their next, and so on."""
    part = part.view(len(part), -1, group)
    fields = [part >> shift & (1 << width) - 1 for shift in range(0, 8, width)]
    return torch.stack(fields, dim=2).view(len(part), -1)


def _bits(part: Tensor) -> Tensor:
    """Bits of bytes [blocks, bytes], the least significant one first."""
    return (part[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=part.device) & 1).view(len(part), -1)


def _halves(first: int, count: int) -> Callable[[Tensor], tuple[Tensor, None]]:
    """`count` float16 at byte `first` of a block, and no s."""
    return lambda blocks: (_half(blocks, first, count), None)


def _half(blocks: Tensor, first: int, count: int = 1) -> Tensor:
    return blocks[:, first : first + 2 * count].clone(memory_format=torch.contiguous_format).view(torch.float16)


def _factors_k32(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """d, dmin, and s and t side by side, of Q4_K and Q5_K."""
    s, t, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    s = torch.cat([s & 63, low & 15 | s >> 6 << 4], dim=1)
    t = torch.cat([t & 63, low >> 4 | t >> 6 << 4], dim=1)
    return _half(blocks, 0, 2), torch.stack([s, t], dim=2)


def _factors_q3(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """d, and s less 32, of Q3_K."""
    s = _fields(blocks[:, 96:104], 8, 4) | _fields(blocks[:, 104:108], 4, 2) << 4
    return _half(blocks, 108), s - 32


def _factors_iq4_xs(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """d, and s less 32, of IQ4_XS."""
    s = _fields(blocks[:, 4:8], 1, 4) | _fields(blocks[:, 2:4], 1, 2) << 4
    return _half(blocks, 0), s - 32


_FORMATS = (
    Format(integer_formats.Q4_0, 4, 8, "half", lambda b: _fields(b[:, 2:], 16, 4), _halves(0, 1)),
    Format(integer_formats.Q4_1, 4, 0, "pair", lambda b: _fields(b[:, 4:], 16, 4), _halves(0, 2)),
    Format(
        integer_formats.Q5_0, 5, 16, "half", lambda b: _fields(b[:, 6:], 16, 4) | _bits(b[:, 2:6]) << 4, _halves(0, 1)
    ),
    Format(
        integer_formats.Q5_1, 5, 0, "pair", lambda b: _fields(b[:, 8:], 16, 4) | _bits(b[:, 4:8]) << 4, _halves(0, 2)
    ),
    Format(integer_formats.Q8_0, 8, 128, "half", lambda b: b[:, 2:] ^ 128, _halves(0, 1)),
    Format(
        integer_formats.Q2_K, 2, 0, "k16", lambda b: _fields(b[:, 16:80], 32, 2), lambda b: (_half(b, 80, 2), b[:, :16])
    ),
    Format(
        integer_formats.Q3_K,
        3,
        4,
        "s16",
        lambda b: _fields(b[:, 32:96], 32, 2) | _fields(b[:, :32], 32, 1) << 2,
        _factors_q3,
    ),
    Format(integer_formats.Q4_K, 4, 0, "k32", lambda b: _fields(b[:, 16:], 32, 4), _factors_k32),
    Format(
        integer_formats.Q5_K,
        5,
        0,
        "k32",
        lambda b: _fields(b[:, 48:], 32, 4) | _fields(b[:, 16:48], 32, 1) << 4,
        _factors_k32,
    ),
    Format(
        integer_formats.Q6_K,
        6,
        32,
        "s16",
        lambda b: _fields(b[:, :128], 64, 4) | _fields(b[:, 128:192], 32, 2) << 4,
        lambda b: (_half(b, 208), b[:, 192:208]),
    ),
    Format(level_formats.IQ4_NL, 4, 0, "half", lambda b: _fields(b[:, 2:], 16, 4), _halves(0, 1), levels=True),
    Format(level_formats.IQ4_XS, 4, 0, "s32", lambda b: _fields(b[:, 8:], 16, 4), _factors_iq4_xs, levels=True),
)
FORMATS: dict[QType, Format] = {layout.block.qtype: layout for layout in _FORMATS}
