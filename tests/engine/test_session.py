"""A sequence that goes on: only what differs is computed, and the result is that of computing all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from nkat.engine.cuda_graph import StaticDecoder
from nkat.engine.decoder import make_decoder
from nkat.engine.eager import EagerDecoder
from nkat.engine.generate import Generation, Sampler, Sampling
from nkat.engine.plan import TorchOps
from nkat.engine.session import Session
from nkat.errors import NKATError
from nkat.lm.load import LoadedModel, load_model
from nkat.lm.transformer import Transformer
from nkat.theta.algebra import Theta, quantise_factors
from tests.support.tiny_models import write_tiny_model

IDS = [(29 * i + 5) % 200 for i in range(120)]
CLOSE, FAR = 1e-3, 1e-2  # of logits: sums in another order, and other tokens
CAPACITY = 200

KINDS = {
    "compiled": ("llama", {}, True),
    "an operation at a time": ("llama", {}, False),
    "compiled, window": ("gemma3", {"blocks": 7, "sliding_window": 20}, True),
    "shared keys": ("gemma4", {}, True),
    "recurrent": ("qwen35", {}, True),
}


@pytest.fixture(scope="module", params=KINDS)
def loaded(request, tmp_path_factory) -> LoadedModel:
    arch, options, repack = KINDS[request.param]
    path = write_tiny_model(tmp_path_factory.mktemp("session") / "tiny.gguf", arch, **options)
    return load_model(path, repack=repack)


@pytest.fixture
def llama(tmp_path: Path) -> LoadedModel:
    return load_model(write_tiny_model(tmp_path / "llama.gguf", "llama"))


class Watched:
    """Passes a decoder's calls on, and says what was computed."""

    def __init__(self, session: Session) -> None:
        self.computed: list[int] = []
        self.decoder, session.decoder = session.decoder, self  # type: ignore[assignment]

    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        self.computed += tokens
        return self.decoder.prefill(tokens)

    def step(self, token: int) -> torch.Tensor:
        self.computed.append(token)
        return self.decoder.step(token)

    def __getattr__(self, name: str) -> object:
        return getattr(self.decoder, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "length":
            self.decoder.length = value
        else:
            super().__setattr__(name, value)


def logits(session: Session, prompt: list[int]) -> torch.Tensor:
    return session.prefill(prompt[session.reuse(prompt) :]).clone()


def fresh(loaded: LoadedModel, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return EagerDecoder(loaded.model, CAPACITY).prefill(prompt)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def answer(session: Session, loaded: LoadedModel, prompt: list[int], most: int = 5) -> Generation:
    sampler = Sampler(Sampling(temperature=0.0), 0)
    return session.generate(loaded.tokenizer, prompt, sampler, max_tokens=most, on_text=lambda _: None)


@pytest.mark.isa
def test_only_what_differs_is_computed(loaded: LoadedModel) -> None:
    session = Session(loaded.model, CAPACITY)
    watched = Watched(session)
    first = IDS[:60]
    assert gap(logits(session, first), fresh(loaded, first)) < CLOSE
    assert watched.computed == first
    for held, prompt in [
        (60, [*first, 7, 8, 9]),  # goes on
        (30, [*first[:30], *IDS[80:110]]),  # differs in the middle
        (58, [*first[:30], *IDS[80:109]]),  # a beginning of it: the last token is computed again
        (0, [3, *first]),  # nothing in common
        (0, [5]),
    ]:
        watched.computed.clear()
        found = logits(session, prompt)
        if loaded.config.recurrent_blocks and held < 60:  # there is no state after so few tokens
            held = 0
        assert watched.computed == prompt[held:]
        assert session.tokens == prompt
        assert gap(found, fresh(loaded, prompt)) < CLOSE
        assert gap(found, fresh(loaded, [*prompt[:-1], prompt[-1] + 1])) > FAR  # the control


@pytest.mark.isa
def test_a_recurrent_model_goes_on_from_where_its_prompts_ended(tmp_path: Path) -> None:
    """The same prompt again, other tokens behind it, and one that goes on from an earlier one."""
    model = load_model(write_tiny_model(tmp_path / "tiny.gguf", "qwen35"), repack=True)
    session = Session(model.model, CAPACITY)
    watched = Watched(session)
    first = IDS[:60]
    said = answer(session, model, first).tokens
    for held, prompt in [
        (59, first),
        (60, [*first, 7, 8, 9]),
        (63, [*first, 7, 8, 9, 10, 11]),
        (62, [*first, 7, 8, 5]),
        (59, [*first, said[0], 3]),
    ]:
        watched.computed.clear()
        found = logits(session, prompt)
        assert watched.computed == prompt[held:]
        assert gap(found, fresh(model, prompt)) < CLOSE
        assert gap(found, fresh(model, [*prompt[:-1], prompt[-1] + 1])) > FAR  # the control


@pytest.mark.isa
def test_an_answer_is_kept_for_the_next_prompt(loaded: LoadedModel) -> None:
    session = Session(loaded.model, CAPACITY)
    first = answer(session, loaded, IDS[:40])
    assert (first.prompt_tokens, first.reused) == (40, 0)
    assert session.tokens == [*IDS[:40], *first.tokens[:-1]]  # nobody needed what follows the last token
    longer = [*IDS[:40], *first.tokens, *IDS[40:50]]
    watched = Watched(session)
    second = answer(session, loaded, longer)
    assert watched.computed == [*longer[40 + len(first.tokens) - 1 :], *second.tokens[:-1]]
    assert (second.prompt_tokens, second.reused) == (len(longer), 40 + len(first.tokens) - 1)
    assert gap(session.step(7), fresh(loaded, [*longer, *second.tokens[:-1], 7])) < CLOSE


def theta(loaded: LoadedModel, seed: int, rank: int = 3) -> dict[str, Theta]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: quantise_factors(*torch.randn(2, max(layer.shape), rank, generator=generator))
        for name, layer in loaded.model.star_linears().items()
    }


@pytest.mark.parametrize("repack", [True, False])
def test_a_decoder_stays_as_long_as_it_has_room_for_what_is_on(tmp_path: Path, repack: bool) -> None:
    """Making one takes longer than a short answer; a Θ of more columns than any before needs one all the same."""
    loaded = load_model(write_tiny_model(tmp_path / "t.gguf", "llama"), repack=repack)
    small, wide = theta(loaded, 0), theta(loaded, 1, rank=5)
    loaded.model.reserve_thetas(dict.fromkeys(small, 3))
    session, first = Session(loaded.model, CAPACITY), IDS[:20]
    decoder = session.decoder
    for thetas in (small, {}, theta(loaded, 2), wide, small):
        loaded.model.set_thetas(thetas)
        loaded.model.set_gamma(0.5)
        assert session.reuse(first) == 0
        assert gap(session.prefill(first), fresh(loaded, first)) < CLOSE
        assert (session.decoder is decoder) == (thetas is not wide or not repack)  # the model's own pass has no room
        decoder = session.decoder


@pytest.mark.parametrize("repack", [True, False])
def test_another_strength_or_theta_keeps_nothing(tmp_path: Path, repack: bool) -> None:
    loaded = load_model(write_tiny_model(tmp_path / "t.gguf", "llama"), repack=repack)
    loaded.model.set_thetas(theta(loaded, 0))
    loaded.model.set_gamma(0.9)
    session, longer = Session(loaded.model, CAPACITY), IDS[:30]
    logits(session, IDS[:20])
    assert session.reuse(longer) == 20  # the control: the same strength keeps it
    for change in (
        lambda: loaded.model.set_gamma(0.5),
        lambda: session.set_gamma(None),
        lambda: loaded.model.set_gamma(0.9),
        lambda: loaded.model.set_thetas(theta(loaded, 1)),
    ):
        change()
        assert session.reuse(longer) == 0
        found = session.prefill(longer)
        assert gap(found, fresh(loaded, longer)) < CLOSE
        assert session.reuse(longer) == len(longer) - 1


@pytest.mark.isa
def test_sliding_computes_what_stays_at_its_new_places(loaded: LoadedModel) -> None:
    """The beginning stays, the older half of the rest goes: the tokens of a plain list that is treated so."""
    room, stays = 24, 4
    session = Session(loaded.model, room, sliding=stays)
    assert session.capacity > 10**9
    logits(session, IDS[:20])
    held = IDS[:20]
    for token in IDS[20:60]:
        if len(held) == room:
            held = held[:stays] + held[stays + (room - stays) // 2 :]
        held.append(token)
        found = session.step(token)
        assert session.tokens == held
    assert gap(found, fresh(loaded, held)) < CLOSE
    assert gap(found, fresh(loaded, IDS[:60])) > FAR  # what went is not remembered
    plain = Session(loaded.model, room)
    logits(plain, IDS[:room])
    with pytest.raises(NKATError, match="the KV cache holds 24 tokens"):
        plain.step(1)


def fixed_step(model: Transformer, capacity: int) -> StaticDecoder:
    """The step that a GPU records, an operation at a time."""
    return StaticDecoder(model, capacity, TorchOps(star=False), TorchOps(star=True))


def test_the_step_of_a_gpu_forgets_and_slides(llama: LoadedModel, monkeypatch) -> None:
    """Its cache is of a fixed size, which what was forgotten is still in."""
    monkeypatch.setattr("nkat.engine.session.make_decoder", fixed_step)
    session = Session(llama.model, 24, sliding=4)
    logits(session, IDS[:20])
    shorter = [*IDS[:10], *IDS[50:55]]
    assert session.reuse(shorter) == 10
    assert gap(session.prefill(shorter[10:]), fresh(llama, shorter)) < CLOSE
    for token in IDS[60:80]:
        found = session.step(token)
    assert len(session.tokens) <= 24
    assert gap(found, fresh(llama, session.tokens)) < CLOSE
    assert gap(found, fresh(llama, [*shorter, *IDS[60:80]])) > FAR


def test_a_full_context_ends_the_text_and_sliding_goes_on(llama: LoadedModel, monkeypatch) -> None:
    monkeypatch.setattr(llama.tokenizer, "eog_ids", frozenset())
    stopped = answer(Session(llama.model, 30), llama, IDS[:20], most=100)
    assert (stopped.stopped, len(stopped.tokens)) == ("context", 10)
    exact = answer(Session(llama.model, 30), llama, IDS[:20], most=10)
    assert (exact.stopped, exact.tokens) == ("length", stopped.tokens)
    endless = answer(Session(llama.model, 30, sliding=0), llama, IDS[:20], most=100)
    assert (endless.stopped, len(endless.tokens)) == ("length", 100)
    assert endless.tokens[:10] == stopped.tokens
    with pytest.raises(NKATError, match="16 tokens cannot stay of a context of 30: at most half of it"):
        Session(llama.model, 30, sliding=16)


def test_an_interrupt_leaves_a_session_that_goes_on(llama: LoadedModel, monkeypatch) -> None:
    """In the second piece of a prompt: the first one is kept."""
    monkeypatch.setattr("nkat.engine.generate.PREFILL_PIECE", 16)
    session = Session(llama.model, CAPACITY)
    inner = session.decoder.prefill
    calls = []

    def interrupted(tokens: Sequence[int]) -> torch.Tensor:
        calls.append(len(tokens))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(tokens)

    monkeypatch.setattr(session.decoder, "prefill", interrupted)
    result = answer(session, llama, IDS[:40])
    assert (result.stopped, result.prompt_tokens, result.reused) == ("interrupted", 0, 0)
    assert session.tokens == IDS[:16]
    again = answer(session, llama, IDS[:40])
    assert again.reused == 16
    assert again.tokens == answer(Session(llama.model, CAPACITY), llama, IDS[:40]).tokens


def test_what_it_says_of_itself_is_its_decoders(llama: LoadedModel) -> None:
    session, decoder = Session(llama.model, 50), make_decoder(llama.model, 50)
    assert (session.name, session.capacity, session.cache_nbytes) == (decoder.name, 50, decoder.cache_nbytes)
    with pytest.raises(NKATError, match="the prompt is empty"):
        answer(session, llama, [])
