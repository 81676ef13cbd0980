"""How the CPU kernels keep the block formats of integers: `nkat.gguf.integer_formats`.

The numbers are the file's, and so is their size, except that the 6-bit scales of Q3_K, Q4_K and Q5_K take a byte each
(at most 3.7 % more), and that the digits of TQ1_0 take two bits each (22 % more).
"""

from __future__ import annotations

from nkat.gguf import integer_formats
from nkat.kernels.cpu.layout import (
    BYTE,
    HALF,
    ROWS,
    WORD,
    BlockLayout,
    Field,
    Interleaver,
    cut,
    half_at,
    join,
    nibble,
    signed_byte_at,
    split,
    unsigned_byte_at,
    whole,
    word_at,
)
from nkat.kernels.cpu.llvm import F32, I8, I32, I64, Builder, Operand, Value


class Q4_0(BlockLayout, block=integer_formats.Q4_0):
    zero = 8
    bundle = 2

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 1)
        rows.words(2, 4)

    @staticmethod
    def factors(k: Builder, unit: Value) -> tuple[Value, Value | None]:
        return half_at(k, unit, 0), None

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        return nibble(k, unit + HALF, quad, 4)


class Q4_1(BlockLayout, block=integer_formats.Q4_1):
    bundle = 2

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 2)
        rows.words(4, 4)

    @staticmethod
    def factors(k: Builder, unit: Value) -> tuple[Value, Value | None]:
        return half_at(k, unit, 0), half_at(k, unit, HALF)

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        return nibble(k, unit + 2 * HALF, quad, 4)


class Q5_0(BlockLayout, block=integer_formats.Q5_0):
    zero = 16
    bundle = 2

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 1)
        rows.spread_bits(2)
        rows.words(6, 4)

    factors = Q4_0.factors

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        high = cut(word_at(k, unit, HALF), quad - 4, 0x10)
        return whole(cut(*nibble(k, unit + HALF + WORD, quad, 4)) | high)


class Q5_1(BlockLayout, block=integer_formats.Q5_1):
    bundle = 2

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 2)
        rows.spread_bits(4)
        rows.words(8, 4)

    factors = Q4_1.factors

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        return Q5_0.field(k, unit + HALF, quad)


class Q8_0(BlockLayout, block=integer_formats.Q8_0):
    zero = 128
    seven_bit = False

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 1)
        rows.words(2, 8, flip=-0x7F7F7F80)

    factors = Q4_0.factors

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        return whole(word_at(k, unit, HALF + WORD * quad))


