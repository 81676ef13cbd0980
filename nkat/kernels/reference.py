"""Packed weight × x and the star term in plain torch: the oracle of every faster kernel, and the fall-back.

Works on any device and in any floating dtype. The weight is dequantised anew on each call, so memory peaks at one
weight (or one tile of rows) in the dtype of x; differentiable in x, `down` and `up`.
"""

from __future__ import annotations

import gguf
import torch
import torch.nn.functional as F

from nkat.quants import dequantize


def packed_rows(packed: torch.Tensor, rows: int, start: int, stop: int) -> torch.Tensor:
    """The bytes of rows [start, stop) of a packed weight of `rows` rows; a view. A row is a whole number of blocks."""
    row_bytes = packed.numel() // rows
    return packed[start * row_bytes : stop * row_bytes]


def linear(
    packed: torch.Tensor,
    qtype: gguf.GGMLQuantizationType,
    shape: tuple[int, int],
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tile_rows: int | None = None,
) -> torch.Tensor:
    """W x + bias for x [..., n] and packed W [m, n] of `shape`; returns [..., m] in the dtype of x.

    tile_rows: dequantise and multiply so many rows of W at a time; all at once when None.
    """
    m, n = shape
    step = m if tile_rows is None else tile_rows
    parts = []
    for start in range(0, m, step):
        stop = min(start + step, m)
        weight = dequantize(packed_rows(packed, m, start, stop), qtype, (stop - start, n)).to(x.dtype)
        parts.append(F.linear(x, weight, None if bias is None else bias[start:stop]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def star_term(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, kappa: float) -> torch.Tensor:
    """κ Θ x for x [..., n], with Θ = up @ down of `nkat.theta.low_rank_form`: down [2r, n], up [m, 2r]."""
    return kappa * F.linear(F.linear(x, down), up)
