"""Θ from a residual: closed forms where there are some, a local optimum elsewhere, and the moments that weight it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from gguf import GGMLQuantizationType as Type

from nkat.lm.load import load_model
from nkat.measure.texts import load_text
from nkat.sources.moments import gather_moments, input_second_moments
from nkat.sources.residual import (
    equal_bytes_rank,
    errors_left,
    factors_from_residual,
    regularised_moments,
    unrestricted_optimum,
)
from nkat.theta.algebra import ThetaError, quantise_factors
from nkat.theta.modelfile import open_model_file
from tests.support.oracle import dense_theta, residual_error
from tests.support.tiny_models import write_tiny_model

CONVERTER = "nkat_gguf_converter.py"
KAPPA = 0.01455


def projection(residual: torch.Tensor) -> torch.Tensor:
    """The block of the best antisymmetric Θ of any rank: ½(R − Rᵀ) where both entries count, R where only one does."""
    m, n = residual.shape
    k = min(m, n)
    best = residual.clone()
    best[:k, :k] = 0.5 * (residual[:k, :k] - residual[:k, :k].T)
    return best


def correlated(n: int, seed: int = 1) -> torch.Tensor:
    """Second moments of inputs of which a few directions carry most, as in a language model: [n, n]."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    return axes * torch.logspace(2, -1, n) @ axes.T


def relative_error(left: torch.Tensor, residual: torch.Tensor, moments: torch.Tensor) -> float:
    return float(((left @ moments) * left).sum() / ((residual @ moments) * residual).sum())


@pytest.mark.parametrize("shape", [(20, 20), (24, 12), (12, 24)])
def test_full_rank_is_the_projection(shape: tuple[int, int]) -> None:
    residual = torch.randn(shape)
    m, n = shape
    p, q = factors_from_residual(residual, max(shape) // 2, KAPPA)
    found = KAPPA * dense_theta(p.double(), q.double())[:m, :n]
    expected = projection(residual.double())
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert float((found - residual).norm() / residual.norm()) > 0.2  # control: antisymmetry is a restriction


@pytest.mark.parametrize("rank", [1, 3])
def test_square_and_unweighted_is_the_truncated_projection(rank: int) -> None:
    """For m = n Eckart–Young applies: the error left is that of the singular values cut off."""
    residual = torch.randn(30, 30)
    p, q = factors_from_residual(residual, rank, KAPPA)
    values = torch.linalg.svdvals(projection(residual))
    symmetric = 0.5 * (residual + residual.T)
    expected = float((values[2 * rank :].square().sum() + symmetric.square().sum()) / residual.square().sum())
    assert residual_error(residual, p, q, KAPPA) == pytest.approx(expected, rel=1e-3)


def test_square_and_full_rank_solves_the_sylvester_equation() -> None:
    """With all second moments the best T of any rank obeys T C + C T = R C − C Rᵀ; scipy solves that."""
    residual, moments = torch.randn(24, 24), correlated(24)
    solved = regularised_moments(moments, 24).double()
    right = residual.double() @ solved
    best = torch.from_numpy(scipy.linalg.solve_sylvester(solved.numpy(), solved.numpy(), (right - right.T).numpy()))
    expected = relative_error(residual - best, residual.double(), solved)
    found = residual_error(residual, *factors_from_residual(residual, 12, KAPPA, moments), KAPPA, solved)
    assert found == pytest.approx(expected, rel=0.01)
    unweighted = relative_error(residual - projection(residual.double()), residual.double(), solved)
    assert unweighted > 1.05 * expected  # control: it is not the answer of inputs that are all alike


@pytest.mark.isa
def test_a_diagonal_matrix_of_moments_is_the_vector() -> None:
    residual, moments = torch.randn(32, 20), torch.rand(20) + 0.1
    as_vector = factors_from_residual(residual, 2, KAPPA, moments)
    as_matrix = factors_from_residual(residual, 2, KAPPA, torch.diag(moments))
    others = factors_from_residual(residual, 2, KAPPA, moments.flip(0))
    # The two sum in other orders, and the search ends where a step gains less than 1e-6: about the optimum, where the
    # error is flat, Θ is free by the root of that. In 60 draws on each setting of make test-isa the errors differed by
    # up to 1.2e-4 and Θ by up to 7 per cent.
    a, b, other = (residual_error(residual, *factors, KAPPA, moments) for factors in (as_vector, as_matrix, others))
    assert b == pytest.approx(a, rel=5e-4)
    assert other > 1.05 * a  # control
    a, b, other = (dense_theta(*factors) for factors in (as_vector, as_matrix, others))
    assert float((a - b).norm() / a.norm()) < 0.15
    assert float((a - other).norm() / a.norm()) > 0.5  # control


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(30, 30), (40, 20), (20, 40)])
def test_weighting_lowers_the_weighted_error(shape: tuple[int, int], full: bool) -> None:
    n = shape[1]
    residual = torch.randn(shape)
    moments = correlated(n) if full else torch.rand(n) ** 4 + 0.01
    wrong = correlated(n, seed=2) if full else moments.flip(0)

    def left(known: torch.Tensor | None) -> float:
        return residual_error(residual, *factors_from_residual(residual, 3, KAPPA, known), KAPPA, moments)

    assert left(moments) < 0.95 * left(None) < 1.0
    assert left(moments) < left(wrong)  # control: the moments of other inputs do not help
    if full:
        assert left(moments) < 0.95 * left(moments.diagonal())


