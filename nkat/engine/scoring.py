"""−ln p of a text's tokens by the compiled CPU program: what perplexities are measured with.

Several chunks go through each weight together, so that it is unpacked once for all of them. The weights stay where they
are: in the file, whose pages all processes share, or in the tiles of a model that was repacked. Nothing of the size of
the model, or of tokens × vocabulary, is made.
"""

from __future__ import annotations

import numpy as np
import torch

from nkat.engine.forward import Cache, ForwardPass, attention_heads
from nkat.kernels.cpu.batch import batch_tokens
from nkat.kernels.cpu.blocks import likelihood_kernel
from nkat.kernels.cpu.formats import ROWS
from nkat.kernels.cpu.linear import CpuLinear
from nkat.kernels.cpu.program import Program, aligned, pool
from nkat.lm.architectures import BLOCK_LINEARS
from nkat.lm.linear import StarLinear
from nkat.lm.transformer import Transformer

_BLOCK_TILES = 128  # of the vocabulary: the logits of 2048 ids at a time


def can_score(model: Transformer) -> bool:
    """Whether the compiled program computes what this model's own forward pass does.

    Not where a layer is trained just now, computes in another precision than float32, or has a type without a kernel.
    """
    from nkat.kernels.registry import kernel_types

    if model.device.type != "cpu":
        return False
    linears = [block.linears[name] for block in model.blocks for name in BLOCK_LINEARS]
    kernels = kernel_types("cpu")
    return model.embedding.qtype in kernels and all(
        isinstance(layer, StarLinear) and layer.dtype == torch.float32 and layer.qtype in kernels
        for layer in (*linears, model.output)
    )


class Scorer(ForwardPass):
    """Scores up to `batch` chunks of `context` tokens together, with the Θ that the model has now.

    first: the first position whose next token is scored
    """

    def __init__(self, model: Transformer, batch: int, context: int, first: int, threads: int) -> None:
        self.context, self.first, self.scored = context, first, context - 1 - first
        tokens = batch_tokens()
        cache = Cache(1, attention_heads(model), context, batch)
        super().__init__(model, _linear, pool(threads), cache, batch * context, tokens, context)
        rows = -(-batch * self.scored // tokens) * tokens
        self.out_state = np.zeros(8, np.int64)
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
            program.add(kernel, (logits, logits.strides[0], columns, first, self.targets, self.running, state))
            program.barrier()
        return program

    def score(self, chunks: torch.Tensor) -> torch.Tensor:
        """−ln p of the tokens behind `first` of chunks, int64 [B, context]: float64 [B, scored]."""
        ids = chunks.numpy()
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


def _linear(layer: StarLinear) -> CpuLinear:
    """What multiplies for a layer: its repacked weight, or the file's bytes as they are."""
    if layer.compiled is not None:
        return layer.compiled
    linear = CpuLinear(
        layer.file_bytes, layer.qtype, layer.shape, layer.bias, exact=not layer.int8_activations, in_place=True
    )
    linear.set_theta(layer.theta)
    return linear
