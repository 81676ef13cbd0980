"""Gauge terms: antisymmetry, the commutator, folding and gradients, each with a control that must fail."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from nkat_vit.gauge import FORMS, Gauge, antisymmetric, fold, star, turn

pytestmark = pytest.mark.isa


def factors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 12, 4, dtype=dtype), torch.randn(3, 12, 4, dtype=dtype)


def commutator(q: torch.Tensor, k: torch.Tensor, theta: torch.Tensor, strength: torch.Tensor | float) -> torch.Tensor:
    """q ⋆ k − k ⋆ q = s qᵀθk for every pair: [..., n, m] of q [..., n, d] and k [..., m, d]."""
    return strength * (q @ theta @ k.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_theta_is_exactly_antisymmetric(dtype: torch.dtype) -> None:
    p, q = factors(dtype)
    theta = antisymmetric(p, q)
    assert torch.equal(theta, -theta.mT)
    assert theta.abs().max() > 0
    # Control: two products instead of one and its transpose are only nearly so, and a general matrix not at all.
    assert not torch.equal(p @ q.mT, -(p @ q.mT).mT)


def test_the_commutator_is_the_difference_of_the_two_orders() -> None:
    theta = antisymmetric(*factors())
    q, k = torch.randn(3, 5, 12, dtype=torch.float64), torch.randn(3, 7, 12, dtype=torch.float64)
    difference = star(q, k, theta, 0.3) - star(k, q, theta, 0.3).mT
    torch.testing.assert_close(difference, commutator(q, k, theta, 0.3), atol=1e-12, rtol=1e-12)
    assert difference.abs().max() > 0.1
    # Control: a symmetric θ commutes.
    symmetric = theta.abs() + theta.abs().mT
    commuting = star(q, k, symmetric, 0.3) - star(k, q, symmetric, 0.3).mT
    assert commuting.abs().max() < 1e-12


def test_the_term_of_a_vector_with_itself_vanishes() -> None:
    theta = antisymmetric(*factors())
    x = torch.randn(3, 6, 12, dtype=torch.float64)
    assert commutator(x, x, theta, 1.0).diagonal(dim1=-2, dim2=-1).abs().max() < 1e-12
    assert commutator(x, x.roll(1, dims=1), theta, 1.0).abs().max() > 0.1


def test_folding_gives_the_star_product() -> None:
    gauge = Gauge(heads=3, head_dim=12, rank=4, strength=0.5, layer=0).double()
    weight, bias = torch.randn(36, 20, dtype=torch.float64), torch.randn(36, dtype=torch.float64)
    x, k = torch.randn(5, 20, dtype=torch.float64), torch.randn(3, 7, 12, dtype=torch.float64)

    def query(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (x @ w.T + b).view(5, 3, 12).transpose(0, 1)

    expected = star(query(weight, bias), k, gauge.theta(), gauge.strength())
    torch.testing.assert_close(query(*gauge(weight, bias)) @ k.mT, expected, atol=1e-12, rtol=1e-12)
    swapped = fold(weight.view(3, 12, 20), -gauge.theta(), gauge.strength()).flatten(0, 1)  # control: the sign matters
    assert not torch.allclose(query(swapped, bias) @ k.mT, expected, atol=1e-3)


def test_the_other_form_turns_queries() -> None:
    """By the exponential that scipy has; lengths stay, which the star product's first order does not keep."""
    gauge = Gauge(heads=3, head_dim=12, rank=4, strength=0.5, layer=0, form="rotation").double()
    theta = gauge.theta().detach()
    exact = torch.stack([torch.from_numpy(scipy.linalg.expm(0.5 * t.T.numpy())) for t in theta])
    weight = torch.randn(36, 20, dtype=torch.float64)
    turned, _ = gauge(weight, torch.zeros(36, dtype=torch.float64))
    apart = weight.view(3, 12, 20)
    torch.testing.assert_close(turned.view(3, 12, 20), exact @ apart, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(turned.view(3, 12, 20).norm(dim=1), apart.norm(dim=1))
    assert not torch.allclose(fold(apart, theta, 0.5).norm(dim=1), apart.norm(dim=1), rtol=1e-3)
    small = 1e-6  # to first order twice the star product's term, whose ½ belongs to the commutator
    first, second = (act(apart, theta, small) - apart for act in (turn, fold))
    torch.testing.assert_close(first, 2 * second, rtol=1e-4, atol=1e-9)
    assert torch.autograd.gradcheck(lambda t: turn(apart.clone(), t, 0.5), (theta.clone().requires_grad_(),))


@pytest.mark.parametrize("form", FORMS)
def test_the_change_of_scores_is_what_the_term_adds(form: str) -> None:
    gauge = Gauge(heads=3, head_dim=12, rank=4, strength=0.5, layer=0, form=form).double()
    q, k = (torch.randn(2, 3, 7, 12, dtype=torch.float64) for _ in range(2))
    if form == "star":
        expected = 0.5 * commutator(q, k, gauge.theta(), gauge.strength())
    else:
        expected = q @ torch.linalg.matrix_exp(0.5 * gauge.theta()) @ k.mT - q @ k.mT
    torch.testing.assert_close(gauge.change(q, k), expected, atol=1e-12, rtol=1e-12)
    assert gauge.change(q, k).abs().max() > 0.1


def test_gradients_in_float64() -> None:
    p, q = (t.requires_grad_() for t in factors())
    gain = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 12, 5, dtype=torch.float64, requires_grad=True)

    def function(p: torch.Tensor, q: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fold(weight, antisymmetric(p, q), 0.2 * gain)

    assert torch.autograd.gradcheck(function, (p, q, gain, weight))

    class Wrong(torch.autograd.Function):  # control: the check notices a wrong sign
        @staticmethod
        def forward(context: torch.autograd.function.FunctionCtx, p: torch.Tensor) -> torch.Tensor:
            return antisymmetric(p, p.detach().roll(1, -1))

        @staticmethod
        def backward(context: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:
            return -gradient[..., :4]

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(Wrong.apply, (p,))


def test_the_start_leaves_the_global_generator_alone_and_differs_by_layer() -> None:
    before = torch.get_rng_state()
    first, again, other = (Gauge(2, 8, 3, 1.0, layer) for layer in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.theta(), again.theta())
    assert not torch.equal(first.theta(), other.theta())
    assert 0.3 < torch.linalg.matrix_norm(first.theta(), 2).mean().item() < 3
