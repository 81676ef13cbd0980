"""Chats to learn from or to judge on: rows of JSON, rendered by the model's own template; the assistant's tokens count.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "completion": "…"}          texts, or lists of messages as above

One row a line, in a file whose name ends in `.jsonl`; other keys are left alone. What the assistant says is told from
what it is told by rendering twice: up to where it is asked to answer, and with the answer. The token that ends its turn
counts, what stands behind that does not. Some templates write an answer otherwise once it is in the past (without
its reasoning): such a conversation becomes several, one for each answer, as the model meets them.

Limits: content is text; no tools. A turn's text is cut into tokens together with what precedes it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nkat.errors import NKATError
from nkat.host.console import bar
from nkat.lm.chat import Message, chat_template, encode_chat, render_chats
from nkat.lm.tokenizer import Tokenizer
from nkat.measure.perplexity import scored_tokens, text_bos, windows
from nkat.measure.texts import Text

SUFFIX = ".jsonl"
_ANSWERS = "assistant"
_ROWS = 50  # rendered between two steps of the progress bar


@dataclass(frozen=True, slots=True)
class Conversation:
    """tokens: int64 [n];  said: bool [n], which of them are the assistant's"""

    tokens: torch.Tensor
    said: torch.Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """The messages of a row, the last of them an answer, and the line it stands in, from 1."""

    line: int
    messages: tuple[Message, ...]

    @property
    def answers(self) -> list[int]:
        return [place for place, message in enumerate(self.messages) if message["role"] == _ANSWERS]


def is_chats(text: Text) -> bool:
    """Whether a text is rows of chats: its file's name says so."""
    return text.name.lower().endswith(SUFFIX)


def read_rows(text: Text) -> list[Row]:
    """The rows of a text. Raises NKATError that names the line of one that is no chat."""
    rows = []
    for line, content in enumerate(text.content.split("\n"), 1):
        if content.strip():
            try:
                rows.append(Row(line, _messages(json.loads(content))))
            except json.JSONDecodeError as error:
                raise _wrong(text, line, f"not JSON: {error.msg} at character {error.pos + 1}") from None
            except RecursionError:
                raise _wrong(text, line, "not JSON of a chat: nested too deeply") from None
            except _NoChatError as error:
                raise _wrong(text, line, str(error)) from None
    return rows


def conversations(text: Text, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> list[Conversation]:
    """The rows as the model's template (of a GGUF's `metadata`) renders them.

    Raises NKATError for a row that is no chat or that the template refuses, with its line, and for a model without a
    template.
    """
    rows = read_rows(text)
    chat_template(metadata, "give a plain text instead of chats")  # raises before time is spent
    found = []
    with bar(len(rows), "rendering chats", "row") as progress:
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            asked = [
                (row.messages[:place] if asks else row.messages[: place + 1], asks)
                for row in part
                for place in row.answers
                for asks in (True, False)
            ]
            rendered = iter(render_chats(metadata, tokenizer, asked))
            for row in part:
                turns = []
                for _ in row.answers:
                    turns.append((next(rendered), next(rendered)))
                wrong = next((words for turn in turns for words in turn if isinstance(words, NKATError)), None)
                if wrong is not None:
                    raise _wrong(text, row.line, str(wrong))
                try:
                    found += _row_conversations(tokenizer, [(str(a), str(b)) for a, b in turns])
                except _NoChatError as error:
                    raise _wrong(text, row.line, str(error)) from None
            progress.update(len(part))
    return found


def chat_chunks(
    chats: Sequence[Conversation], context: int, tokenizer: Tokenizer, most: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks of tokens [C, context] and which of their scored tokens count, bool [C, scored]: each answer's once.

    The chats stand one behind the other, and windows over them are as in `windows`; those without an answer are left
    out. Before the first chat and behind the last one a window is filled up with the token that ends a text.
    most: at most so many chunks
    """
    tokens, said = (torch.cat(parts) for parts in zip(*((c.tokens, c.said) for c in chats), strict=True))
    places = windows(len(tokens), context)
    inside = (places >= 0) & (places < len(tokens))
    places = places.clamp(0, len(tokens) - 1)
    counted = (said[places] & inside)[:, -scored_tokens(context) :]
    chosen = counted.any(dim=1).nonzero()[:most, 0]
    filler = torch.tensor(tokenizer.eos_id or 0)
    chunks = torch.where(inside[chosen], tokens[places[chosen]], filler)
    bos = text_bos(tokenizer)
    if bos is not None:
        chunks[:, 0] = bos
    return chunks, counted[chosen]


class _NoChatError(Exception):
    """What is wrong with a row."""


def _wrong(text: Text, line: int, why: str) -> NKATError:
    return NKATError(f"{text.name}, line {line}: {why}")


def _messages(row: object) -> tuple[Message, ...]:
    """Of a row, up to the last answer."""
    if not isinstance(row, dict):
        raise _NoChatError('a row is {"messages": […]} or {"prompt": …, "completion": …}, not ' + _kind(row))
    if "messages" in row:
        messages = _list(row["messages"], "messages")
    elif "prompt" in row and "completion" in row:
        messages = [*_side(row["prompt"], "prompt", "user"), *_side(row["completion"], "completion", _ANSWERS)]
    else:
        keys = ", ".join(map(repr, row))[:80] or "none"
        raise _NoChatError(f"a row needs 'messages', or 'prompt' and 'completion'; it has {keys}")
    last = max((place for place, message in enumerate(messages) if message["role"] == _ANSWERS), default=None)
    if last is None:
        raise _NoChatError("no message of the assistant's, so there is nothing to learn")
    return tuple(messages[: last + 1])


def _side(value: object, name: str, role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _list(value, name)


def _list(value: object, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _NoChatError(f"'{name}' must be a list of messages, and is {_kind(value)}")
    messages: list[Message] = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise _NoChatError(f"message {number} of '{name}' must have a role and content, and is {_kind(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = _kind(message.get(key))
                raise _NoChatError(f"message {number} of '{name}': its {key} must be a text, and is {found}")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _kind(value: object) -> str:
    """What JSON calls it."""
    if value is None:
        return "missing or null"
    names = {dict: "an object", list: "a list" if value else "an empty list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number")


def _row_conversations(tokenizer: Tokenizer, turns: Sequence[tuple[str, str]]) -> list[Conversation]:
    """turns: for each answer the text up to where it is asked for, and with it."""
    if any(not answered.startswith(asked) for asked, answered in turns):
        raise _NoChatError("the model's chat template writes the answer otherwise than it asks for it")
    whole = turns[-1][1]
    if all(whole.startswith(answered) for _, answered in turns):
        return [_conversation(tokenizer, whole, turns)]
    return [_conversation(tokenizer, turn[1], [turn]) for turn in turns]


def _conversation(tokenizer: Tokenizer, text: str, turns: Sequence[tuple[str, str]]) -> Conversation:
    ids = encode_chat(tokenizer, text)
    said = torch.zeros(len(ids), dtype=torch.bool)
    for asked, answered in turns:
        start, end = (_common(ids, encode_chat(tokenizer, part)) for part in (asked, answered))
        ends = [place for place in range(start, end) if ids[place] in tokenizer.eog_ids]
        said[start : ends[-1] + 1 if ends else end] = True
    return Conversation(torch.tensor(ids, dtype=torch.int64), said)


def _common(ids: Sequence[int], start: Sequence[int]) -> int:
    """How many tokens both begin with: a token may reach over the place where a part of a text ends."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, start, strict=False)))
