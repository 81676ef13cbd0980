"""The end of a compiled pass: the likelihood of one token at each of some places, without all logits being there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from nkat.engine.forward import ForwardPass
from nkat.kernels.cpu.blocks import likelihood_kernel
from nkat.kernels.cpu.layout import ROWS
from nkat.kernels.cpu.linear import token_state
from nkat.kernels.cpu.program import Program, aligned

_BLOCK_TILES = 128  # of the vocabulary: the logits of 2048 ids at a time


class Likelihoods(ForwardPass):
    """A pass with an output layer for up to `rows_at_once` rows of what its blocks have left in `x`.

    Its memory is taken when it is first needed, or never where somebody adds other steps behind `vocabulary`.
    """

    rows_at_once: int

    @cached_property
    def out_state(self) -> np.ndarray:
        """Of the output layer's rows."""
        return token_state(0)

    @cached_property
    def head(self) -> Program:
        """`hidden` → `running`: the output layer, some of its rows at a time."""
        rows, program = -(-self.rows_at_once // self.tokens) * self.tokens, Program()
        self.hidden = aligned((rows, self.d), np.float32)
        self.targets = np.zeros(rows, np.int64)
        self.running = np.zeros((rows, 3), np.float32)
        kernel = likelihood_kernel(self.tokens)
        for logits, first, columns in self.vocabulary(program, self.hidden, self.out_state):
            words = (logits, logits.strides[0], columns, first, self.targets, self.running, self.out_state)
            program.add(kernel, words)
        return program

    def vocabulary(
        self, program: Program, hidden: np.ndarray, state: np.ndarray
    ) -> Iterator[tuple[np.ndarray, int, int]]:
        """Adds the steps of the output layer over rows of `hidden`, a block of the vocabulary at a time.

        Yields the block's logits, the id of the first and how many there are: what is then added works on them, and a
        barrier ends it.
        """
        rows, model = len(hidden), self.model
        normed = aligned((rows, self.d), np.float32)
        self.norm(program, hidden, model.output_norm, normed, state)
        step = self.prepare(program, [model.output], normed, state)[0]
        vocabulary = model.config.vocab_size
        tiles = -(-vocabulary // ROWS)
        logits = aligned((rows, min(tiles, _BLOCK_TILES) * ROWS), np.float32)
        for tile in range(0, tiles, _BLOCK_TILES):
            first, count = tile * ROWS, min(_BLOCK_TILES, tiles - tile)
            self.multiply(program, step, logits, tile, count)
            program.barrier()
            columns = min(count * ROWS, vocabulary - first)
            self.cap_logits(program, logits, columns, state)
            yield logits, first, columns
            program.barrier()

    def likelihoods(self, hidden: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of `x` [N, d] and token ids [N] → −ln p, float64, and whether no token is likelier, bool.

        N: at most `rows_at_once`. What is not finite stands for a prediction that is none (damaged weights).
        """
        head, count = self.head, len(targets)
        self.hidden[:count], self.targets[:count] = hidden, targets
        self.running[:] = (-1e30, 0.0, 0.0)
        self.out_state[0] = count
        head.run(self.threads)
        largest, total, chosen = self.running[:count].astype(np.float64).T
        return largest + np.log(total) - chosen, chosen >= largest
