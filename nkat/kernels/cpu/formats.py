"""How packed weights lie in memory for the CPU kernels, and how a kernel takes them apart.

A weight's rows are taken 16 at a time (a *tile*, one row a lane), and columns one *unit* at a time: the block of the
file format, 32 or 256. A unit's bytes are the blocks of the 16 rows with their fields interleaved, so that one 64-byte
load has the same four bytes of all 16 rows. The numbers themselves are the file's, and so is their size, except that
the 6-bit scales of Q3_K, Q4_K, Q5_K and IQ4_XS take a byte each (at most 3.7 % more).

Every block format comes out as w = s·q + m with an unsigned byte q, and float32 s and m for each group of columns:
what stands for zero (8 in Q4_0, 32 in Q6_K, ...) goes into m. Where a block's bits are is drawn in `nkat.gguf.formats`;
the byte numbers below are those of the drawing of a layout's `block`.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from llvmlite import ir
from torch import Tensor

from nkat.gguf import formats
from nkat.gguf.formats import BlockFormat, packed_nbytes
from nkat.kernels.cpu.jit import compile_kernel
from nkat.kernels.cpu.llvm import F16, I8, I16, I32, Builder, Operand, Value
from nkat.kernels.cpu.program import aligned, pool

ROWS = 16  # of a tile: the lanes of a 512-bit vector of float32

BLOCK_LAYOUTS: dict[GGMLQuantizationType, type[BlockLayout]] = {}


class Interleaver:
    """Takes blocks of 16 rows and stores their fields, each field's 16 values next to one another.

    Positions are bytes in a block. What is stored comes one after the other; `size` counts its bytes.
    """

    def __init__(self, k: Builder, block: Value, row_bytes: Value, out: Value) -> None:
        self.k, self.block, self.row_bytes, self.out = k, block, row_bytes, out
        self.size = 0

    def vector(self, kind: ir.Type, byte: Operand) -> Value:
        """The number at `byte` of each row's block."""
        at = self.block + byte
        return self.k.vector([self.k.load(kind, at + self.row_bytes * row) for row in range(ROWS)])

    def store(self, value: Value, nbytes: int) -> None:
        self.k.store(value, self.out + self.size)
        self.size += nbytes

    def halves(self, byte: int, count: int) -> None:
        for i in range(count):
            self.store(self.vector(I16(), byte + 2 * i), _HALF)

    def bytes(self, byte: int, count: int) -> None:
        for i in range(count):
            self.store(self.vector(I8(), byte + i), _BYTE)

    def words(self, byte: int, count: int, flip: int = 0) -> None:
        """Four bytes at a time. flip: bits that are inverted in each."""
        with self.k.loop(0, count) as i:
            word = self.vector(I32(), i * 4 + byte)
            self.k.store(word ^ flip if flip else word, self.out + (i * _WORD + self.size))
        self.size += _WORD * count

    def four_bytes(self, word: Value, minus: int = 0) -> None:
        """The bytes of words, as one vector each."""
        for byte in range(4):
            self.store((word >> 8 * byte).narrow(I8()) - minus, _BYTE)

    def spread_bits(self, byte: int) -> None:
        """32 bits: bit i goes to bit i // 4 of byte i % 4, so that a shift and a mask find those of four neighbours."""
        word = self.vector(I32(), byte)
        spread = self.k.value(0, I32(ROWS))
        for place in range(4):
            every_fourth = (word >> place) & 0x11111111
            for shift, mask in ((3, 0x03030303), (6, 0x000F000F), (12, 0x000000FF)):
                every_fourth = (every_fourth | every_fourth >> shift) & mask
            spread = spread | every_fourth << 8 * place
        self.store(spread, _WORD)


class BlockLayout:
    """How the kernels keep one block format and take it apart: the entry of its type in `BLOCK_LAYOUTS`.

    block: the format, with the drawing of its bits
    columns:  of a unit, a block's weights
    group:    columns that share s and m
    seven_bit: no q is above 127
    wider: bytes that a block takes more than in the file
    interleave(rows): stores a unit's parts, in the order in which the next two look for them
    scales(k, unit, group): s and m of the tile's rows, float32 vectors
    quad(k, unit, quad): q of the columns 4·quad to 4·quad + 3: four bytes a lane, as int32
    """

    block: type[BlockFormat]
    columns: int
    group = 32
    seven_bit = True
    wider = 0

    def __init_subclass__(cls, block: type[BlockFormat]) -> None:
        cls.block, cls.columns = block, block.block_size
        BLOCK_LAYOUTS[block.qtype] = cls

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        raise NotImplementedError

    @staticmethod
    def scales(k: Builder, unit: Value, group: int) -> tuple[Value, Value]:
        raise NotImplementedError

    @staticmethod
    def quad(k: Builder, unit: Value, quad: int) -> Value:
        raise NotImplementedError


