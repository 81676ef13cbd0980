"""Θ from the residual R = W_reference − W: the antisymmetric Θ whose κΘ comes closest to what quantisation lost.

The problem. For a layer's m×n residual, inputs x with second moments d_j = E[x_j²] (1 where unknown), and P, Q of
rank r:

    minimise over P, Q    f = ‖ (R − κ Θ[:m, :n]) D^½ ‖²_F,    Θ = P Qᵀ − Q Pᵀ,    D = diag(d)

With E[x xᵀ] ≈ D this is the expected squared error of the layer's output (QERA's diagonal approximation,
arXiv 2410.06040), restricted to antisymmetric Θ. Antisymmetry binds only the entries of the leading k×k corner,
k = min(m, n): Θ_ij and Θ_ji both lie inside the block there. The mirror images of all other entries lie outside, so
those entries are free. Without D and without a rank limit the solution is therefore T / κ with

    T[:k, :k] = ½ (R − Rᵀ)[:k, :k],    T[i, j] = R[i, j] and T[j, i] = −R[i, j] elsewhere in the block, 0 outside.

The start is the best rank-2r approximation of T (a truncated SVD, whose singular values come in pairs); from there
L-BFGS minimises f itself. f needs only small products: with Θ[:m, :n] = up · down (`low_rank_form`),
f = ‖R D^½‖² − 2κ ⟨upᵀ R D, down⟩ + κ² ⟨upᵀ up, down D downᵀ⟩.
"""

from __future__ import annotations

import torch

from nkat.theta import ThetaError, low_rank_form, truncated_svd

_LBFGS_STEPS = 60
_MOMENT_FLOOR = 1e-6  # of the mean: an input that was never active must not make the problem singular


def factors_from_residual(
    residual: torch.Tensor,
    rank: int,
    kappa: float,
    input_weights: torch.Tensor | None = None,
    seed: int = 0,
    target_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """P, Q [max(m, n), r] in float32 such that κ Θ[:m, :n] approximates `residual` [m, n].

    input_weights: E[x_j²] [n], or None for equal weights. With `target_size` only the leading corner is used.
    Columns are ordered by the size of their part of Θ, largest first.
    """
    if target_size is not None:
        residual = residual[:target_size, :target_size]
        input_weights = None if input_weights is None else input_weights[:target_size]
    if not bool(torch.isfinite(residual).all()):
        raise ThetaError("the weight or the reference's weight holds NaN or infinity")
    m, n = residual.shape
    moments = torch.ones(n) if input_weights is None else input_weights.float()
    moments = moments.clamp_min(_MOMENT_FLOOR * float(moments.mean())) / moments.mean()
    if not bool(torch.isfinite(moments).all()):
        raise ThetaError("the calibration inputs' second moments are not finite or all zero")
    norm = float(residual.norm())
    if norm == 0.0:
        empty = residual.new_zeros(max(m, n), rank)
        return empty, empty.clone()
    # Unit norm and κ = 1 while solving: L-BFGS's step sizes and tolerances then suit every layer.
    p, q = _start(residual / norm, rank, seed)
    p, q = _refine(residual / norm, moments, p, q)
    p, q = _order(p, q)
    root = (norm / kappa) ** 0.5
    return p * root, q * root


def residual_error(
    residual: torch.Tensor, p: torch.Tensor, q: torch.Tensor, kappa: float, input_weights: torch.Tensor | None = None
) -> float:
    """‖(R − κΘ[:m, :n]) D^½‖² / ‖R D^½‖²: the share of the output's squared error that Θ leaves."""
    m, n = residual.shape
    down, up = low_rank_form(p, q, m, n)
    d = torch.ones(n, dtype=residual.dtype) if input_weights is None else input_weights.to(residual.dtype)
    left = ((residual - kappa * (up @ down)).square() @ d).sum()
    return float(left / (residual.square() @ d).sum())


def _start(residual: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    m, n = residual.shape
    k, size = min(m, n), max(m, n)
    target = residual.new_zeros(size, size)
    target[:m, :n] = residual
    target[:n, :m] -= residual.T
    target[:k, :k] *= 0.5
    u, _, _ = truncated_svd(target, min(2 * rank, size), seed)
    # Within the space of the largest pairs, i·H is Hermitian: its eigenvectors a + ib span the planes a, b in which
    # the antisymmetric H = Uᵀ T U acts as a rotation by λ: H = Σ 2λ (b aᵀ − a bᵀ) over the positive λ.
    projected = (u.T @ target @ u).double()
    projected = 0.5 * (projected - projected.T)
    values, vectors = torch.linalg.eigh(1j * projected)
    values, vectors = values[-rank:].flip(0).clamp_min(0), vectors[:, -rank:].flip(1)
    root = (2.0 * values).sqrt()
    p, q = vectors.imag * root, vectors.real * root
    return u @ p.to(u.dtype), u @ q.to(u.dtype)


def _refine(
    residual: torch.Tensor, moments: torch.Tensor, p: torch.Tensor, q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    m, n = residual.shape
    weighted = residual * moments
    constant = float((weighted * residual).sum())
    factors = torch.stack([p, q]).requires_grad_()

    def loss() -> torch.Tensor:
        down, up = low_rank_form(factors[0], factors[1], m, n)
        linear = ((up.T @ weighted) * down).sum()
        square = ((up.T @ up) * ((down * moments) @ down.T)).sum()
        return constant - 2.0 * linear + square

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    optimizer = torch.optim.LBFGS([factors], max_iter=_LBFGS_STEPS, line_search_fn="strong_wolfe")
    optimizer.step(closure)
    return factors[0].detach(), factors[1].detach()


def _order(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest column pairs first, so that cutting the rank keeps the most; norms evened out for INT8."""
    p_norm, q_norm = p.norm(dim=0), q.norm(dim=0)
    even = (q_norm / p_norm.clamp_min(1e-30)).sqrt().clamp(1e-3, 1e3)
    order = (p_norm * q_norm).argsort(descending=True)
    return (p * even)[:, order], (q / even)[:, order]
