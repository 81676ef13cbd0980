"""What Θ is fitted on: batches of a text's tokens, and a slice of it kept back for validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nkat.errors import NKATError
from nkat.host import console
from nkat.lm.tokenizer import Tokenizer
from nkat.measure.judge import Passages
from nkat.measure.perplexity import CONTEXT, scored_tokens
from nkat.measure.texts import Text

_VALIDATION_SHARE = 10  # every tenth part of the text, from its end, …
_MOST_VALIDATION_CHUNKS = 16  # … but no more than this: 8192 tokens
_LEAST_VALIDATION_CHUNKS = 2


@dataclass(frozen=True, slots=True)
class FitText:
    """A text's tokens, int64 [n], and which of them are not to be learned, bool [n]. bos: what starts a sequence."""

    tokens: torch.Tensor
    ignored: torch.Tensor
    bos: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens: int64 [B, context];  counted: bool [B, context − 1], which predictions of the next token are learned."""

    tokens: torch.Tensor
    counted: torch.Tensor


def fit_text(tokenizer: Tokenizer, text: Text, ignore: Sequence[str] = ()) -> FitText:
    """Tokenises a text. `ignore`: strings that the model should not learn to write, such as "<unk>"."""
    tokens = torch.tensor(tokenizer.encode(text.content, add_special=False), dtype=torch.int64)
    ignored = torch.zeros(len(tokens), dtype=torch.bool)
    for string in ignore:
        found = 0
        for spelling in (string, " " + string):
            pattern = torch.tensor(tokenizer.encode(spelling, add_special=False), dtype=torch.int64)
            starts = _occurrences(tokens, pattern)
            found += len(starts)
            for place in range(len(pattern)):
                ignored[starts + place] = True
        if found == 0:
            raise NKATError(f"{text.name}: holds no {string!r} to ignore")
    return FitText(tokens, ignored, tokenizer.bos_id if tokenizer.adds_bos else None)


def split_validation(text: FitText, name: str, context: int, judged: int = CONTEXT) -> tuple[FitText, Passages]:
    """The part to learn from, and the last tenth for validation.

    context: tokens of a sequence;  judged: tokens of a validation chunk
    Raises NKATError for a text with too few tokens; `name` is what the error calls it.
    """
    share = len(text.tokens) // _VALIDATION_SHARE // judged
    most = _MOST_VALIDATION_CHUNKS * CONTEXT // judged
    chunks = min(most, max(_LEAST_VALIDATION_CHUNKS, share))
    kept_back = chunks * judged
    if len(text.tokens) < kept_back + context:
        has = console.counted(len(text.tokens), "token")
        raise NKATError(
            f"{name}: the text is too short: it has {has}, and a fit needs at least {kept_back + context} ({kept_back} "
            "of them kept back for validation)"
        )
    cut = text.tokens[-kept_back:].view(chunks, judged)
    if text.bos is not None:
        cut = cut.clone()
        cut[:, 0] = text.bos
    counted = ~text.ignored[-kept_back:].view(chunks, judged)[:, -scored_tokens(judged) :]
    if not bool(counted.any()):
        raise NKATError(f"{name}: nothing in the text's last {kept_back} tokens is left to validate on")
    kept = Passages(cut, counted, "the calibration text's validation slice")
    return FitText(text.tokens[:-kept_back], text.ignored[:-kept_back], text.bos), kept


def batch_at(text: FitText, first: int, count: int, context: int, seed: int) -> Batch:
    """Sequences first, first + 1, … of a text read in random order, epoch after epoch, each cut at other places.

    A function of its arguments alone, so that a resumed fit sees what it would have seen.
    """
    available = len(text.tokens) // context
    if available == 0:
        has = console.counted(len(text.tokens), "token")
        raise NKATError(f"the text is too short: it has {has}, and one sequence needs {context}")
    rows = [_sequence(text, first + i, available, context, seed) for i in range(count)]
    tokens = torch.stack([text.tokens[row] for row in rows])
    counted = ~torch.stack([text.ignored[row] for row in rows])[:, 1:]
    if text.bos is not None:
        tokens[:, 0] = text.bos
    return Batch(tokens, counted)


def _sequence(text: FitText, number: int, available: int, context: int, seed: int) -> slice:
    epoch, place = divmod(number, available)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    room = len(text.tokens) - available * context
    offset = int(torch.randint(room + 1, (1,), generator=generator))
    order = torch.randperm(available, generator=generator)
    start = offset + int(order[place]) * context
    return slice(start, start + context)


def _occurrences(tokens: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    if len(pattern) == 0 or len(pattern) > len(tokens):
        return torch.empty(0, dtype=torch.int64)
    return (tokens.unfold(0, len(pattern), 1) == pattern).all(dim=1).nonzero()[:, 0]
