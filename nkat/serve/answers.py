"""Answers in the form of OpenAI's API: whole, or piece by piece."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import time
from typing import Any

from nkat.serve.arms import Arm
from nkat.serve.model import End, Piece, Scored

Json = dict[str, Any]


def encoded(value: Any) -> bytes:
    """As JSON. Halves of characters, which a request may have held, become question marks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def server_event(value: Any) -> bytes:
    """One event of a stream: a JSON value, or a word as it is."""
    return b"data: " + (value.encode() if isinstance(value, str) else encoded(value)) + b"\n\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """What all parts of one answer have in common.

    gamma: the strength of Θ; None: without; seed: what its tokens were drawn with
    """

    chat: bool
    arm: Arm
    gamma: float | None
    seed: int
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time()))
    number: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, pieces: Sequence[Piece], end: End) -> Json:
        text = "".join(piece.text for piece in pieces)
        scored = [token for piece in pieces for token in piece.tokens]
        logprobs = self._logprobs(scored) if scored else None
        choice: Json = {"index": 0, "logprobs": logprobs, "finish_reason": end.reason}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return {**self._head(stream=False), "choices": [choice], "usage": usage(end)}

    def first(self) -> Json | None:
        """What a stream begins with."""
        return self._chunk({"role": "assistant", "content": ""}, None, None) if self.chat else None

    def more(self, piece: Piece) -> Json:
        logprobs = self._logprobs(piece.tokens) if piece.tokens else None
        return self._chunk({"content": piece.text} if self.chat else piece.text, logprobs, None)

    def last(self, end: End) -> list[Json]:
        """What a stream ends with, before the word [DONE]."""
        final = self._chunk({} if self.chat else "", None, end.reason)
        if not self.include_usage:
            return [final]
        return [final, {**self._head(stream=True), "choices": [], "usage": usage(end)}]

    def _chunk(self, what: Any, logprobs: Json | None, reason: str | None) -> Json:
        choice = {"index": 0, "delta" if self.chat else "text": what, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head(stream=True), "choices": [choice]}
        return chunk | ({"usage": None} if self.include_usage else {})

    def _head(self, stream: bool) -> Json:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if stream else "chat.completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.number}",
            "object": kind,
            "created": self.created,
            "model": self.arm.name,
            "nkat": {"theta": dict(self.arm.weights), "gamma": self.gamma, "seed": self.seed},
        }

    def _logprobs(self, tokens: Sequence[Scored]) -> Json:
        if self.chat:
            return {"content": [_chat_token(one) for one in tokens], "refusal": None}
        return {
            "tokens": [_word(one.piece) for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [{_word(piece): logprob for piece, logprob in one.likeliest} for one in tokens],
            "text_offset": [one.start for one in tokens],
        }


def usage(end: End) -> Json:
    return {
        "prompt_tokens": end.prompt,
        "completion_tokens": end.generated,
        "total_tokens": end.prompt + end.generated,
        "prompt_tokens_details": {"cached_tokens": end.cached},
    }


def _chat_token(one: Scored) -> Json:
    best = [_named(piece, logprob) for piece, logprob in one.likeliest]
    return {**_named(one.piece, one.logprob), "top_logprobs": best}


def _named(piece: bytes, logprob: float) -> Json:
    return {"token": _word(piece), "logprob": logprob, "bytes": list(piece)}


def _word(piece: bytes) -> str:
    """A token's text; of a part of a character its bytes, as OpenAI writes them, so that no two look the same."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
