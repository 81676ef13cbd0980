"""Puts a packed weight of a file into the tiles of `nkat.kernels.cpu.formats`."""

from __future__ import annotations

import functools

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from nkat.gguf.formats import packed_nbytes
from nkat.kernels.cpu.formats import BLOCK_LAYOUTS, unit_bytes
from nkat.kernels.cpu.jit import compile_kernel
from nkat.kernels.cpu.layout import ROWS, Interleaver
from nkat.kernels.cpu.llvm import Builder
from nkat.kernels.cpu.program import aligned, pool


@functools.cache
def _repack_kernel(qtype: GGMLQuantizationType) -> int:
    """arguments: packed rows, bytes of a row, units, tiles, out, bytes of its tiles. Each thread takes some tiles."""
    layout = BLOCK_LAYOUTS[qtype]

    def emit(k: Builder) -> None:
        packed, row_bytes, units, tiles, out, stride = (
            k.pointer(0), k.integer(1), k.integer(2), k.integer(3), k.pointer(4), k.integer(5)
        )  # fmt: skip
        with (
            k.loop(tiles * k.thread // k.threads, tiles * (k.thread + 1) // k.threads) as tile,
            k.loop(0, units) as unit,
        ):
            block = packed + (tile * row_bytes * ROWS + unit * layout.block.block_bytes)
            rows = Interleaver(k, block, row_bytes, out + tile * stride + unit * unit_bytes(qtype))
            layout.interleave(rows)
            assert rows.size == unit_bytes(qtype)

    return compile_kernel(f"repack_{qtype.name}", emit)


def repack(
    packed: Tensor, qtype: GGMLQuantizationType, shape: tuple[int, int], threads: int = 1, behind: int = 0
) -> np.ndarray:
    """A block-quantised weight [m, n] in tiles: uint8 [ceil(m / 16), bytes of a tile], rows beyond m zero.

    behind: bytes behind each tile, zero, and as many more as end on a cache line
    """
    m, n = shape
    units, row_bytes = n // BLOCK_LAYOUTS[qtype].columns, packed_nbytes(qtype, shape) // m
    rows = packed.numpy()
    stride = -(-(units * unit_bytes(qtype) + behind) // 64) * 64 if behind else units * unit_bytes(qtype)
    out = aligned((-(-m // ROWS), stride), np.uint8)
    whole = m // ROWS
    arguments = np.array([rows.ctypes.data, row_bytes, units, whole, out.ctypes.data, stride], np.int64)
    pool(threads).run(_repack_kernel(qtype), arguments)
    if whole < len(out):
        rest = np.zeros(ROWS * row_bytes, np.uint8)
        rest[: (m - whole * ROWS) * row_bytes] = rows[whole * ROWS * row_bytes :]
        arguments[:] = rest.ctypes.data, row_bytes, units, 1, out[whole:].ctypes.data, stride
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
