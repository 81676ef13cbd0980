"""What a model keeps of the tokens it has seen: keys and values, and the states of recurrent blocks.

Keys and values of a token lie by themselves, so any number of the last tokens can be forgotten. A recurrent state holds
all tokens in one, from which none can be taken away again: one goes back only to lengths whose states were kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import torch

from nkat.errors import NKATError
from nkat.lm.config import ModelConfig

FIRST_ROOM = 2048  # tokens: most prompts and answers together, so that most caches never grow
KEPT_STATES = 4  # of a text that goes on: where its last prompts ended


def next_room(room: int, needed: int, capacity: int) -> int:
    """Tokens that a cache grows to: twice as many, so that a token is moved once on average."""
    return min(capacity, max(needed, 2 * room))


@contextmanager
def cache_memory(tokens: int) -> Iterator[None]:
    """Says in one line that the memory for so many tokens is not there."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise NKATError(
            f"the KV cache for {tokens} tokens does not fit into the GPU's memory: give fewer (--max-tokens, --seq-len)"
        ) from None
    except (MemoryError, OverflowError, RuntimeError, ValueError):  # no memory, or more bytes than can be counted
        raise NKATError(
            f"there is no memory for a KV cache of {tokens} tokens: give fewer (--max-tokens, --seq-len)"
        ) from None


class State(NamedTuple):
    """Of one recurrent block (`nkat.lm.delta_net`).

    inputs: the last tokens' before the convolution, [B, kernel − 1, channels];  memory: [B, H, D, D]
    """

    inputs: torch.Tensor
    memory: torch.Tensor


States = TypeVar("States")


class KeptStates(Generic[States]):
    """Recurrent states after some of the lengths that a text had, the last ones that were kept."""

    def __init__(self) -> None:
        self._kept: dict[int, States] = {}

    def keep(self, length: int, states: States, most: int) -> None:
        """most: of so many lengths; the shortest go"""
        self._kept[length] = states
        for shortest in sorted(self._kept)[:-most]:
            del self._kept[shortest]

    def __contains__(self, length: int) -> bool:
        return length in self._kept

    def reach(self, length: int, now: int | None) -> int:
        """The longest of the lengths up to this one whose states there are. now: one more; None: there are none now"""
        return max(known for known in (0, now, *self._kept) if known is not None and known <= length)

    def back(self, length: int) -> States | None:
        """The states after so many tokens, None for 0; those after more are forgotten.

        Raises ValueError where they were not kept.
        """
        if length and length not in self._kept:
            raise ValueError(f"the state after {length} tokens was not kept")
        self._kept = {known: states for known, states in self._kept.items() if known <= length}
        return self._kept.get(length)

    def all(self) -> Iterable[States]:
        return self._kept.values()


@dataclass(frozen=True, slots=True)
class _Held:
    """So many tokens, and the recurrent blocks' states after them. Nothing of it is ever changed in place."""

    length: int = 0
    states: Mapping[int, State] = field(default_factory=dict)


class KVCache:
    """Keys (after RoPE) and values of every block: [B, H_kv, room, D] each; recurrent ones have a `State` instead.

    `length` tokens of it are filled. Setting `length` to a smaller value forgets the tokens after it.
    room: tokens that there is memory for: `capacity`, or with `growing` as many as were needed so far, or some more
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        growing: bool = False,
    ) -> None:
        self.batch, self.capacity = batch, capacity
        self.room = min(capacity, FIRST_ROOM) if growing else capacity
        self._recurrent = bool(config.recurrent_blocks)
        self._held, self._kept = _Held(), KeptStates[Mapping[int, State]]()
        self._coming: dict[int, State] = {}
        heads = [
            (config.of(i).kv_heads if config.has_own_kv(i) else 0, config.of(i).head_dim)
            for i in range(config.block_count)
        ]
        with cache_memory(self.room):
            self.keys, self.values = (
                [torch.zeros(batch, count, self.room, size, dtype=dtype, device=device) for count, size in heads]
                for _ in range(2)
            )

    @property
    def length(self) -> int:
        return self._held.length

    @length.setter
    def length(self, value: int) -> None:
        """Raises ValueError for a length whose recurrent states were not kept; see `reach`."""
        if value == self._held.length:
            return
        if not self._recurrent:
            self._held = _Held(value)
            return
        self._held = _Held(value, self._kept.back(value) or {})

    def reach(self, length: int) -> int:
        """How many of its first `length` tokens can be kept when those behind them are forgotten."""
        if not self._recurrent:
            return length
        return self._kept.reach(length, self.length)

    def keep_state(self, most: int = KEPT_STATES) -> None:
        """`length` can be set to what it is now later on; `most`: of so many such lengths, the oldest go."""
        if self._recurrent and self.length:
            self._kept.keep(self.length, self._held.states, most)

    def check_room(self, batch: int, tokens: int) -> None:
        if batch != self.batch:
            raise NKATError(f"the KV cache was made for {self.batch} sequences, not {batch}")
        if self.length + tokens > self.capacity:
            raise NKATError(
                f"the KV cache holds {self.capacity} tokens; {self.length} are in it and {tokens} more do not fit"
            )
        if self.length + tokens > self.room:
            self._grow(next_room(self.room, self.length + tokens, self.capacity))

    def _grow(self, room: int) -> None:
        """Memory for more tokens, an array at a time, so that no more than one is there twice."""
        with cache_memory(room):
            for arrays in (self.keys, self.values):
                for i, old in enumerate(arrays):
                    arrays[i] = old.new_zeros(*old.shape[:2], room, old.shape[3])
                    arrays[i][:, :, : self.length] = old[:, :, : self.length]
        self.room = room

    def extend(self, block: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes one block's new keys and values behind `length`; returns all of that block's, [B, H_kv, S, D]."""
        end = self.length + k.shape[2]
        self.keys[block][:, :, self.length : end] = k
        self.values[block][:, :, self.length : end] = v
        return self.keys[block][:, :, :end], self.values[block][:, :, :end]

    def state(self, block: int) -> State | None:
        """A recurrent block's after `length` tokens; None: after none."""
        return self._held.states.get(block)

    def put_state(self, block: int, state: State) -> None:
        """Its state after the new tokens, which counts from `advance` on."""
        self._coming[block] = state

    def advance(self, tokens: int) -> None:
        """The new tokens are in it. What an interrupt left of a pass that did not come to this does not count."""
        self._held = _Held(self.length + tokens, self._coming)
        self._coming = {}

    @property
    def nbytes(self) -> int:
        kept = {id(held): held for held in (*self._kept.all(), self._held.states)}.values()
        states = (tensor for held in kept for state in held.values() for tensor in state)
        return sum(t.nbytes for t in (*self.keys, *self.values, *states))


KeysValues = tuple[torch.Tensor, torch.Tensor]  # [B, H_kv, S, D] each
