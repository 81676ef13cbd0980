"""How packed weights lie in memory for the CPU kernels, and how a kernel takes them apart.

A weight's rows are taken 16 at a time (a *tile*, one row a lane), and columns one *unit* at a time: the block of the
file format, 32 or 256. A unit's bytes are the blocks of the 16 rows with their fields interleaved, so that one 64-byte
load has the same four bytes of all 16 rows. The numbers themselves are the file's, and so is their size, except that
the 6-bit scales of Q3_K, Q4_K, Q5_K and IQ4_XS take a byte each (at most 3.7 % more).

Every block format comes out as w = s·q + m with an unsigned byte q, and float32 s and m for each group of columns:
what stands for zero (8 in Q4_0, 32 in Q6_K, ...) goes into m. Where a block's bits are is drawn where the
format is, in `nkat.gguf.integer_formats` or beside it; the byte numbers below are those of a layout's `block`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from gguf.constants import GGMLQuantizationType
from llvmlite import ir

from nkat.gguf import integer_formats, level_formats
from nkat.gguf.blocks import BlockFormat
from nkat.kernels.cpu.llvm import F16, F32, I8, I16, I32, Builder, Operand, Value

ROWS = 16  # of a tile: the lanes of a 512-bit vector of float32
Field: TypeAlias = "tuple[Value, int, int]"  # a word, how many bits of each byte are below the field, its mask

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

    def bundles(self, count: int, words: int, make: Callable[[Value], list[Value]]) -> None:
        """make(i): so many words, for each i below count."""
        with self.k.loop(0, count) as i:
            for j, word in enumerate(make(i)):
                self.k.store(word, self.out + (i * (words * _WORD) + (self.size + j * _WORD)))
        self.size += count * words * _WORD

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
    zero:     the q that stands for 0 in a format without a minimum: m = -zero·s
    seven_bit: no q is above 127
    wider: bytes that a block takes more than in the file
    parts, bundle: in each of so many parts of a unit, so many quads, at equal distances, have their bits in the same
        words
    interleave(rows): stores a unit's parts, in the order in which the next three look for them
    factors(k, unit): the parts of s and m that a whole unit shares, float32 vectors; no second one where zero says it
    steps(k, unit, group): what a group multiplies them by: whole numbers, float32 vectors; None where group == columns
    field(k, unit, quad): q of the columns 4·quad to 4·quad + 3, four bytes a lane, as a word of int32 lanes, and the
        bits of each byte that are q: how many lie below them, and a mask of one byte
    """

    block: type[BlockFormat]
    columns: int
    group = 32
    zero = 0
    seven_bit = True
    wider = 0
    parts = 1
    bundle = 1

    def __init_subclass__(cls, block: type[BlockFormat]) -> None:
        cls.block, cls.columns = block, block.block_size
        BLOCK_LAYOUTS[block.qtype] = cls

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        raise NotImplementedError

    @staticmethod
    def factors(k: Builder, unit: Value) -> tuple[Value, Value | None]:
        raise NotImplementedError

    @staticmethod
    def steps(k: Builder, unit: Value, group: int) -> tuple[Value, Value | None] | None:
        return None

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        raise NotImplementedError

    @classmethod
    def scales(cls, k: Builder, unit: Value, group: int) -> tuple[Value, Value]:
        """s and m of a group of the tile's rows, float32 vectors."""
        s, m = cls.factors(k, unit)
        step = cls.steps(k, unit, group)
        if step is not None:
            s = step[0] * s
            m = step[1] * m if step[1] is not None and m is not None else m
        return s, s * -float(cls.zero) if m is None else m

    @classmethod
    def quad(cls, k: Builder, unit: Value, quad: int) -> Value:
        """q of the columns 4·quad to 4·quad + 3: four bytes a lane, as int32."""
        word, below, mask = cls.field(k, unit, quad)
        return word if mask == 0xFF else _bits(word, below, mask)

    @classmethod
    def order(cls) -> list[int]:
        """A unit's quads, those that share words next to one another."""
        quads = cls.columns // 4 // cls.parts
        apart = quads // cls.bundle
        return [
            part * quads + place + apart * i
            for part in range(cls.parts)
            for place in range(apart)
            for i in range(cls.bundle)
        ]


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


def _bits(word: Value, shift: int, mask: int) -> Value:
    """Bits `shift`... of each byte, moved to the bottom, under a mask of one byte; to the left where negative."""
    moved = word >> shift if shift > 0 else word << -shift if shift < 0 else word
    return moved & (mask * 0x01010101)


def _whole(word: Value) -> Field:
    """A word whose bytes are q."""
    return word, 0, 0xFF


