"""How well a model predicts a text, and what Θ changes about it: every perplexity of the toolkit is judged here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nkat.engine.compared import Compared
from nkat.engine.scoring import MakeScorer, make_scorer
from nkat.errors import NKATError
from nkat.host.console import counted, note
from nkat.lm.load import LoadedModel
from nkat.lm.transformer import Transformer
from nkat.measure.chats import chat_chunks, conversations, is_chats
from nkat.measure.compare import Base, check_base, compare_arms, compare_with
from nkat.measure.divergence import Divergence
from nkat.measure.perplexity import (
    DEFAULT_BATCH,
    PairedChange,
    Perplexity,
    chunk_context,
    paired,
    score_arms,
    score_chunks,
    scored_tokens,
    text_chunks,
    warn_of_short_chunks,
)
from nkat.measure.texts import Text, load_text
from nkat.measure.tpe import byte_ratio, tpe
from nkat.theta.set import TermSet, check_judging_text


@dataclass(frozen=True, slots=True)
class Passages:
    """Chunks as perplexity cuts them, int64 [C, context], and which of their scored tokens count, bool [C, scored].

    counted: None where all of them do, as in a plain perplexity
    name: where they are from, for people; sha256: of the text that Θ must not have been made from, None if it may
    """

    chunks: torch.Tensor
    counted: torch.Tensor | None
    name: str
    sha256: str | None = None

    def score(
        self,
        model: Transformer,
        progress: str | None = None,
        *,
        batch: int = DEFAULT_BATCH,
        make: MakeScorer = make_scorer,
    ) -> torch.Tensor:
        """−ln p of the tokens that count: float64 [C, scored], or [n] where not all do."""
        return self.those_that_count(score_chunks(model, self.chunks, batch=batch, progress=progress, make=make))

    def score_arms(
        self,
        model: Transformer,
        progress: str | None = None,
        *,
        batch: int = DEFAULT_BATCH,
        make: MakeScorer = make_scorer,
    ) -> torch.Tensor:
        """The same without Θ and with it, [2, ...]."""
        arms = score_arms(model, self.chunks, batch=batch, progress=progress, make=make)
        return torch.stack([self.those_that_count(nll) for nll in arms])

    def those_that_count(self, values: torch.Tensor) -> torch.Tensor:
        """Of values for each scored token, [C, scored]: all as they are, or [n] where not all tokens count."""
        return values if self.counted is None else values[self.counted]

    def by_chunk(self, nll: torch.Tensor) -> list[torch.Tensor]:
        """What `score` gave, chunk by chunk: of each the tokens that count."""
        counts = [nll.shape[-1]] * len(self.chunks) if self.counted is None else self.counted.sum(dim=1).tolist()
        return list(nll.reshape(-1).split(counts))

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        chunks, context = self.chunks.shape
        return chunks * scored_tokens(context) if self.counted is None else int(self.counted.sum())

    def pick(self, chunks: slice | Sequence[int]) -> Passages:
        """Some of the chunks, or all of them in another order."""
        counted = None if self.counted is None else self.counted[chunks]
        return replace(self, chunks=self.chunks[chunks], counted=counted)


@dataclass(frozen=True, slots=True)
class Score:
    """One arm beside the model without Θ on the same tokens.

    byte_ratio: bytes read per token with Θ over without;  divergence: from the model without Θ, where it was measured
    """

    perplexity: Perplexity
    change: PairedChange
    byte_ratio: float = 1.0
    divergence: Divergence | None = None

    @property
    def tpe(self) -> float:
        return tpe(self.perplexity.ppl, self.byte_ratio)

    def record(self) -> dict[str, Any]:
        divergence = {} if self.divergence is None else {"divergence": self.divergence.record()}
        bytes_read = {"byte_ratio": self.byte_ratio, "tpe": self.tpe}
        return {**self.perplexity.record(), **self.change.record(), **bytes_read, **divergence}


@dataclass(frozen=True, slots=True)
class Beside:
    """One arm beside a base on the same tokens: its perplexity, the change from the base's, and the divergence."""

    perplexity: Perplexity
    change: PairedChange
    divergence: Divergence

    def record(self) -> dict[str, Any]:
        return {**self.perplexity.record(), **self.change.record(), "divergence": self.divergence.record()}


