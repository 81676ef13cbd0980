"""Θ from a residual: the closed form where there is one, and a local optimum elsewhere."""

from __future__ import annotations

import pytest
import torch

from nkat.residual import factors_from_residual, residual_error
from nkat.theta import ThetaError, dense_theta

KAPPA = 0.01455


def projection(residual: torch.Tensor) -> torch.Tensor:
    """The block of the best antisymmetric Θ of any rank: ½(R − Rᵀ) where both entries count, R where only one does."""
    m, n = residual.shape
    k = min(m, n)
    best = residual.clone()
    best[:k, :k] = 0.5 * (residual[:k, :k] - residual[:k, :k].T)
    return best


@pytest.mark.parametrize("shape", [(20, 20), (24, 12), (12, 24)])
def test_full_rank_is_the_projection(shape: tuple[int, int]) -> None:
    residual = torch.randn(shape)
    m, n = shape
    p, q = factors_from_residual(residual, max(shape) // 2, KAPPA)
    found = KAPPA * dense_theta(p.double(), q.double())[:m, :n]
    expected = projection(residual.double())
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert not torch.allclose(found, residual.double(), atol=0.1)  # control: antisymmetry is a restriction


@pytest.mark.parametrize("rank", [1, 3])
def test_square_and_unweighted_is_the_truncated_projection(rank: int) -> None:
    """For m = n Eckart–Young applies: the error left is that of the singular values cut off."""
    residual = torch.randn(30, 30)
    p, q = factors_from_residual(residual, rank, KAPPA)
    values = torch.linalg.svdvals(projection(residual))
    symmetric = 0.5 * (residual + residual.T)
    expected = float((values[2 * rank :].square().sum() + symmetric.square().sum()) / residual.square().sum())
    assert residual_error(residual, p, q, KAPPA) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("shape", [(30, 30), (40, 20), (20, 40)])
def test_weighting_lowers_the_weighted_error(shape: tuple[int, int]) -> None:
    residual, moments = torch.randn(shape), torch.rand(shape[1]) ** 4 + 0.01
    plain = residual_error(residual, *factors_from_residual(residual, 3, KAPPA), KAPPA, moments)
    weighted = residual_error(residual, *factors_from_residual(residual, 3, KAPPA, moments), KAPPA, moments)
    assert weighted < 0.95 * plain < 1.0
    wrong = residual_error(residual, *factors_from_residual(residual, 3, KAPPA, moments.flip(0)), KAPPA, moments)
    assert weighted < wrong  # control: the weights of other inputs do not help


def test_nothing_in_reach_is_better() -> None:
    residual, moments = torch.randn(24, 16), torch.rand(16) + 0.1
    p, q = factors_from_residual(residual, 2, KAPPA, moments)
    best = residual_error(residual, p, q, KAPPA, moments)
    for _ in range(50):
        step = 0.01 * torch.randn(2, *p.shape) * p.abs().mean()
        assert residual_error(residual, p + step[0], q + step[1], KAPPA, moments) > best - 1e-6


def test_columns_are_ordered_and_deterministic() -> None:
    residual = torch.randn(40, 24)
    p, q = factors_from_residual(residual, 4, KAPPA)
    sizes = p.norm(dim=0) * q.norm(dim=0)
    assert bool((sizes[:-1] >= sizes[1:]).all())
    again = factors_from_residual(residual, 4, KAPPA)
    assert torch.equal(p, again[0])
    assert torch.equal(q, again[1])


def test_no_residual_and_bad_residuals() -> None:
    p, q = factors_from_residual(torch.zeros(6, 4), 2, KAPPA)
    assert p.shape == (6, 2)
    assert not bool(p.any() or q.any())
    with pytest.raises(ThetaError, match="NaN"):
        factors_from_residual(torch.full((4, 4), float("nan")), 1, KAPPA)
    with pytest.raises(ThetaError, match="second moments"):
        factors_from_residual(torch.randn(4, 4), 1, KAPPA, torch.zeros(4))
