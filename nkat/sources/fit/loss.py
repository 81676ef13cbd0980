"""The losses that Θ is fitted by, summed over tokens without ever holding all logits.

Both are differences between a target distribution and the model's, so one function serves: the target is the text's
next token (cross entropy), another model's prediction (Kullback–Leibler divergence), or a mixture. The gradient with
respect to the hidden states is made in the forward pass, tile by tile (Hsu et al., 2024, "Liger Kernel",
arXiv 2410.10989); the output layer's weight is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

_TILE_ELEMENTS = 1 << 24  # logits of a tile: 64 MB in float32


@dataclass(frozen=True, slots=True)
class Teacher:
    """Another model's prediction for the same tokens.

    hidden: its normalised last hidden states [N, d'];  weight: its output layer [V, d']
    share: of this target in the mixture, 0 to 1; the rest is the text's own next token
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    share: float = 1.0


def vocabulary_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor | None, teacher: Teacher | None = None
) -> torch.Tensor:
    """Σ over N tokens, in nats, of (1 − share) · −ln p(target) + share · KL(teacher ‖ model): a scalar.

    hidden: [N, d], differentiable;  weight: the output layer [V, d];  targets: token ids [N], None with share 1
    """
    return _VocabularyLoss.apply(hidden, weight, targets, teacher)


class _Context(Protocol):
    """What `_VocabularyLoss` uses of torch's class, whose stub lacks the second."""

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...

    @property
    def saved_tensors(self) -> tuple[torch.Tensor, ...]: ...


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor | None,
        teacher: Teacher | None,
    ) -> torch.Tensor:
        share = 0.0 if teacher is None else teacher.share
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float64)
        tile = max(1, _TILE_ELEMENTS // weight.shape[0])
        for start in range(0, len(hidden), tile):
            part = slice(start, start + tile)
            log_p = _log_probabilities(hidden[part], weight)
            difference = log_p.exp()  # model − target, the gradient with respect to the logits
            if teacher is not None and share > 0.0:
                log_t = _log_probabilities(teacher.hidden[part], teacher.weight)
                t = log_t.exp()
                total += share * (t * (log_t - log_p)).sum(dtype=torch.float64)
                difference -= share * t
            if targets is not None and share < 1.0:
                index = targets[part, None]
                total -= (1.0 - share) * log_p.gather(1, index).sum(dtype=torch.float64)
                difference.scatter_add_(1, index, difference.new_full(index.shape, share - 1.0))
            gradient[part] = (difference.to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: _Context, factor: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * factor.to(gradient.dtype), None, None, None


def _log_probabilities(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Logarithms of the predicted probabilities [N, V], float32 (float64 of a float64 model)."""
    logits = F.linear(hidden.to(weight.dtype), weight)
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
