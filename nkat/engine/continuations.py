"""−ln p of continuations, each of the tokens before it: what multiple choice and the like are judged with.

Many continuations share a beginning (a question and its answers, examples and what is asked behind them), which is
computed once for all that go through the model together. `predict` takes the fastest way that model and device have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import torch

from nkat.engine.scoring import has_kernels
from nkat.engine.tree import Tokens, batches, in_common
from nkat.errors import NKATError
from nkat.lm.attention import capped
from nkat.lm.transformer import Transformer

_LOGIT_ROWS = 128  # at once, of the whole vocabulary
_AHEAD = 16  # sequences, in whose beginnings a recurrent model's states are kept


@dataclass(frozen=True, slots=True)
class Continuation:
    """tokens: beginning and continuation; first: where the continuation begins, at least 1"""

    tokens: tuple[int, ...]
    first: int

    def __post_init__(self) -> None:
        if not 1 <= self.first < len(self.tokens):
            raise NKATError(f"a continuation of {len(self.tokens)} tokens cannot begin behind the first {self.first}")

    @property
    def read(self) -> tuple[int, ...]:
        """What the model reads: the last token is only predicted."""
        return self.tokens[:-1]


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """nll: −ln p of each token of a continuation, float64 [n]; best: whether no other token was likelier, bool [n]"""

    nll: np.ndarray
    best: np.ndarray


_Wanted = Sequence[tuple[int, Continuation]]  # of one sequence that is read


def predict(
    model: Transformer, continuations: Sequence[Continuation], most: int | None = None
) -> Iterator[tuple[int, Prediction]]:
    """The number of each continuation and what the model predicts of it, in the order in which they are computed.

    most: sequences that go through the model together; None: as many as are worth it

    What is computed together makes no difference beyond rounding. Raises NKATError for predictions that are not finite
    and ids that are none.
    """
    for tokens in (each.tokens for each in continuations):
        if min(tokens) < 0 or max(tokens) >= model.config.vocab_size:
            raise NKATError(f"a token id lies outside the vocabulary of {model.config.vocab_size}")
    by_sequence: dict[tuple[int, ...], list[tuple[int, Continuation]]] = {}
    for number, each in enumerate(continuations):
        by_sequence.setdefault(each.read, []).append((number, each))
    turning = model.config.rope.original_context  # beyond it some models turn otherwise, also the tokens before
    short, long = (sorted(s for s in by_sequence if (len(s) > turning) == beyond) for beyond in (False, True))
    way = _compiled if has_kernels(model) and not model.config.recurrent_blocks else _one_by_one
    for sequences in (short, long):
        for number, found in way(model, sequences, by_sequence, most) if sequences else ():
            if not np.isfinite(found.nll).all():
                raise NKATError("the model's predictions are not finite numbers (damaged weights?)")
            yield number, found


def _compiled(
    model: Transformer, sequences: Sequence[Tokens], wanted: Mapping[tuple[int, ...], _Wanted], most: int | None
) -> Iterator[tuple[int, Prediction]]:
    from nkat.engine.tree_scorer import TreeScorer  # LLVM is loaded only where it is used

    scorer = TreeScorer(model, max(map(len, sequences)), torch.get_num_threads())
    for low, high in batches(sequences, scorer.most_tokens, scorer.most_blocks, most):
        part = sequences[low:high]
        asked = [(at, number, each) for at, sequence in enumerate(part) for number, each in wanted[tuple(sequence)]]
        found = scorer.predict(part, [(at, each.first - 1, each.tokens[each.first :]) for at, _, each in asked])
        for (_, number, _), (nll, best) in zip(asked, found, strict=True):
            yield number, Prediction(nll, best)


class Reader(Protocol):
    """One sequence at a time, which may go on from where another one has left it."""

    def go_to(self, length: int) -> int:
        """Forgets what it has read behind at most so many tokens; returns how many are left."""
        ...

    def keep_state(self) -> None:
        """It can come back to where it is now."""
        ...

    def read(self, tokens: Tokens) -> torch.Tensor:
        """More tokens → a row for each, [T, d], for `predict`."""
        ...

    def predict(self, rows: torch.Tensor, targets: Tokens) -> tuple[np.ndarray, np.ndarray]:
        """−ln p of a target by each row, float64, and whether no token is likelier, bool."""
        ...


@torch.inference_mode()
def _one_by_one(
    model: Transformer, sequences: Sequence[Tokens], wanted: Mapping[tuple[int, ...], _Wanted], most: int | None
) -> Iterator[tuple[int, Prediction]]:
    """What a sequence has in common with the one before is not read again, as far as that can be."""
    reader = _make_reader(model, max(map(len, sequences)))
    pairs = pairwise(sequences)
    shared = [min(in_common(a, b), *(each.first - 1 for _, each in wanted[tuple(b)])) for a, b in pairs]
    for i, sequence in enumerate(sequences):
        kept = start = reader.go_to(shared[i - 1] if i else 0)
        parts = []
        # where later sequences go on: only recurrent models have to be told, and gain by it
        lengths = accumulate(shared[i : i + _AHEAD], min) if model.config.recurrent_blocks else ()
        for end in sorted({length for length in lengths if kept < length < len(sequence)} | {len(sequence)}):
            parts.append(reader.read(sequence[start:end]))
            reader.keep_state()
            start = end
        rows = torch.cat(parts)
        for number, each in wanted[tuple(sequence)]:
            targets = each.tokens[each.first :]
            yield number, Prediction(*reader.predict(rows[each.first - 1 - kept :][: len(targets)], targets))


def _make_reader(model: Transformer, longest: int) -> Reader:
    if has_kernels(model):
        from nkat.engine.chain_scorer import ChainScorer  # LLVM is loaded only where it is used

        return ChainScorer(model, longest, torch.get_num_threads())
    return _EagerReader(model, longest)


class _EagerReader:
    """The model's own forward pass."""

    def __init__(self, model: Transformer, longest: int) -> None:
        self.model, self.cache = model, model.new_cache(1, longest, growing=True)

    def go_to(self, length: int) -> int:
        self.cache.length = self.cache.reach(length)
        return self.cache.length

    def keep_state(self) -> None:
        self.cache.keep_state()

    def read(self, tokens: Tokens) -> torch.Tensor:
        ids = torch.tensor([list(tokens)], dtype=torch.int64, device=self.model.device)
        return self.model.hidden(ids, self.cache)[0]

    def predict(self, rows: torch.Tensor, targets: Tokens) -> tuple[np.ndarray, np.ndarray]:
        ids = torch.tensor(targets, dtype=torch.int64, device=self.model.device)
        pairs = zip(rows.split(_LOGIT_ROWS), ids.split(_LOGIT_ROWS), strict=True)
        found = [_likelihoods(self.model, *pair) for pair in pairs]
        nll, best = (torch.cat(column).cpu().numpy() for column in zip(*found, strict=True))
        return nll, best


def _likelihoods(model: Transformer, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = capped(model.output(hidden).to(hidden.dtype), model.config.logit_cap).double()
    chosen = logits.gather(1, targets[:, None])[:, 0]
    return logits.logsumexp(dim=1) - chosen, chosen >= logits.max(dim=1).values
