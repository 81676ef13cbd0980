"""−ln p of a text's tokens by the compiled CPU program: what perplexities are measured with.

Several chunks go through each weight together, so that it is unpacked once for all of them. The weights stay where they
are: in the file, whose pages all processes share, or in the tiles of a model that was repacked. Nothing of the size of
the model, or of tokens × vocabulary, is made.
"""

from __future__ import annotations

import numpy as np
import torch

from nkat.engine.kernel_cache import Cache
from nkat.engine.likelihoods import Likelihoods
from nkat.kernels.cpu.batch import batch_tokens
from nkat.kernels.cpu.experts import CpuExperts
from nkat.kernels.cpu.linear import CpuLinear
from nkat.kernels.cpu.program import pool
from nkat.lm.experts import ExpertStack
from nkat.lm.linear import StarLinear
from nkat.lm.transformer import Transformer

_EXPERT_TOKENS = 1024  # at once through a mixture of experts, whose rows are as many times as many as a token's experts


class CompiledScorer(Likelihoods):
    """`nkat.engine.scoring.Scorer` on the CPU kernels: up to `batch` sequences of `context` tokens together."""

    def __init__(self, model: Transformer, batch: int, context: int, threads: int) -> None:
        batch = tokens_together(model, batch * context) // context or 1
        self.batch = batch
        self.first = context // 2
        self.scored = context - 1 - self.first
        # INT8 activations change the inputs of the layers here, and nothing else: the cache is not rounded.
        cache = Cache(model, context, batch, kept=False, half=False)
        tokens = batch_tokens()
        super().__init__(model, linear_of, experts_of, pool(threads), cache, batch * context, tokens, context, context)
        self.rows_at_once = batch * self.scored

    def score(self, chunks: torch.Tensor) -> torch.Tensor:
        return self._score(chunks, 0)

    def score_arms(self, chunks: torch.Tensor) -> torch.Tensor:
        return self._score(torch.cat((chunks, chunks)), len(chunks)).view(2, len(chunks), self.scored)

    def _score(self, chunks: torch.Tensor, plain: int) -> torch.Tensor:
        """plain: how many chunks, the first ones, do not feel Θ."""
        parts = []
        for start in range(0, len(chunks), self.batch):
            part = chunks[start : start + self.batch]
            hidden = self._hidden_together(part, max(0, plain - start)).reshape(-1, self.d)
            self.out_state[3] = max(0, plain - start) * self.scored
            parts.append(torch.from_numpy(self.likelihoods(hidden, self.targets_of(part))[0]))
        return torch.cat(parts).view(len(chunks), self.scored)

    def targets_of(self, chunks: torch.Tensor) -> np.ndarray:
        """The scored tokens themselves, int64 [B · scored]."""
        return chunks.numpy()[:, self.first + 1 :].reshape(-1)

    def hidden_rows(self, chunks: torch.Tensor, plain: int = 0) -> np.ndarray:
        """What the output layer's norm gets where tokens are scored, float32 [B · scored, d].

        plain: how many chunks, the first ones, do not feel Θ
        """
        out = np.empty((len(chunks), self.scored, self.d), np.float32)
        for start in range(0, len(chunks), self.batch):
            part = chunks[start : start + self.batch]
            out[start : start + len(part)] = self._hidden_together(part, max(0, plain - start))
        return out.reshape(-1, self.d)

    def _hidden_together(self, chunks: torch.Tensor, plain: int) -> np.ndarray:
        """[B, scored, d], until the next one is asked for."""
        ids = chunks.numpy()
        self.state[3] = plain * ids.shape[1]
        self.forward(np.ascontiguousarray(ids).reshape(-1), 0)
        return self.x[: ids.size].reshape(*ids.shape, self.d)[:, self.first : -1]


def tokens_together(model: Transformer, tokens: int) -> int:
    """So many tokens in a pass, or fewer where that takes too much memory."""
    return tokens if model.config.mixture is None else min(tokens, _EXPERT_TOKENS)


def experts_of(stack: ExpertStack) -> CpuExperts:
    """As `linear_of`."""
    if stack.compiled is not None:
        return stack.compiled
    exact = not stack.int8_activations
    return CpuExperts(stack.packed, stack.qtype, stack.shape, stack.bias, exact=exact, in_place=True)


def linear_of(layer: StarLinear) -> CpuLinear:
    """What multiplies for a layer: its repacked weight, or the file's bytes as they are."""
    if layer.compiled is not None:
        return layer.compiled
    linear = CpuLinear(
        layer.file_bytes, layer.qtype, layer.shape, layer.bias, exact=not layer.int8_activations, in_place=True
    )
    linear.set_theta(layer.theta, layer.room)
    return linear