class Judge:
    """Scores a model with one Θ after another, each beside the model without any, which is scored once: where it was
    not before, in the same pass as the first Θ.

    loaded: the model; every measurement leaves on it the Θ and the strength that were measured
    make: what makes the scorer; a `KeptScorer` where many Θ or strengths are measured in turn
    diverging: each score has the divergence from the model without Θ, for which what its output layer reads is kept
    """

    def __init__(
        self,
        loaded: LoadedModel,
        passages: Passages,
        *,
        batch: int = DEFAULT_BATCH,
        make: MakeScorer = make_scorer,
        diverging: bool = False,
    ) -> None:
        self.loaded, self.passages, self.batch, self.make, self.diverging = loaded, passages, batch, make, diverging
        self._without: Perplexity | None = None
        self._hidden: list[torch.Tensor] = []  # of the model without Θ

    @classmethod
    def open(
        cls,
        loaded: LoadedModel,
        text: Text | Path | None,
        chunks: int | None,
        *,
        context: int | None = None,
        batch: int = DEFAULT_BATCH,
        diverging: bool = False,
    ) -> Judge:
        """A judge on a text's first chunks. Raises NKATError for what cannot be measured, before time is spent.

        text: None: the one that every Python carries;  chunks, context: as `text_passages` has them
        """
        text = text if isinstance(text, Text) else load_text(text)
        return cls(loaded, text_passages(loaded, text, chunks, context), batch=batch, diverging=diverging)

    def without(self, progress: str | None = "without Θ") -> Perplexity:
        """The model without Θ, scored once."""
        if self._without is None:
            self.loaded.model.set_gamma(None)
            self._without = self._perplexity(
                self.passages.score(self.loaded.model, progress, batch=self.batch, make=self.make)
            )
        return self._without

    def base(self) -> Score:
        """The model without Θ as a Score: its change is nothing."""
        return Score(self.without(), paired(self.without(), self.without()))

    def score(self, theta: TermSet, gamma: float | None = None, *, progress: str | None = "with Θ") -> Score:
        """The model with a Θ, at its own strength or at `gamma`. Raises as `put_on` does."""
        self.put_on(theta, gamma)
        model = self.loaded.model
        if self.diverging:
            return self._diverging(theta, progress)
        if self._without is None:
            both = None if progress is None else f"without Θ and {progress}"
            arms = self.passages.score_arms(model, both, batch=self.batch, make=self.make)
            self._without, measured = (self._perplexity(nll) for nll in arms)
        else:
            measured = self._perplexity(self.passages.score(model, progress, batch=self.batch, make=self.make))
        return Score(measured, paired(self._without, measured), self.ratio(theta))

    def _diverging(self, theta: TermSet, progress: str | None) -> Score:
        model, chunks = self.loaded.model, self.passages.chunks
        label = None if progress is None else f"without Θ and {progress}"
        found = compare_arms(model, chunks, self._hidden, batch=self.batch, progress=label)
        self._without = self._without or self._perplexity(self.passages.those_that_count(found.base_nll))
        beside = self._beside(found, self._without)
        return Score(beside.perplexity, beside.change, self.ratio(theta), beside.divergence)

    def beside(
        self,
        base: Base,
        theta: TermSet | None = None,
        gamma: float | None = None,
        *,
        progress: str | None = "comparing",
    ) -> tuple[Perplexity, list[Beside]]:
        """Another base's perplexity, and the model beside it: without Θ, then with it where there is one.

        Raises NKATError for a base of another vocabulary, and as `put_on` does.
        """
        check_base(self.loaded, base)
        if theta is not None:
            self.put_on(theta, gamma)
        arms = 1 if theta is None else 2
        model, chunks = self.loaded.model, self.passages.chunks
        found = compare_with(model, base, chunks, arms, batch=self.batch, progress=progress)
        base_score = self._perplexity(self.passages.those_that_count(found[0].base_nll))
        return base_score, [self._beside(arm, base_score) for arm in found]

    def _beside(self, found: Compared, base: Perplexity) -> Beside:
        """What was found of all chunks, as far as it counts."""
        nll = self._perplexity(self.passages.those_that_count(found.nll))
        kl, same = (self.passages.those_that_count(x) for x in (found.kl, found.same_top))
        return Beside(nll, paired(base, nll), Divergence.of(base.nll, nll.nll, kl, same))

    def rows(self, chunks: slice) -> list[torch.Tensor]:
        """−ln p in some of the chunks with what is on the model just now, chunk by chunk, without a bar."""
        part = self.passages.pick(chunks)
        return part.by_chunk(part.score(self.loaded.model, batch=self.batch, make=self.make))

    def whole(self, rows: Sequence[torch.Tensor]) -> Perplexity:
        """What `rows` gave of all chunks, in order."""
        return self._perplexity(torch.stack([*rows]) if self.passages.counted is None else torch.cat([*rows]))

    def check(self, theta: TermSet) -> None:
        """Raises NKATError for a Θ that was made from the very text."""
        if self.passages.sha256 is not None:
            check_judging_text(theta, self.passages.sha256, self.loaded.file.path)

    def put_on(self, theta: TermSet, gamma: float | None = None) -> None:
        """Puts a Θ on the model, without measuring. Raises as `check` does."""
        self.check(theta)
        self.loaded.model.set_thetas(theta.layers)
        self.loaded.model.set_gamma(theta.gamma if gamma is None else gamma)

    def ratio(self, theta: TermSet) -> float:
        """c: bytes read per token with this Θ over without."""
        return byte_ratio(
            self.loaded.tensors,
            theta.bytes_per_token(self.loaded.config.active_experts),
            self.loaded.config.active_experts,
        )

    def other(self, loaded: LoadedModel) -> Judge:
        """The same judgement of another model with the same vocabulary."""
        return Judge(loaded, self.passages, batch=self.batch)

    def _perplexity(self, nll: torch.Tensor) -> Perplexity:
        count, context = self.passages.chunks.shape
        return Perplexity(nll, context) if nll.ndim == 2 else Perplexity(nll[None], context, count)


