"""Block formats of a codebook: eight or four neighbouring weights are one entry of a grid, their signs apart.

The grids are ggml's, of which gguf-py has a copy (`gguf.quants.IQ2_XXS.grid` and the like); it is read from there when
a format is first used. A number k of an entry has 8 to 11 bits, whose high bits may lie elsewhere in the block. Signs
are a bit for each weight, 1 for minus. Where there are seven bits for eight weights, the last weight has the sign that
makes the number of minuses even.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from gguf import quants as gguf_quants
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from nkat.gguf.blocks import BlockFormat, copy_of, float16_numbers


def grid(name: str) -> np.ndarray:
    """The grid of a type, by its name: int8 [entries, neighbours]."""
    codebook = getattr(gguf_quants, name)
    codebook.init_grid()
    numbers: np.ndarray = codebook.grid.reshape(codebook.grid_shape).astype(np.int8)
    return numbers


@functools.cache
def _table(name: str, times: int, device: torch.device) -> Tensor:
    """The grid times a whole number: int64 (entries,) of eight int8 each, or int32 of four."""
    table = torch.from_numpy(grid(name)).to(device) * times
    return table.view(torch.int64 if table.shape[1] == 8 else torch.int32).squeeze(1)


def _entries(name: str, k: Tensor, times: int = 1) -> Tensor:
    """The entries k, an int32 tensor of any shape, one behind the other: int8 (len(k)·8,) or (len(k)·4,)."""
    return _table(name, times, k.device).index_select(0, k.reshape(-1)).view(torch.int8)


@functools.cache
def _eight_signs(device: torch.device) -> Tensor:
    """int64 (256,): byte i of entry b is -1 where bit i of b is set, else 1."""
    byte = torch.arange(256, device=device).unsqueeze(1)
    bit = torch.arange(8, device=device)
    return (1 - 2 * (byte >> bit & 1)).to(torch.int8).view(torch.int64).squeeze(1)


@functools.cache
def _even_signs(device: torch.device) -> Tensor:
    """int64 (128,): the same for seven bits, with an eighth that makes the number of set bits even."""
    seven = torch.arange(128, device=device)
    odd = (seven.unsqueeze(1) >> torch.arange(7, device=device)).bitwise_and_(1).sum(dim=1) & 1
    return _eight_signs(device)[seven + 128 * odd]


def _with_signs(entries: Tensor, signs: Tensor, table: Tensor) -> Tensor:
    """`entries`, each multiplied by its sign in place. signs: an int32 tensor of numbers of `table`'s entries."""
    return entries.mul_(table.index_select(0, signs.reshape(-1)).view(torch.int8))


def _cut(part: Tensor, width: int) -> Tensor:
    """Cuts some bytes of each block into fields of 1, 2 or 4 bits, the lowest first: int32 (n, fields)."""
    shifts = torch.arange(0, 8, width, dtype=torch.int32, device=part.device)
    return (part.to(torch.int32).unsqueeze(-1) >> shifts).bitwise_and_((1 << width) - 1).flatten(1)


def _words(part: Tensor) -> Tensor:
    """Some bytes of each block as 16-bit words: int32 (n, words), with the upper 16 bits as the sign has them."""
    return copy_of(part).view(torch.int16).to(torch.int32)


