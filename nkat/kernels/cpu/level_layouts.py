"""How the CPU kernels keep the block formats of a short table of levels: `nkat.gguf.level_formats`.

The numbers are the file's, and so is their size, except that the 6-bit scales of IQ4_XS take a byte each (1.5 % more).
"""

from __future__ import annotations

from nkat.gguf import level_formats
from nkat.kernels.cpu.integer_layouts import Q4_0
from nkat.kernels.cpu.layout import (
    BYTE,
    HALF,
    ROWS,
    BlockLayout,
    Field,
    Interleaver,
    cut,
    level_of,
    nibble,
    signed_byte_at,
    whole,
)
from nkat.kernels.cpu.llvm import F16, F32, I8, I16, I32, Builder, Value


class IQ4_NL(Q4_0, block=level_formats.IQ4_NL):
    zero = 128
    seven_bit = False

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        return whole(level_of(k, level_formats.IQ4_LEVELS, 128, cut(*Q4_0.field(k, unit, quad))))


class IQ4_XS(BlockLayout, block=level_formats.IQ4_XS):
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
            rows.store((s - 32).narrow(I8()), BYTE)
        rows.words(8, 32)

    factors = Q4_0.factors

    @staticmethod
    def steps(k: Builder, unit: Value, group: int) -> tuple[Value, Value | None] | None:
        return signed_byte_at(k, unit, HALF + BYTE * group), None

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        return whole(level_of(k, level_formats.IQ4_LEVELS, 128, cut(*nibble(k, unit + (HALF + 8 * BYTE), quad, 4))))


class MXFP4(BlockLayout, block=level_formats.MXFP4):
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
        return whole(level_of(k, level_formats.FP4_LEVELS, 12, cut(*nibble(k, unit + BYTE, quad, 4))))


class NVFP4(BlockLayout, block=level_formats.NVFP4):
    zero = 12
    group = 16
    parts = 4
    bundle = 2

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        for group in range(4):
            s = rows.vector(I8(), group)
            rows.store(rows.k.select(s.equals(0x7F), rows.k.value(0, I8(ROWS)), s), BYTE)
        rows.words(4, 8)

    @staticmethod
    def factors(k: Builder, unit: Value) -> tuple[Value, Value | None]:
        return k.value(128.0, F32(ROWS)), None

    @staticmethod
    def steps(k: Builder, unit: Value, group: int) -> tuple[Value, Value | None] | None:
        """The bits of a float16, whose exponents begin 7 further down and have half of s for the doubled levels."""
        s = k.load(I8(ROWS), unit + BYTE * group).unsigned(I16())
        return ((s & 0x7F) << 7).bits(F16(ROWS)).float32(), None

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        return whole(level_of(k, level_formats.FP4_LEVELS, 12, cut(*nibble(k, unit + 4 * BYTE, quad, 2))))


LAYOUTS: tuple[type[BlockLayout], ...] = (IQ4_NL, IQ4_XS, MXFP4, NVFP4)