@pytest.mark.parametrize("full", [False, True])
def test_nothing_in_reach_is_better(full: bool) -> None:
    """Of rank 1, where no weight goes to lower ranks."""
    residual = torch.randn(24, 16)
    moments = regularised_moments(correlated(16) if full else torch.rand(16) + 0.1, 16)
    p, q = factors_from_residual(residual, 1, KAPPA, moments)
    best = residual_error(residual, p, q, KAPPA, moments)
    for _ in range(50):
        step = 0.02 * torch.randn(2, *p.shape) * p.abs().mean()
        assert residual_error(residual, p + step[0], q + step[1], KAPPA, moments) > best - 1e-5


@pytest.mark.parametrize("shape", [(48, 48), (64, 32), (32, 64)])
def test_first_columns_are_a_good_theta_of_lower_rank(shape: tuple[int, int]) -> None:
    residual = torch.randn(shape) * torch.logspace(0, -1, shape[1])
    moments = correlated(shape[1])
    p, q = factors_from_residual(residual, 6, KAPPA, moments)
    errors = [residual_error(residual, p[:, :r], q[:, :r], KAPPA, moments) for r in range(1, 7)]
    assert errors == sorted(errors, reverse=True)
    for rank in (1, 3):
        direct = residual_error(residual, *factors_from_residual(residual, rank, KAPPA, moments), KAPPA, moments)
        assert errors[rank - 1] < 1.15 * direct
        last = residual_error(residual, p[:, -rank:], q[:, -rank:], KAPPA, moments)
        assert last > 1.1 * errors[rank - 1]  # control: the order matters