def _in_words(words: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """The fields (word >> shift) & mask of each word, a word's next to one another: int32 (n, words·fields)."""
    places = torch.tensor(shifts, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(-1) >> places).bitwise_and_(mask).flatten(1)


def _odd(s: Tensor) -> Tensor:
    """2·s + 1 as float32."""
    return (2 * s + 1).float()


class IQ2_XXS(BlockFormat, qtype=GGMLQuantizationType.IQ2_XXS, halves=(0,)):
    """w = d·(2·s + 1)/8·grid[k]·sign: 256 weights in 66 bytes, a 4-bit s for each 32, an 8-bit k for each 8.

    bytes  0-1    float16 d
           2-5    byte j: k[j]
           6-9    bits 7·j to 7·j + 6 of this 32-bit word: seven signs of weights[8·j:8·j + 8]; bits 28-31: s[0]
          10-65   the same for weights[32:64] up to weights[224:256]
    """

    @classmethod
    def scales(cls, blocks: Tensor) -> tuple[Tensor, None]:
        (d,) = float16_numbers(cls, blocks)
        word = copy_of(blocks[:, 2:]).view(torch.int32)[:, 1::2]
        return d * _odd(word >> 28 & 0x0F) * 0.125, None

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        pairs = copy_of(blocks[:, 2:]).view(-1, 8)
        entries = _entries("IQ2_XXS", pairs[:, :4].to(torch.int32))
        signs = _in_words(pairs.view(torch.int32)[:, 1:], (0, 7, 14, 21), 0x7F)
        return _with_signs(entries, signs, _even_signs(blocks.device))


class IQ2_XS(BlockFormat, qtype=GGMLQuantizationType.IQ2_XS, halves=(0,)):
    """w = d·(2·s + 1)/8·grid[k]·sign: 256 weights in 74 bytes, a 4-bit s for each 16, a 9-bit k for each 8.

    bytes  0-1    float16 d
           2-65   16-bit word j: k[j] in bits 0-8, seven signs of weights[8·j:8·j + 8] in bits 9-15
          66-73   byte i: s[2·i] in bits 0-3, s[2·i + 1] in bits 4-7
    """

    @classmethod
    def scales(cls, blocks: Tensor) -> tuple[Tensor, None]:
        (d,) = float16_numbers(cls, blocks)
        return d * _odd(_cut(blocks[:, 66:], 4)) * 0.125, None

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        words = _words(blocks[:, 2:66])
        return _with_signs(_entries("IQ2_XS", words & 0x1FF), words >> 9 & 0x7F, _even_signs(blocks.device))


class IQ2_S(BlockFormat, qtype=GGMLQuantizationType.IQ2_S, halves=(0,)):
    """w = d·(2·s + 1)/8·grid[k]·sign: 256 weights in 82 bytes, a 4-bit s for each 16, a 10-bit k for each 8.

    bytes  0-1    float16 d
           2-33   byte j: bits 0-7 of k[j]
          34-65   byte j, bit i: sign of weight 8·j + i
          66-73   byte i: bits 8-9 of k[4·i], k[4·i + 1], k[4·i + 2], k[4·i + 3] in bits 0-1, 2-3, 4-5, 6-7
          74-81   byte i: s[2·i] in bits 0-3, s[2·i + 1] in bits 4-7
    """

    @classmethod
    def scales(cls, blocks: Tensor) -> tuple[Tensor, None]:
        (d,) = float16_numbers(cls, blocks)
        return d * _odd(_cut(blocks[:, 74:], 4)) * 0.125, None

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        k = blocks[:, 2:34].to(torch.int32) + (_cut(blocks[:, 66:74], 2) << 8)
        return _with_signs(_entries("IQ2_S", k), blocks[:, 34:66].to(torch.int32), _eight_signs(blocks.device))


class IQ3_XXS(BlockFormat, qtype=GGMLQuantizationType.IQ3_XXS, halves=(0,)):
    """w = d·(2·s + 1)/4·grid[k]·sign: 256 weights in 98 bytes, a 4-bit s for each 32, an 8-bit k for each 4.

    bytes  0-1    float16 d
           2-65   byte j: k[j]
          66-69   bits 7·j to 7·j + 6 of this 32-bit word: seven signs of weights[8·j:8·j + 8]; bits 28-31: s[0]
          70-97   the same for weights[32:64] up to weights[224:256]
    """

    @classmethod
    def scales(cls, blocks: Tensor) -> tuple[Tensor, None]:
        (d,) = float16_numbers(cls, blocks)
        return d * _odd(copy_of(blocks[:, 66:]).view(torch.int32) >> 28 & 0x0F) * 0.25, None

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        signs = _in_words(copy_of(blocks[:, 66:]).view(torch.int32), (0, 7, 14, 21), 0x7F)
        return _with_signs(_entries("IQ3_XXS", blocks[:, 2:66].to(torch.int32)), signs, _even_signs(blocks.device))


class IQ3_S(BlockFormat, qtype=GGMLQuantizationType.IQ3_S, halves=(0,)):
    """w = d·(2·s + 1)·grid[k]·sign: 256 weights in 110 bytes, a 4-bit s for each 32, a 9-bit k for each 4.

    bytes  0-1    float16 d
           2-65   byte j: bits 0-7 of k[j]
          66-73   byte j, bit i: bit 8 of k[8·j + i]
          74-105  byte j, bit i: sign of weight 8·j + i
         106-109  byte i: s[2·i] in bits 0-3, s[2·i + 1] in bits 4-7
    """

    @classmethod
    def scales(cls, blocks: Tensor) -> tuple[Tensor, None]:
        (d,) = float16_numbers(cls, blocks)
        return d * _odd(_cut(blocks[:, 106:], 4)), None

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        k = blocks[:, 2:66].to(torch.int32) + (_cut(blocks[:, 66:74], 1) << 8)
        return _with_signs(_entries("IQ3_S", k), blocks[:, 74:106].to(torch.int32), _eight_signs(blocks.device))


class IQ1_S(BlockFormat, qtype=GGMLQuantizationType.IQ1_S, halves=(0,)):
    """w = d·(2·s + 1)/8·(8·grid[k] + 1 - 2·t): 256 weights in 50 bytes.

    A 3-bit s and a bit t for each 32 weights, an 11-bit k for each 8.

    bytes  0-1    float16 d
           2-33   byte j: bits 0-7 of k[j]
          34-49   16-bit word i: bits 8-10 of k[4·i], k[4·i + 1], k[4·i + 2], k[4·i + 3] in bits 0-2, 3-5, 6-8, 9-11;
                  s[i] in bits 12-14, t[i] in bit 15
    """

    @classmethod
    def scales(cls, blocks: Tensor) -> tuple[Tensor, None]:
        (d,) = float16_numbers(cls, blocks)
        return d * _odd(_words(blocks[:, 34:]) >> 12 & 0x07) * 0.125, None

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        words = _words(blocks[:, 34:])
        k = blocks[:, 2:34].to(torch.int32) + (_in_words(words, (0, 3, 6, 9), 0x07) << 8)
        return _moved(_entries("IQ1_S", k, times=8), words >> 15 & 0x01)


class IQ1_M(BlockFormat, qtype=GGMLQuantizationType.IQ1_M, halves=()):
    """w = d·(2·s + 1)/8·(8·grid[k] + 1 - 2·t): 256 weights in 56 bytes.

    A 3-bit s for each 16 weights, a bit t and an 11-bit k for each 8; the grid is that of IQ1_S.

    bytes  0-31   byte j: bits 0-7 of k[j]
          32-47   byte i: bits 8-10 of k[2·i] in bits 0-2, t[2·i] in bit 3;
                  bits 8-10 of k[2·i + 1] in bits 4-6, t[2·i + 1] in bit 7
          48-55   16-bit word i: s[4·i], s[4·i + 1], s[4·i + 2], s[4·i + 3] in bits 0-2, 3-5, 6-8, 9-11;
                  bits 4·i to 4·i + 3 of the float16 d in bits 12-15
    """

    @classmethod
    def scales(cls, blocks: Tensor) -> tuple[Tensor, None]:
        words = copy_of(blocks[:, 48:]).view(torch.int16)
        a, b, c, e = (words >> 12 & 0x0F).unbind(1)
        d = (a | b << 4 | c << 8 | e << 12).view(torch.float16).float().unsqueeze(1)
        return d * _odd(_in_words(words.to(torch.int32), (0, 3, 6, 9), 0x07)) * 0.125, None

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        high = _cut(blocks[:, 32:48], 4)
        k = blocks[:, :32].to(torch.int32) + ((high & 0x07) << 8)
        return _moved(_entries("IQ1_M", k, times=8), high >> 3)


def _moved(entries: Tensor, t: Tensor) -> Tensor:
    """`entries` less 2·t - 1, in place; t, int32, is that of len(entries) / t.numel() neighbours."""
    return entries.view(t.numel(), -1).add_((1 - 2 * t).to(torch.int8).view(-1, 1)).view(-1)


FORMATS: tuple[type[BlockFormat], ...] = (IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S)
