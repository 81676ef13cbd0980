"""What all block formats have in common: the class that describes one, and how fields of bits are cut out of its bytes.

A row of a quantised tensor is a chain of blocks. A block holds `block_size` weights in `block_bytes` bytes: integers q
of 1 to 8 bits and, per group of 16 to 32 of them, a scale d and in some formats an offset m, so that w = d·q + m.

The formats themselves are in `nkat.gguf.integer_formats`, `nkat.gguf.level_formats` and `nkat.gguf.grid_formats`. Each
is one `BlockFormat`, and its docstring draws the bits: bytes are numbered from the start of the block, bits from the
least significant one, and q[a:b] is a half-open range. These are the only drawings: `nkat.kernels.cpu.formats` and
`nkat.kernels.cuda.planes`, which read the same bytes in their own ways, point here.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

# Weights in a tile, per thread: 2 MiB of float32, about a core's L2 cache. Smaller tiles lose to the cost of starting
# an operation.
_CPU_TILE = 1 << 19
# A GPU wants few large kernels; the limit bounds the memory that the integers take.
_GPU_TILE = 1 << 25


class BlockFormat:
    """One block format: a subclass, its type's entry in `nkat.gguf.formats.BLOCK_FORMATS`, never instantiated.

    The subclass's docstring says what a weight is, and draws where in a block each number lies.

    qtype: the type that a file gives such a tensor
    block_size: weights of a block, neighbours in a row
    block_bytes: bytes of a block
    halves: where in a block its float16 numbers start: d, which every q is multiplied with, then what m is made of;
            none where scales are of another kind or lie in pieces
    """

    qtype: ClassVar[GGMLQuantizationType]
    block_size: ClassVar[int]
    block_bytes: ClassVar[int]
    halves: ClassVar[tuple[int, ...]]

    def __init_subclass__(cls, qtype: GGMLQuantizationType, halves: tuple[int, ...]) -> None:
        cls.qtype, cls.halves = qtype, halves
        cls.block_size, cls.block_bytes = GGML_QUANT_SIZES[qtype]

    @classmethod
    def scales(cls, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """d and m of w = d·q + m for uint8 [n, block_bytes]; m is None where there is no offset.

        float32 [n, groups]: each is that of block_size / groups neighbouring weights
        """
        raise NotImplementedError

    @staticmethod
    def quants(blocks: Tensor) -> Tensor:
        """q of uint8 [n, block_bytes] in the order of the weights: contiguous uint8 or int8, n·block_size of them."""
        raise NotImplementedError

    @classmethod
    def dequantise(cls, blocks: Tensor, out: Tensor) -> None:
        """Writes the weights of uint8 [n, block_bytes] to `out`, contiguous float32 of n·block_size weights."""
        scale, offset = cls.scales(blocks)
        groups = scale.shape[1]
        # one row a scale, so that scales broadcast along it
        weights, scale = out.view(-1, cls.block_size // groups), scale.view(-1, 1)
        offset = None if offset is None else offset.view(-1, 1)
        tile = _CPU_TILE * torch.get_num_threads() if out.device.type == "cpu" else _GPU_TILE
        step = tile // cls.block_size
        for first in range(0, len(blocks), step):
            part = slice(first * groups, (first + step) * groups)
            tile_weights = weights[part]
            tile_weights.copy_(cls.quants(blocks[first : first + step]).view_as(tile_weights)).mul_(scale[part])
            if offset is not None:
                tile_weights.add_(offset[part])


def float16_numbers(cls: type[BlockFormat], blocks: Tensor) -> tuple[Tensor, ...]:
    """The float16 numbers of each block, as float32 (n, 1) each."""
    halves = blocks.view(torch.float16)
    return tuple(halves[:, byte // 2].float().unsqueeze(1) for byte in cls.halves)


def one_scale(cls: type[BlockFormat], blocks: Tensor) -> tuple[Tensor, None]:
    """d alone, and no offset."""
    (d,) = float16_numbers(cls, blocks)
    return d, None


def scale_and_offset(cls: type[BlockFormat], blocks: Tensor) -> tuple[Tensor, Tensor]:
    """d and m."""
    d, m = float16_numbers(cls, blocks)
    return d, m


def copy_of(part: Tensor) -> Tensor:
    """Some bytes of each block in new memory, aligned so that wider numbers can be viewed."""
    return part.clone(memory_format=torch.contiguous_format)  # .contiguous() of a single block would not copy


def fields(part: Tensor, group: int, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Cuts each byte into the fields (byte >> shift) & mask, one for each shift; a negative one shifts left.

    Returns bytes as a flat int64 view: the first field of `group` bytes, then the second field of the same bytes, and
    so on. `group` is a multiple of 8. Eight bytes are shifted at once, so `mask` must drop what comes in from the
    neighbouring byte.
    """
    words = copy_of(part).view(torch.int64)
    shifted = [words >> shift if shift >= 0 else words << -shift for shift in shifts]
    # torch copies short rows of 16-byte elements several times faster than the same rows of smaller elements
    element = torch.complex128 if group % 16 == 0 else torch.int64
    rows = [field.view(element).view(-1, group // element.itemsize) for field in shifted]
    return torch.stack(rows, dim=1).view(torch.int64).view(-1).bitwise_and_(mask * 0x0101_0101_0101_0101)


def nibbles(part: Tensor, group: int) -> Tensor:
    """Bits 0-3 of `group` bytes, then bits 4-7 of the same bytes, and so on: bytes as a flat int64 view."""
    return fields(part, group, (0, 4), 0x0F)


def unsigned(words: Tensor) -> Tensor:
    return words.view(torch.uint8)


def signed(words: Tensor, zero: int) -> Tensor:
    """Bytes, less the value that stands for zero, as int8."""
    return words.view(torch.int8).sub_(zero)
