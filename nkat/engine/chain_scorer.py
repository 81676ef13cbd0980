"""Continuations of a recurrent model by the compiled CPU program: one sequence after another, from states that were
kept. The tree of `nkat.engine.tree_scorer` has no place for states, which are one for each sequence."""

from __future__ import annotations

import numpy as np
import torch

from nkat.engine.compiled_scorer import experts_of, linear_of, tokens_together
from nkat.engine.kernel_cache import Cache
from nkat.engine.likelihoods import Likelihoods
from nkat.engine.tree import Tokens
from nkat.kernels.cpu.batch import batch_tokens
from nkat.kernels.cpu.program import pool
from nkat.lm.cache import KEPT_STATES
from nkat.lm.transformer import Transformer

_PASS_TOKENS = 512
_HEAD_ROWS = 256  # predictions that the output layer makes together


class ChainScorer(Likelihoods):
    """Passes over one sequence of up to `longest` tokens at a time; a `nkat.engine.continuations.Reader`."""

    def __init__(self, model: Transformer, longest: int, threads: int) -> None:
        most = min(tokens_together(model, _PASS_TOKENS), longest)
        cache = Cache(model, longest, half=False)
        super().__init__(model, linear_of, experts_of, pool(threads), cache, most, batch_tokens(), longest)
        self.most_tokens, self.rows_at_once, self.length = most, _HEAD_ROWS, 0

    def go_to(self, length: int) -> int:
        reached = self.cache.states.reach(min(length, self.length))
        self.cache.states.go_to(reached)
        self.length = reached
        return reached

    def keep_state(self) -> None:
        self.cache.states.keep(KEPT_STATES)

    def read(self, tokens: Tokens) -> torch.Tensor:
        """What the output layer's norm gets, float32 [T, d]."""
        parts = []
        for start in range(0, len(tokens), self.most_tokens):
            part = np.array(tokens[start : start + self.most_tokens], np.int64)
            self.cache.states.begin()
            self.forward(part, self.length)
            self.length += len(part)
            self.cache.states.end(self.length)
            parts.append(self.x[: len(part)].copy())
        return torch.from_numpy(np.concatenate(parts))

    def predict(self, rows: torch.Tensor, targets: Tokens) -> tuple[np.ndarray, np.ndarray]:
        hidden, ids = rows.numpy(), np.array(targets, np.int64)
        found = [
            self.likelihoods(hidden[start : start + _HEAD_ROWS], ids[start : start + _HEAD_ROWS])
            for start in range(0, len(ids), _HEAD_ROWS)
        ]
        nll, best = (np.concatenate(column) for column in zip(*found, strict=True))
        return nll, best
