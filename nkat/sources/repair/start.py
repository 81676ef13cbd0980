"""Scales in closed form: where a repair may begin when there is a better copy of the model.

The scales of one row of a weight are independent of those of the others. With e = w* − w what the row lost, C = E[x xᵀ]
the second moments of the layer's inputs, and b_u the part of the row that stored scale u carries (zero outside its
block), the factors 1 + δ_u that leave the least expected squared error of the layer's output solve

    min over δ  (e − Σ δ_u b_u)ᵀ C (e − Σ δ_u b_u)        N δ = r,   N_uv = b_uᵀ C b_v,   r_u = b_uᵀ C e

a system of as many unknowns as a row has scales: 18 for 576 weights of Q4_0. A small share of N's diagonal is added to
it, which holds scales that hardly matter where they are.
"""

from __future__ import annotations

import math

import torch
from gguf.constants import GGMLQuantizationType

from nkat.gguf.formats import BLOCK_FORMATS, dequantise

_RIDGE = 1e-2  # of N's diagonal
_MOST = math.log(2.0)  # a scale is at most doubled or halved
_TILE_ELEMENTS = 1 << 24  # of N for the rows of a tile: 64 MB


def closed_form(
    packed: torch.Tensor,
    qtype: GGMLQuantizationType,
    wanted: torch.Tensor,
    moments: torch.Tensor,
) -> torch.Tensor:
    """ln of the best factors, float32 [blocks, k], for a packed weight (uint8 [nbytes]) that was W* = `wanted` [m, n].

    moments: float32 C [n, n], or its diagonal [n], with a ridge (`nkat.sources.residual.regularised_moments`)
    """
    block = BLOCK_FORMATS[qtype]
    m, n = wanted.shape
    groups, k = n // block.block_size, len(block.halves)
    parts = _parts(packed, qtype, (m, n))
    rows = max(1, _TILE_ELEMENTS // (groups * k) ** 2)
    changes = []
    for first in range(0, m, rows):
        some = parts[:, first : first + rows]
        lost = wanted[first : first + rows] - some.sum(dim=0)
        normal, right = _normal_equations(some, lost, moments, groups)
        held = normal.diagonal(dim1=1, dim2=2)
        normal = normal + torch.diag_embed(_RIDGE * held + (held == 0).float())  # what is zero stays as it is
        factors = 1.0 + torch.linalg.solve(normal, right)
        changes.append(factors.clamp(math.exp(-_MOST), math.exp(_MOST)).log())
    return torch.cat(changes).view(m * groups, k)


def _parts(packed: torch.Tensor, qtype: GGMLQuantizationType, shape: tuple[int, int]) -> torch.Tensor:
    """float32 [k, m, n]: what each of a block's stored scales contributes to the weight."""
    block = BLOCK_FORMATS[qtype]
    weight = dequantise(packed, qtype, shape)
    if len(block.halves) == 1:
        return weight[None]
    _, offset = block.scales(packed.view(-1, block.block_bytes))
    assert offset is not None
    of_offset = offset.repeat_interleave(block.block_size // offset.shape[1], dim=1).view(shape)
    return torch.stack([weight - of_offset, of_offset])


def _normal_equations(
    parts: torch.Tensor, lost: torch.Tensor, moments: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """N [R, u, u] and r [R, u] for the parts [k, R, n] of R rows; u runs over blocks, then over a block's scales."""
    k, rows, n = parts.shape

    def by_scale(values: torch.Tensor) -> torch.Tensor:
        """Σ over each block of values [R, n] times each part: [R, groups·k]."""
        return (values * parts).view(k, rows, groups, -1).sum(dim=3).permute(1, 2, 0).reshape(rows, groups * k)

    right = by_scale(lost * moments if moments.ndim == 1 else lost @ moments)
    columns = []
    for group in range(groups):
        place = slice(group * (n // groups), (group + 1) * (n // groups))
        for part in parts:
            if moments.ndim == 1:
                spread = torch.zeros_like(part)
                spread[:, place] = part[:, place] * moments[place]
            else:
                spread = part[:, place] @ moments[place]
            columns.append(by_scale(spread))
    return torch.stack(columns, dim=2), right
