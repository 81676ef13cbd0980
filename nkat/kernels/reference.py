"""Packed weight × x and the star term in plain torch: the oracle of every faster kernel, and the fall-back.

Works on any device and in any floating dtype. The weight is dequantised anew on each call, so memory peaks at one
weight (or one tile of rows) in the dtype of x; differentiable in x, `down` and `up`.
"""

from __future__ import annotations

import gguf
import torch
import torch.nn.functional as F
from gguf.constants import GGML_QUANT_SIZES

from nkat.gguf.formats import dequantise


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
        weight = dequantise(packed_rows(packed, m, start, stop), qtype, (stop - start, n)).to(x.dtype)
        parts.append(F.linear(x, weight, None if bias is None else bias[start:stop]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def star_term(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, kappa: float | torch.Tensor) -> torch.Tensor:
    """κ Θ x for x [..., n], with Θ = up @ down of `nkat.theta.algebra.low_rank_form`: down [2r, n], up [m, 2r]."""
    return kappa * F.linear(F.linear(x, down), up)


def activation_block(qtype: gguf.GGMLQuantizationType) -> int:
    """Neighbouring inputs of a weight of this type that share a scale where they are rounded; 1: they are not."""
    weights = GGML_QUANT_SIZES[qtype][0]
    return weights if weights in (1, 256) else 32  # NVFP4 has 64


def round_activations(x: torch.Tensor, qtype: gguf.GGMLQuantizationType) -> torch.Tensor:
    """x [..., n] rounded to INT8 and back as llama.cpp's CPU kernels do before they multiply by a weight of this type.

    One scale (absmax / 127) for each block: of 256 values for types in blocks of 256 (ggml's Q8_K, float32 scale), of
    32 for the other quantised types (Q8_0 and Q8_1, float16 scale); float weights take x as it is.
    """
    block = activation_block(qtype)
    if block == 1:
        return x
    blocks = x.float().unflatten(-1, (-1, block))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    rounded = torch.round(blocks / scale.clamp_min(torch.finfo(torch.float32).tiny))
    stored = scale if block == 256 else scale.half().float()
    return (rounded * stored).flatten(-2).to(x.dtype)
