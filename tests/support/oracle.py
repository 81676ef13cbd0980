"""The mathematics as it is written down, for the tests to compare with."""

from __future__ import annotations

import torch

from nkat.theta.algebra import Theta, coupling


def dense_theta(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Θ = P Qᵀ − Q Pᵀ as a dense [t, t] matrix, exactly antisymmetric in floating point."""
    product = p @ q.T
    return product - product.T


def star_product(weight: torch.Tensor, x: torch.Tensor, theta: Theta, gamma: float) -> torch.Tensor:
    """W ⋆ x = W x + κ(γ) θ x for x [..., n] and weight [m, n], in the dtype of `weight`, with θ as a dense matrix."""
    m, n = weight.shape
    size = max(m, n)
    whole = weight.new_zeros(size, size)
    whole[: theta.size, : theta.size] = dense_theta(*theta.factors(weight.dtype))
    return x @ weight.T + coupling(gamma) * (x @ whole[:m, :n].T)


def residual_error(
    residual: torch.Tensor, p: torch.Tensor, q: torch.Tensor, kappa: float, moments: torch.Tensor | None = None
) -> float:
    """f / f(Θ = 0): the share of the output's squared error that Θ leaves, for moments E[x xᵀ] or E[x²] as they are."""
    m, n = residual.shape
    size = max(m, n)
    factors = [torch.cat([f, f.new_zeros(size - len(f), f.shape[1])]) for f in (p, q)]
    left = residual - kappa * dense_theta(*factors)[:m, :n].to(residual.dtype)
    weights = torch.ones(n) if moments is None else moments

    def error(rows: torch.Tensor) -> float:
        rows, known = rows.double(), weights.double()
        return float(((rows @ known if known.ndim == 2 else rows * known) * rows).sum())

    return error(left) / error(residual)
