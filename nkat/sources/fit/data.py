"""What Θ is fitted on: batches of a text's tokens, and parts of it kept back: to validate on, and for the guard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nkat.errors import NKATError
from nkat.host import console
from nkat.lm.load import LoadedModel
from nkat.lm.tokenizer import Tokenizer
from nkat.measure.chats import Conversation, chat_chunks, conversations, is_chats
from nkat.measure.judge import Passages
from nkat.measure.perplexity import CONTEXT, chunk_context, scored_tokens, text_bos, warn_of_short_chunks
from nkat.measure.texts import Text

_SHARE = 10  # every tenth part of the text, from its end to validate on and from its beginning for the guard, …
_MOST_VALIDATION_CHUNKS = 16  # … but no more than this: 8192 tokens
_LEAST_VALIDATION_CHUNKS = 2
_MOST_OWN_CHUNKS = 4
_VALIDATION, _OWN = "the calibration text's validation slice", "the calibration text's first part"


@dataclass(frozen=True, slots=True)
class FitText:
    """A text's tokens, int64 [n], and which of them are not to be learned, bool [n]. bos: what starts a sequence.

    starts: int64 [s], where sequences begin that have something to learn; None: anywhere
    """

    tokens: torch.Tensor
    ignored: torch.Tensor
    bos: int | None
    starts: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Parts:
    """A calibration text in parts: what is learned, what is validated on, and what the guard gets, if there is enough.

    The guard's part is the first tenth, the validation's the last.
    """

    learned: FitText
    validation: Passages
    own: Passages | None


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
    return FitText(tokens, ignored, text_bos(tokenizer))


def chat_text(chats: Sequence[Conversation], bos: int | None, context: int) -> FitText:
    """Chats one behind the other, of which the assistant's tokens are learned in sequences of `context` tokens."""
    tokens, said = (torch.cat(parts) for parts in zip(*((c.tokens, c.said) for c in chats), strict=True))
    starts = chat_starts([len(c.tokens) for c in chats], context)
    learns = [start for start in starts if bool(said[start + 1 : start + context].any())]
    return FitText(tokens, ~said, bos, torch.tensor(learns, dtype=torch.int64))