@pytest.mark.isa
def test_same_seed_same_factors() -> None:
    residual, moments = torch.randn(40, 24), correlated(24)
    first, again = (factors_from_residual(residual, 4, KAPPA, moments) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_no_residual_and_bad_residuals() -> None:
    p, q = factors_from_residual(torch.zeros(6, 4), 2, KAPPA)
    assert p.shape == (6, 2)
    assert not bool(p.any() or q.any())
    with pytest.raises(ThetaError, match="NaN"):
        factors_from_residual(torch.full((4, 4), float("nan")), 1, KAPPA)
    with pytest.raises(ThetaError, match="second moments"):
        factors_from_residual(torch.randn(4, 4), 1, KAPPA, torch.zeros(4))
    with pytest.raises(ThetaError, match="do not fit 4 inputs"):
        factors_from_residual(torch.randn(4, 4), 1, KAPPA, torch.ones(3, 3))


@pytest.mark.isa
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_unrestricted_optimum_is_qera_exact(shape: tuple[int, int]) -> None:
    """The closed form as the paper writes it, with the symmetric root C^½."""
    residual, moments = torch.randn(shape), regularised_moments(correlated(shape[1]), shape[1])
    root = np.real(scipy.linalg.sqrtm(moments.double().numpy()))
    u, s, vh = np.linalg.svd(residual.double().numpy() @ root)
    expected = (u[:, :4] * s[:4]) @ vh[:4] @ np.linalg.inv(root)
    left, right = unrestricted_optimum(residual, 4, moments)
    np.testing.assert_allclose((left @ right.T).numpy(), expected, atol=5e-3)
    u, s, vh = np.linalg.svd(residual.numpy())
    assert np.abs((u[:, :4] * s[:4]) @ vh[:4] - expected).max() > 0.1  # control: the unweighted optimum is another


@pytest.mark.parametrize(("rank", "m", "n"), [(4, 576, 576), (4, 1536, 576), (4, 576, 1536), (1, 64, 4), (2, 192, 576)])
def test_equal_bytes(rank: int, m: int, n: int) -> None:
    other = equal_bytes_rank(rank, m, n)
    assert (m + n) * other <= 2 * max(m, n) * rank
    assert (m + n) * (other + 1) > 2 * max(m, n) * rank or other == min(m, n)


@pytest.mark.isa
def test_errors_left() -> None:
    residual, moments = torch.randn(48, 32), 7.0 * correlated(32)
    theta = quantise_factors(*factors_from_residual(residual, 3, KAPPA, moments))
    errors = errors_left(residual, theta, KAPPA, moments)
    solved = regularised_moments(moments, 32)
    exact = residual_error(residual, *theta.factors(), KAPPA, solved)
    assert errors.theta / errors.lost == pytest.approx(exact, rel=1e-4)
    assert errors.lost == pytest.approx(float(((residual @ moments) * residual).sum()), rel=0.05)
    assert errors.unrestricted_rank == equal_bytes_rank(3, 48, 32)
    left, right = unrestricted_optimum(residual, errors.unrestricted_rank, solved)
    ideal = relative_error(residual - left @ right.T, residual, solved)
    assert ideal <= errors.unrestricted / errors.lost + 1e-6 < ideal + 0.01  # INT8 costs a little
    assert errors.theta < errors.diagonal < errors.lost
    assert errors_left(residual, theta, KAPPA, moments.diagonal()).diagonal is None
    cropped = quantise_factors(*factors_from_residual(residual, 3, KAPPA, moments, target_size=16))
    corner = errors_left(residual[:16, :16], cropped, KAPPA, moments[:16, :16])
    assert errors_left(residual, cropped, KAPPA, moments, target_size=16) == corner


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A text of three chunks of 512 tokens for the tiny models."""
    path = tmp_path / "words.txt"
    rng = np.random.RandomState(0)
    path.write_text(" ".join(rng.choice(["the", "a", "engine", "in", "river", "stone", "and", "light"], 1200)))
    return path


def test_moments_are_those_of_the_inputs(tmp_path: Path) -> None:
    model = load_model(write_tiny_model(tmp_path / "m.gguf", "qwen3")).model
    tokens = torch.randint(0, model.config.vocab_size, (6, 40))
    names = [name for name in model.star_linears() if name != "output.weight"]
    moments = gather_moments(model, tokens, names)
    assert sorted(moments) == sorted(names)
    inputs: list[torch.Tensor] = []
    down = model.star_linears()["blk.1.ffn_down.weight"]
    handle = down.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    x = inputs[0].flatten(0, -2).double()
    torch.testing.assert_close(moments["blk.1.ffn_down.weight"].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    for a, b in (("attn_q", "attn_k"), ("attn_q", "attn_v"), ("ffn_gate", "ffn_up")):
        assert moments[f"blk.1.{a}.weight"] is moments[f"blk.1.{b}.weight"]
    assert moments["blk.1.attn_q.weight"] is not moments["blk.1.ffn_up.weight"]  # control
    assert moments["blk.1.attn_q.weight"] is not moments["blk.2.attn_q.weight"]


def test_a_budget_turns_the_largest_into_diagonals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(write_tiny_model(tmp_path / "m.gguf", "llama")).model  # inputs of 64 and 96
    tokens = torch.randint(0, model.config.vocab_size, (2, 40))
    names = [name for name in model.star_linears() if name != "output.weight"]
    full = gather_moments(model, tokens, names)
    assert capsys.readouterr().err == ""
    part = gather_moments(model, tokens, names, full_bytes=9 * 4 * 64 * 64)
    assert "layers with 96 inputs get the diagonal alone" in capsys.readouterr().err
    for name in names:
        known = part[name]
        assert known.ndim == (1 if name.endswith("ffn_down.weight") else 2)
        expected = full[name].diagonal() if known.ndim == 1 else full[name]
        torch.testing.assert_close(known, expected, rtol=1e-4, atol=1e-6)
    none = gather_moments(model, tokens, names, full_bytes=0)
    assert {moments.ndim for moments in none.values()} == {1}


@pytest.mark.isa
def test_only_named_layers_are_watched(tmp_path: Path, words: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", "llama")
    names = ["blk.0.attn_v.weight", "blk.2.ffn_down.weight"]
    some, notes = input_second_moments(load_model(path), load_text(words), 2, names)
    every, _ = input_second_moments(load_model(path), load_text(words), 2)
    assert sorted(some) == names
    assert len(every) == 21
    assert torch.equal(some[names[1]], every[names[1]])
    assert notes["nkat.calibration.tokens"] == 1024


def test_converter_reports_what_is_left(script, tmp_path: Path, words: Path) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", "llama", qtype=Type.Q4_0, blocks=1)
    reference = write_tiny_model(tmp_path / "hi.gguf", "llama", blocks=1)
    out = tmp_path / "out.nkat"
    other = tmp_path / "other.txt"
    other.write_text(words.read_text()[::-1])
    arguments = ["--input", base, "--output", out, "--theta-source", "residual", "--reference", reference, "--force"]
    arguments += ["--text", other]
    records = {}
    for label, extra in (("none", []), ("full", ["--calibrate", words])):
        done = script(CONVERTER, *arguments, *extra, "--json", "-")
        assert done.returncode == 0, done.stderr
        assert "squared error of the layers' outputs" in done.stdout
        record = json.loads(done.stdout.strip().splitlines()[-1])["residual"]
        assert record["moments"] == label
        assert sorted(row["kind"] for row in record["kinds"]) == [
            "attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up",
        ]  # fmt: skip
        assert record["all"]["layers"] == 7
        records[label] = record["all"]
        again = out.read_bytes()
        assert script(CONVERTER, *arguments, *extra).returncode == 0
        assert out.read_bytes() == again
    assert records["none"]["diagonal_left"] is None
    assert records["full"]["theta_left"] < records["full"]["diagonal_left"] < 1
    assert open_model_file(out).theta.source == "residual"
