"""Block formats of whole multiples of a scale, plus an offset or not: Q4_0 to Q8_0, Q2_K to Q6_K, TQ1_0 and TQ2_0."""

from __future__ import annotations

import functools

import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from nkat.gguf.blocks import (
    BlockFormat,
    copy_of,
    fields,
    float16_numbers,
    nibbles,
    one_scale,
    scale_and_offset,
    signed,
    unsigned,
)


class Q4_0(BlockFormat, qtype=GGMLQuantizationType.Q4_0, halves=(0,)):
    """w = d·(q - 8): 32 weights in 18 bytes.

    bytes  0-1    float16 d
           2-17   byte i: q[i] in bits 0-3, q[16 + i] in bits 4-7
    """

    scales = classmethod(one_scale)

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return signed(nibbles(blocks[:, 2:], 16), 8)


class Q4_1(BlockFormat, qtype=GGMLQuantizationType.Q4_1, halves=(0, 2)):
    """w = d·q + m: 32 weights in 20 bytes.

    bytes  0-1    float16 d
           2-3    float16 m
           4-19   byte i: q[i] in bits 0-3, q[16 + i] in bits 4-7
    """

    scales = classmethod(scale_and_offset)

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return unsigned(nibbles(blocks[:, 4:], 16))


@functools.cache
def _fifth_bits(device: torch.device) -> Tensor:
    """int64 (256,): byte i of entry b is bit i of b, moved to bit 4."""
    byte = torch.arange(256, device=device).unsqueeze(1)
    bit = torch.arange(8, device=device)
    return ((byte >> bit & 1) << 4).to(torch.uint8).view(torch.int64).squeeze(1)


