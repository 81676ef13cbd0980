"""Θ from the weight alone."""

from __future__ import annotations

import torch

from nkat.theta.algebra import ThetaError, pad_rows
from nkat.theta.svd import truncated_svd


def factors_from_weight(
    weight: torch.Tensor, rank: int, seed: int = 0, target_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The data-free source: Θ = ½ (W_r − W_rᵀ) of the zero-padded truncated SVD W_r = U_r S_r V_rᵀ.

    weight: float32 [m, n]; with `target_size` only its leading corner is used.
    Returns float32 P, Q of [max(m, n), r] (of the corner's m, n). S is split evenly between the two, so that
    their columns have equal norms.
    """
    if target_size is not None:
        if target_size < 1:
            raise ThetaError(f"target size must be at least 1, got {target_size}")
        weight = weight[:target_size, :target_size]
    m, n = weight.shape
    if not bool(torch.isfinite(weight).all()):
        raise ThetaError("the weight holds NaN or infinity")
    u, s, v = truncated_svd(weight, rank, seed)
    root = (0.5 * s).sqrt()
    size = max(m, n)
    return pad_rows(u * root, size), pad_rows(v * root, size)
