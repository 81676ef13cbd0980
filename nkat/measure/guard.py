"""The guard: what a Θ that was learned from one text costs on others, and how much it may.

Guard texts by default, all in English: Python's documentation (reference prose and code), and sixteen kinds of text
that were written for this (`kinds.txt`: stories, verse, letters, news, a recipe, science, chat, a contract, programs,
…), each short, so that they say how much a price differs from kind to kind. A caller adds a part of the calibration
text that is not learned, and users what is dear to them (`--guard FILE`).

The rule: on no guard text may perplexity rise by more than 0.5 %, and that beyond doubt:

    ln(ppl with Θ / without) + 1.64 · sqrt(standard error² + spread between kinds²) ≤ ln 1.005

A text of a kind that the guard does not have is one more draw from the kinds, hence the spread; 1.64 leaves one in
twenty of such draws outside if they are normal. As γ → 1 every Θ meets the rule: all three numbers go to 0.

What it does not cover: other languages, and whatever is less like the sixteen kinds than they are like one another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any

import torch

from nkat.engine.scoring import MakeScorer, make_scorer
from nkat.errors import NKATError
from nkat.host.tables import Column, Table
from nkat.lm.load import LoadedModel
from nkat.lm.tokenizer import Tokenizer
from nkat.measure.columns import CHANGE_PERCENT
from nkat.measure.judge import Judge, Passages, evenly
from nkat.measure.perplexity import (
    DEFAULT_BATCH,
    PairedChange,
    Perplexity,
    chunk_context,
    paired,
    scored_tokens,
    text_bos,
    text_chunks,
    windows,
)
from nkat.measure.texts import Text, default_text
from nkat.theta.set import ThetaSet, check_judging_text

GUARD_LIMIT = 0.005  # of the perplexity without Θ
GUARD_CHUNKS = 12  # of a text's chunks, evenly spread over it
_MARGIN = 1.64
_MOST_CHARACTERS = 16  # of a token, on average over a chunk
_KINDS = "sixteen kinds of English text"
_KINDS_SHARE = 2  # see `Guard.part`
_LEAST_OF_A_KIND = 32  # tokens, below which a kind's mean says nothing of it


@dataclass(frozen=True, slots=True)
class GuardText:
    """Passages to be left as good as they are.

    kinds: which kind each scored token is of, int64 [C, scored]; None: all are of one
    """

    passages: Passages
    kinds: torch.Tensor | None = None

    def pick(self, chunks: slice | Sequence[int]) -> GuardText:
        return GuardText(self.passages.pick(chunks), None if self.kinds is None else self.kinds[chunks])


@dataclass(frozen=True, slots=True)
class Price:
    """What a Θ changes on one guard text. spread: standard deviation of that between its kinds, in nats a token"""

    name: str
    change: PairedChange
    spread: float = 0.0

    @property
    def bound(self) -> float:
        """The most that it may be, by the rule: ln(ppl with Θ / without)."""
        return self.change.log_ratio + _MARGIN * math.hypot(self.change.log_ratio_stderr, self.spread)

    def record(self) -> dict[str, Any]:
        spread, bound = 100.0 * math.expm1(self.spread), 100.0 * math.expm1(self.bound)
        return {"text": self.name, **self.change.record(), "spread_percent": spread, "bound_percent": bound}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The prices of one Θ at one γ. limit: share of the perplexity without Θ by which none may be worse"""

    prices: tuple[Price, ...]
    limit: float = GUARD_LIMIT

    @property
    def worst(self) -> Price:
        return max(self.prices, key=lambda price: price.bound)

    @property
    def admitted(self) -> bool:
        return self.worst.bound <= math.log1p(self.limit)

    def record(self) -> dict[str, Any]:
        rows = [price.record() for price in self.prices]
        return {"admitted": self.admitted, "limit_percent": 100.0 * self.limit, "prices": rows}

    def __str__(self) -> str:
        """For people: the worst price."""
        worst = self.worst
        return f"{worst.name} {worst.change}, at most {100.0 * math.expm1(worst.bound):+.2f} %"


class Guard:
    """Judges one Θ after another on the guard's texts, all texts in one pass, as `Judge` does on one.

    texts: whose chunks have the same length;  limit: see `Verdict`;  make: as `Judge` has it
    """

    def __init__(
        self,
        loaded: LoadedModel,
        texts: Sequence[GuardText],
        limit: float = GUARD_LIMIT,
        *,
        batch: int = DEFAULT_BATCH,
        make: MakeScorer = make_scorer,
    ) -> None:
        self.loaded, self.texts, self.limit, self.batch, self.make = loaded, texts, limit, batch, make

    @cached_property
    def _judge(self) -> Judge:
        chunks = torch.cat([text.passages.chunks for text in self.texts])
        return Judge(self.loaded, Passages(chunks, None, "the guard's texts"), batch=self.batch, make=self.make)

    @property
    def chunks(self) -> int:
        return sum(len(text.passages.chunks) for text in self.texts)

    def part(self, share: int) -> Guard:
        """One in `share` of the chunks of each text, at least one: to look before time is spent.

        Of a text of several kinds one in two: no kind is left out that has two chunks, or else it would say too little
        of how much they differ.
        """
        picked = []
        for text in self.texts:
            count = len(text.passages.chunks)
            kept = count // share if text.kinds is None else -(-count // min(share, _KINDS_SHARE))
            picked.append(text.pick(evenly(count, max(1, kept))))
        return Guard(self.loaded, picked, self.limit, batch=self.batch, make=self.make)

    def judge(self, theta: ThetaSet, gamma: float | None = None, *, progress: str | None = "guarding") -> Verdict:
        """The prices of a Θ, at its own strength or at `gamma`.

        Raises NKATError for a Θ that was made from one of the texts.
        """
        for text in self.texts:
            if text.passages.sha256 is not None:
                check_judging_text(theta, text.passages.sha256, self.loaded.file.path)
        with_theta = self._judge.score(theta, gamma, progress=progress).perplexity.nll
        without = self._judge.without().nll
        counts = [len(text.passages.chunks) for text in self.texts]
        parts = zip(self.texts, without.split(counts), with_theta.split(counts), strict=True)
        return Verdict(tuple(price(text, a, b) for text, a, b in parts), self.limit)


