"""The guard: prices as the judge finds them, a rule that a Θ can break, and texts that are scored throughout."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nkat.errors import NKATError
from nkat.lm.load import LoadedModel, load_model
from nkat.measure.guard import (
    GUARD_LIMIT,
    Guard,
    GuardText,
    Price,
    Verdict,
    guard_texts,
    kind_contents,
    kind_spread,
    prices_table,
)
from nkat.measure.judge import Judge, Passages
from nkat.measure.perplexity import PairedChange
from nkat.measure.texts import Text, default_text
from nkat.sources.make import describe_theta_set, make_thetas
from nkat.sources.options import ThetaOptions
from nkat.theta.layers import select_layers
from nkat.theta.set import CALIBRATION_KEY, ThetaSet
from tests.support.tiny_models import write_tiny_model

MORE = Text("more", default_text().content[-9000:], "e" * 64)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tmp_path_factory.mktemp("guard") / "m.gguf"
    return load_model(write_tiny_model(path, "gemma3", blocks=1, context=128))  # short chunks, and BOS


@pytest.fixture(scope="module")
def theta(loaded: LoadedModel) -> ThetaSet:
    options = ThetaOptions(rank=2, gamma=0.5)
    names = select_layers(loaded.tensors, None)
    return describe_theta_set(loaded.file, make_thetas(loaded.gguf, names, options), options, "0" * 64)


@pytest.fixture(scope="module")
def texts(loaded: LoadedModel) -> list[GuardText]:
    own = Passages(torch.full((2, 128), 300), None, "own")
    return guard_texts(loaded, [MORE], own=[own], chunks=3)


def test_the_texts_are_what_was_asked_for(loaded: LoadedModel, texts: list[GuardText]) -> None:
    names = [text.passages.name for text in texts]
    assert names[0] == "own"
    assert names[1].startswith("pydoc_data.topics")
    assert names[2:] == ["sixteen kinds of English text", "more"]
    assert [len(texts[i].passages.chunks) for i in (0, 1, 3)] == [2, 3, 3]
    assert len(kind_contents()) == len(set(kind_contents())) == 16
    assert all(len(content) > 900 and "===" not in content[:4] for content in kind_contents())
    with pytest.raises(NKATError, match=r"short\.txt: as a guard: the text is too short"):
        guard_texts(loaded, [Text("short.txt", "a few words", "")])


def test_every_token_of_the_kinds_is_scored_once(loaded: LoadedModel, texts: list[GuardText]) -> None:
    kinds = texts[2]
    scored = kinds.kinds.shape[1]
    assert scored == 63  # of 128
    ids = [loaded.tokenizer.encode(content, add_special=False) for content in kind_contents()]
    whole = torch.tensor([token for part in ids for token in part])
    numbers = torch.tensor([number for number, part in enumerate(ids) for _ in part])
    found = kinds.passages.chunks[:, -scored:].flatten()
    assert 0 <= len(whole) - len(found) < scored
    assert torch.equal(found, whole[: len(found)])
    assert torch.equal(kinds.kinds.flatten(), numbers[: len(found)])
    assert torch.equal(kinds.passages.chunks[0, 1:-scored], whole[-(128 - scored) + 1 :])  # the end leads in
    assert bool((kinds.passages.chunks[:, 0] == loaded.tokenizer.bos_id).all())


def test_prices_are_the_judges(loaded: LoadedModel, theta: ThetaSet, texts: list[GuardText]) -> None:
    counted = torch.rand(3, 63, generator=torch.Generator().manual_seed(0)) < 0.5
    some = replace(texts[1].passages, counted=counted)
    verdict = Guard(loaded, [GuardText(some), *texts[2:]]).judge(theta, 0.9, progress=None)
    for price, passages in zip(verdict.prices, [some, *(text.passages for text in texts[2:])], strict=True):
        alone = Judge(loaded, replace(passages, sha256=None)).score(theta, 0.9, progress=None).change
        assert price.change.log_ratio == pytest.approx(alone.log_ratio, rel=1e-4)
        assert price.change.log_ratio_stderr == pytest.approx(alone.log_ratio_stderr, rel=1e-4)
        assert abs(price.change.log_ratio) > 1e-4  # control: Θ is felt
    assert [price.spread > 0 for price in verdict.prices] == [False, True, False]


def test_the_rule_can_be_broken_and_is_met_as_gamma_goes_to_one(
    loaded: LoadedModel, theta: ThetaSet, texts: list[GuardText]
) -> None:
    guard = Guard(loaded, texts[1:])
    strong, weak = guard.judge(theta, progress=None), guard.judge(theta, 1 - 1e-7, progress=None)
    assert not strong.admitted
    assert weak.admitted
    assert strong.record()["limit_percent"] == pytest.approx(0.5)
    assert [row["text"] for row in strong.record()["prices"]] == [text.passages.name for text in texts[1:]]
    assert strong.worst.name in str(strong)
    _, lines = prices_table(strong.record()).cells()
    assert [line[0] for line in lines] == [price.name for price in strong.prices]


def test_the_bound_is_mean_error_and_spread() -> None:
    certain = Price("a", PairedChange(math.log1p(GUARD_LIMIT) - 1e-9, 0.0))
    assert Verdict((certain,)).admitted
    assert not Verdict((replace(certain, change=PairedChange(0.005, 1e-4)),)).admitted
    assert not Verdict((certain, Price("b", PairedChange(0.0, 0.0), spread=0.0031))).admitted
    assert Verdict((certain, Price("b", PairedChange(0.0, 0.0), spread=0.0030))).admitted
    assert Price("c", PairedChange(-0.01, 0.003), spread=0.004).bound == pytest.approx(-0.01 + 1.64 * 0.005)
    assert Verdict((certain, Price("b", PairedChange(0.4, 0.0))), limit=0.5).admitted


def test_the_spread_is_between_kinds_and_not_within_them() -> None:
    kinds = torch.arange(16).repeat_interleave(400)
    noise = torch.randn(len(kinds), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alike = kind_spread(0.2 * noise, kinds)
    assert alike < 0.005  # the means themselves scatter by 0.01
    differing = kind_spread(0.2 * noise + 0.03 * kinds, kinds)
    assert differing == pytest.approx(0.03 * float(torch.arange(16.0).std()), rel=0.1)
    assert kind_spread(noise, torch.zeros_like(kinds)) == 0.0
    assert kind_spread(noise[:17], torch.arange(17)) == 0.0


def test_a_look_takes_some_chunks_of_each_text(loaded: LoadedModel, texts: list[GuardText], theta: ThetaSet) -> None:
    guard = Guard(loaded, texts)
    some = guard.part(3)
    kinds = len(guard.texts[2].passages.chunks)
    assert [len(text.passages.chunks) for text in some.texts] == [1, 1, -(-kinds // 2), 1]
    assert len(some.texts[2].kinds.unique()) == 16  # of every kind some: they say how much kinds differ
    assert some.chunks < 0.6 * guard.chunks
    assert [price.name for price in some.judge(theta, progress=None).prices] == [t.passages.name for t in texts]


def test_a_theta_made_from_a_guard_text_is_refused(
    loaded: LoadedModel, theta: ThetaSet, texts: list[GuardText], tmp_path: Path
) -> None:
    made = replace(theta, notes={CALIBRATION_KEY: MORE.sha256})
    with pytest.raises(NKATError, match="made from that very text"):
        Guard(loaded, texts).judge(made, progress=None)
