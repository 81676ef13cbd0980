"""Θ's mathematics: against dense formulas and the exact SVD, with controls that must fail."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nkat.gguf.file import GGUFFile
from nkat.gguf.weights import read_weight
from nkat.sources.weight import factors_from_weight
from nkat.theta.algebra import Theta, ThetaError, coupling, low_rank_form, quantise_factors
from nkat.theta.svd import truncated_svd
from tests.support.oracle import dense_theta, star_product

pytestmark = pytest.mark.isa

SHAPES = [(24, 24), (40, 16), (16, 40), (7, 5), (300, 200)]


def dense_from_svd(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """Θ = ½ (W_r − W_rᵀ) written out with the exact SVD and explicit zero padding."""
    m, n = weight.shape
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    padded = torch.zeros(max(m, n), max(m, n), dtype=torch.float64)
    padded[:m, :n] = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return 0.5 * (padded - padded.T)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4])
def test_factors_give_the_antisymmetrised_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    weight = (u * 0.8 ** torch.arange(min(shape))) @ vh  # separated singular values: the truncation is unique
    p, q = factors_from_weight(weight, rank)
    expected = dense_from_svd(weight, rank)
    assert p.shape == q.shape == (max(shape), rank)
    torch.testing.assert_close(
        dense_theta(p.double(), q.double()), expected, atol=2e-3 * float(expected.abs().max()), rtol=0
    )
    # Control: another rank is another Θ.
    other = dense_from_svd(weight, rank + 1)
    assert not torch.allclose(expected, other, atol=0.05 * float(other.abs().max()))


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31 - 1))
@settings(max_examples=60, deadline=None)
def test_quantised_theta_is_exactly_antisymmetric(size: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, size, rank, generator=generator)
    dense = dense_theta(*quantise_factors(p, q).factors())
    assert torch.equal(dense, -dense.T)


def test_quantising_the_product_instead_would_not_be_antisymmetric() -> None:
    """The control for the test above: the same factors with each half of Θ rounded on its own."""
    p, q = torch.randn(2, 16, 4)
    half = p @ q.T
    scale = (half.abs().amax(dim=0) / 127).clamp_min(1e-9)
    rounded = torch.round(half / scale) * scale
    dense = rounded - torch.round(half.T / scale) * scale
    assert not torch.equal(dense, -dense.T)


def test_int8_error_is_at_most_half_a_step_and_scales_are_per_column() -> None:
    p, q = torch.randn(2, 64, 3)
    p *= torch.tensor([1.0, 1e-3, 1e3])  # one scale for all columns would lose the small one
    theta = quantise_factors(p, q)
    p8, q8 = theta.factors()
    assert bool(((p8 - p).abs() <= theta.scale[0] * 0.5001).all())
    assert bool(((q8 - q).abs() <= theta.scale[1] * 0.5001).all())
    assert theta.p.abs().amax(dim=0).tolist() == [127, 127, 127]
    assert theta.nbytes == 2 * 64 * 3 + 2 * 3 * 4


def test_star_product_is_the_dense_formula() -> None:
    for m, n in SHAPES:
        weight, x = torch.randn(m, n, dtype=torch.float64), torch.randn(5, n, dtype=torch.float64)
        theta = quantise_factors(*factors_from_weight(weight.float(), 3))
        dense = dense_theta(*theta.factors(torch.float64))[:m, :n]
        gamma = 0.93
        expected = x @ weight.T + 0.5 * gamma * ((1 - gamma) * (x @ dense.T))
        torch.testing.assert_close(star_product(weight, x, theta, gamma), expected, atol=1e-12, rtol=1e-12)
        wrong = x @ weight.T - 0.5 * gamma * ((1 - gamma) * (x @ dense.T))  # control: the sign matters
        assert not torch.allclose(star_product(weight, x, theta, gamma), wrong, atol=1e-6)


def test_gamma_one_is_bit_identical_to_no_theta_and_lower_is_stronger() -> None:
    weight, x = torch.randn(20, 12), torch.randn(6, 12)
    theta = quantise_factors(*factors_from_weight(weight, 4))
    plain = x @ weight.T
    assert torch.equal(star_product(weight, x, theta, 1.0), plain)
    effects = [float((star_product(weight, x, theta, g) - plain).norm()) for g in (0.99, 0.97, 0.90)]
    assert 0 < effects[0] < effects[1] < effects[2]


def test_coupling() -> None:
    assert coupling(1.0) == 0.0
    assert coupling(0.97) == pytest.approx(0.01455)
    for bad in (0.0, -0.1, 1.0001, float("nan")):
        with pytest.raises(ThetaError, match="gamma"):
            coupling(bad)


def test_low_rank_form_is_the_block_that_fits_the_layer() -> None:
    p, q = torch.randn(2, 9, 2, dtype=torch.float64)
    for m, n in [(9, 9), (9, 4), (4, 9), (12, 9), (12, 15)]:
        down, up = low_rank_form(p, q, m, n)
        expected = torch.zeros(m, n, dtype=torch.float64)
        rows, columns = min(m, 9), min(n, 9)
        expected[:rows, :columns] = dense_theta(p, q)[:rows, :columns]
        torch.testing.assert_close(up @ down, expected, atol=1e-13, rtol=0)


def test_target_size_keeps_theta_in_the_leading_corner() -> None:
    weight = torch.randn(30, 50)
    p, q = factors_from_weight(weight, 2, target_size=16)
    p_corner, q_corner = factors_from_weight(weight[:16, :16].contiguous(), 2)
    assert p.shape == (16, 2)
    assert torch.equal(p, p_corner)  # a view and a copy: the exact SVD, taken for such sizes, copies what it is given
    assert torch.equal(q, q_corner)
    assert factors_from_weight(weight, 2, target_size=99)[0].shape == (50, 2)


@pytest.mark.parametrize(("m", "n", "rank"), [(500, 400, 4), (400, 700, 8), (64, 48, 3)])
def test_truncated_svd_matches_the_exact_one(m: int, n: int, rank: int) -> None:
    weight = torch.randn(m, n) * torch.linspace(3, 1, n)  # the slow decay of a real weight's spectrum
    u, s, v = truncated_svd(weight, rank)
    exact = torch.linalg.svdvals(weight)[:rank]
    torch.testing.assert_close(s, exact, rtol=1e-3, atol=0)
    torch.testing.assert_close(u.T @ u, torch.eye(rank), atol=1e-4, rtol=0)
    torch.testing.assert_close(v.T @ v, torch.eye(rank), atol=1e-4, rtol=0)
    assert not torch.allclose(s, torch.linalg.svdvals(weight)[1 : rank + 1], rtol=1e-3)


def test_truncated_svd_on_real_weights(smollm2) -> None:
    with GGUFFile.open(smollm2) as file:
        for name in ("blk.0.ffn_up.weight", "blk.11.ffn_down.weight", "blk.29.attn_q.weight"):
            weight = read_weight(file, name)
            exact = torch.linalg.svdvals(weight)[:8]
            torch.testing.assert_close(truncated_svd(weight, 8)[1], exact, rtol=1e-3, atol=0)
            one_pass = torch.svd_lowrank(weight, q=8, niter=0)[1]  # control: a single pass is not good enough
            assert not torch.allclose(one_pass, exact, rtol=1e-3)


def test_truncated_svd_is_deterministic_for_a_seed_and_leaves_the_global_generator_alone() -> None:
    weight = torch.randn(300, 260)
    before = torch.get_rng_state()
    first = truncated_svd(weight, 4, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    torch.randn(10)
    again = truncated_svd(weight, 4, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], truncated_svd(weight, 4, seed=8)[0])


def test_low_rank_and_zero_weights_are_no_special_case() -> None:
    weight = torch.outer(torch.randn(300), torch.randn(250))
    _, s, _ = truncated_svd(weight, 3)
    assert float(s[0]) == pytest.approx(float(weight.norm()), rel=1e-4)
    assert float(s[1]) < 1e-4 * float(s[0])
    assert quantise_factors(*factors_from_weight(torch.zeros(300, 250), 3)).is_zero()
    assert not quantise_factors(*factors_from_weight(weight, 3)).is_zero()


def test_impossible_input_is_refused() -> None:
    with pytest.raises(ThetaError, match=r"rank 6 is impossible for a 5x9 matrix"):
        factors_from_weight(torch.randn(5, 9), 6)
    with pytest.raises(ThetaError, match="rank 0"):
        truncated_svd(torch.randn(5, 9), 0)
    weight = torch.randn(8, 8)
    weight[3, 4] = float("nan")
    with pytest.raises(ThetaError, match="NaN"):
        factors_from_weight(weight, 2)
    with pytest.raises(ThetaError, match="NaN"):
        quantise_factors(weight, weight)
    with pytest.raises(ThetaError, match="do not fit together"):
        Theta(torch.zeros(4, 2, dtype=torch.int8), torch.zeros(4, 3, dtype=torch.int8), torch.zeros(2, 2))
