"""Several Θ as one, against the sum of their dense matrices in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nkat.errors import NKATError
from nkat.gguf.file import GGUFError
from nkat.gguf.writer import write_gguf
from nkat.theta import modelfile
from nkat.theta.algebra import Theta, coupling, of_experts, quantise_factors
from nkat.theta.combine import Weighted, WeightedFile, combined, combined_for, joined, scaled_files, weighted_file
from nkat.theta.modelfile import layout_parts, open_model_file, theta_only_parts
from nkat.theta.set import CALIBRATION_KEY, HELDOUT_PREFIX, KEEP_KEY, ThetaSet, check_judging_text
from tests.support.oracle import dense_theta
from tests.support.tiny_models import write_tiny_model
from tests.theta.test_modelfile import NAMES, make_set, same_set


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base.gguf", "llama")


def dense(theta: Theta, size: int) -> torch.Tensor:
    whole = torch.zeros(size, size, dtype=torch.float64)
    whole[: theta.size, : theta.size] = dense_theta(*theta.factors(torch.float64))
    return whole


def effect(theta_set: ThetaSet, name: str, size: int = 100) -> torch.Tensor:
    """κΘ of one weight."""
    return coupling(theta_set.gamma) * dense(theta_set.layers[name], size)


def three(base: Path) -> list[ThetaSet]:
    """Of other ranks, strengths and layers."""
    sets = [make_set(base, rank, seed) for rank, seed in ((3, 1), (1, 2), (2, 3))]
    weaker = replace(sets[1], gamma=0.99, layers={name: sets[1].layers[name] for name in NAMES[1:]})
    return [sets[0], weaker, replace(sets[2], gamma=0.8)]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -2.0, 0.25), (0.0, 1.5, -1.0)])
def test_the_sum_is_that_of_the_dense_matrices(base: Path, weights: tuple[float, ...]) -> None:
    sets = three(base)
    whole = combined([Weighted(one, weight) for one, weight in zip(sets, weights, strict=True)])
    assert whole.source == "combined"
    for name in NAMES:
        terms = [w * effect(one, name) for one, w in zip(sets, weights, strict=True) if name in one.layers]
        expected = sum(terms)
        largest = expected.abs().max()
        assert (effect(whole, name) - expected).abs().max() < 1e-6 * largest  # a scale is rounded to float32
        assert (effect(whole, name) - 1.01 * expected).abs().max() > 1e-3 * largest  # control
        assert torch.equal(dense(whole.layers[name], 100), -dense(whole.layers[name], 100).T)
        ranks = [one.layers[name].rank for one, w in zip(sets, weights, strict=True) if w and name in one.layers]
        assert whole.layers[name].rank == sum(ranks)


def test_one_of_weight_one_is_itself_and_none_is_nothing(base: Path) -> None:
    one, two, _ = three(base)
    assert combined([Weighted(one)]) is one
    assert combined([Weighted(one), Weighted(two, 0.0)]) is one
    assert combined([Weighted(one, 0.0), Weighted(two, 0.0)]) is None
    assert combined([]) is None
    assert combined([Weighted(one, 0.5)]) is not one
    assert combined([Weighted(one, 0.5)]).layers[NAMES[0]].p is one.layers[NAMES[0]].p  # nothing is copied


def test_factors_are_taken_again_where_only_weights_change(base: Path) -> None:
    sets = three(base)
    first = combined([Weighted(one, 1.0) for one in sets])
    anew = combined([Weighted(one, w) for one, w in zip(sets, (0.5, 2.0, 3.0), strict=True)])
    again = combined([Weighted(one, w) for one, w in zip(sets, (0.5, 2.0, 3.0), strict=True)], first)
    for name in NAMES:
        assert again.layers[name].p is first.layers[name].p
        assert torch.equal(again.layers[name].p, anew.layers[name].p)
        assert torch.equal(again.layers[name].scale, anew.layers[name].scale)
        assert not torch.equal(again.layers[name].scale, first.layers[name].scale)


def test_experts_and_corners_of_other_sizes() -> None:
    generator = torch.Generator().manual_seed(0)

    def make(size: int, rank: int) -> Theta:
        return of_experts([quantise_factors(*torch.randn(2, size, rank, generator=generator)) for _ in range(3)])

    small, large = make(10, 2), make(24, 1)
    whole = joined([small, large], [2.0, -0.5])
    assert (whole.experts, whole.size, whole.rank) == (3, 24, 3)
    for i in range(3):
        expected = 2.0 * dense(small.expert(i), 24) - 0.5 * dense(large.expert(i), 24)
        assert (dense(whole.expert(i), 24) - expected).abs().max() < 1e-6 * expected.abs().max()


def test_what_is_noted_of_the_parts(base: Path) -> None:
    one, two, _ = three(base)
    one = replace(one, notes={CALIBRATION_KEY: "a" * 64, f"{HELDOUT_PREFIX}change_percent": -1.0})
    two = replace(two, notes={KEEP_KEY: "b" * 64})
    whole = combined([Weighted(one, 0.5, "one.bin"), Weighted(two, 1.0, "two.bin")])
    assert whole.notes["nkat.part.0.weight"] == 0.5
    assert whole.notes["nkat.part.1.name"] == "two.bin"
    assert not any("heldout" in key for key in whole.notes)
    for text in ("a" * 64, "b" * 64):
        with pytest.raises(GGUFError, match="made from that very text"):
            check_judging_text(whole, text, base)
    check_judging_text(whole, "c" * 64, base)
    again = combined([Weighted(whole, 1.0), Weighted(three(base)[2], 1.0)])  # a sum in a sum
    with pytest.raises(GGUFError, match="made from that very text"):
        check_judging_text(again, "b" * 64, base)


@pytest.mark.parametrize("layout", ["tensors", "appended"])
def test_a_sum_goes_to_a_file_and_back(tmp_path: Path, base: Path, layout: str) -> None:
    sets = three(base)
    whole = combined([Weighted(one, w) for one, w in zip(sets, (0.5, -2.0, 1.0), strict=True)])
    write_gguf(tmp_path / "sum.nkat", layout_parts(whole, open_model_file(base), layout), force=False)
    found = open_model_file(tmp_path / "sum.nkat").theta
    assert same_set(found, whole)
    assert not same_set(found, combined([Weighted(one) for one in sets]))


def test_mistakes(base: Path) -> None:
    one, two, _ = three(base)
    with pytest.raises(NKATError, match="different models"):
        combined([Weighted(one), Weighted(replace(two, base_sha256="0" * 64, base_name="other"))])
    for weight in (float("nan"), float("inf")):
        with pytest.raises(NKATError, match="finite"):
            combined([Weighted(one, weight)])
    with pytest.raises(NKATError, match="too large"):
        combined([Weighted(one, 1e300), Weighted(two)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.bin:0.5", [("a.bin", 0.5)]),
        ("a.bin:1,b.bin:-.25", [("a.bin", 1.0), ("b.bin", -0.25)]),
        ("C:\\x\\a.bin:2e-1", [("C:\\x\\a.bin", 0.2)]),
        ("a,b.bin:3", [("a,b.bin", 3.0)]),
        ("rank:4.bin:1", [("rank:4.bin", 1.0)]),
    ],
)
def test_files_with_weights(text: str, expected: list[tuple[str, float]]) -> None:
    assert scaled_files(text) == [WeightedFile(Path(name), weight) for name, weight in expected]


@pytest.mark.parametrize("text", ["a.bin", "a.bin:", ":1", "a.bin:x", "a.bin:1,b.bin", "a.bin:1,", ""])
def test_what_is_no_file_with_a_weight(text: str) -> None:
    with pytest.raises(ValueError, match="FILE:WEIGHT"):
        scaled_files(text)


def test_a_weight_behind_a_colon_unless_a_file_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert weighted_file("a.bin:0.5") == WeightedFile(Path("a.bin"), 0.5)
    assert weighted_file("a.bin") == WeightedFile(Path("a.bin"))
    assert weighted_file("C:\\a.bin") == WeightedFile(Path("C:\\a.bin"))
    (tmp_path / "a.bin:0.5").touch()
    assert weighted_file("a.bin:0.5") == WeightedFile(Path("a.bin:0.5"))
    with pytest.raises(NKATError, match="must be a number"):
        weighted_file("a.bin:inf")


def test_files_are_checked_and_the_model_is_hashed_once(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = three(base)
    paths = [tmp_path / f"{i}.bin" for i in range(3)]
    for path, one in zip(paths, sets, strict=True):
        write_gguf(path, theta_only_parts(one), force=False)
    own = tmp_path / "own.nkat"
    write_gguf(own, layout_parts(make_set(base, 2, 9), open_model_file(base), "tensors"), force=False)
    hashed: list[object] = []
    real = modelfile.sha256_of_parts
    monkeypatch.setattr(modelfile, "sha256_of_parts", lambda *a: hashed.append(a) or real(*a))
    model = open_model_file(own)
    files = [WeightedFile(own), WeightedFile(paths[0], 0.5), WeightedFile(paths[2])]
    whole = combined_for(model, files)
    assert len(hashed) == 1
    for name in NAMES:
        expected = effect(model.theta, name) + 0.5 * effect(sets[0], name) + effect(sets[2], name)
        assert (effect(whole, name) - expected).abs().max() < 1e-6 * expected.abs().max()
    assert combined_for(model, [WeightedFile(own, 0.0)]) is None
    stronger = combined_for(model, files, gamma=0.5)
    assert stronger.gamma == 0.5
    assert (effect(stronger, NAMES[0]) - effect(whole, NAMES[0])).abs().max() > 0.01
    other = write_tiny_model(tmp_path / "other.gguf", "llama", seed=7)
    with pytest.raises(GGUFError, match="another model"):
        combined_for(open_model_file(other), [WeightedFile(paths[0])])
