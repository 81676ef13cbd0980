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

from nkat.lm.attention import capped
from nkat.lm.transformer import Transformer

_TILE_ELEMENTS = 1 << 24  # logits of a tile: 64 MB in float32


@dataclass(frozen=True, slots=True)
class Head:
    """A model's output layer, hidden states [N, d] → logits [N, V]: weight [V, d], bias [V], then c·tanh(x/c) with a
    cap c (0: none). In float32, in float64 of a float64 model.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    cap: float = 0.0

    @classmethod
    def of(cls, model: Transformer) -> Head:
        """A model's, dequantised once for the whole fit."""
        return cls(model.output.weight(), model.output.bias, model.config.logit_cap)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return capped(logits if logits.dtype == torch.float64 else logits.float(), self.cap)

    def gradient(self, logits: torch.Tensor, by_logits: torch.Tensor) -> torch.Tensor:
        """The gradient by the hidden states [N, d] from the one by the logits, which `logits` gave."""
        if self.cap:
            by_logits = by_logits * (1.0 - (logits / self.cap).square())
        return by_logits.to(self.weight.dtype) @ self.weight


@dataclass(frozen=True, slots=True)
class Teacher:
    """Another model's prediction for the same tokens.

    hidden: its normalised last hidden states [N, d'];  head: its output layer
    share: of this target in the mixture, 0 to 1; the rest is the text's own next token
    """

    hidden: torch.Tensor
    head: Head
    share: float = 1.0


def vocabulary_loss(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor | None, teacher: Teacher | None = None
) -> torch.Tensor:
    """Σ over N tokens, in nats, of (1 − share) · −ln p(target) + share · KL(teacher ‖ model): a scalar.

    hidden: [N, d], differentiable;  head: the frozen output layer;  targets: token ids [N], None with share 1
    """
    return _VocabularyLoss.apply(hidden, head, targets, teacher)


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
        head: Head,
        targets: torch.Tensor | None,
        teacher: Teacher | None,
    ) -> torch.Tensor:
        share = 0.0 if teacher is None else teacher.share
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float64)
        tile = max(1, _TILE_ELEMENTS // head.weight.shape[0])
        for start in range(0, len(hidden), tile):
            part = slice(start, start + tile)
            text = None if targets is None or share == 1.0 else targets[part]
            taught = None if teacher is None or share == 0.0 else (teacher.head, teacher.hidden[part])
            if _have_kernels(head, None if taught is None else taught[0]):
                loss, gradient[part] = _by_kernels(hidden[part], head, text, taught, share)
            else:
                loss, gradient[part] = _by_torch(hidden[part], head, text, taught, share)
            total += loss
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: _Context, factor: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * factor.to(gradient.dtype), None, None, None


_Taught = tuple[Head, torch.Tensor]  # the teacher's output layer and hidden states


def _by_torch(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor | None, taught: _Taught | None, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of some tokens, float64, and its gradient by their hidden states."""
    logits = head.logits(hidden)
    log_p = torch.log_softmax(logits, dim=-1)
    total = hidden.new_zeros((), dtype=torch.float64)
    difference = log_p.exp()  # model − target, the gradient with respect to the logits
    if taught is not None:
        log_t = torch.log_softmax(taught[0].logits(taught[1]), dim=-1)
        t = log_t.exp()
        total += share * (t * (log_t - log_p)).sum(dtype=torch.float64)
        difference -= share * t
    if targets is not None:
        index = targets[:, None]
        total -= (1.0 - share) * log_p.gather(1, index).sum(dtype=torch.float64)
        difference.scatter_add_(1, index, difference.new_full(index.shape, share - 1.0))
    return total, head.gradient(logits, difference)


def _have_kernels(*heads: Head | None) -> bool:
    """Whether the kernels read the logits of these output layers as their products leave them."""
    dtypes = (torch.float32, torch.bfloat16)
    there = [head for head in heads if head is not None]
    kinds = {(head.weight.device.type, head.weight.dtype) for head in there}
    return len(kinds) == 1 and kinds <= {("cpu", d) for d in dtypes} and not any(head.cap for head in there)


def _by_kernels(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor | None, taught: _Taught | None, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_by_torch`: two passes over the logits, in whose place the gradient comes, in the dtype they are in."""
    from nkat.kernels.cpu.beside_torch import run  # LLVM is loaded only where it is used
    from nkat.kernels.cpu.learning import loss_kernel, number

    logits, log_sums = _with_log_sums(head, hidden)
    total = hidden.new_zeros((), dtype=torch.float64)
    arguments: list[torch.Tensor | int] = [logits, log_sums, logits.shape[1], len(logits), torch.tensor([share]), 0]
    if targets is not None:
        chosen = logits.gather(1, targets[:, None])[:, 0].double() - log_sums
        total -= (1.0 - share) * chosen.sum()
        arguments[-1] = targets.contiguous()
    divergences = torch.zeros(len(logits))
    if taught is not None:
        arguments += [*_with_log_sums(*taught), divergences]
    run(loss_kernel(number(logits), targets is not None, taught is not None), *arguments)
    return total + share * divergences.sum(dtype=torch.float64), logits @ head.weight


def _with_log_sums(head: Head, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] in the output layer's dtype, and ln Σ exp of each row in float32."""
    from nkat.kernels.cpu.beside_torch import run
    from nkat.kernels.cpu.learning import log_sum_kernel, number

    logits = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    tops = torch.empty(len(logits), 2)
    run(log_sum_kernel(number(logits)), logits, logits.shape[1], tops, len(logits))
    return logits, tops[:, 0] + tops[:, 1].log()