def evenly(count: int, most: int) -> list[int]:
    """At most so many of 0 … count − 1, evenly spread."""
    wanted = min(count, most)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def text_passages(loaded: LoadedModel, text: Text, chunks: int | None, context: int | None = None) -> Passages:
    """A text's first chunks, of which every scored token counts; of chats the assistant's tokens.

    chunks: at most so many; None: all;  context: tokens of each; None: 512, or fewer where the model was made for fewer
    """
    length = chunk_context(loaded.config.context_length) if context is None else context
    if is_chats(text):
        chats = conversations(text, loaded.gguf.metadata, loaded.tokenizer)
        cut, counts = chat_chunks(chats, length, loaded.tokenizer, chunks)
        if not len(cut):
            raise NKATError(f"{text.name}: the assistant's messages are empty, so that there is nothing to judge on")
        return Passages(cut, counts, text.name, text.sha256)
    cut = text_chunks(loaded.tokenizer, text.content, chunks, length)
    if context is None:
        warn_of_short_chunks(length)
    return Passages(cut, None, text.name, text.sha256)


def note_missing_chunks(passages: Passages, asked: int) -> None:
    """Says so where a text has fewer chunks than a user asked for."""
    count, context = passages.chunks.shape
    if count < asked:
        note(
            f"note: {passages.name} has {counted(count, 'chunk')} of {context} tokens, and not the {asked} that were "
            "asked for"
        )
