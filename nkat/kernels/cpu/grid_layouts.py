"""How the CPU kernels keep the block formats of a codebook: `nkat.gguf.grid_formats`.

To look eight neighbours up in the grid at each use would be all the work there is. They are looked up once, when a
weight is put into tiles, and kept as numbers of the few levels that a grid has: of 16 in four bits where it has eight
magnitudes (IQ3), of 6 in three bits where it has three (IQ2), of 3 in two bits (IQ1, whose shift up or down is kept
beside them). That is more than the file has, and much less than the processor would be busy with:

    bits a weight   IQ1_S  IQ1_M  IQ2_XXS  IQ2_XS  IQ2_S  IQ3_XXS  IQ3_S
    in the file     1.56   1.75   2.06     2.31    2.56   3.06     3.44
    in tiles        2.19   2.44   3.19     3.31    3.31   4.19     4.19

Neighbours come in 32 at a time, so that words hold what belongs to the same columns. A 4-bit s stands with that of the
next group in a byte; a group is multiplied by s + 1/2, and the unit by the rest of d·(2·s + 1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from nkat.gguf import grid_formats
from nkat.kernels.cpu.layout import (
    BYTE,
    HALF,
    ROWS,
    WORD,
    BlockLayout,
    Field,
    Interleaver,
    cut,
    every_fourth,
    half_at,
    join,
    level_of,
    nibble,
    split,
    whole,
    word_at,
)
from nkat.kernels.cpu.llvm import I8, I16, I32, Builder, Value


def _words(entries: np.ndarray, apart: int) -> list[int]:
    """Entries [count, 4 or 8] as int32: a byte for each of four neighbours, and of eight the upper four `apart` bits
    above the lower ones."""
    low, high = entries[:, :4], entries[:, 4:]
    numbers = low | high << apart if high.size else low
    return np.ascontiguousarray(numbers, np.uint8).view("<i4")[:, 0].tolist()


def _numbers(name: str, apart: int = 0) -> list[int]:
    """For each entry of a grid, which of its levels its neighbours have, the smallest level being 0."""
    grid = grid_formats.grid(name)
    _, numbers = np.unique(grid, return_inverse=True)
    return _words(numbers.reshape(grid.shape), apart)


@functools.cache
def _levels(name: str, bits: int) -> tuple[int, ...]:
    """16 levels: a magnitude by the lower bits of its number, minus where the bit above them is set."""
    magnitudes = [*np.unique(grid_formats.grid(name)).tolist(), 0, 0][: 1 << bits - 1]
    return (*magnitudes, *(-level for level in magnitudes)) * (16 >> bits)


def _entries(k: Builder, table: Value, index: Value) -> Value:
    """Numbers of an int32 table for the lanes of an index."""
    offset = index << 2
    return k.vector([k.load(I32(), table + offset.lane(row)) for row in range(ROWS)])


def _spread(four: Value) -> Value:
    """Bit i of four bits to bit 0 of byte i."""
    return (four * 0x00204081) & 0x01010101


def _eight(signs: Value) -> Value:
    """Seven bits with an eighth that makes the number of set bits even."""
    parity = signs ^ signs >> 4
    parity = parity ^ parity >> 2
    return signs | ((parity ^ parity >> 1) & 1) << 7


def _store_nibbles(rows: Interleaver, words: list[Value]) -> None:
    """Bytes of two groups each, from words of 8 bits that count."""
    for word in words:
        rows.store(word.narrow(I8()), BYTE)


def _nibble_of_group(k: Builder, unit: Value, group: int) -> Value:
    """The four bits of a group, behind the unit's d."""
    both = k.load(I8(ROWS), unit + (HALF + BYTE * (group // 2))).unsigned(I32())
    return both >> 4 if group % 2 else both & 0x0F


def _top_nibbles(rows: Interleaver, byte: int, apart: int) -> None:
    """The s of eight groups, in bits 28-31 of a word each, so many bytes behind one another."""
    words = [rows.vector(I32(), byte + apart * group) for group in range(8)]
    _store_nibbles(rows, [(even >> 28) | (odd >> 24 & 0xF0) for even, odd in zip(words[::2], words[1::2], strict=True)])


class _Grid(BlockLayout):
    """A unit is d, the groups' s, and the weights' numbers, 32 columns behind one another.

    times: of d for s + 1/2
    """

    times: float

    @classmethod
    def numbers_at(cls, unit: Value) -> Value:
        return unit + (HALF + cls.columns // cls.group // 2 * BYTE)

    @classmethod
    def factors(cls, k: Builder, unit: Value) -> tuple[Value, Value | None]:
        return half_at(k, unit, 0) * cls.times, None

    @staticmethod
    def steps(k: Builder, unit: Value, group: int) -> tuple[Value, Value | None] | None:
        return _nibble_of_group(k, unit, group).float32() + 0.5, None


class _ThreeBits(_Grid):
    """IQ2. Words of three: each byte has the numbers of two quads, and two of the six bits of two more."""

    times = 0.25
    zero = 43
    parts = 8
    bundle = 8

    @classmethod
    def bundles(cls, rows: Interleaver, make: Callable[[Value], list[tuple[Value, Value]]]) -> None:
        """make(i): numbers of entries and eight signs, four of each, for the 32 columns from 32·i on."""
        table = rows.k.table(_numbers(cls.block.qtype.name, apart=3))

        def bundle(i: Value) -> list[Value]:
            pairs = [
                _entries(rows.k, table, entry) | _spread(signs & 0x0F) << 2 | _spread(signs >> 4) << 5
                for entry, signs in make(i)
            ]
            return split(pairs[:3], pairs[3])

        rows.bundles(8, 3, bundle)

    @classmethod
    def field(cls, k: Builder, unit: Value, quad: int) -> Field:
        part, i = divmod(quad, 8)
        at = cls.numbers_at(unit)
        words = [word_at(k, at, WORD * (3 * part + j)) for j in range(3)]
        number = cut(words[i // 2] if i < 6 else join(words), 3 * (i % 2), 0x07)
        return whole(level_of(k, _levels(cls.block.qtype.name, 3), cls.zero, number))


class IQ2_XXS(_ThreeBits, block=grid_formats.IQ2_XXS):
    wider = 36

    @classmethod
    def interleave(cls, rows: Interleaver) -> None:
        rows.halves(0, 1)
        _top_nibbles(rows, 6, 8)

        def entries(i: Value) -> list[tuple[Value, Value]]:
            numbers, signs = (rows.vector(I32(), i * 8 + byte) for byte in (2, 6))
            return [((numbers >> 8 * j) & 0xFF, _eight((signs >> 7 * j) & 0x7F)) for j in range(4)]

        cls.bundles(rows, entries)


class IQ2_XS(_ThreeBits, block=grid_formats.IQ2_XS):
    group = 16
    wider = 32

    @classmethod
    def interleave(cls, rows: Interleaver) -> None:
        rows.halves(0, 1)
        rows.bytes(66, 8)

        def entries(i: Value) -> list[tuple[Value, Value]]:
            words = [rows.vector(I32(), i * 8 + byte) for byte in (2, 6)]
            halves = [word >> shift for word in words for shift in (0, 16)]
            return [(half & 0x1FF, _eight((half >> 9) & 0x7F)) for half in halves]

        cls.bundles(rows, entries)


class IQ2_S(_ThreeBits, block=grid_formats.IQ2_S):
    group = 16
    wider = 24

    @classmethod
    def interleave(cls, rows: Interleaver) -> None:
        rows.halves(0, 1)
        rows.bytes(74, 8)

        def entries(i: Value) -> list[tuple[Value, Value]]:
            low, signs = (rows.vector(I32(), i * 4 + byte) for byte in (2, 34))
            high = rows.vector(I8(), i + 66).unsigned(I32())
            return [((low >> 8 * j) & 0xFF | (high >> 2 * j & 0x03) << 8, (signs >> 8 * j) & 0xFF) for j in range(4)]

        cls.bundles(rows, entries)


class _FourBits(_Grid):
    """IQ3. Each byte has the number of a weight below, and of the one four columns behind it above."""

    parts = 32
    bundle = 2

    @classmethod
    def bundles(cls, rows: Interleaver, make: Callable[[Value], list[tuple[Value, Value, Value]]]) -> None:
        """make(i): numbers of two entries and eight signs, four of each, for the 32 columns from 32·i on."""
        table = rows.k.table(_numbers(cls.block.qtype.name))

        def bundle(i: Value) -> list[Value]:
            words = []
            for first, second, signs in make(i):
                magnitudes = _entries(rows.k, table, first) | _entries(rows.k, table, second) << 4
                words.append(cls.signed(magnitudes, _spread(signs & 0x0F) | _spread(signs >> 4) << 4))
            return words

        rows.bundles(8, 4, bundle)

    @staticmethod
    def signed(magnitudes: Value, signs: Value) -> Value:
        """Nibbles of magnitudes with bit 0 of the nibbles of signs."""
        raise NotImplementedError


class IQ3_XXS(_FourBits, block=grid_formats.IQ3_XXS):
    times = 0.5
    zero = 62
    wider = 36

    @classmethod
    def interleave(cls, rows: Interleaver) -> None:
        rows.halves(0, 1)
        _top_nibbles(rows, 66, 4)

        def entries(i: Value) -> list[tuple[Value, Value, Value]]:
            words = [rows.vector(I32(), i * 8 + byte) for byte in (2, 6)]
            signs = rows.vector(I32(), i * 4 + 66)
            return [
                (
                    (words[j // 2] >> 16 * (j % 2)) & 0xFF,
                    (words[j // 2] >> 16 * (j % 2) + 8) & 0xFF,
                    _eight((signs >> 7 * j) & 0x7F),
                )
                for j in range(4)
            ]

        cls.bundles(rows, entries)

    @staticmethod
    def signed(magnitudes: Value, signs: Value) -> Value:
        return magnitudes | signs << 3

    @classmethod
    def field(cls, k: Builder, unit: Value, quad: int) -> Field:
        number = cut(*nibble(k, cls.numbers_at(unit), quad, 1))
        return whole(level_of(k, _levels(cls.block.qtype.name, 4), cls.zero, number))


class IQ3_S(_FourBits, block=grid_formats.IQ3_S):
    """The levels are the odd numbers from -15 to 15: two apart, and so the nibble itself is q."""

    times = 4.0
    zero = 7.5
    wider = 24

    @classmethod
    def interleave(cls, rows: Interleaver) -> None:
        rows.halves(0, 1)
        rows.bytes(106, 4)

        def entries(i: Value) -> list[tuple[Value, Value, Value]]:
            words = [rows.vector(I32(), i * 8 + byte) for byte in (2, 6)]
            high = rows.vector(I8(), i + 66).unsigned(I32())
            signs = rows.vector(I32(), i * 4 + 74)
            numbers = [(words[j // 4] >> 8 * (j % 4)) & 0xFF | (high >> j & 0x01) << 8 for j in range(8)]
            return [(numbers[2 * j], numbers[2 * j + 1], (signs >> 8 * j) & 0xFF) for j in range(4)]

        cls.bundles(rows, entries)

    @staticmethod
    def signed(magnitudes: Value, signs: Value) -> Value:
        return (magnitudes | 0x88888888 - (1 << 32)) ^ ((signs << 4) - signs)

    @classmethod
    def field(cls, k: Builder, unit: Value, quad: int) -> Field:
        return nibble(k, cls.numbers_at(unit), quad, 1)


class _TwoBits(_Grid):
    """IQ1. Words of four quads: a level is 8·(number - 1), and 1 more or less than that."""

    times = 2.0
    parts = 16
    bundle = 4

    @classmethod
    def bundles(cls, rows: Interleaver, make: Callable[[Value], list[Value]]) -> None:
        """make(i): numbers of four entries, for the 32 columns from 32·i on."""
        table = rows.k.table(_numbers(cls.block.qtype.name, apart=2))

        def bundle(i: Value) -> list[Value]:
            pairs = [_entries(rows.k, table, entry) for entry in make(i)]
            return [first | second << 4 for first, second in (pairs[:2], pairs[2:])]

        rows.bundles(8, 2, bundle)

    @classmethod
    def field(cls, k: Builder, unit: Value, quad: int) -> Field:
        return word_at(k, cls.numbers_at(unit), WORD * (quad // 4)), 2 * (quad % 4), 0x03


class IQ1_S(_TwoBits, block=grid_formats.IQ1_S):
    """w = d·(2·s + 1)·(number - 1 + 1/8 - t/4), where t stands above s: the shift goes into m."""

    wider = 20

    @classmethod
    def interleave(cls, rows: Interleaver) -> None:
        rows.halves(0, 1)
        words = [rows.vector(I32(), 34 + 4 * i) for i in range(4)]
        _store_nibbles(rows, [(word >> 12 & 0x0F) | (word >> 24 & 0xF0) for word in words])

        def entries(i: Value) -> list[Value]:
            low, high = rows.vector(I32(), i * 4 + 2), rows.vector(I16(), i * 2 + 34).unsigned(I32())
            return [(low >> 8 * j) & 0xFF | (high >> 3 * j & 0x07) << 8 for j in range(4)]

        cls.bundles(rows, entries)

    @classmethod
    def factors(cls, k: Builder, unit: Value) -> tuple[Value, Value | None]:
        d = half_at(k, unit, 0)
        return d * cls.times, d * (-cls.times / 8)

    @staticmethod
    def steps(k: Builder, unit: Value, group: int) -> tuple[Value, Value | None] | None:
        both = _nibble_of_group(k, unit, group)
        s = (both & 0x07).float32() + 0.5
        return s, s * ((both >> 3 << 1) + 7).float32()


class IQ1_M(_TwoBits, block=grid_formats.IQ1_M):
    """The t of 32 entries are a word behind the s; a weight's number with its t above it is looked up."""

    times = 0.25
    zero = 9
    group = 16
    wider = 22

    @classmethod
    def interleave(cls, rows: Interleaver) -> None:
        halves = [rows.vector(I32(), byte) for byte in (48, 52)]
        d = [half >> shift & 0xF000 for half in halves for shift in (0, 16)]
        rows.store((d[0] >> 12 | d[1] >> 8 | d[2] >> 4 | d[3]).narrow(I16()), HALF)
        words = [half >> shift for half in halves for shift in (0, 6, 16, 22)]
        _store_nibbles(rows, [(word & 0x07) | (word >> 3 & 0x07) << 4 for word in words])
        shifts = [every_fourth(rows.vector(I32(), 32 + 4 * i) >> 3) << 8 * i for i in range(4)]
        rows.store(shifts[0] | shifts[1] | shifts[2] | shifts[3], WORD)

        def entries(i: Value) -> list[Value]:
            low, high = rows.vector(I32(), i * 4), rows.vector(I16(), i * 2 + 32).unsigned(I32())
            return [(low >> 8 * j) & 0xFF | (high >> 4 * j & 0x07) << 8 for j in range(4)]

        cls.bundles(rows, entries)

    @classmethod
    def field(cls, k: Builder, unit: Value, quad: int) -> Field:
        shifts = word_at(k, cls.numbers_at(unit), 0)
        shift = (shifts << 31 - quad // 2).shift_signed(31) & 0x04040404
        number = cut(*super().field(k, unit + WORD, quad)) | shift
        return whole(level_of(k, _SHIFTED, cls.zero, number))


# 8·(number - 1), and 1 more where t, above the number, is not set, else 1 less
_SHIFTED = (-7, 1, 9, 0, -9, -1, 7, 0) * 2
LAYOUTS: tuple[type[BlockLayout], ...] = (IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S)