class Q2_K(BlockLayout, block=integer_formats.Q2_K):
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
        return half_at(k, unit, 0), half_at(k, unit, HALF) * -1.0

    @staticmethod
    def steps(k: Builder, unit: Value, group: int) -> tuple[Value, Value | None] | None:
        both = k.load(I8(ROWS), unit + (2 * HALF + BYTE * group)).unsigned(I32())
        return (both & 0x0F).float32(), (both >> 4).float32()

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        half, place = divmod(quad, 32)
        word = word_at(k, unit, 2 * HALF + 16 * BYTE + WORD * (8 * half + place % 8))
        return word, 2 * (place // 8), 0x03


class Q3_K(BlockLayout, block=integer_formats.Q3_K):
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
            q = [cut(two[i // 4], 2 * (i % 4), 0x03) | cut(fourth, i - 2, 0x04) for i in range(8)]
            pairs = [q[i] | q[i + 1] << 3 for i in range(0, 8, 2)]
            return split(pairs[:3], pairs[3])

        rows.bundles(8, 3, bundle)

    factors = Q4_0.factors

    @staticmethod
    def steps(k: Builder, unit: Value, group: int) -> tuple[Value, Value | None] | None:
        return signed_byte_at(k, unit, HALF + BYTE * group), None

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        i, place = divmod(quad, 8)
        words = [word_at(k, unit, HALF + 16 * BYTE + WORD * (3 * place + j)) for j in range(3)]
        return words[i // 2] if i < 6 else join(words), 3 * (i % 2), 0x07


def _k_scales(rows: Interleaver) -> None:
    """The 6-bit s, then t, of Q4_K and Q5_K, a byte each."""
    s, t, low = (rows.vector(I32(), byte) for byte in (4, 8, 12))
    rows.four_bytes(s & 0x3F3F3F3F)
    rows.four_bytes((low & 0x0F0F0F0F) | (s >> 2 & 0x30303030))
    rows.four_bytes(t & 0x3F3F3F3F)
    rows.four_bytes((low >> 4 & 0x0F0F0F0F) | (t >> 2 & 0x30303030))


class Q4_K(BlockLayout, block=integer_formats.Q4_K):
    wider = 4
    parts = 4
    bundle = 2

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 2)
        _k_scales(rows)
        rows.words(16, 32)

    factors = Q2_K.factors

    @staticmethod
    def steps(k: Builder, unit: Value, group: int) -> tuple[Value, Value | None] | None:
        s = unsigned_byte_at(k, unit, 2 * HALF + BYTE * group)
        return s, unsigned_byte_at(k, unit, 2 * HALF + BYTE * (8 + group))

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        return nibble(k, unit + (2 * HALF + 16 * BYTE), quad, 8)


class Q5_K(BlockLayout, block=integer_formats.Q5_K):
    wider = 4
    parts = 4
    bundle = 2

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(0, 2)
        _k_scales(rows)
        rows.words(16, 40)

    factors = Q4_K.factors
    steps = Q4_K.steps

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        unit = unit + (2 * HALF + 16 * BYTE)
        high = cut(word_at(k, unit, WORD * (quad % 8)), quad // 8 - 4, 0x10)
        return whole(cut(*nibble(k, unit + 8 * WORD, quad, 8)) | high)


class Q6_K(BlockLayout, block=integer_formats.Q6_K):
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
                q = [cut(four[i % 2], 4 * (i // 2), 0x0F) | cut(two, 2 * i - 4, 0x30) for i in range(4)]
                return split(q[:3], q[3])

            rows.bundles(8, 3, bundle)

    factors = Q4_0.factors

    @staticmethod
    def steps(k: Builder, unit: Value, group: int) -> tuple[Value, Value | None] | None:
        return signed_byte_at(k, unit, HALF + BYTE * group), None

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        half, i, place = quad // 32, quad % 32 // 8, quad % 8
        words = [word_at(k, unit, HALF + 16 * BYTE + WORD * (3 * (8 * half + place) + j)) for j in range(3)]
        return (words[i], 0, 0x3F) if i < 3 else whole(join(words))


class TQ2_0(BlockLayout, block=integer_formats.TQ2_0):
    zero = 1
    parts = 2
    bundle = 4

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        rows.halves(64, 1)
        rows.words(0, 16)

    factors = Q4_0.factors

    @staticmethod
    def steps(k: Builder, unit: Value, group: int) -> tuple[Value, Value | None] | None:
        return k.value(1.0, F32(ROWS)), None  # one d for all groups

    @staticmethod
    def field(k: Builder, unit: Value, quad: int) -> Field:
        half, place = divmod(quad, 32)
        return word_at(k, unit, HALF + WORD * (8 * half + place % 8)), 2 * (place // 8), 0x03


class TQ1_0(TQ2_0, block=integer_formats.TQ1_0):
    """Kept as TQ2_0: a digit takes two bits."""

    wider = 12

    @staticmethod
    def interleave(rows: Interleaver) -> None:
        def word(*quads: tuple[Operand, Operand]) -> list[Value]:
            """Of four quads, each of whose digits are in four bytes: the first byte, and 3^place."""
            q = [_digits(rows.vector(I32(), byte), power) for byte, power in quads]
            return [q[0] | q[1] << 2 | q[2] << 4 | q[3] << 6]

        rows.halves(52, 1)
        rows.bundles(8, 1, lambda i: word(*((i * 4, 3**place) for place in range(4))))
        rows.bundles(4, 1, lambda i: word((i * 4, 81), *((i * 4 + 32, power) for power in (1, 9, 81))))
        powers = rows.k.value(0x1B090301, I64())  # of the four places of the last four bytes

        def last(i: Value) -> list[Value]:
            power = ((powers >> i * 8) & 0xFF).narrow(I32())
            return word((i * 4 + 16, 81), (i * 4 + 32, 3), (i * 4 + 32, 27), (48, power))

        rows.bundles(4, 1, last)


def _digits(v: Value, power: Operand) -> Value:
    """Of four bytes v: what v·3^place is modulo 256, times 3, over 256."""
    even, odd = ((((v >> shift & 0x00FF00FF) * power & 0x00FF00FF) * 3 >> 8) & 0x00030003 for shift in (0, 8))
    return even | odd << 8


LAYOUTS: tuple[type[BlockLayout], ...] = (
    *(Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K),
    *(TQ1_0, TQ2_0),
)
