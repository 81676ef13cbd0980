"""A whole forward pass on the CPU as one compiled program: decoding without Python between the operations.

There are two programs: one token at a time, and up to `PREFILL_TOKENS` together. Both read the same repacked weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nkat.engine.forward import ForwardPass, PositionTables
from nkat.engine.kernel_cache import Cache
from nkat.errors import NKATError
from nkat.kernels.cpu.agreed import KEYS
from nkat.kernels.cpu.batch import batch_tokens
from nkat.kernels.cpu.formats import padded_rows
from nkat.kernels.cpu.linear import StarStep, token_state
from nkat.kernels.cpu.program import Program, aligned, pool
from nkat.lm.cache import FIRST_ROOM, KEPT_STATES, cache_memory, next_room
from nkat.lm.experts import ExpertStack
from nkat.lm.linear import StarLinear
from nkat.lm.transformer import Transformer

PREFILL_TOKENS = 256  # at once: enough to spread the work of taking a weight apart, few enough for the L2 cache


class CompiledDecoder:
    """`nkat.engine.decoder.Decoder` on the CPU kernels. The model's layers must have been repacked for them, and its
    embedding be of a type that they have; see `nkat.engine.decoder.make_decoder`."""

    def __init__(self, model: Transformer, capacity: int, threads: int) -> None:
        self.model, self.capacity, self._length = model, capacity, 0
        self.name = f"compiled CPU program, {threads} thread{'s' if threads > 1 else ''}"
        half = model.output.int8_activations  # as in llama.cpp
        self.cache = Cache(model, min(capacity, FIRST_ROOM), half=half)
        self._one = _LastLogits(self, threads, 1, 1)
        self._many = _LastLogits(self, threads, min(PREFILL_TOKENS, capacity), batch_tokens())

    @property
    def length(self) -> int:
        return self._length

    @length.setter
    def length(self, value: int) -> None:
        self.cache.states.go_to(value)
        self._length = value

    @property
    def cache_nbytes(self) -> int:
        return self.cache.nbytes

    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        if not tokens:
            raise NKATError("there is no token to start from")
        self._check_room(len(tokens))
        if len(tokens) == 1:
            return self.step(tokens[0])
        logits = None
        for start in range(0, len(tokens), PREFILL_TOKENS):
            part = tokens[start : start + PREFILL_TOKENS]
            logits = self._run(self._many, part, start + len(part) == len(tokens))
        assert logits is not None
        return logits

    def step(self, token: int) -> torch.Tensor:
        self._check_room(1)
        return self._run(self._one, [token], True)

    def _run(self, forward: _LastLogits, tokens: Sequence[int], want_logits: bool) -> torch.Tensor:
        if self.reach(self.length) != self.length:
            raise RuntimeError(f"a pass behind {self.length} tokens was interrupted: set the length to what is left")
        self.cache.states.begin()
        logits = forward.run(tokens, self.length, want_logits)
        self.cache.states.end(self.length + len(tokens))
        self._length += len(tokens)
        return logits

    def reach(self, length: int) -> int:
        return self.cache.states.reach(length)

    def keep_state(self, most: int = KEPT_STATES) -> None:
        self.cache.states.keep(most)

    def set_gamma(self, gamma: float | None) -> None:
        self.model.set_gamma(gamma)

    @property
    def stars(self) -> list[tuple[StarLinear, StarStep]]:
        """The layers with a place for Θ, and the parts of a step that read it."""
        return self._one.stars

    def can_follow(self) -> bool:
        return self._many.can_follow()

    def _check_room(self, count: int) -> None:
        if self.length + count > self.capacity:
            raise NKATError(
                f"the KV cache holds {self.capacity} tokens; {self.length} are in it and {count} more do not fit"
            )
        if self.length + count > self.cache.room:
            self._grow(next_room(self.cache.room, self.length + count, self.capacity))

    def _grow(self, room: int) -> None:
        """All that can fail comes before the steps' memory is let go."""
        room = -(-room // KEYS) * KEYS
        passes = (self._one, self._many)
        with cache_memory(room):
            tables = PositionTables.of(self.model, room, self.capacity)
            scores = [forward.scores_for(room) for forward in passes]
        self.cache.grow(room)
        for forward, array in zip(passes, scores, strict=True):
            forward.use_cache(array, tables)


class _LastLogits(ForwardPass):
    """A pass of one sequence that ends in the logits after its last token."""

    def __init__(self, decoder: CompiledDecoder, threads: int, capacity: int, tokens: int) -> None:
        model = decoder.model
        reach = decoder.capacity
        products = StarLinear.require_compiled, ExpertStack.require_compiled
        super().__init__(model, *products, pool(threads), decoder.cache, capacity, tokens, reach)
        self.last = token_state(1)  # of the output layer
        self.head = self.program if self.capacity == 1 else Program()
        self.logits = aligned((1, padded_rows(model.output.shape[0])), np.float32)
        normed = aligned((1, self.d), np.float32)
        self.last_row = self.x if self.head is self.program else aligned((1, self.d), np.float32)
        self.norm(self.head, self.last_row, model.output_norm, normed, self.last)
        self.multiply(self.head, self.prepare(self.head, [model.output], normed, self.last)[0], self.logits)
        self.head.barrier()
        self.cap_logits(self.head, self.logits, model.output.shape[0], self.last)

    def run(self, tokens: Sequence[int], position: int, want_logits: bool) -> torch.Tensor:
        """Logits after the last token, float32 [V]; an empty tensor when they are not wanted."""
        self.forward(np.array(tokens, np.int64), position)
        if not want_logits:
            return torch.empty(0)
        if self.head is not self.program:
            self.last_row[0] = self.x[len(tokens) - 1]
            self.head.run(self.threads)
        return torch.from_numpy(self.logits[0, : self.model.config.vocab_size])