def guard_texts(
    loaded: LoadedModel, more: Sequence[Text] = (), *, own: Sequence[Passages] = (), chunks: int = GUARD_CHUNKS
) -> list[GuardText]:
    """The default guard texts, and what a caller adds.

    more: a user's texts;  own: passages of the calibration text that are not learned;  chunks: at most of each text
    Raises NKATError for a text that has no chunk.
    """
    tokenizer, context = loaded.tokenizer, chunk_context(loaded.config.context_length)
    texts = [_text(tokenizer, default_text(), context, chunks), _sixteen_kinds(tokenizer, context)]
    texts += [_text(tokenizer, text, context, chunks) for text in more]
    return [*(GuardText(passages) for passages in own), *texts]


def price(text: GuardText, without: torch.Tensor, with_theta: torch.Tensor) -> Price:
    """Of a text from −ln p of its scored tokens in both arms, float64 [C, scored]."""
    counted, kinds = text.passages.counted, text.kinds
    if counted is not None:
        without, with_theta = without[counted][None], with_theta[counted][None]
        kinds = None if kinds is None else kinds[counted][None]
    change = paired(Perplexity(without), Perplexity(with_theta))
    spread = 0.0 if kinds is None else kind_spread(with_theta - without, kinds)
    return Price(text.passages.name, change, spread)


def kind_spread(differences: torch.Tensor, kinds: torch.Tensor) -> float:
    """Standard deviation of what a Θ changes from kind to kind, without what the kinds' own errors explain.

    By moments: variance of the kinds' means less the mean of their squared standard errors (DerSimonian & Laird, 1986,
    with equal weights). Kinds of fewer than 32 tokens are left out; 0 for fewer than two kinds.
    """
    groups = [differences[kinds == kind] for kind in kinds.unique()]
    groups = [group for group in groups if group.numel() >= _LEAST_OF_A_KIND]
    if len(groups) < 2:
        return 0.0
    means = torch.stack([group.mean() for group in groups])
    errors = torch.stack([group.var() / group.numel() for group in groups])
    return math.sqrt(max(0.0, float(means.var() - errors.mean())))


def prices_table(record: Mapping[str, Any], caption: str = "") -> Table:
    """A verdict's record as a table: what a Θ costs on each of the guard's texts."""
    columns = [
        Column("guard text", "text"),
        CHANGE_PERCENT,
        Column("between kinds", "spread_percent", lambda spread: f"{spread:.3f}" if spread else ""),
        Column(f"bound (≤ {record['limit_percent']:g})", "bound_percent", "+.3f"),
    ]
    return Table("guard", columns, record["prices"], caption, {"limit_percent": record["limit_percent"]})


def _text(tokenizer: Tokenizer, text: Text, context: int, most: int) -> GuardText:
    """Chunks from all over a text: its beginning may be unlike the rest."""
    try:
        pieces = [piece for piece in _pieces(text.content, context, most) if piece.strip()]
        cut = torch.cat([text_chunks(tokenizer, piece, None, context) for piece in pieces])
    except NKATError as error:
        raise NKATError(f"{text.name}: as a guard: {error}") from None
    return GuardText(Passages(cut[evenly(len(cut), most)], None, text.name, text.sha256))


def _pieces(content: str, context: int, most: int) -> list[str]:
    """Of a long text so many pieces, each from a line's beginning, that each surely gives a chunk; else all of it."""
    width = context * _MOST_CHARACTERS
    if len(content) < 2 * most * width:
        return [content]
    starts = [content.find("\n", place * width) + 1 for place in evenly(len(content) // width - 1, most)]
    return [content[start : start + width] for start in starts]


def _sixteen_kinds(tokenizer: Tokenizer, context: int) -> GuardText:
    """Windows over the kinds one after another, so that every token but the last few is scored once."""
    tokens, kinds = [], []
    for number, content in enumerate(kind_contents()):
        ids = tokenizer.encode(content, add_special=False)
        tokens += ids
        kinds += [number] * len(ids)
    scored = scored_tokens(context)
    places = windows(len(tokens), context)[: len(tokens) // scored]
    chunks = torch.tensor(tokens)[places % len(tokens)]
    bos = text_bos(tokenizer)
    if bos is not None:
        chunks[:, 0] = bos
    return GuardText(Passages(chunks, None, _KINDS), torch.tensor(kinds)[places[:, -scored:]])


def kind_contents() -> list[str]:
    """The sixteen texts."""
    whole = resources.files("nkat.measure").joinpath("kinds.txt").read_text(encoding="utf-8")
    return [part.partition("\n")[2].strip() for part in f"\n{whole}".split("\n=== ")[1:]]
