"""Block formats of 4-bit numbers that stand for entries of a short table of levels: IQ4_NL, IQ4_XS, MXFP4, NVFP4."""

from __future__ import annotations

import functools

import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from nkat.gguf.blocks import BlockFormat, float16_numbers, nibbles, one_scale

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

    scales = classmethod(one_scale)

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return _levels(IQ4_LEVELS, nibbles(blocks[:, 2:], 16))


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
        (d,) = float16_numbers(cls, blocks)
        group = torch.arange(8, dtype=torch.int32, device=blocks.device)
        high = blocks.view(torch.int16)[:, 1, None].to(torch.int32) >> 2 * group & 0x03
        low = blocks.view(torch.int32)[:, 1, None] >> 4 * group & 0x0F
        return d * (low + 16 * high - 32).float(), None

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return _levels(IQ4_LEVELS, nibbles(blocks[:, 8:], 16))


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
        return _levels(FP4_LEVELS, nibbles(blocks[:, 1:], 16))


@functools.cache
def _ue4m3(device: torch.device) -> Tensor:
    """float32 (256,): half of what a byte stands for as an unsigned FP8 number of 4 exponent and 3 mantissa bits.

    Half, because `FP4_LEVELS` are doubled. Bit 7 is not looked at, but in 127, which is NaN elsewhere and 0 here.
    """
    byte = torch.arange(256, device=device)
    exponent, mantissa = byte >> 3 & 0x0F, byte & 0x07
    whole = torch.where(exponent == 0, mantissa, mantissa + 8).float()
    value = torch.ldexp(whole, exponent.clamp(min=1) - 11)
    return torch.where(byte == 0x7F, 0.0, value)


class NVFP4(BlockFormat, qtype=GGMLQuantizationType.NVFP4, halves=()):
    """w = s/2·level[k], level = `FP4_LEVELS`: 64 weights in 36 bytes, an 8-bit float s for each 16.

    bytes  0-3    byte g: s[g], exponent in bits 3-6 (bias 7), mantissa in bits 0-2
           4-11   byte i: k[i] in bits 0-3, k[8 + i] in bits 4-7
          12-35   the same for k[16:32], k[32:48] and k[48:64]
    """

    @staticmethod
    def scales(blocks: Tensor) -> tuple[Tensor, None]:
        s = blocks[:, :4].to(torch.int32)
        return _ue4m3(blocks.device).index_select(0, s.reshape(-1)).view(-1, 4), None

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        return _levels(FP4_LEVELS, nibbles(blocks[:, 4:], 8))


FORMATS: tuple[type[BlockFormat], ...] = (IQ4_NL, IQ4_XS, MXFP4, NVFP4)
