"""−ln p of a text's tokens by the compiled CPU program: what perplexities are measured with.

Several chunks go through each weight together, so that it is unpacked once for all of them. The weights stay where they
are: in the file, whose pages all processes share, or in the tiles of a model that was repacked. Nothing of the size of
the model, or of tokens × vocabulary, is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

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

    def __init__(self, model: Transformer, batch: int, context: int, threads: int, *, every: bool = False) -> None:
        """every: there is room to score every token, and not the last half alone"""
        if model.config.mixture is not None:
            batch = min(batch, max(1, _EXPERT_TOKENS // context))
        self.batch = batch
        self.scored = context - 1 - (0 if every else context // 2)  # at most, of a sequence
        tokens = batch_tokens()
        # INT8 activations change the inputs of the layers here, and nothing else: the cache is not rounded.
        cache = Cache(model, context, batch, kept=False, half=False)
        super().__init__(model, _linear, _experts, pool(threads), cache, batch * context, tokens, context, context)
        self.rows_at_once = -(-batch * self.scored // tokens) * tokens
        self.out_state = token_state(0)

    @cached_property
    def head(self) -> Program:
        """`hidden` → `running`: the output layer, some of its rows at a time."""
        rows, program = self.rows_at_once, Program()
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

    def score(self, chunks: torch.Tensor) -> torch.Tensor:
        return self.score_from(chunks, chunks.shape[1] // 2, 1)[0]

    def score_arms(self, chunks: torch.Tensor) -> torch.Tensor:
        return self.score_from(chunks, chunks.shape[1] // 2, 2)

    def score_from(self, tokens: torch.Tensor, first: int, arms: int) -> torch.Tensor:
        plain = (arms - 1) * len(tokens)  # how many sequences, the first ones, do not feel Θ
        tokens = torch.cat([tokens] * arms)
        parts = [
            self._score_together(tokens[start : start + self.batch], first, max(0, plain - start))
            for start in range(0, len(tokens), self.batch)
        ]
        return torch.cat(parts).view(arms, len(tokens) // arms, -1)

    def _score_together(self, tokens: torch.Tensor, first: int, plain: int) -> torch.Tensor:
        head, scored = self.head, tokens.shape[1] - 1 - first
        count = len(tokens) * scored
        self.out_state[0], self.out_state[3] = count, plain * scored
        self.hidden[:count] = self._hidden_together(tokens, first, plain).reshape(count, self.d)
        self.targets[:count] = tokens.numpy()[:, first + 1 :].reshape(-1)
        self.running[:] = (-1e30, 0.0, 0.0)
        head.run(self.threads)
        largest, total, chosen = self.running[:count].astype(np.float64).T
        return torch.from_numpy(largest + np.log(total) - chosen).view(len(tokens), scored)

    def hidden_rows(self, chunks: torch.Tensor, plain: int = 0) -> np.ndarray:
        """What the output layer's norm gets where tokens of a chunk's second half are scored, float32 [B · scored, d].

        plain: how many chunks, the first ones, do not feel Θ
        """
        first = chunks.shape[1] // 2
        out = np.empty((len(chunks), chunks.shape[1] - 1 - first, self.d), np.float32)
        for start in range(0, len(chunks), self.batch):
            part = chunks[start : start + self.batch]
            out[start : start + len(part)] = self._hidden_together(part, first, max(0, plain - start))
        return out.reshape(-1, self.d)

    def _hidden_together(self, tokens: torch.Tensor, first: int, plain: int) -> np.ndarray:
        """[B, scored, d], until the next one is asked for."""
        ids = tokens.numpy()
        self.state[2], self.state[3] = ids.shape[1], plain * ids.shape[1]
        self.forward(np.ascontiguousarray(ids).reshape(-1), 0)
        return self.x[: ids.size].reshape(*ids.shape, self.d)[:, first:-1]


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
