"""The judge: each arm on the same tokens as the model without Θ, which is scored once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nkat.errors import NKATError
from nkat.lm.load import LoadedModel, load_model
from nkat.lm.transformer import Transformer
from nkat.measure import judge as judge_module
from nkat.measure.judge import Judge, Passages, text_passages
from nkat.measure.perplexity import Perplexity, paired, score_arms, score_chunks
from nkat.measure.texts import Text, default_text
from nkat.measure.tpe import byte_ratio, tpe
from nkat.sources.make import describe_theta_set, make_thetas
from nkat.sources.options import ThetaOptions
from nkat.theta.layers import select_layers
from nkat.theta.set import CALIBRATION_KEY, ThetaSet
from tests.support.tiny_models import write_tiny_model

TEXT = Text("documentation", default_text().content[:9000], "f" * 64)
CHUNKS = 3


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("judge") / "m.gguf", "qwen3"))


@pytest.fixture(scope="module")
def theta(loaded: LoadedModel) -> ThetaSet:
    options = ThetaOptions(rank=4, gamma=0.8)
    names = select_layers(loaded.tensors, None)
    return describe_theta_set(loaded.file, make_thetas(loaded.gguf, names, options), options, "0" * 64)


@pytest.fixture
def judge(loaded: LoadedModel) -> Judge:
    return Judge.open(loaded, TEXT, CHUNKS)


def test_a_score_is_what_the_parts_give(judge: Judge, loaded: LoadedModel, theta: ThetaSet) -> None:
    score = judge.score(theta)
    chunks = text_passages(loaded, TEXT, CHUNKS).chunks
    by_hand = load_model(loaded.file.path, thetas=theta.layers, gamma=theta.gamma).model
    expected = Perplexity(score_chunks(by_hand, chunks))
    by_hand.set_gamma(None)
    base = Perplexity(score_chunks(by_hand, chunks))
    torch.testing.assert_close(score.perplexity.nll, expected.nll, atol=1e-5, rtol=4e-6)
    assert score.change.log_ratio == pytest.approx(paired(base, expected).log_ratio, rel=1e-4)
    assert abs(score.change.percent) > 1e-3  # control: Θ is felt
    assert score.byte_ratio == byte_ratio(loaded.tensors, theta.nbytes) > 1
    assert score.tpe == tpe(score.perplexity.ppl, score.byte_ratio)


def test_the_model_without_theta_is_scored_once(judge: Judge, theta: ThetaSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the first Θ, or by itself where it is asked for before."""
    scored: list[tuple[str, float | None]] = []

    def counted(score: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(model: Transformer, *arguments: object, **options: object) -> torch.Tensor:
            scored.append((score.__name__, model.gamma))
            return score(model, *arguments, **options)

        return run

    for score in (score_chunks, score_arms):
        monkeypatch.setattr(judge_module, score.__name__, counted(score))
    first = judge.score(theta)
    judge.score(theta, 0.9)
    assert judge.base().change.percent == 0.0
    judge.without()
    assert scored == [("score_arms", 0.8), ("score_chunks", 0.9)]

    other = judge.other(judge.loaded)
    assert torch.equal(other.without().nll, judge.without().nll)
    assert torch.equal(other.score(theta).perplexity.nll, first.perplexity.nll)
    assert scored[2:] == [("score_chunks", None), ("score_chunks", 0.8)]


def test_judging_is_determined_by_its_inputs(judge: Judge, theta: ThetaSet) -> None:
    first, _, again = judge.score(theta), judge.score(theta, 0.95), judge.score(theta)
    assert torch.equal(first.perplexity.nll, again.perplexity.nll)
    assert not torch.equal(first.perplexity.nll, judge.score(theta, 0.95).perplexity.nll)  # control


def test_only_tokens_that_count_are_scored(judge: Judge, loaded: LoadedModel, theta: ThetaSet) -> None:
    everything = judge.without().nll
    counted = torch.rand(everything.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    some = Judge(loaded, replace(judge.passages, counted=counted))
    torch.testing.assert_close(some.without().nll[0], everything[counted])
    made = some.score(theta).perplexity.nll[0]
    beside = Judge(loaded, some.passages)  # both arms in one pass
    assert torch.equal(beside.score(theta).perplexity.nll[0], made)
    assert torch.equal(beside.without().nll, some.without().nll)
    assert torch.equal(made, Judge(loaded, judge.passages).score(theta).perplexity.nll[counted])
    assert some.passages.tokens == int(counted.sum()) < judge.passages.tokens == everything.numel()
    picked = some.passages.pick([2, 0])
    assert torch.equal(picked.chunks, judge.passages.chunks[[2, 0]])
    assert picked.tokens == int(counted[[2, 0]].sum())


def test_a_theta_is_not_judged_on_its_own_text(judge: Judge, loaded: LoadedModel, theta: ThetaSet) -> None:
    made = replace(theta, notes={CALIBRATION_KEY: TEXT.sha256})
    with pytest.raises(NKATError, match="made from that very text"):
        judge.score(made)
    validation = Passages(judge.passages.chunks, None, "a slice of that text")
    Judge(loaded, validation).score(made)  # a slice that was kept back may


def test_too_short_a_text_is_known_before_anything_is_measured(loaded: LoadedModel) -> None:
    with pytest.raises(NKATError, match="too short"):
        Judge.open(loaded, Text("short", "a few words", ""), 4)


def test_a_record_has_every_figure_with_its_error(judge: Judge, theta: ThetaSet, tmp_path: Path) -> None:
    record = judge.score(theta).record()
    assert record.keys() == {
        *("perplexity", "perplexity_stderr", "change_percent", "change_percent_stderr", "byte_ratio", "tpe")
    }
    assert all(value == value for value in record.values())