# What stands in a unit: the parts below one after the other, each so many bytes a field of the 16 rows
_HALF, _BYTE, _WORD = 2 * ROWS, ROWS, 4 * ROWS


def _half(k: Builder, unit: Value, byte: int) -> Value:
    return k.load(F16(ROWS), unit + byte).float32()


def _signed_byte(k: Builder, unit: Value, byte: int) -> Value:
    return k.load(I8(ROWS), unit + byte).signed(I32()).float32()


def _unsigned_byte(k: Builder, unit: Value, byte: int) -> Value:
    return k.load(I8(ROWS), unit + byte).unsigned(I32()).float32()


def _word(k: Builder, unit: Value, byte: int) -> Value:
    return k.load(I32(ROWS), unit + byte)


def _shifted(word: Value, by: int) -> Value:
    """Right by so many bits; left where negative."""
    return word >> by if by > 0 else word << -by if by < 0 else word


def _bits(word: Value, shift: int, mask: int) -> Value:
    """Bits `shift`... of each byte, moved to the bottom, under a mask of one byte."""
    return _shifted(word, shift) & (mask * 0x01010101)


def _nibble(k: Builder, unit: Value, quad: int, apart: int) -> Value:
    """Four nibbles a lane, where byte i of the format has q[i] below and q[i + 4·apart] above."""
    pair, place = divmod(quad, 2 * apart)
    word = _word(k, unit, _WORD * (pair * apart + place % apart))
    return _bits(word, 4 * (place // apart), 0x0F)


class _Q4_0(BlockLayout, block=formats.Q4_0):
    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 1)
        rows.words(2, 4)

    @staticmethod
    def scales(k: Builder, unit: Value, group: int) -> tuple[Value, Value]:
        s = _half(k, unit, 0)
        return s, s * -8.0

    @staticmethod
    def quad(k: Builder, unit: Value, quad: int) -> Value:
        return _nibble(k, unit + _HALF, quad, 4)


class _Q4_1(BlockLayout, block=formats.Q4_1):
    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 2)
        rows.words(4, 4)

    @staticmethod
    def scales(k: Builder, unit: Value, group: int) -> tuple[Value, Value]:
        return _half(k, unit, 0), _half(k, unit, _HALF)

    @staticmethod
    def quad(k: Builder, unit: Value, quad: int) -> Value:
        return _nibble(k, unit + 2 * _HALF, quad, 4)


class _Q5_0(BlockLayout, block=formats.Q5_0):
    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 1)
        rows.spread_bits(2)
        rows.words(6, 4)

    @staticmethod
    def scales(k: Builder, unit: Value, group: int) -> tuple[Value, Value]:
        s = _half(k, unit, 0)
        return s, s * -16.0

    @staticmethod
    def quad(k: Builder, unit: Value, quad: int) -> Value:
        high = _bits(_word(k, unit, _HALF), quad - 4, 0x10)
        return _nibble(k, unit + _HALF + _WORD, quad, 4) | high


class _Q5_1(BlockLayout, block=formats.Q5_1):
    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 2)
        rows.spread_bits(4)
        rows.words(8, 4)

    @staticmethod
    def scales(k: Builder, unit: Value, group: int) -> tuple[Value, Value]:
        return _half(k, unit, 0), _half(k, unit, _HALF)

    @staticmethod
    def quad(k: Builder, unit: Value, quad: int) -> Value:
        return _Q5_0.quad(k, unit + _HALF, quad)


class _Q8_0(BlockLayout, block=formats.Q8_0):
    seven_bit = False

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 1)
        rows.words(2, 8, flip=-0x7F7F7F80)

    @staticmethod
    def scales(k: Builder, unit: Value, group: int) -> tuple[Value, Value]:
        s = _half(k, unit, 0)
        return s, s * -128.0

    @staticmethod
    def quad(k: Builder, unit: Value, quad: int) -> Value:
        return _word(k, unit, _HALF + _WORD * quad)


