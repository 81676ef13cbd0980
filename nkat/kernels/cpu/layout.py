"""How packed weights lie in memory for the CPU kernels: what the layouts of all block formats have in common.

A weight's rows are taken 16 at a time (a *tile*, one row a lane), and columns one *unit* at a time: the block of the
file format, 32 or 256. A unit's bytes are the blocks of the 16 rows with their fields interleaved, so that one 64-byte
load has the same four bytes of all 16 rows.

Every block format comes out as w = s·q + m with an unsigned byte q, and float32 s and m for each group of columns:
what stands for zero (8 in Q4_0, 32 in Q6_K, ...) goes into m. The layouts are in `nkat.kernels.cpu.integer_layouts` and
beside it, and `nkat.kernels.cpu.formats` has them all. Where a block's bits are is drawn where the format is, in
`nkat.gguf.integer_formats` or beside it; the byte numbers in a layout are those of its `block`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from llvmlite import ir

from nkat.gguf.blocks import BlockFormat
from nkat.kernels.cpu.llvm import F16, I8, I16, I32, Builder, Operand, Value

ROWS = 16  # of a tile: the lanes of a 512-bit vector of float32
Field: TypeAlias = "tuple[Value, int, int]"  # a word, how many bits of each byte are below the field, its mask


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
            self.store(self.vector(I16(), byte + 2 * i), HALF)

    def bytes(self, byte: int, count: int) -> None:
        for i in range(count):
            self.store(self.vector(I8(), byte + i), BYTE)

    def words(self, byte: int, count: int, flip: int = 0) -> None:
        """Four bytes at a time. flip: bits that are inverted in each."""
        with self.k.loop(0, count) as i:
            word = self.vector(I32(), i * 4 + byte)
            self.k.store(word ^ flip if flip else word, self.out + (i * WORD + self.size))
        self.size += WORD * count

    def four_bytes(self, word: Value, minus: int = 0) -> None:
        """The bytes of words, as one vector each."""
        for byte in range(4):
            self.store((word >> 8 * byte).narrow(I8()) - minus, BYTE)

    def bundles(self, count: int, words: int, make: Callable[[Value], list[Value]]) -> None:
        """make(i): so many words, for each i below count."""
        with self.k.loop(0, count) as i:
            for j, word in enumerate(make(i)):
                self.k.store(word, self.out + (i * (words * WORD) + (self.size + j * WORD)))
        self.size += count * words * WORD

    def spread_bits(self, byte: int) -> None:
        """32 bits: bit i goes to bit i // 4 of byte i % 4, so that a shift and a mask find those of four neighbours."""
        word = self.vector(I32(), byte)
        spread = self.k.value(0, I32(ROWS))
        for place in range(4):
            spread = spread | every_fourth(word >> place) << 8 * place
        self.store(spread, WORD)


class BlockLayout:
    """How the kernels keep one block format and take it apart: its type's entry in `formats.BLOCK_LAYOUTS`.

    block: the format, with the drawing of its bits; none in a class that several layouts have in common
    columns:  of a unit, a block's weights
    group:    columns that share s and m
    zero:     the q that stands for 0 in a format without a minimum: m = -zero·s
    seven_bit: no q is above 127
    wider: bytes that a block takes more than in the file
    parts, bundle: in each of so many parts of a unit, so many quads, at equal distances, have their bits in the same
        words
    interleave(rows): stores a unit's parts, in the order in which the next three look for them
    factors(k, unit): the parts of s and m that a whole unit shares, float32 vectors; no second one where zero says it
    steps(k, unit, group): what a group multiplies them by, float32 vectors; None where group == columns
    field(k, unit, quad): q of the columns 4·quad to 4·quad + 3, four bytes a lane, as a word of int32 lanes, and the
        bits of each byte that are q: how many lie below them, and a mask of one byte
    """

    block: type[BlockFormat]
    columns: int
    group = 32
    zero: float = 0
    seven_bit = True
    wider = 0
    parts = 1
    bundle = 1

    def __init_subclass__(cls, block: type[BlockFormat] | None = None) -> None:
        if block is not None:
            cls.block, cls.columns = block, block.block_size

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
        return word if mask == 0xFF else cut(word, below, mask)

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
HALF, BYTE, WORD = 2 * ROWS, ROWS, 4 * ROWS


def half_at(k: Builder, unit: Value, byte: int) -> Value:
    return k.load(F16(ROWS), unit + byte).float32()


def signed_byte_at(k: Builder, unit: Value, byte: int) -> Value:
    return k.load(I8(ROWS), unit + byte).signed(I32()).float32()


def unsigned_byte_at(k: Builder, unit: Value, byte: int) -> Value:
    return k.load(I8(ROWS), unit + byte).unsigned(I32()).float32()


def word_at(k: Builder, unit: Value, byte: int) -> Value:
    return k.load(I32(ROWS), unit + byte)


def cut(word: Value, shift: int, mask: int) -> Value:
    """Bits `shift`... of each byte, moved to the bottom, under a mask of one byte; to the left where negative."""
    moved = word >> shift if shift > 0 else word << -shift if shift < 0 else word
    return moved & (mask * 0x01010101)


def every_fourth(word: Value) -> Value:
    """Bits 0, 4, 8, ... of a word, next to one another: 8 of them."""
    found = word & 0x11111111
    for shift, mask in ((3, 0x03030303), (6, 0x000F000F), (12, 0x000000FF)):
        found = (found | found >> shift) & mask
    return found


def whole(word: Value) -> Field:
    """A word whose bytes are q."""
    return word, 0, 0xFF


def nibble(k: Builder, unit: Value, quad: int, apart: int) -> Field:
    """Four nibbles a lane, where byte i of the format has q[i] below and q[i + 4·apart] above."""
    pair, place = divmod(quad, 2 * apart)
    word = word_at(k, unit, WORD * (pair * apart + place % apart))
    return word, 4 * (place // apart), 0x0F


def join(words: list[Value]) -> Value:
    """The 6 bits that the top two of each byte of three words make, those of the first word lowest."""
    a, b, c = words
    return cut(a, 6, 0x03) | cut(b, 4, 0x0C) | cut(c, 2, 0x30)


def split(words: list[Value], top: Value) -> list[Value]:
    """The three words with 6 more bits at the top of their bytes: `join` backwards."""
    return [word | cut(top, -shift, 0xC0) for word, shift in zip(words, (6, 4, 2), strict=True)]


def level_of(k: Builder, levels: tuple[int, ...], zero: float, nibbles: Value) -> Value:
    """The level of each nibble plus what stands for zero: a look-up in a table of 16 bytes."""
    return k.look_up([int(level + zero) for level in levels], nibbles)
