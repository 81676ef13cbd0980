"""Optimisers, learning rate, and averaged weights.

Muon (Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks") moves a matrix by its momentum
with all singular values made about 1; the quintic Newton–Schulz coefficients are theirs. It serves the blocks' matrices
only: embeddings, gauge factors, norms, biases and the classifier stay with AdamW.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nkat_vit.recipe import TrainConfig

_NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NS_STEPS = 5
# Name and how many maps are packed into it.
_MUON_MATRICES = {"q.weight": 1, "kv.weight": 2, "out.weight": 1, "mlp_in.weight": 1, "mlp_out.weight": 1}


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices [k, m, n] with their singular values moved near 1 (0.7 to 1.2), in their own dtype."""
    a, b, c = _NS_COEFFICIENTS
    # The quintic was made for bfloat16. AMX and tensor cores are built for it; without them it is slow but right.
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (torch.linalg.vector_norm(x.float(), dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    for _ in range(_NS_STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(Optimizer):
    """Momentum 0.95 (Nesterov), orthogonalised; decoupled weight decay.

    A group's "parts" (1) says how many maps are packed into each of its matrices, one above the other.
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. closure: makes the gradients, and returns the loss, as torch's optimisers have it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - momentum)
                update = parameter.grad.lerp(average, momentum)
                for part, direction in zip(parameter.chunk(group["parts"]), update.chunk(group["parts"]), strict=True):
                    by_shape[tuple(part.shape)].append((part, direction))
            for shape, items in by_shape.items():  # all matrices of a shape in one batch of products
                directions = orthogonalise(torch.stack([direction for _, direction in items]))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for (part, _), direction in zip(items, directions, strict=True):
                    part.mul_(1 - lr * group["weight_decay"]).add_(direction, alpha=-lr * scale)
        return loss


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """One or two optimisers; vectors (biases, norms, gains) and positions are not decayed."""
    decayed, others = [], []
    matrices: dict[int, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        parts = _MUON_MATRICES.get(".".join(name.split(".")[-2:])) if name.startswith("blocks.") else None
        if config.opt == "muon" and parts is not None:
            matrices[parts].append(parameter)
        elif parameter.ndim < 2 or name in ("position", "cls"):
            others.append(parameter)
        else:
            decayed.append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizers: list[Optimizer] = [AdamW(groups, lr=config.lr, fused=True)]
    if matrices:
        packed = [{"params": params, "parts": parts} for parts, params in matrices.items()]
        optimizers.append(Muon(packed, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """The learning rate of a step from 0 as a share of the peak: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def set_lr(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Every group to `factor` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


class Average:
    """Moving average of a model's parameters; buffers (BatchNorm's statistics) are averages already, and copied.

    The decay rises with the number of updates, (1 + n) / (10 + n), until it reaches its setting: a short run is not
    held back by its random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._learned = [name for name, _ in model.named_parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After an optimiser's step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        now = model.state_dict()
        mine, theirs = [self.weights[n] for n in self._learned], [now[n] for n in self._learned]
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for name in self.weights.keys() - set(self._learned):
            self.weights[name].copy_(now[name])

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"updates": self.updates, "weights": self.weights}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.updates = state["updates"]
        for name, value in self.weights.items():
            value.copy_(state["weights"][name])