def _with_fifth_bits(low: Tensor, blocks: Tensor, byte: int) -> Tensor:
    """Bit i of the 32-bit word at `byte` of a block becomes bit 4 of the block's i-th byte of `low`, in place."""
    halves = blocks.view(torch.int16)  # blocks of 22 bytes cannot be viewed as 32-bit words
    word = torch.stack([halves[:, byte // 2], halves[:, byte // 2 + 1]], dim=1).view(torch.uint8)
    return low.bitwise_or_(_fifth_bits(blocks.device).index_select(0, word.to(torch.int32).view(-1)))


class Q5_0(BlockFormat, qtype=GGMLQuantizationType.Q5_0, halves=(0,)):
    """w = d·(q - 16): 32 weights in 22 bytes.

    bytes  0-1    float16 d
           2-5    bit i of this 32-bit word: bit 4 of q[i]
           6-21   byte i: bits 0-3 of q[i] in bits 0-3, of q[16 + i] in bits 4-7
    """

    scales = classmethod(one_scale)

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return signed(_with_fifth_bits(nibbles(blocks[:, 6:], 16), blocks, 2), 16)


class Q5_1(BlockFormat, qtype=GGMLQuantizationType.Q5_1, halves=(0, 2)):
    """w = d·q + m: 32 weights in 24 bytes.

    bytes  0-1    float16 d
           2-3    float16 m
           4-7    bit i of this 32-bit word: bit 4 of q[i]
           8-23   byte i: bits 0-3 of q[i] in bits 0-3, of q[16 + i] in bits 4-7
    """

    scales = classmethod(scale_and_offset)

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return unsigned(_with_fifth_bits(nibbles(blocks[:, 8:], 16), blocks, 4))


class Q8_0(BlockFormat, qtype=GGMLQuantizationType.Q8_0, halves=(0,)):
    """w = d·q: 32 weights in 34 bytes.

    bytes  0-1    float16 d
           2-33   int8 q[i]
    """

    scales = classmethod(one_scale)

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return copy_of(blocks[:, 2:]).view(torch.int8)


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
        d, dmin = float16_numbers(cls, blocks)
        packed = copy_of(blocks[:, :16])
        return d * (packed & 0x0F).float(), -dmin * (packed >> 4).float()

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return unsigned(fields(blocks[:, 16:80], 32, (0, 2, 4, 6), 0x03))


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
        (d,) = float16_numbers(cls, blocks)
        low, middle, high = copy_of(blocks[:, 96:108]).view(torch.int32).unbind(1)  # four bytes at once
        s = [
            (low & 0x0F0F0F0F) | (high << 4 & 0x30303030),
            (middle & 0x0F0F0F0F) | (high << 2 & 0x30303030),
            (low >> 4 & 0x0F0F0F0F) | (high & 0x30303030),
            (middle >> 4 & 0x0F0F0F0F) | (high >> 2 & 0x30303030),
        ]
        return d * signed(torch.stack(s, dim=1), 32).float(), None

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        low = fields(blocks[:, 32:96], 32, (0, 2, 4, 6), 0x03)
        return signed(low.bitwise_or_(fields(blocks[:, :32], 32, (-2, -1, 0, 1, 2, 3, 4, 5), 0x04)), 4)


def _k_scales(cls: type[BlockFormat], blocks: Tensor) -> tuple[Tensor, Tensor]:
    """d·s and -dmin·t of Q4_K and Q5_K."""
    d, dmin = float16_numbers(cls, blocks)
    s, t, low = copy_of(blocks[:, 4:16]).view(torch.int32).unbind(1)  # four bytes at once
    s = torch.stack([s & 0x3F3F3F3F, (low & 0x0F0F0F0F) | (s >> 2 & 0x30303030)], dim=1)
    t = torch.stack([t & 0x3F3F3F3F, (low >> 4 & 0x0F0F0F0F) | (t >> 2 & 0x30303030)], dim=1)
    return d * unsigned(s).float(), -dmin * unsigned(t).float()


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
        return unsigned(nibbles(blocks[:, 16:], 32))


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
        low = nibbles(blocks[:, 48:], 32)
        return unsigned(low.bitwise_or_(fields(blocks[:, 16:48], 32, (-4, -3, -2, -1, 0, 1, 2, 3), 0x10)))


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
        (d,) = float16_numbers(cls, blocks)
        return d * blocks[:, 192:208].view(torch.int8).float(), None

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        low = nibbles(blocks[:, :128], 64)
        return signed(low.bitwise_or_(fields(blocks[:, 128:192], 32, (-4, -2, 0, 2), 0x30)), 32)


@functools.cache
def _powers_of_three(count: int, device: torch.device) -> Tensor:
    """uint8 (count, 1): 1, 3, 9 and so on."""
    return torch.tensor([3**i for i in range(count)], dtype=torch.uint8, device=device).unsqueeze(1)


def _from_digit(part: Tensor, count: int) -> Tensor:
    """Each byte, a fraction of 256 in base 3, from its first digit on, from its second, ...: uint8 (n, count·bytes)."""
    return (part.unsqueeze(1) * _powers_of_three(count, part.device)).flatten(1)  # what is in front is lost: modulo 256


class TQ1_0(BlockFormat, qtype=GGMLQuantizationType.TQ1_0, halves=(52,)):
    """w = d·(q - 1): 256 weights in 54 bytes, ternary.

    A byte v holds the first digits of v / 256 = q₀/3 + q₁/9 + q₂/27 + ... in base 3.

    bytes  0-31   byte i: q[i], q[32 + i], q[64 + i], q[96 + i], q[128 + i] as its digits
          32-47   byte i: q[160 + i], q[176 + i], q[192 + i], q[208 + i], q[224 + i] as its digits
          48-51   byte i: q[240 + i], q[244 + i], q[248 + i], q[252 + i] as its digits
          52-53   float16 d
    """

    scales = classmethod(one_scale)

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        parts = ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4))
        left = torch.cat([_from_digit(part, count) for part, count in parts], dim=1).view(-1)
        # the first digit of each, less 1
        return (left > 85).view(torch.int8).add_((left > 170).view(torch.int8)).sub_(1)


class TQ2_0(BlockFormat, qtype=GGMLQuantizationType.TQ2_0, halves=(64,)):
    """w = d·(q - 1): 256 weights in 66 bytes, ternary by its quantiser, though q may be 3.

    bytes  0-31   byte i: q[i], q[32 + i], q[64 + i], q[96 + i] in bits 0-1, 2-3, 4-5, 6-7
          32-63   the same for q[128:256]
          64-65   float16 d
    """

    scales = classmethod(one_scale)

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return signed(fields(blocks[:, :64], 32, (0, 2, 4, 6), 0x03), 1)


FORMATS: tuple[type[BlockFormat], ...] = (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, TQ1_0, TQ2_0)