def _nibble(k: Builder, unit: Value, quad: int, apart: int) -> Field:
    """Four nibbles a lane, where byte i of the format has q[i] below and q[i + 4·apart] above."""
    pair, place = divmod(quad, 2 * apart)
    word = _word(k, unit, _WORD * (pair * apart + place % apart))
    return word, 4 * (place // apart), 0x0F


def _join(words: list[Value]) -> Value:
    """The 6 bits that the top two of each byte of three words make, those of the first word lowest."""
    a, b, c = words
    return _bits(a, 6, 0x03) | _bits(b, 4, 0x0C) | _bits(c, 2, 0x30)


def _split(words: list[Value], top: Value) -> list[Value]:
    """The three words with 6 more bits at the top of their bytes: `_join` backwards."""
    return [word | _bits(top, -shift, 0xC0) for word, shift in zip(words, (6, 4, 2), strict=True)]


class _Q4_0(BlockLayout, block=integer_formats.Q4_0):
    zero = 8
    bundle = 2

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 1)
        rows.words(2, 4)

    @staticmethod
    def factors(k: Builder, unit: Value) -> tuple[Value, Value | None]:
        return _half(k, unit, 0), None

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        return _nibble(k, unit + _HALF, quad, 4)


class _Q4_1(BlockLayout, block=integer_formats.Q4_1):
    bundle = 2

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 2)
        rows.words(4, 4)

    @staticmethod
    def factors(k: Builder, unit: Value) -> tuple[Value, Value | None]:
        return _half(k, unit, 0), _half(k, unit, _HALF)

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        return _nibble(k, unit + 2 * _HALF, quad, 4)


class _Q5_0(BlockLayout, block=integer_formats.Q5_0):
    zero = 16
    bundle = 2

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 1)
        rows.spread_bits(2)
        rows.words(6, 4)

    factors = _Q4_0.factors

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        high = _bits(_word(k, unit, _HALF), quad - 4, 0x10)
        return _whole(_bits(*_nibble(k, unit + _HALF + _WORD, quad, 4)) | high)


class _Q5_1(BlockLayout, block=integer_formats.Q5_1):
    bundle = 2

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 2)
        rows.spread_bits(4)
        rows.words(8, 4)

    factors = _Q4_1.factors

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        return _Q5_0.field(k, unit + _HALF, quad)


class _Q8_0(BlockLayout, block=integer_formats.Q8_0):
    zero = 128
    seven_bit = False

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 1)
        rows.words(2, 8, flip=-0x7F7F7F80)

    factors = _Q4_0.factors

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        return _whole(_word(k, unit, _HALF + _WORD * quad))


