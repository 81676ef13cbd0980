"""Sampling against its definitions, streaming across characters, ends; greedy text against llama.cpp."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from nkat.engine.eager import EagerDecoder
from nkat.engine.generate import Sampler, Sampling, generate
from nkat.errors import NKATError
from nkat.lm.load import LoadedModel, load_model
from tests.support.golden import read_golden
from tests.support.tiny_models import write_tiny_model

OFF = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
SETTINGS = [
    OFF,
    Sampling(0.7, 0, 1.0, 0.0),
    Sampling(1.0, 5, 1.0, 0.0),
    Sampling(1.0, 0, 0.6, 0.0),
    Sampling(1.0, 0, 1.0, 0.2),
    Sampling(),
    Sampling(1.7, 20, 0.9, 0.1),
    Sampling(0.3, 1000, 0.5, 0.01),
]


def logits_of(seed: int, count: int = 60) -> torch.Tensor:
    return 2.0 * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def by_definition(logits: torch.Tensor, sampling: Sampling) -> dict[int, float]:
    """Token → probability, in plain Python: top-k, then top-p, then min-p, then temperature."""
    pairs = sorted(enumerate(logits.double().tolist()), key=lambda pair: -pair[1])
    if sampling.top_k:
        pairs = pairs[: sampling.top_k]

    def softmax(values: list[float]) -> list[float]:
        powers = [math.exp(value - max(values)) for value in values]
        return [power / sum(powers) for power in powers]

    if sampling.top_p < 1:
        total, kept = 0.0, []
        for pair, p in zip(pairs, softmax([value for _, value in pairs]), strict=True):
            kept.append(pair)
            total += p
            if total >= sampling.top_p:
                break
        pairs = kept
    everything = softmax([value for _, value in pairs])
    pairs = [pair for pair, p in zip(pairs, everything, strict=True) if p >= sampling.min_p * everything[0] - 1e-12]
    weights = softmax([value / sampling.temperature for _, value in pairs])
    return {token: weight for (token, _), weight in zip(pairs, weights, strict=True)}


# --- the sampler


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_candidates_are_those_of_the_definitions(sampling: Sampling, seed: int) -> None:
    logits = logits_of(seed)
    ids, probabilities = Sampler(sampling, 0).candidates(logits)
    assert dict(zip(ids.tolist(), probabilities.tolist(), strict=True)) == pytest.approx(
        by_definition(logits, sampling), rel=1e-9
    )
    assert ids[0] == logits.argmax()


def test_temperature_comes_last() -> None:
    """Before top-p, as elsewhere, a high temperature lets more tokens in."""
    logits = logits_of(4)
    hot = Sampling(temperature=3.0, top_k=0, top_p=0.8, min_p=0.0)
    ids, _ = Sampler(hot, 0).candidates(logits)
    cold_ids, _ = Sampler(Sampling(1.0, 0, 0.8, 0.0), 0).candidates(logits)
    assert ids.tolist() == cold_ids.tolist()
    first, _ = Sampler(Sampling(1.0, 0, 0.8, 0.0), 0).candidates(logits / 3.0)
    assert len(first) > len(ids)


@pytest.mark.parametrize("sampling", [OFF, Sampling(), Sampling(1.7, 20, 0.9, 0.1)], ids=str)
def test_draws_follow_the_probabilities(sampling: Sampling) -> None:
    logits, draws = logits_of(7), 20_000
    sampler = Sampler(sampling, seed=3)
    drawn = Counter(sampler.pick(logits) for _ in range(draws))
    expected = by_definition(logits, sampling)
    assert set(drawn) <= set(expected)
    assert _fits(drawn, expected, draws) > 1e-3
    other = by_definition(logits, Sampling(sampling.temperature * 1.1, sampling.top_k, sampling.top_p, sampling.min_p))
    assert _fits(drawn, other, draws) < 1e-6  # ten per cent of temperature would be noticed


def _fits(drawn: Counter, expected: dict[int, float], draws: int) -> float:
    """p of a chi-square test; tokens expected less than ten times are taken together."""
    common = [token for token, p in expected.items() if p * draws >= 10]
    observed = [drawn[token] for token in common]
    wanted = [expected[token] * draws for token in common]
    if len(common) < len(expected):
        observed.append(draws - sum(observed))
        wanted.append(draws - sum(wanted))
    return chisquare(observed, wanted).pvalue


def test_a_seed_gives_the_same_draws() -> None:
    logits = logits_of(1)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(OFF, seed)
        return [sampler.pick(logits) for _ in range(50)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_only_differences_of_logits_count() -> None:
    logits = logits_of(2)
    ids, probabilities = Sampler(Sampling(), 0).candidates(logits)
    moved_ids, moved = Sampler(Sampling(), 0).candidates(logits + 8.0)  # a power of two: no other rounding
    assert ids.tolist() == moved_ids.tolist()
    assert torch.allclose(probabilities, moved, rtol=1e-4)
    scaled_ids, _ = Sampler(Sampling(), 0).candidates(logits * 0.2)
    assert len(scaled_ids) != len(ids)


def test_greedy_is_the_best_token_and_draws_nothing() -> None:
    greedy = Sampler(Sampling(temperature=0.0, top_k=3), 0)
    for seed in range(5):
        assert (
            greedy.pick(logits_of(seed))
            == logits_of(seed).argmax()
            == Sampler(Sampling(top_k=1), 9).pick(logits_of(seed))
        )
    assert greedy.pick(torch.tensor([-math.inf, 2.0, -math.inf])) == 1


def test_settings_that_mean_nothing_are_refused() -> None:
    for setting, message in (
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top-k"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.1}, "top-p"),
        ({"min_p": -0.1}, "min-p"),
        ({"min_p": 2.0}, "min-p"),
    ):
        with pytest.raises(NKATError, match=message):
            Sampling(**setting)
    for bad in (torch.tensor([0.0, math.nan]), torch.full((3,), -math.inf), torch.tensor([0.0, math.inf])):
        with pytest.raises(NKATError, match="not finite numbers"):
            Sampler(Sampling(), 0).pick(bad)


# --- streaming


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> LoadedModel:
    """A tiny model whose vocabulary has a token for each byte."""
    return load_model(write_tiny_model(tmp_path_factory.mktemp("generate") / "gemma.gguf", "gemma3"))


class Scripted:
    """A decoder whose best token is the next of a list, whatever it is fed."""

    name = "scripted"
    capacity = 1000
    cache_nbytes = 0

    def __init__(self, tokens: list[int], vocabulary: int, interrupt_at: int | None = None) -> None:
        self.tokens, self.vocabulary, self.interrupt_at = iter(tokens), vocabulary, interrupt_at
        self.length, self.fed = 0, []

    def prefill(self, tokens):
        self.fed += tokens
        if len(self.fed) == self.interrupt_at:
            raise KeyboardInterrupt
        return torch.nn.functional.one_hot(torch.tensor(next(self.tokens)), self.vocabulary).float()

    def step(self, token):
        return self.prefill([token])

    def set_gamma(self, gamma):
        raise AssertionError("generation does not change Θ's strength")


def stream(loaded: LoadedModel, tokens: list[int], max_tokens: int = 100, interrupt_at: int | None = None):
    pieces: list[str] = []
    decoder = Scripted(tokens, loaded.config.vocab_size, interrupt_at)
    result = generate(
        decoder,
        loaded.tokenizer,
        [5, 6, 7],
        Sampler(Sampling(temperature=0.0), 0),
        max_tokens=max_tokens,
        on_text=pieces.append,
    )
    return result, pieces, decoder


def byte_tokens(loaded: LoadedModel, text: str) -> list[int]:
    zero = loaded.tokenizer.encode("\x00")[0]
    return [zero + byte for byte in text.encode()]


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill sends no Ctrl-C there")
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_text_is_shown(gemma: LoadedModel, times: int) -> None:
    """It waits until the piece is shown; a second one does not, as when nobody reads what is written."""
    shown: list[str] = []

    def show(piece: str) -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        shown.append(piece)

    before = signal.getsignal(signal.SIGINT)
    decoder = Scripted(byte_tokens(gemma, "abc"), gemma.config.vocab_size)
    sampler = Sampler(Sampling(temperature=0.0), 0)
    result = generate(decoder, gemma.tokenizer, [5], sampler, max_tokens=3, on_text=show)
    assert (result.stopped, result.text) == ("interrupted", "a")
    assert shown == (["a"] if times == 1 else [])
    assert signal.getsignal(signal.SIGINT) is before


def test_characters_appear_whole(gemma: LoadedModel) -> None:
    """Each of these is two to four tokens of one byte."""
    text = "é世🙂!"
    tokens = byte_tokens(gemma, text)
    assert len(tokens) == 10
    result, pieces, _ = stream(gemma, [*tokens, gemma.tokenizer.eos_id])
    assert pieces == ["é", "世", "🙂", "!"]
    assert result.text == text
    assert result.tokens == tokens
    assert result.stopped == "end of generation"
    cut, pieces, _ = stream(gemma, tokens, max_tokens=4)  # inside the second character
    assert pieces == ["é", "\ufffd"]
    assert cut.stopped == "length"


def test_every_kind_of_end_stops_and_is_not_shown(gemma: LoadedModel) -> None:
    word = gemma.tokenizer.encode("the")
    assert len(gemma.tokenizer.eog_ids) > 1
    for end in gemma.tokenizer.eog_ids:
        result, _, decoder = stream(gemma, [*word, end, *word])
        assert result.text == "the"
        assert (result.stopped, result.steps) == ("end of generation", len(word))
        assert decoder.fed == [5, 6, 7, *word]
    unended, _, decoder = stream(gemma, word * 4, max_tokens=2 * len(word))
    assert unended.text == "thethe"
    assert unended.steps == 2 * len(word) - 1  # nobody needs the logits behind the last token
    assert decoder.fed == [5, 6, 7, *(word * 2)[:-1]]


def test_an_interrupt_keeps_what_is_there(gemma: LoadedModel) -> None:
    tokens = byte_tokens(gemma, "abcdef")
    result, pieces, _ = stream(gemma, tokens, interrupt_at=6)
    assert (result.text, result.stopped, result.prompt_tokens) == ("abc", "interrupted", 3)
    assert "".join(pieces) == "abc"
    assert result.speed > 0
    early, pieces, _ = stream(gemma, tokens, interrupt_at=3)
    assert (early.text, early.stopped, early.prompt_tokens, early.prompt_speed) == ("", "interrupted", 0, 0.0)
    assert pieces == []


def test_an_empty_prompt_is_refused(gemma: LoadedModel) -> None:
    decoder = Scripted([1], gemma.config.vocab_size)
    with pytest.raises(NKATError, match="the prompt is empty"):
        generate(decoder, gemma.tokenizer, [], Sampler(OFF, 0), max_tokens=1, on_text=print)
    with pytest.raises(NKATError, match="at least one token"):
        generate(decoder, gemma.tokenizer, [1], Sampler(OFF, 0), max_tokens=0, on_text=print)


@pytest.mark.isa
def test_a_long_prompt_in_pieces_is_the_same_prompt(tmp_path, monkeypatch) -> None:
    loaded = load_model(write_tiny_model(tmp_path / "llama.gguf", "llama"))
    prompt = loaded.tokenizer.encode("the rain in a tin and the other one")
    assert len(prompt) > 10

    margins = []

    class Watched(Sampler):
        def pick(self, logits: torch.Tensor) -> int:
            best, second = logits.topk(2).values.tolist()
            margins.append(best - second)
            return super().pick(logits)

    def run(piece: int) -> list[int]:
        monkeypatch.setattr("nkat.engine.generate.PREFILL_PIECE", piece)
        decoder = EagerDecoder(loaded.model, 100)
        sampler = Watched(Sampling(temperature=0.0), 0)
        return generate(decoder, loaded.tokenizer, prompt, sampler, max_tokens=12, on_text=lambda _: None).tokens

    assert run(4) == run(512)
    assert min(margins) > 1e-2  # a hundred times what the two sums' orders make of logits: no choice hangs on rounding


# --- against llama.cpp


@pytest.mark.isa
@pytest.mark.parametrize("name", ["stories", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_greedy_tokens_are_llama_cpps(name: str, request) -> None:
    """All 64 of its run with the same float32 weights; 8-bit activations turn off at SmolLM2's ninth."""
    golden = read_golden("models")[name]
    expected = golden["float32"]["greedy"]
    loaded = load_model(request.getfixturevalue(name), keep_dense=True)  # the same numbers, many times as fast
    prompt = loaded.tokenizer.encode(golden["prompt"], add_special=True)
    assert prompt == golden["float32"]["prompt_ids"]
    decoder = EagerDecoder(loaded.model, len(prompt) + 64)
    logits, ids = decoder.prefill(prompt), []
    sampler = Sampler(Sampling(temperature=0.0), 0)
    for _ in expected["ids"]:
        ids.append(sampler.pick(logits))
        logits = decoder.step(ids[-1])
    assert min(expected["margins"]) > 1e-3  # float32 decides all of them
    assert ids == expected["ids"]
