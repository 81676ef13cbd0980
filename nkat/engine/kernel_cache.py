"""What the compiled program keeps of the tokens it has seen, in the order in which its kernels read it."""

from __future__ import annotations

import numpy as np

from nkat.engine.recurrent import RecurrentStates
from nkat.kernels.cpu.agreed import KEYS
from nkat.kernels.cpu.blocks import Heads
from nkat.kernels.cpu.program import aligned
from nkat.lm.cache import cache_memory
from nkat.lm.transformer import Block, Transformer


class Cache:
    """Keys and values of every block, see `nkat.kernels.cpu.blocks`, and states of the recurrent ones.

    room: tokens that there is memory for
    sequences: how many lie behind one another
    kept: everything stays for the tokens to come; otherwise only until no later block needs it
    half: as float16, otherwise float32
    """

    def __init__(self, model: Transformer, room: int, sequences: int = 1, *, kept: bool = True, half: bool) -> None:
        self.heads, self.sequences, self.room = block_heads(model, half=half), sequences, 0
        self.places = _places(model, kept)  # number of the arrays that a block's keys and values are in
        shapes = dict(zip(self.places, self.heads, strict=True))
        self._shapes = [shapes[place] for place in range(len(shapes))]
        self.keys = [self._array(heads, 0) for heads in self._shapes]
        self.values = [self._array(heads, 0) for heads in self._shapes]
        self.states = RecurrentStates(model.config, sequences, kept)
        self.grow(room)

    def _array(self, heads: Heads, room: int) -> np.ndarray:
        return aligned((self.sequences * heads.kv, room, heads.size), np.float16 if heads.half else np.float32)

    def of(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a block."""
        place = self.places[block]
        return self.keys[place], self.values[place]

    def grow(self, room: int) -> None:
        """Memory for more tokens. Where there is none, nothing has changed.

        The new arrays take no memory until they are written to, so that no more than one is there twice.
        """
        room = -(-room // KEYS) * KEYS
        with cache_memory(room):
            new = [[self._array(heads, room) for heads in self._shapes] for _ in range(2)]
        for arrays, larger in zip((self.keys, self.values), new, strict=True):
            for i, array in enumerate(larger):
                array[:, : self.room] = arrays[i]  # whole blocks of keys, whose order within is the same
                arrays[i] = array
        self.room = room

    def head_bytes(self, block: int) -> int:
        return self.room * self.heads[block].size * self.heads[block].cache_bytes

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.keys, *self.values)) + self.states.nbytes


def block_heads(model: Transformer, *, half: bool) -> list[Heads]:
    """The shape of each block's attention; half: the KV cache is float16."""
    config = model.config
    return [
        Heads(
            config.head_count,
            0 if block.index in config.recurrent_blocks else config.of(block.index).kv_heads,
            config.of(block.index).head_dim,
            (config.local_rope if block.local else config.rope).dimensions,
            config.rope.interleaved,
            config.architecture.qk_norm,
            half=half,
            capped=config.attention_cap != 0.0,
            own=config.has_own_kv(block.index),
            value_norm=config.architecture.value_norm,
            sinks=config.architecture.sinks,
        )
        for block in model.blocks
    ]


def _places(model: Transformer, kept: bool) -> list[int]:
    """Which arrays each block's keys and values are in.

    Where nothing is kept, blocks with heads of one shape take turns; those with a window are by themselves where later
    blocks use the keys of the last one of their kind.
    """
    config, numbers = model.config, dict[object, int]()

    def key(block: Block) -> object:
        sizes = config.of(block.index)
        if kept:
            return sizes.kv_block
        return sizes.kv_heads, sizes.head_dim, block.local and bool(config.shared_blocks)

    return [numbers.setdefault(key(block), len(numbers)) for block in model.blocks]