class _Q2_K(BlockLayout, block=integer_formats.Q2_K):
    group = 16
    parts = 2
    bundle = 4

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(80, 2)
        rows.bytes(0, 16)
        rows.words(16, 16)

    @staticmethod
    def factors(k: Builder, unit: Value) -> tuple[Value, Value | None]:
        return _half(k, unit, 0), _half(k, unit, _HALF) * -1.0

    @staticmethod
    def steps(k: Builder, unit: Value, group: int) -> tuple[Value, Value | None] | None:
        both = k.load(I8(ROWS), unit + (2 * _HALF + _BYTE * group)).unsigned(I32())
        return (both & 0x0F).float32(), (both >> 4).float32()

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        half, place = divmod(quad, 32)
        word = _word(k, unit, 2 * _HALF + 16 * _BYTE + _WORD * (8 * half + place % 8))
        return word, 2 * (place // 8), 0x03


class _Q3_K(BlockLayout, block=integer_formats.Q3_K):
    """Kept in words of three: each byte has q of two quads, and two of the six bits of two more."""

    group = 16
    zero = 4
    wider = 4
    bundle = 8

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

        def bundle(place: Value) -> list[Value]:
            fourth, *two = (rows.vector(I32(), place * 4 + byte) for byte in (0, 32, 64))
            q = [_bits(two[i // 4], 2 * (i % 4), 0x03) | _bits(fourth, i - 2, 0x04) for i in range(8)]
            pairs = [q[i] | q[i + 1] << 3 for i in range(0, 8, 2)]
            return _split(pairs[:3], pairs[3])

        rows.bundles(8, 3, bundle)

    factors = _Q4_0.factors

    @staticmethod
    def steps(k: Builder, unit: Value, group: int) -> tuple[Value, Value | None] | None:
        return _signed_byte(k, unit, _HALF + _BYTE * group), None

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        i, place = divmod(quad, 8)
        words = [_word(k, unit, _HALF + 16 * _BYTE + _WORD * (3 * place + j)) for j in range(3)]
        return words[i // 2] if i < 6 else _join(words), 3 * (i % 2), 0x07


def _k_scales(rows: Interleaver) -> None:
    """The 6-bit s, then t, of Q4_K and Q5_K, a byte each."""
    s, t, low = (rows.vector(I32(), byte) for byte in (4, 8, 12))
    rows.four_bytes(s & 0x3F3F3F3F)
    rows.four_bytes((low & 0x0F0F0F0F) | (s >> 2 & 0x30303030))
    rows.four_bytes(t & 0x3F3F3F3F)
    rows.four_bytes((low >> 4 & 0x0F0F0F0F) | (t >> 2 & 0x30303030))


class _Q4_K(BlockLayout, block=integer_formats.Q4_K):
    wider = 4
    parts = 4
    bundle = 2

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 2)
        _k_scales(rows)
        rows.words(16, 32)

    factors = _Q2_K.factors

    @staticmethod
    def steps(k: Builder, unit: Value, group: int) -> tuple[Value, Value | None] | None:
        s = _unsigned_byte(k, unit, 2 * _HALF + _BYTE * group)
        return s, _unsigned_byte(k, unit, 2 * _HALF + _BYTE * (8 + group))

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        return _nibble(k, unit + (2 * _HALF + 16 * _BYTE), quad, 8)


class _Q5_K(BlockLayout, block=integer_formats.Q5_K):
    wider = 4
    parts = 4
    bundle = 2

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 2)
        _k_scales(rows)
        rows.words(16, 40)

    factors = _Q4_K.factors
    steps = _Q4_K.steps

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        unit = unit + (2 * _HALF + 16 * _BYTE)
        high = _bits(_word(k, unit, _WORD * (quad % 8)), quad // 8 - 4, 0x10)
        return _whole(_bits(*_nibble(k, unit + 8 * _WORD, quad, 8)) | high)


class _Q6_K(BlockLayout, block=integer_formats.Q6_K):
    """Kept in words of three: each byte has q of one quad, and two of the bits of a fourth."""

    group = 16
    zero = 32
    parts = 2
    bundle = 4

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(208, 1)
        rows.bytes(192, 16)

        for half in range(2):

            def bundle(place: Value, half: int = half) -> list[Value]:
                starts = (64 * half, 64 * half + 32, 128 + 32 * half)
                *four, two = (rows.vector(I32(), place * 4 + byte) for byte in starts)
                q = [_bits(four[i % 2], 4 * (i // 2), 0x0F) | _bits(two, 2 * i - 4, 0x30) for i in range(4)]
                return _split(q[:3], q[3])

            rows.bundles(8, 3, bundle)

    factors = _Q4_0.factors

    @staticmethod
    def steps(k: Builder, unit: Value, group: int) -> tuple[Value, Value | None] | None:
        return _signed_byte(k, unit, _HALF + _BYTE * group), None

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        half, i, place = quad // 32, quad % 32 // 8, quad % 8
        words = [_word(k, unit, _HALF + 16 * _BYTE + _WORD * (3 * (8 * half + place) + j)) for j in range(3)]
        return (words[i], 0, 0x3F) if i < 3 else _whole(_join(words))


def _levels(k: Builder, levels: tuple[int, ...], zero: int, nibbles: Value) -> Value:
    """The level of each nibble plus what stands for zero: a look-up in a table of 16 bytes."""
    return k.look_up([level + zero for level in levels], nibbles)


class _IQ4_NL(_Q4_0, block=level_formats.IQ4_NL):
    zero = 128
    seven_bit = False

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        return _whole(_levels(k, level_formats.IQ4_LEVELS, 128, _bits(*_Q4_0.field(k, unit, quad))))


class _IQ4_XS(BlockLayout, block=level_formats.IQ4_XS):
    zero = 128
    seven_bit = False
    wider = 2
    parts = 8
    bundle = 2

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 1)
        high, low = rows.vector(I16(), 2).unsigned(I32()), rows.vector(I32(), 4)
        for group in range(8):
            s = ((low >> 4 * group) & 0x0F) | ((high >> 2 * group) & 0x03) << 4
            rows.store((s - 32).narrow(I8()), _BYTE)
        rows.words(8, 32)

    factors = _Q4_0.factors

    @staticmethod
    def steps(k: Builder, unit: Value, group: int) -> tuple[Value, Value | None] | None:
        return _signed_byte(k, unit, _HALF + _BYTE * group), None

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        return _whole(
            _levels(k, level_formats.IQ4_LEVELS, 128, _bits(*_nibble(k, unit + (_HALF + 8 * _BYTE), quad, 4)))
        )


class _MXFP4(BlockLayout, block=level_formats.MXFP4):
    zero = 12
    bundle = 2

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.bytes(0, 1)
        rows.words(1, 4)

    @staticmethod
    def factors(k: Builder, unit: Value) -> tuple[Value, Value | None]:
        e = k.load(I8(ROWS), unit).unsigned(I32())
        return k.select(e > 1, (e - 1) << 23, (e + 1) << 21).bits(F32(ROWS)), None

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        return _whole(_levels(k, level_formats.FP4_LEVELS, 12, _bits(*_nibble(k, unit + _BYTE, quad, 4))))


def unit_bytes(qtype: GGMLQuantizationType) -> int:
    """Bytes of one unit of a tile."""
    layout = BLOCK_LAYOUTS[qtype]
    return ROWS * (layout.block.block_bytes + layout.wider)


def padded_rows(rows: int) -> int:
    """Rows of whole tiles: the columns that a buffer for a weight's outputs needs."""
    return -(-rows // ROWS) * ROWS
