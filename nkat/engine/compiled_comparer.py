"""Two predictions side by side by the compiled CPU program: `nkat.engine.comparing.Comparer` on its kernels.

As a perplexity is measured: several chunks go through each weight together, both arms of a model through one unpacking
of it, and of the logits a block of the vocabulary is there at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from nkat.engine.compared import Compared
from nkat.engine.compiled_scorer import CompiledScorer
from nkat.engine.log_probs import empty_rows, grid, put_heads
from nkat.kernels.cpu.blocks import likelihood_kernel
from nkat.kernels.cpu.divergence import RUNNING, divergence_kernel, lowest_kernel, store_kernel
from nkat.kernels.cpu.linear import token_state
from nkat.kernels.cpu.program import Program, aligned
from nkat.lm.transformer import Transformer

_START = (-1e30, 0.0, 0.0, -1e30, 0.0, 0.0, 0.0, 0.0)  # of running sums


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """What the comparison of an arm's rows with the base's has come to, see `divergence_kernel`."""

    running: np.ndarray
    best: np.ndarray

    @classmethod
    def of(cls, rows: int) -> _Sums:
        return cls(np.zeros((rows, RUNNING), np.float32), np.zeros((rows, 2), np.int64))

    def found(self, chunks: int, scored: int, stored: bool) -> Compared:
        count = chunks * scored
        top, total, chosen, own_top, own_total, own_chosen, mixed, _ = self.running[:count].astype(np.float64).T
        own_whole = own_top + np.log(own_total)
        if stored:  # log-probabilities, of which those that are very unlikely were left out
            base_nll, kl = -chosen, mixed + total * own_whole
        else:
            whole = top + np.log(total)
            base_nll, kl = whole - chosen, mixed / total - whole + own_whole
        same = self.best[:count, 0] == self.best[:count, 1]
        columns = (base_nll, own_whole - own_chosen, kl, same)
        return Compared(*(torch.from_numpy(column).view(chunks, scored) for column in columns))


@dataclass(frozen=True, slots=True, eq=False)
class _Comparison:
    """A program and the sums that it leaves, of each arm."""

    program: Program
    sums: list[_Sums]
    stored: bool


class CompiledComparer:
    """Up to `batch` chunks of `context` tokens together. other: a base that is another model"""

    def __init__(
        self, model: Transformer, batch: int, context: int, threads: int, other: Transformer | None = None
    ) -> None:
        self.model = model
        self.own = CompiledScorer(model, 2 * batch, context, threads)
        self.other = None if other is None else CompiledScorer(other, batch, context, threads)
        self.scored, tokens = self.own.scored, self.own.tokens
        self.room = -(-batch * self.scored // tokens) * tokens  # rows of an arm
        self.targets = np.zeros(self.room, np.int64)
        self.state, self.own_state, self.other_state = (token_state(0) for _ in range(3))
        self.hidden = aligned((2 * self.room, self.own.d), np.float32)  # an arm's rows behind the room of the other's
        self._comparisons: dict[tuple[int, bool], _Comparison] = {}

    def beside_itself(self, chunks: torch.Tensor, base: torch.Tensor | None = None) -> tuple[Compared, torch.Tensor]:
        if base is None:
            self._put(self.own.hidden_rows(torch.cat((chunks, chunks)), len(chunks)), 2, plain=True)
        else:
            kept = base.numpy().reshape(len(chunks) * self.scored, -1)
            self._put(np.concatenate((kept, self.own.hidden_rows(chunks))), 2, plain=True)
        found = self._run(self._itself, chunks)[0]
        hidden = torch.from_numpy(self.hidden[: len(chunks) * self.scored].copy()).view(len(chunks), self.scored, -1)
        return found, hidden

    def beside(self, chunks: torch.Tensor, arms: int, rows: np.ndarray | None = None) -> list[Compared]:
        count = len(chunks) * self.scored
        self._put(self.own.hidden_rows(torch.cat([chunks] * arms), (arms - 1) * len(chunks)), arms, plain=arms == 2)
        if rows is None:
            assert self.other is not None
            self.other_hidden[:count] = self.other.hidden_rows(chunks)
            self.other_state[0] = count
        else:
            self.rows[:count] = rows
        return self._run(self._beside(arms, rows is not None), chunks)

    def stored(self, chunks: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        self._put(self.own.hidden_rows(chunks, len(chunks)), 1, plain=True)
        self._point_to(chunks)
        return self._storing.run(chunks)

    def _put(self, hidden: np.ndarray, arms: int, plain: bool) -> None:
        """Rows of all arms, [arms · count, d], to their places. plain: the first arm does not feel Θ"""
        count = len(hidden) // arms
        for arm in range(arms):
            self.hidden[arm * self.room : arm * self.room + count] = hidden[arm * count : (arm + 1) * count]
        self.own_state[0] = (arms - 1) * self.room + count
        self.own_state[3] = self.room if plain else 0

    def _point_to(self, chunks: torch.Tensor) -> None:
        """Which tokens are scored."""
        self.state[0] = count = len(chunks) * self.scored
        self.targets[:count] = self.own.targets_of(chunks)

    @cached_property
    def rows(self) -> np.ndarray:
        """Stored log-probabilities of an arm."""
        return empty_rows(self.room, self.model.config.vocab_size)

    @cached_property
    def other_hidden(self) -> np.ndarray:
        assert self.other is not None
        return aligned((self.room, self.other.d), np.float32)

    @cached_property
    def _storing(self) -> _Storing:
        return _Storing(self)

    @cached_property
    def _itself(self) -> _Comparison:
        return self._compare(Program(), itertools.repeat(None), [self.room])

    def _beside(self, arms: int, stored: bool) -> _Comparison:
        if (arms, stored) not in self._comparisons:
            program = Program()
            bases = itertools.repeat(self.rows) if stored else self._other_logits(program)
            starts = [arm * self.room for arm in range(arms)]
            self._comparisons[arms, stored] = self._compare(program, bases, starts, stored)
        return self._comparisons[arms, stored]

    def _other_logits(self, program: Program) -> Iterator[np.ndarray]:
        assert self.other is not None
        for logits, _, _ in self.other.vocabulary(program, self.other_hidden, self.other_state):
            yield logits

    def _compare(
        self, program: Program, bases: Iterator[np.ndarray | None], starts: list[int], stored: bool = False
    ) -> _Comparison:
        """bases: for each block of the vocabulary the base's logits, or its stored rows; None: the own first arm's

        starts: the first rows of the arms that are compared with it
        """
        sums = [_Sums.of(self.room) for _ in starts]
        kernel = divergence_kernel(self.own.tokens, stored)
        own = self.own.vocabulary(program, self.hidden[: starts[-1] + self.room], self.own_state)
        for base, (logits, first, columns) in zip(bases, own, strict=False):
            left = logits if base is None else base
            for start, arm in zip(starts, sums, strict=True):
                right = logits[start:]
                words = (left, left.strides[0], right, right.strides[0], columns, first)
                program.add(kernel, (*words, self.targets, arm.running, arm.best, self.state))
        return _Comparison(program, sums, stored)

    def _run(self, comparison: _Comparison, chunks: torch.Tensor) -> list[Compared]:
        self._point_to(chunks)
        for arm in comparison.sums:
            arm.running[:], arm.best[:] = _START, 0
        comparison.program.run(self.own.threads)
        return [arm.found(len(chunks), self.scored, comparison.stored) for arm in comparison.sums]


class _Storing:
    """The rows that a comparer's first arm leaves: a program that looks at the logits, one that makes numbers of them.

    The output layer runs twice, because a row's grid depends on its last logit and no row of logits is kept.
    """

    def __init__(self, comparer: CompiledComparer) -> None:
        self.comparer = comparer
        own, rows, state = comparer.own, comparer.rows, comparer.state
        self.likelihood = np.zeros((comparer.room, 3), np.float32)
        self.lowest = np.zeros(comparer.room, np.float32)
        self.grid = np.zeros((comparer.room, 2), np.float32)
        hidden = comparer.hidden[: comparer.room]
        self.look, self.store = Program(), Program()
        for logits, first, columns in own.vocabulary(self.look, hidden, comparer.own_state):
            block = logits, logits.strides[0], columns
            self.look.add(likelihood_kernel(own.tokens), (*block, first, comparer.targets, self.likelihood, state))
            self.look.add(lowest_kernel(own.tokens), (*block, self.lowest, state))
        for logits, first, columns in own.vocabulary(self.store, hidden, comparer.own_state):
            words = logits, logits.strides[0], columns, first, self.grid, rows, rows.strides[0]
            self.store.add(store_kernel(own.tokens), (*words, state))

    def run(self, chunks: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        """−ln p [B, scored] and rows, where the comparer has everything in its place."""
        threads, count = self.comparer.own.threads, len(chunks) * self.comparer.scored
        self.likelihood[:], self.lowest[:] = (-1e30, 0.0, 0.0), 1e30
        self.look.run(threads)
        self.grid[:count], heads = grid(self.likelihood[:count, 0], self.likelihood[:count, 1], self.lowest[:count])
        rows = self.comparer.rows[:count]
        put_heads(rows, heads)
        self.store.run(threads)
        largest, whole, own = self.likelihood[:count].astype(np.float64).T
        return torch.from_numpy(largest + np.log(whole) - own).view(len(chunks), -1), rows
