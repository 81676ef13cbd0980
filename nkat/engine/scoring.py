"""−ln p of a text's tokens, chunk by chunk: what perplexities are measured with, whatever the device.

`make_scorer` picks the fastest way that this model and device have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from nkat.kernels.registry import kernel_types, say_fallbacks
from nkat.lm.linear import StarLinear
from nkat.lm.transformer import Transformer


class Scorer(Protocol):
    """Made for a model with the Θ that it has then; the strength may change."""

    def score(self, chunks: torch.Tensor) -> torch.Tensor:
        """Chunks of token ids, int64 [B, context] → −ln p of the tokens behind the first half, each from those before
        it: float64 [B, context − 1 − context // 2], on the CPU.

        A number that is not finite stands for a prediction that is none (damaged weights).
        """
        ...

    def score_arms(self, chunks: torch.Tensor) -> torch.Tensor:
        """The same without Θ, then with it, [2, B, ...]: bit by bit what `score` gives for each."""
        ...


def make_scorer(model: Transformer, batch: int, context: int) -> Scorer:
    """The fastest scorer of up to `batch` sequences of `context` tokens together, for this model as it was loaded.

    A sequence is a chunk in one arm. A note says where a type without a kernel made it slow.
    """
    if has_kernels(model):
        from nkat.engine.compiled_scorer import CompiledScorer  # LLVM is loaded only where it is used

        return CompiledScorer(model, batch, context, torch.get_num_threads())
    linears = (layer for block in model.blocks for layer in block.linears.values())
    trained = not all(isinstance(layer, StarLinear) for layer in linears)
    if model.device.type == "cpu" and not trained:
        say_fallbacks("cpu", model.packed_types())  # on a GPU loading has said it
    return EagerScorer(model)


MakeScorer = Callable[[Transformer, int, int], Scorer]


@dataclass(slots=True)
class KeptScorer:
    """`make_scorer` for many measurements in turn: a scorer is made once for each Θ, whatever its strength and text.

    least: sequences there is room for, at least, so that a short text's scorer does for a long one
    It holds its memory until another Θ is measured or it goes itself.
    """

    least: int = 1
    _made: tuple[object, Scorer] | None = None

    def __call__(self, model: Transformer, batch: int, context: int) -> Scorer:
        batch = max(batch, self.least)
        key = (model, model.theta_changes, batch, context, torch.get_num_threads())
        if self._made is None or self._made[0] != key:
            self._made = None  # not two of them at a time
            self._made = key, make_scorer(model, batch, context)
        return self._made[1]


def has_kernels(model: Transformer) -> bool:
    """Whether the compiled CPU program computes what this model's own forward pass does.

    Not where a layer is trained just now, computes in another precision than float32, or has a type without a kernel.
    """
    if model.device.type != "cpu":
        return False
    linears = [layer for block in model.blocks for layer in block.linears.values()]
    if model.layer_inputs is not None:
        linears.append(model.layer_inputs.projection)
    kernels = kernel_types("cpu")
    experts = [block.experts for block in model.blocks if block.experts is not None]
    linears += [each.router for each in experts]
    stacks = [each.stack(name) for each in experts for name in each.names]
    if any(stack.dtype != torch.float32 or stack.theta is not None or stack.scales_inside for stack in stacks):
        return False
    if not all(stack.qtype in kernels for stack in stacks):
        return False
    return all(table.qtype in kernels for table in model.tables()) and all(
        isinstance(layer, StarLinear) and layer.dtype == torch.float32 and layer.qtype in kernels and layer.scale == 1.0
        for layer in (*linears, model.output)
    )


class EagerScorer:
    """The model's own forward pass, an operation at a time."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    @torch.inference_mode()
    def score(self, chunks: torch.Tensor) -> torch.Tensor:
        first = chunks.shape[1] // 2
        chunks = chunks.to(self.model.device)
        hidden = self.model.hidden(chunks)[:, first:-1]
        targets = chunks[:, first + 1 :]
        return self.model.nll(hidden.flatten(0, 1), targets.flatten()).view(targets.shape).double().cpu()

    def score_arms(self, chunks: torch.Tensor) -> torch.Tensor:
        gamma = self.model.gamma
        self.model.set_gamma(None)
        without = self.score(chunks)
        self.model.set_gamma(gamma)
        return torch.stack((without, self.score(chunks)))