def chat_starts(lengths: Sequence[int], context: int) -> list[int]:
    """Where sequences begin such that each token of each chat is in one, behind as much of its chat as there is room
    for: at the beginning of a chat, and every half sequence on in one that is longer than a sequence.

    A chat that a sequence has room for behind another one begins none.
    """
    starts, end, begin = list[int](), 0, 0  # end: up to where sequences reach
    for length in lengths:
        if begin + length > end:
            place = begin
            while True:
                starts.append(place)
                if place + context >= begin + length:
                    break
                place += max(1, context // 2)
            end = place + context
        begin += length
    return [max(0, min(start, begin - context)) for start in starts]


def calibration_parts(loaded: LoadedModel, text: Text, ignore: Sequence[str], context: int) -> Parts:
    """A plain text or chats for a model, in parts. context: tokens of a sequence

    Raises NKATError for what is too short, and for strings to ignore in chats.
    """
    judged = chunk_context(loaded.config.context_length)
    if is_chats(text):
        if ignore:
            raise NKATError("--calibrate-ignore is for plain text: of chats only the assistant's words are learned")
        chats = conversations(text, loaded.gguf.metadata, loaded.tokenizer)
        parts = split_chats(chats, text.name, loaded.tokenizer, context, judged)
    else:
        parts = split_text(fit_text(loaded.tokenizer, text, ignore), text.name, context, judged)
    warn_of_short_chunks(judged)
    return parts


def split_text(text: FitText, name: str, context: int, judged: int = CONTEXT) -> Parts:
    """A plain text in parts; see `split_validation`."""
    rest, validation = split_validation(text, name, context, judged)
    chunks = min(_MOST_OWN_CHUNKS * CONTEXT // judged, max(1, len(text.tokens) // _SHARE // judged))
    cut = chunks * judged
    if len(rest.tokens) < cut + context:
        return Parts(rest, validation, None)
    own = _passages(FitText(rest.tokens[:cut], rest.ignored[:cut], text.bos), judged, _OWN)
    learned = FitText(rest.tokens[cut:], rest.ignored[cut:], text.bos)
    return Parts(learned, validation, own if own.tokens else None)


def split_chats(chats: Sequence[Conversation], name: str, tokenizer: Tokenizer, context: int, judged: int) -> Parts:
    """Chats in parts: of whole conversations.

    Raises NKATError for fewer than three, or too few tokens for one sequence.
    """
    if len(chats) < 3:
        raise NKATError(f"{name}: {console.counted(len(chats), 'chat')} are too few: a fit needs at least 3")
    share = max(1, len(chats) // _SHARE)
    own = chats[:share]
    learned = chat_text(chats[len(own) : -share], text_bos(tokenizer), context)
    if len(learned.tokens) < context:
        has = console.counted(len(learned.tokens), "token")
        raise NKATError(
            f"{name}: the chats are too short: those to learn from have {has}, and a sequence has {context}"
        )

    def passages(some: Sequence[Conversation], most: int, called: str) -> Passages:
        return Passages(*chat_chunks(some, judged, tokenizer, most * CONTEXT // judged), called)

    validation = passages(chats[-share:], _MOST_VALIDATION_CHUNKS, _VALIDATION)
    if not validation.tokens or learned.starts is None or not len(learned.starts):
        raise NKATError(f"{name}: the assistant's messages are empty, so that there is nothing to learn")
    kept = passages(own, _MOST_OWN_CHUNKS, _OWN)
    return Parts(learned, validation, kept if kept.tokens else None)


def split_validation(text: FitText, name: str, context: int, judged: int = CONTEXT) -> tuple[FitText, Passages]:
    """The part to learn from, and the last tenth for validation.

    context: tokens of a sequence;  judged: tokens of a validation chunk
    Raises NKATError for a text with too few tokens; `name` is what the error calls it.
    """
    share = len(text.tokens) // _SHARE // judged
    most = _MOST_VALIDATION_CHUNKS * CONTEXT // judged
    chunks = min(most, max(_LEAST_VALIDATION_CHUNKS, share))
    kept_back = chunks * judged
    if len(text.tokens) < kept_back + context:
        has = console.counted(len(text.tokens), "token")
        raise NKATError(
            f"{name}: the text is too short: it has {has}, and a fit needs at least {kept_back + context} ({kept_back} "
            "of them kept back for validation)"
        )
    kept = FitText(text.tokens[-kept_back:], text.ignored[-kept_back:], text.bos)
    validation = _passages(kept, judged, _VALIDATION)
    if not validation.tokens:
        raise NKATError(f"{name}: nothing in the text's last {kept_back} tokens is left to validate on")
    return FitText(text.tokens[:-kept_back], text.ignored[:-kept_back], text.bos), validation


def _passages(text: FitText, judged: int, name: str) -> Passages:
    """All of a text as chunks."""
    cut = text.tokens.view(-1, judged)
    if text.bos is not None:
        cut = cut.clone()
        cut[:, 0] = text.bos
    return Passages(cut, ~text.ignored.view(-1, judged)[:, -scored_tokens(judged) :], name)


def batch_at(text: FitText, first: int, count: int, context: int, seed: int) -> Batch:
    """Sequences first, first + 1, … of a text read in random order, epoch after epoch, each cut at other places.

    A function of its arguments alone, so that a resumed fit sees what it would have seen.
    """
    available = len(text.tokens) // context if text.starts is None else len(text.starts)
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
    if text.starts is not None:
        start = int(text.starts[torch.randperm(available, generator=generator)[place]])
        return slice(start, start + context)
    room = len(text.tokens) - available * context
    offset = int(torch.randint(room + 1, (1,), generator=generator))
    order = torch.randperm(available, generator=generator)
    start = offset + int(order[place]) * context
    return slice(start, start + context)


def _occurrences(tokens: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    if len(pattern) == 0 or len(pattern) > len(tokens):
        return torch.empty(0, dtype=torch.int64)
    return (tokens.unfold(0, len(pattern), 1) == pattern).all(dim=1).nonzero()[:, 0]