def _two_bits(k: Builder, unit: Value, quad: int) -> Value:
    """Four fields of two bits a lane, which Q2_K and Q3_K keep alike."""
    half, place = divmod(quad, 32)
    return _bits(_word(k, unit, _WORD * (8 * half + place % 8)), 2 * (place // 8), 0x03)


class _Q2_K(BlockLayout, block=formats.Q2_K):
    group = 16

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(80, 2)
        rows.bytes(0, 16)
        rows.words(16, 16)

    @staticmethod
    def scales(k: Builder, unit: Value, group: int) -> tuple[Value, Value]:
        both = k.load(I8(ROWS), unit + (2 * _HALF + _BYTE * group)).unsigned(I32())
        s, t = (both & 0x0F).float32(), (both >> 4).float32()
        return s * _half(k, unit, 0), t * (_half(k, unit, _HALF) * -1.0)

    @staticmethod
    def quad(k: Builder, unit: Value, quad: int) -> Value:
        return _two_bits(k, unit + (2 * _HALF + 16 * _BYTE), quad)


class _Q3_K(BlockLayout, block=formats.Q3_K):
    group = 16
    wider = 4

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(108, 1)
        low, middle, high = (rows.vector(I32(), byte) for byte in (96, 100, 104))
        for word in (
            (low & 0x0F0F0F0F) | (high << 4 & 0x30303030),
            (middle & 0x0F0F0F0F) | (high << 2 & 0x30303030),
            (low >> 4 & 0x0F0F0F0F) | (high & 0x30303030),
            (middle >> 4 & 0x0F0F0F0F) | (high >> 2 & 0x30303030),
        ):
            rows.four_bytes(word, minus=32)
        rows.words(0, 24)

    @staticmethod
    def scales(k: Builder, unit: Value, group: int) -> tuple[Value, Value]:
        s = _signed_byte(k, unit, _HALF + _BYTE * group) * _half(k, unit, 0)
        return s, s * -4.0

    @staticmethod
    def quad(k: Builder, unit: Value, quad: int) -> Value:
        unit = unit + (_HALF + 16 * _BYTE)
        high = _bits(_word(k, unit, _WORD * (quad % 8)), quad // 8 - 2, 0x04)
        return _two_bits(k, unit + 8 * _WORD, quad) | high


def _k_scales(rows: Interleaver) -> None:
    """The 6-bit s, then t, of Q4_K and Q5_K, a byte each."""
    s, t, low = (rows.vector(I32(), byte) for byte in (4, 8, 12))
    rows.four_bytes(s & 0x3F3F3F3F)
    rows.four_bytes((low & 0x0F0F0F0F) | (s >> 2 & 0x30303030))
    rows.four_bytes(t & 0x3F3F3F3F)
    rows.four_bytes((low >> 4 & 0x0F0F0F0F) | (t >> 2 & 0x30303030))


class _Q4_K(BlockLayout, block=formats.Q4_K):
    wider = 4

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 2)
        _k_scales(rows)
        rows.words(16, 32)

    @staticmethod
    def scales(k: Builder, unit: Value, group: int) -> tuple[Value, Value]:
        s = _unsigned_byte(k, unit, 2 * _HALF + _BYTE * group)
        t = _unsigned_byte(k, unit, 2 * _HALF + _BYTE * (8 + group))
        return s * _half(k, unit, 0), t * (_half(k, unit, _HALF) * -1.0)

    @staticmethod
    def quad(k: Builder, unit: Value, quad: int) -> Value:
        return _nibble(k, unit + (2 * _HALF + 16 * _BYTE), quad, 8)


class _Q5_K(BlockLayout, block=formats.Q5_K):
    wider = 4

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 2)
        _k_scales(rows)
        rows.words(16, 40)

    scales = _Q4_K.scales

    @staticmethod
    def quad(k: Builder, unit: Value, quad: int) -> Value:
        unit = unit + (2 * _HALF + 16 * _BYTE)
        high = _bits(_word(k, unit, _WORD * (quad % 8)), quad // 8 - 4, 0x10)
        return _nibble(k, unit + 8 * _WORD, quad, 8) | high


class _Q6_K(BlockLayout, block=formats.Q6_K):
    group = 16

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(208, 1)
        rows.bytes(192, 16)
        rows.words(0, 48)

    @staticmethod
    def scales(k: Builder, unit: Value, group: int) -> tuple[Value, Value]:
        s = _signed_byte(k, unit, _HALF + _BYTE * group) * _half(k, unit, 0)
        return s, s * -32.0

    @staticmethod
    def quad(k: Builder, unit: Value, quad: int) -> Value:
        unit = unit + (_HALF + 16 * _BYTE)
        half, place = divmod(quad, 32)
        high = _bits(_word(k, unit, _WORD * (32 + 8 * half + place % 8)), 2 * (place // 8) - 4, 0x30)
        return _nibble(k, unit, quad, 16) | high


def _levels(k: Builder, nibbles: Value) -> Value:
    """The IQ4 level of each nibble plus 128: a look-up in a table of 16 bytes."""
    table = [level + 128 for level in formats.IQ4_LEVELS]
    return k.look_up(table, nibbles)


class _IQ4_NL(_Q4_0, block=formats.IQ4_NL):
    seven_bit = False

    @staticmethod
    def scales(k: Builder, unit: Value, group: int) -> tuple[Value, Value]:
        s = _half(k, unit, 0)
        return s, s * -128.0

    @staticmethod
    def quad(k: Builder, unit: Value, quad: int) -> Value:
        return _levels(k, _Q4_0.quad(k, unit, quad))


class _IQ4_XS(BlockLayout, block=formats.IQ4_XS):
    seven_bit = False
    wider = 2

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 1)
        high, low = rows.vector(I16(), 2).unsigned(I32()), rows.vector(I32(), 4)
        for group in range(8):
            s = ((low >> 4 * group) & 0x0F) | ((high >> 2 * group) & 0x03) << 4
            rows.store((s - 32).narrow(I8()), _BYTE)
        rows.words(8, 32)

    @staticmethod
    def scales(k: Builder, unit: Value, group: int) -> tuple[Value, Value]:
        s = _signed_byte(k, unit, _HALF + _BYTE * group) * _half(k, unit, 0)
        return s, s * -128.0

    @staticmethod
    def quad(k: Builder, unit: Value, quad: int) -> Value:
        return _levels(k, _nibble(k, unit + (_HALF + 8 * _BYTE), quad, 4))


def unit_bytes(qtype: GGMLQuantizationType) -> int:
    """Bytes of one unit of a tile."""
    layout = BLOCK_LAYOUTS[qtype]
    return ROWS * (layout.block.block_bytes + layout.wider)


@functools.cache
def _repack_kernel(qtype: GGMLQuantizationType) -> int:
    """arguments: packed rows, bytes of a row, units, tiles, out. Each thread takes some of the tiles."""
    layout = BLOCK_LAYOUTS[qtype]

    def emit(k: Builder) -> None:
        packed, row_bytes, units, tiles, out = (k.pointer(0), k.integer(1), k.integer(2), k.integer(3), k.pointer(4))
        with (
            k.loop(tiles * k.thread // k.threads, tiles * (k.thread + 1) // k.threads) as tile,
            k.loop(0, units) as unit,
        ):
            block = packed + (tile * row_bytes * ROWS + unit * layout.block.block_bytes)
            rows = Interleaver(k, block, row_bytes, out + (tile * units + unit) * unit_bytes(qtype))
            layout.interleave(rows)
            assert rows.size == unit_bytes(qtype)

    return compile_kernel(f"repack_{qtype.name}", emit)


def repack(packed: Tensor, qtype: GGMLQuantizationType, shape: tuple[int, int], threads: int = 1) -> np.ndarray:
    """A block-quantised weight [m, n] in tiles: uint8 [ceil(m / 16), bytes of a tile], rows beyond m zero."""
    m, n = shape
    units, row_bytes = n // BLOCK_LAYOUTS[qtype].columns, packed_nbytes(qtype, shape) // m
    rows = packed.numpy()
    out = aligned((-(-m // ROWS), units * unit_bytes(qtype)), np.uint8)
    whole = m // ROWS
    arguments = np.array([rows.ctypes.data, row_bytes, units, whole, out.ctypes.data], np.int64)
    pool(threads).run(_repack_kernel(qtype), arguments)
    if whole < len(out):
        rest = np.zeros(ROWS * row_bytes, np.uint8)
        rest[: (m - whole * ROWS) * row_bytes] = rows[whole * ROWS * row_bytes :]
        arguments[:] = rest.ctypes.data, row_bytes, units, 1, out[whole:].ctypes.data
        pool(threads).run(_repack_kernel(qtype), arguments)
    return out


def repack_float(packed: Tensor, qtype: GGMLQuantizationType, shape: tuple[int, int]) -> np.ndarray:
    """A float weight [m, n] in tiles of [column, 16 rows]: uint8 [ceil(m / 16), 16·n·width], rows beyond m zero."""
    m, n = shape
    width = GGML_QUANT_SIZES[qtype][1]
    words = packed.clone().view({2: torch.int16, 4: torch.int32}[width]).view(m, n)
    tiles = -(-m // ROWS)
    out = words.new_zeros(tiles, n, ROWS)
    whole = m // ROWS
    out[:whole] = words[: whole * ROWS].view(whole, ROWS, n).transpose(1, 2)
    if whole < tiles:
        out[whole, :, : m - whole * ROWS] = words[whole * ROWS :].T
    return out.view(tiles, -1).view(torch.uint8).numpy()
