"""A conversation that grows: its messages, what of them the model still sees, and its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nkat.engine.generate import Generation, Sampler
from nkat.engine.session import Session
from nkat.errors import NKATError
from nkat.host.console import counted
from nkat.lm.chat import Message, encode_chat, render_chats
from nkat.lm.template_process import TemplateProcess
from nkat.lm.tokenizer import Tokenizer

_ANSWER_SHARE = 4  # a prompt leaves this part of the context to its answer, or all that the answer may have


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer, and how many of the oldest messages went before it to make room."""

    result: Generation
    left_out: int


class Conversation:
    """Every turn is rendered anew with all messages, of which the session computes only what is new.

    messages: all there were, the instructions first where there are any
    max_tokens: of an answer
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        sampler: Sampler,
        *,
        metadata: Mapping[str, Any],
        system: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        max_tokens: int,
    ) -> None:
        """metadata: where the chat template is; arguments: for it"""
        self._session, self._tokenizer, self._sampler = session, tokenizer, sampler
        self._metadata, self._arguments, self.max_tokens = metadata, arguments, max_tokens
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._templates = TemplateProcess()  # kept from turn to turn
        self._turns: list[Message] = []
        self._first = 0  # of the messages behind the instructions, the first that the model still sees

    @property
    def messages(self) -> list[Message]:
        return [*self._system, *self._turns]

    def ask(self, text: str, on_text: Callable[[str], object]) -> Turn:
        """Adds a message and its answer. on_text: gets each piece of the answer

        An answer that is interrupted is kept as far as it came; without a word of it the message is gone as well.
        Raises NKATError for a message that the context has no room for, or that the template refuses; it is gone then.
        """
        count, first = len(self._turns), self._first
        self._turns.append({"role": "user", "content": text})
        try:
            result = self._session.generate(
                self._tokenizer, self._prompt(), self._sampler, max_tokens=self.max_tokens, on_text=on_text
            )
        except BaseException:
            self._go_back(count, first)
            raise
        if not result.text and result.stopped in ("interrupted", "terminated"):
            self._go_back(count, first)
        else:
            self._turns.append({"role": "assistant", "content": result.text})
        return Turn(result, self._first - first)

    def _go_back(self, count: int, first: int) -> None:
        del self._turns[count:]
        self._first = first

    def undo(self) -> str | None:
        """Takes back the last message and its answer; returns the message, None where there is none."""
        asked = self._asked()
        if not asked:
            return None
        text = self._turns[asked[-1]]["content"]
        del self._turns[asked[-1] :]
        self._first = min(self._first, max(self._asked(), default=0))
        return text

    def clear(self) -> None:
        """Forgets everything but the instructions."""
        self._turns.clear()
        self._first = 0

    def _asked(self) -> list[int]:
        """Where the user's messages are."""
        return [place for place, message in enumerate(self._turns) if message["role"] == "user"]

    def _prompt(self) -> list[int]:
        """Tokens of what the model is to see. Where that leaves no room to answer, the oldest turns go, so many that
        half of the context is free: otherwise every turn from now on would be computed from its start.
        """
        room = self._session.capacity
        (prompt,) = self._encoded([self._first])
        if len(prompt) + max(1, min(self.max_tokens, room // _ANSWER_SHARE)) <= room:
            return prompt
        later = [place for place in self._asked() if place > self._first]
        found = self._encoded(later)
        for place, shorter in zip(later, found, strict=True):
            if len(shorter) <= room // 2 or (place == later[-1] and len(shorter) < room):
                self._first = place
                return shorter
        least = found[-1] if found else prompt
        if len(least) < room:
            return least
        raise NKATError(
            f"this message comes to {counted(len(least), 'token')} with all that belongs to it, and the context holds "
            f"{room}: a shorter one, or a larger --context"
        )

    def _encoded(self, starts: list[int]) -> list[list[int]]:
        """Tokens of the conversation from each of these messages on."""
        chats = [([*self._system, *self._turns[start:]], True) for start in starts]
        if not chats:
            return []
        prompts = []
        for text in render_chats(self._metadata, self._tokenizer, chats, self._arguments, self._templates):
            if isinstance(text, NKATError):
                raise text
            prompts.append(encode_chat(self._tokenizer, text))
        return prompts
