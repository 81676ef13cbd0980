"""The one model that answers: text token by token, and the KV cache that the next prompt may begin with."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from nkat.engine.generate import PREFILL_PIECE, Sampler, Sampling
from nkat.engine.session import Session
from nkat.lm.load import LoadedModel
from nkat.lm.mix import ThetaMix
from nkat.serve.arms import Arm
from nkat.serve.stops import Stops
from nkat.theta.set import ThetaSet


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be answered.

    prompt: token ids, at least one; max_tokens: at least 1, and with the prompt no more than the cache holds
    logprobs: how many of the likeliest tokens are named beside each token; None: no probabilities at all
    """

    arm: Arm
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """A token's bytes, where its text begins (characters of the answer), its ln p before any sampler, and those of the
    likeliest tokens, best first."""

    piece: bytes
    start: int
    logprob: float
    likeliest: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """More of the text, and the probabilities of its tokens where they were asked for."""

    text: str
    tokens: tuple[Scored, ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """Why the text ends, and what was counted.

    cached: tokens of the prompt that were in the cache already
    generated: without the token that ended it, but with those of a stop string
    """

    reason: Literal["stop", "length"]
    prompt: int
    cached: int
    generated: int


class Served:
    """A loaded model and its decoder. For one thread at a time."""

    def __init__(self, loaded: LoadedModel, thetas: Mapping[str, ThetaSet], context: int) -> None:
        """loaded: without Θ; thetas: those that an answer may have on, by name

        context: tokens of a prompt and its answer together, at most
        """
        self.tokenizer = loaded.tokenizer
        self._mix = ThetaMix(loaded.model, thetas)
        self._session = Session(loaded.model, context)
        self._on: tuple[object, ...] = ((), None)  # which Θ, how much of each, at which strength

    def answer(self, ask: Ask, go_on: Callable[[], bool]) -> Iterator[Piece | End]:
        """The answer's pieces, then its end; nothing more once `go_on` says no.

        Raises NKATError when the model's predictions are no numbers.
        """
        wanted = (ask.arm.weights, ask.arm.gamma)
        if self._on != wanted:
            self._mix.set_weights(dict(ask.arm.weights), ask.arm.gamma)
            self._on = wanted
        cached = self._session.reuse(ask.prompt)
        for start in range(cached, len(ask.prompt), PREFILL_PIECE):
            if not go_on():
                return
            logits = self._session.prefill(ask.prompt[start : start + PREFILL_PIECE])
        sampler, text = Sampler(ask.sampling, ask.seed), _Text(ask.stop)
        generated, reason = 0, "length"
        while generated < ask.max_tokens:
            token = sampler.pick(logits)
            if token in self.tokenizer.eog_ids:
                reason = "stop"
                break
            generated += 1
            scored = None if ask.logprobs is None else self._scored(logits, token, ask.logprobs)
            yield from text.add(self.tokenizer.decode_bytes([token]), scored)
            if text.stopped or generated == ask.max_tokens:
                break  # nobody needs the logits behind the last token
            if not go_on():
                return
            logits = self._session.step(token)
        yield from text.finish()
        yield End("stop" if text.stopped or reason == "stop" else "length", len(ask.prompt), cached, generated)

    def _scored(self, logits: torch.Tensor, token: int, count: int) -> Scored:
        known = logits.detach().cpu().double().log_softmax(dim=0)
        best = known.topk(min(count, len(known)))
        names = [self.tokenizer.decode_bytes([one]) for one in best.indices.tolist()]
        likeliest = tuple(zip(names, best.values.tolist(), strict=True))
        return Scored(self.tokenizer.decode_bytes([token]), 0, float(known[token]), likeliest)


class _Text:
    """Tokens' bytes become text: whole characters, up to a stop string; a token is told of once its text is shown."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
        self._stops = Stops(stop)
        self._made = self._shown = 0  # characters
        self._waiting: list[tuple[Scored, int]] = []  # and where its text ends
        self.stopped = False

    def add(self, data: bytes, scored: Scored | None) -> Iterator[Piece]:
        start = self._made
        characters = self._characters.decode(data)
        self._made += len(characters)
        if scored is not None:
            self._waiting.append((replace(scored, start=start), self._made))
        shown, self.stopped = self._stops.feed(characters)
        if shown:
            yield self._piece(shown, self._shown + len(shown))

    def finish(self) -> Iterator[Piece]:
        """What was held back; of a text that a stop string ended, the tokens that it cut."""
        shown = ""
        if not self.stopped:
            shown, self.stopped = self._stops.feed(self._characters.decode(b"", final=True))
            shown += self._stops.rest()
        if self.stopped:
            self._waiting = [(one, end) for one, end in self._waiting if one.start < self._shown + len(shown)]
        if shown or self._waiting:
            yield self._piece(shown, self._made)

    def _piece(self, text: str, end: int) -> Piece:
        self._shown += len(text)
        told = [one for one, at in self._waiting if at <= end]
        self._waiting = self._waiting[len(told) :]
        return Piece(text, tuple(told))
