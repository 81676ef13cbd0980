"""−ln p of a text's tokens by the compiled CPU program: what perplexities are measured with.

Several chunks go through each weight together, so that it is unpacked once for all of them. The weights stay where they
are: in the file, whose pages all processes share, or in the tiles of a model that was repacked. Nothing of the size of
the model, or of tokens × vocabulary, is made.
"""

from __future__ import annotations

import numpy as np
import torch

from nkat.engine.forward import Cache, ForwardPass
from nkat.kernels.cpu.batch import batch_tokens
from nkat.kernels.cpu.blocks import likelihood_kernel
from nkat.kernels.cpu.experts import CpuExperts
from nkat.kernels.cpu.formats import ROWS
from nkat.kernels.cpu.linear import CpuLinear, token_state
from nkat.kernels.cpu.program import Program, aligned, pool
from nkat.lm.experts import ExpertStack
from nkat.lm.linear import StarLinear
from nkat.lm.transformer import Transformer

_EXPERT_TOKENS = 1024  # at once through a mixture of experts, whose rows are as many times as many as a token's experts
_BLOCK_TILES = 128  # of the vocabulary: the logits of 2048 ids at a time


class CompiledScorer(ForwardPass):
    """`nkat.engine.scoring.Scorer` on the CPU kernels: up to `batch` sequences of `context` tokens together."""

    def __init__(self, model: Transformer, batch: int, context: int, threads: int) -> None:
        if model.config.mixture is not None:
            batch = min(batch, max(1, _EXPERT_TOKENS // context))
        self.batch = batch
        self.first = context // 2
        self.scored = context - 1 - self.first
        tokens = batch_tokens()
        # INT8 activations change the inputs of the layers here, and nothing else: the cache is not rounded.
        cache = Cache(model, context, batch, kept=False, half=False)
        super().__init__(model, _linear, _experts, pool(threads), cache, batch * context, tokens, context, context)
        rows = -(-batch * self.scored // tokens) * tokens
        self.out_state = token_state(0)
        self.hidden = aligned((rows, self.d), np.float32)
        self.targets = np.zeros(rows, np.int64)
        self.running = np.zeros((rows, 3), np.float32)
        self.head = self._vocabulary(rows)

    def _vocabulary(self, rows: int) -> Program:
        """`hidden` → `running`: the output layer, some of its rows at a time."""
        program, model, state = Program(), self.model, self.out_state
        normed = aligned((rows, self.d), np.float32)
        self.norm(program, self.hidden, model.output_norm, normed, state)
        step = self.prepare(program, [model.output], normed, state)[0]
        vocabulary = model.config.vocab_size
        tiles = -(-vocabulary // ROWS)
        logits = aligned((rows, min(tiles, _BLOCK_TILES) * ROWS), np.float32)
        kernel = likelihood_kernel(self.tokens)
        for tile in range(0, tiles, _BLOCK_TILES):
            first, count = tile * ROWS, min(_BLOCK_TILES, tiles - tile)
            self.multiply(program, step, logits, tile, count)
            program.barrier()
            columns = min(count * ROWS, vocabulary - first)
            self.cap_logits(program, logits, columns, state)
            program.add(kernel, (logits, logits.strides[0], columns, first, self.targets, self.running, state))
            program.barrier()
        return program

    def score(self, chunks: torch.Tensor) -> torch.Tensor:
        return self._score(chunks, 0)

    def score_arms(self, chunks: torch.Tensor) -> torch.Tensor:
        return self._score(torch.cat((chunks, chunks)), len(chunks)).view(2, len(chunks), self.scored)

    def _score(self, chunks: torch.Tensor, plain: int) -> torch.Tensor:
        """plain: how many chunks, the first ones, do not feel Θ."""
        parts = [
            self._score_together(chunks[start : start + self.batch], max(0, plain - start))
            for start in range(0, len(chunks), self.batch)
        ]
        return torch.cat(parts)

    def _score_together(self, chunks: torch.Tensor, plain: int) -> torch.Tensor:
        ids = chunks.numpy()
        self.state[3], self.out_state[3] = plain * ids.shape[1], plain * self.scored
        self.forward(np.ascontiguousarray(ids).reshape(-1), 0)
        count = len(ids) * self.scored
        wanted = self.x[: ids.size].reshape(*ids.shape, self.d)[:, self.first : -1]
        self.hidden[:count] = wanted.reshape(count, self.d)
        self.targets[:count] = ids[:, self.first + 1 :].reshape(-1)
        self.running[:] = (-1e30, 0.0, 0.0)
        self.out_state[0] = count
        self.head.run(self.threads)
        largest, total, chosen = self.running[:count].astype(np.float64).T
        return torch.from_numpy(largest + np.log(total) - chosen).view(len(ids), self.scored)


def _experts(stack: ExpertStack) -> CpuExperts:
    """As `_linear`."""
    if stack.compiled is not None:
        return stack.compiled
    exact = not stack.int8_activations
    return CpuExperts(stack.packed, stack.qtype, stack.shape, stack.bias, exact=exact, in_place=True)


def _linear(layer: StarLinear) -> CpuLinear:
    """What multiplies for a layer: its repacked weight, or the file's bytes as they are."""
    if layer.compiled is not None:
        return layer.compiled
    linear = CpuLinear(
        layer.file_bytes, layer.qtype, layer.shape, layer.bias, exact=not layer.int8_activations, in_place=True
    )
    linear.set_theta(layer.theta, layer.room)
    return linear
