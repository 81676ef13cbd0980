"""A sequence that goes on: of the next prompt only what differs from the last one is computed.

The next prompt of a conversation begins with the last one and its answer, whose keys and values the decoder's cache
holds already. A `Session` knows which tokens these are, keeps the longest common beginning, and forgets the rest. What
the cache holds was computed with one Θ at one strength: with another, all of it is computed anew. A recurrent model
goes back no further than to a state that was kept: one of those before the last token of its last prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from nkat.engine.decoder import make_decoder
from nkat.engine.generate import PREFILL_PIECE, Generation, Sampler, generate, prefill
from nkat.engine.tree import in_common
from nkat.errors import NKATError
from nkat.lm.cache import KEPT_STATES
from nkat.lm.tokenizer import Tokenizer
from nkat.lm.transformer import Transformer


class Session:
    """A `nkat.engine.decoder.Decoder` that keeps what it has seen.

    One at a time may run on a model; any number of them may lie beside one another, each with a cache of its own.
    """

    def __init__(self, model: Transformer, capacity: int, *, sliding: int | None = None) -> None:
        """capacity: tokens that its cache holds

        sliding: tokens of the beginning that stay when the cache is full: then the older half of what is behind them
        makes room, as in llama.cpp. What stays is computed again at its new places, so that nothing of what went is
        left in it; llama.cpp turns the old keys instead, which costs less and is another text. None: nothing makes room
        """
        if sliding is not None and not 0 <= sliding <= capacity // 2:
            raise NKATError(f"{sliding} tokens cannot stay of a context of {capacity}: at most half of it")
        self.model, self._sliding, self._room = model, sliding, capacity
        self.decoder = make_decoder(model, capacity)
        self._seen: list[int] = []  # what was given to the decoder, of which its length says what has arrived
        self._computed_with = self._strength

    @property
    def _strength(self) -> tuple[float | None, int]:
        return self.model.gamma, self.model.theta_changes

    @property
    def tokens(self) -> list[int]:
        """What the cache holds."""
        return self._seen[: self.decoder.length]

    @property
    def name(self) -> str:
        return self.decoder.name

    @property
    def length(self) -> int:
        return self.decoder.length

    @length.setter
    def length(self, value: int) -> None:
        self.decoder.length = value

    @property
    def capacity(self) -> int:
        """Without an end where the oldest tokens make room."""
        return self._room if self._sliding is None else sys.maxsize

    @property
    def cache_nbytes(self) -> int:
        return self.decoder.cache_nbytes

    def set_gamma(self, gamma: float | None) -> None:
        """From the next token on; what is in the cache stays, until `reuse` finds that it is another strength's."""
        self.decoder.set_gamma(gamma)

    def reach(self, length: int) -> int:
        return self.decoder.reach(length)

    def keep_state(self, most: int = KEPT_STATES) -> None:
        self.decoder.keep_state(most)

    def can_follow(self) -> bool:
        return self.decoder.can_follow()

    def reuse(self, prompt: Sequence[int]) -> int:
        """Forgets what the cache holds behind its longest common beginning with `prompt`; returns how long that is.

        At most all but the last token of the prompt, whose logits nobody has kept, and where the model has recurrent
        states no more than up to one of them that was kept. The rest is for `prefill`.
        """
        if self._strength != self._computed_with:
            if not self.decoder.can_follow():
                self.decoder = make_decoder(self.model, self._room)
            self.decoder.length = 0
        self._computed_with = self._strength
        same = in_common(self.tokens, prompt[:-1])
        same = self.decoder.reach(same)
        self.decoder.length = same
        return same

    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        # Noted before it is done: whatever of it a Ctrl-C lets arrive, the decoder's length counts from the front.
        self._seen[self.decoder.length :] = tokens
        if self.model.config.recurrent_blocks and 1 < len(tokens) < PREFILL_PIECE:
            # a prompt's end: the same one may come again, or another that goes on from it
            self.decoder.prefill(tokens[:-1])
            self.decoder.keep_state()
            tokens = tokens[-1:]
        logits = self.decoder.prefill(tokens)
        if len(tokens) >= PREFILL_PIECE:
            self.decoder.keep_state()
        return logits

    def step(self, token: int) -> torch.Tensor:
        if self._sliding is not None and self.decoder.length == self._room:
            return self._slide(token)
        self._seen[self.decoder.length :] = [token]
        return self.decoder.step(token)

    def _slide(self, token: int) -> torch.Tensor:
        """Without the older half of what is behind the beginning; logits after the token, float32 [V]."""
        assert self._sliding is not None
        held = self.tokens
        dropped = max(1, (len(held) - self._sliding) // 2)
        left = [*held[: self._sliding], *held[self._sliding + dropped :], token]
        return prefill(self, left[self.reuse(left) :], "making room")

    def generate(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        sampler: Sampler,
        *,
        max_tokens: int,
        on_text: Callable[[str], object],
    ) -> Generation:
        """`nkat.engine.generate.generate`, computing only what is not in the cache; its `reused` says how much was."""
        reused = self.reuse(prompt)
        result = generate(self, tokenizer, prompt[reused:], sampler, max_tokens=max_tokens, on_text=on_text)
        if not result.prompt_tokens:  # interrupted before the first logits
            return result
        return replace(result, prompt_tokens=len(prompt), reused=reused)
