"""Continuations by the compiled CPU program: many at a time, what they have in common once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nkat.engine.compiled_scorer import experts_of, linear_of, tokens_together
from nkat.engine.kernel_cache import Cache
from nkat.engine.likelihoods import Likelihoods
from nkat.engine.tree import Tokens, token_tree
from nkat.kernels.cpu.agreed import KEYS
from nkat.kernels.cpu.batch import batch_tokens
from nkat.kernels.cpu.program import pool
from nkat.lm.transformer import Transformer

TREE_TOKENS = 2048  # of one pass: as many as in one of a perplexity
_HEAD_ROWS = 1024  # predictions that the output layer makes together
_SHORT = 4  # tokens of a segment at least, on average, before a pass is full of blocks of keys that are hardly filled


class TreeScorer(Likelihoods):
    """Passes over trees of up to `most_tokens` tokens and `most_blocks` blocks of keys.

    longest: tokens of a sequence at most, which may by itself be more than those of a tree of several
    """

    def __init__(self, model: Transformer, longest: int, threads: int) -> None:
        self.most_tokens = max(tokens_together(model, TREE_TOKENS), longest)
        self.most_blocks = max(self.most_tokens // _SHORT, longest // KEYS + 2)
        cache = Cache(model, self.most_blocks * KEYS, kept=False, half=False)
        size = self.most_tokens, batch_tokens(), longest
        super().__init__(model, linear_of, experts_of, pool(threads), cache, *size, tree=True)
        self.rows_at_once = _HEAD_ROWS

    def predict(
        self, sequences: Sequence[Tokens], wanted: Sequence[tuple[int, int, Tokens]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """−ln p, float64, and whether no token is likelier, bool, of each target of each of the wanted.

        sequences: sorted, distinct, not empty
        wanted: number of a sequence, which of its tokens predicts the first target, the targets
        """
        tree = token_tree(sequences)
        self.use_tree(tree)
        self.forward(tree.tokens, 0)
        places = [tree.paths[number][first : first + len(targets)] for number, first, targets in wanted]
        targets = np.concatenate([np.asarray(each, np.int64) for _, _, each in wanted])
        pairs = np.stack((np.concatenate(places), targets), axis=1)
        distinct, back = np.unique(pairs, axis=0, return_inverse=True)
        parts = []
        for start in range(0, len(distinct), _HEAD_ROWS):
            part = distinct[start : start + _HEAD_ROWS]
            parts.append(self.likelihoods(self.x[part[:, 0]], part[:, 1]))
        nll, best = (np.concatenate(column)[back.reshape(-1)] for column in zip(*parts, strict=True))
        ends = np.cumsum([len(each) for each in places])[:-1]
        return list(zip(np.split(nll, ends), np.split(best, ends), strict=True))
