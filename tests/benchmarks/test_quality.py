"""The quality benchmark compares what it says it compares."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from benchmarks import quality, quality_report
from benchmarks.low_rank import LowRankTerms, apply_terms, weight_controls
from nkat.errors import NKATError
from nkat.lm.load import LoadedModel, load_model
from nkat.measure.texts import default_text
from nkat.sources.make import make_thetas
from nkat.sources.options import ThetaOptions
from nkat.theta.algebra import coupling, low_rank_form
from nkat.theta.layers import adaptable_layers
from nkat.theta.set import ThetaSet
from tests.support.tiny_models import write_tiny_model

GAMMA = 0.5


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny.gguf", "llama", blocks=2)


def theta_set_of(loaded: LoadedModel) -> ThetaSet:
    names = adaptable_layers(loaded.tensors)
    thetas = make_thetas(loaded.gguf, names, ThetaOptions(rank=4, gamma=GAMMA))
    return ThetaSet(thetas, GAMMA, "weight", 0, "", "tiny", 0)


def test_the_first_case_is_judged_with_its_theta(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is measured on the way to it, on the same model, which must not leave the case without Θ."""
    monkeypatch.setattr(quality, "JUDGED", {"t.txt": 2})
    monkeypatch.setattr(quality.Bench, "path", lambda self, model: model_path)
    (tmp_path / "t.txt").write_text(default_text().content[:8000])
    bench = quality.Bench(tmp_path, tmp_path, steps=1)
    theta_set = theta_set_of(load_model(model_path))
    case = quality.theta_case("tiny", lambda _: theta_set, GAMMA)
    first, again = case(bench, "first")["texts"]["t.txt"], case(bench, "again")["texts"]["t.txt"]
    assert first == again
    assert abs(first["change_percent"]) > 1e-3
    none = quality.theta_case("tiny", lambda _: theta_set, 1.0)(bench, "none")["texts"]["t.txt"]
    assert none["change_percent"] == 0.0  # control: γ = 1 is no Θ
    down_up = {
        name: low_rank_form(*theta.factors(), *bench.load("tiny").tensors[name].shape)
        for name, theta in theta_set.layers.items()
    }
    terms = LowRankTerms({name: (down, coupling(GAMMA) * up) for name, (down, up) in down_up.items()}, 0)
    same = quality.terms_case("tiny", lambda *_: terms)(bench, "terms")["texts"]["t.txt"]
    assert same["change_percent"] == pytest.approx(first["change_percent"], rel=0.02)


def test_a_case_is_judged_on_the_texts_it_names(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "JUDGED", {"a.txt": 1, "b.txt": 1})
    monkeypatch.setattr(quality.Bench, "path", lambda self, model: model_path)
    for name in quality.JUDGED:
        (tmp_path / name).write_text(default_text().content[:4000])
    bench = quality.Bench(tmp_path, tmp_path, steps=1)
    make = theta_set_of(load_model(model_path))
    cases = {
        "one": quality.theta_case("tiny", lambda _: make, GAMMA, ["a.txt"]),
        "all": quality.theta_case("tiny", lambda _: make, GAMMA),
    }
    results = {name: case(bench, name) for name, case in cases.items()}
    assert [list(result["texts"]) for result in results.values()] == [["a.txt"], ["a.txt", "b.txt"]]
    one, both = ("".join(line) for line in quality_report.tables(results)[0].cells()[1])
    assert (one.count("±"), both.count("±")) == (2, 3)  # the perplexity's and the changes'


def test_an_interrupted_fit_goes_on(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it wrote is no finished Θ, although it lies where one would."""
    commands: list[list[str]] = []

    def converter(command: list[str], **_: object) -> CompletedProcess[str]:
        commands.append(command)
        return CompletedProcess(command, 130)

    monkeypatch.setattr(quality.subprocess, "run", converter)
    monkeypatch.setattr(quality.Bench, "path", lambda self, model: model_path)
    bench = quality.Bench(tmp_path, tmp_path, steps=1)
    (tmp_path / "a.theta").touch()
    with pytest.raises(NKATError, match="the file is empty"):
        bench.thetas("a", "tiny")
    assert not commands  # control: without a state beside it, the file is taken as it is
    (tmp_path / "a.theta.fit").touch()
    with pytest.raises(NKATError, match="status 130"):
        bench.thetas("a", "tiny")
    assert "--resume" in commands[0]


def test_controls_are_parts_of_theta(model_path: Path) -> None:
    loaded = load_model(model_path)
    theta_set = theta_set_of(loaded)
    controls = weight_controls(loaded, theta_set, 3, GAMMA)

    def dense(control: str, name: str) -> torch.Tensor:
        down, up = controls[control].layers[name]
        return up @ down

    for name, theta in theta_set.layers.items():
        p, q = (factor[:, :3] for factor in theta.factors())
        m, n = loaded.tensors[name].shape
        whole = coupling(GAMMA) * (p @ q.T - q @ p.T)[:m, :n]
        torch.testing.assert_close(dense("straight-half", name) + dense("transposed-half", name), whole)
        torch.testing.assert_close(dense("negated", name), -whole)
        assert not torch.allclose(dense("random", name), whole, atol=0.1 * float(whole.abs().max()))
    with torch.inference_mode():
        tokens = torch.randint(40, (1, 9))
        before = loaded.model(tokens)
        apply_terms(loaded.model, controls["negated"])
        assert not torch.allclose(loaded.model(tokens), before)
        loaded.model.set_thetas({})
        loaded.model.set_gamma(None)
        assert torch.equal(loaded.model(tokens), before)
