"""The steps of recurrent blocks in a compiled program, and their states; see `nkat.kernels.cpu.delta`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nkat.kernels.cpu.delta import DeltaShape, convolve_kernel, delta_kernel, gated_norm_kernel
from nkat.kernels.cpu.program import Program, aligned
from nkat.lm.cache import KeptStates
from nkat.lm.config import ModelConfig
from nkat.lm.delta_net import DeltaNet
from nkat.lm.recurrence import Recurrence


def delta_shape(sizes: Recurrence) -> DeltaShape:
    """What the kernels are made for."""
    return DeltaShape(sizes.key_heads, sizes.value_heads, sizes.size, sizes.kernel, sizes.row.grouped, sizes.fused)


@dataclass(frozen=True, slots=True, eq=False)
class BlockState:
    """Of one block, float32: earlier inputs [sequence, kernel − 1, channels], memory [sequence, H, D / width, D, width]
    (`nkat.kernels.cpu.delta`)."""

    earlier: np.ndarray
    memory: np.ndarray

    @classmethod
    def of(cls, sizes: Recurrence, sequences: int) -> BlockState:
        width = delta_shape(sizes).width
        earlier = aligned((sequences, sizes.kernel - 1, sizes.channels), np.float32)
        memory = sequences, sizes.value_heads, sizes.size // width, sizes.size, width
        return cls(earlier, aligned(memory, np.float32))

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return self.earlier, self.memory


class RecurrentStates:
    """Those of all recurrent blocks, where a program works on them, and copies of those after earlier lengths.

    kept: every block has one of its own, for the tokens to come; otherwise they take turns with one
    """

    def __init__(self, config: ModelConfig, sequences: int, kept: bool) -> None:
        blocks, sizes = sorted(config.recurrent_blocks), config.recurrence
        self._length: int | None = 0
        self._kept = KeptStates[list[np.ndarray]]()
        self._states: list[BlockState] = []
        self.by_block: dict[int, BlockState] = {}
        if sizes is not None:
            self._states = [BlockState.of(sizes, sequences) for _ in (blocks if kept else blocks[:1])]
            self.by_block = {block: self._states[i if kept else 0] for i, block in enumerate(blocks)}

    @property
    def _arrays(self) -> list[np.ndarray]:
        return [array for state in self._states for array in state.arrays]

    def begin(self) -> None:
        """A pass changes them from now on. What an interrupt leaves of it is of no length."""
        self._length = None

    def end(self, length: int) -> None:
        """The pass has come to its end: they are those after so many tokens."""
        self._length = length

    def reach(self, length: int) -> int:
        """As of `nkat.engine.decoder.Decoder`."""
        return self._kept.reach(length, self._length) if self._states else length

    def go_to(self, length: int) -> None:
        """Raises ValueError for a length whose states there are not."""
        if self._states and length != self._length:
            copies = self._kept.back(length)
            if copies is not None:  # those of no token are not looked at
                for array, copy in zip(self._arrays, copies, strict=True):
                    array[:] = copy
        self._length = length

    def keep(self, most: int) -> None:
        if self._states and self._length and self._length not in self._kept:
            self._kept.keep(self._length, [array.copy() for array in self._arrays], most)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for arrays in (self._arrays, *self._kept.all()) for array in arrays)


class DeltaRows:
    """What recurrent blocks have between their linear layers: memory that all of them share, and the steps.

    capacity: tokens, `tokens` to a panel; state: of the tokens; epsilon: of all norms, float32 [1]
    """

    def __init__(self, sizes: Recurrence, capacity: int, tokens: int, state: np.ndarray, epsilon: np.ndarray) -> None:
        self.shape = delta_shape(sizes)
        self.sizes, self.tokens, self.state, self.epsilon = sizes, tokens, state, epsilon
        self.convolved = aligned((capacity, sizes.channels), np.float32)

    def add(
        self, program: Program, outputs: Mapping[str, np.ndarray], net: DeltaNet, held: BlockState, out: np.ndarray
    ) -> None:
        """Adds the steps from what the block's first linear layers gave to what its last one reads, in `out`."""
        mixed, *others = (outputs[name] for name in self.sizes.inputs)
        gate, *strengths = (mixed, *others) if self.sizes.fused else others
        kernel, biases, factors, norm = (
            np.ascontiguousarray(vector.numpy(), np.float32)
            for vector in (net.kernel.mT, net.time_bias, net.decay, net.norm)
        )
        convolved, state = _rows(self.convolved), self.state
        program.add(convolve_kernel(self.shape), (*_rows(mixed), held.earlier, kernel, *convolved, self.epsilon, state))
        program.barrier()
        program.add(
            delta_kernel(self.shape),
            (
                *(*convolved, *_rows(strengths[0]), *_rows(strengths[-1]), biases, factors, held.memory),
                *(*_rows(out), *_rows(mixed), held.earlier, state),
            ),
        )
        program.barrier()
        program.add(gated_norm_kernel(self.shape, self.tokens), (*_rows(out), *_rows(gate), norm, self.epsilon, state))


def _rows(array: np.ndarray) -> Sequence[np.ndarray | int]:
    """An array and the bytes of a row, as kernels are told of it."""
    return array, array.strides[0]
