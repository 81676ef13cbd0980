"""Optimisers, learning rate, and averaged weights.

Muon moves a matrix by its momentum with all singular values made about 1. It serves the blocks' matrices, the patch
embedding and the stem's convolutions (a filter is a row); positions, gauge factors, what makes colours of heads, norms,
biases and the classifier stay with AdamW.

With `layer_decay` d below 1, layer i of depth + 1 learns at dᵈᵉᵖᵗʰ⁺¹⁻ⁱ of the rate, so that early layers keep more of
what they have (BEiT, Bao et al., arXiv 2106.08254, appendix; timm's --layer-decay): layer 0 is all before the blocks,
the last one the final norm, the pooling and the classifier. Both optimisers multiply weight decay by the rate
(decoupled, Loshchilov and Hutter, arXiv 1711.05101), which makes it layer-wise as well.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nkat_vit.muon import Muon
from nkat_vit.recipe import TrainConfig

# Of `blocks.N`, with the number of maps that are packed into each, one above the other.
_BLOCK_MATRICES = {"q.weight": 1, "kv.weight": 2, "out.weight": 1, "mlp_in.weight": 1, "mlp_out.weight": 1}


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """One or two optimisers; vectors (biases, norms, gains) and positions are not decayed."""
    # By how many layers they lie below the last one, whose rate is the whole one.
    decayed: defaultdict[int, list[nn.Parameter]] = defaultdict(list)
    others: defaultdict[int, list[nn.Parameter]] = defaultdict(list)
    packed: defaultdict[int, list[tuple[nn.Parameter, int]]] = defaultdict(list)
    depths = _layers_below_the_last(model) if config.layer_decay < 1 else {}
    # By the module's kind: the shape does not tell, the norm of colours has [3, 1, 1].
    norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # the whitening's filters
            continue
        parts, below = _packed_maps(name, parameter), depths.get(name, 0)
        if config.opt == "muon" and parts:
            packed[below].append((parameter, parts))
        elif parameter.ndim < 2 or id(parameter) in norms or name in ("position", "cls"):
            others[below].append(parameter)
        else:
            decayed[below].append(parameter)
    groups = [
        {"params": kind[below], "weight_decay": decay, "lr": config.lr * config.layer_decay**below}
        for below in sorted(decayed.keys() | others.keys())
        for kind, decay in ((decayed, config.weight_decay), (others, 0.0))
        if below in kind
    ]
    optimizers: list[Optimizer] = [AdamW(groups, lr=config.lr, fused=True)]
    if packed:
        optimizers.append(_make_muon(packed, config))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _layers_below_the_last(model: nn.Module) -> dict[str, int]:
    """Of each parameter by its name: 0 for the final norm, the pooling and the classifier, 1 for the last block, …"""
    last = ("norm.", "pool_score.", "head.")
    layers = {
        name: int(name.split(".")[1]) + 1 if name.startswith("blocks.") else -1 if name.startswith(last) else 0
        for name, _ in model.named_parameters()
    }
    top = max(layers.values()) + 1
    return {name: 0 if layer < 0 else top - layer for name, layer in layers.items()}


def _packed_maps(name: str, parameter: Tensor) -> int:
    """How many maps that are Muon's a parameter holds; 0: it is AdamW's."""
    if name.startswith("blocks."):
        return _BLOCK_MATRICES.get(".".join(name.split(".")[-2:]), 0)
    return int(name == "embed.weight" or (name.startswith("stem.") and parameter.ndim == 4))


def _make_muon(packed: Mapping[int, list[tuple[nn.Parameter, int]]], config: TrainConfig) -> Optimizer:
    """Muon over matrices that share the parameters' memory; each step takes the gradients from the parameters.

    Those have to be cleared on the model: the optimiser's `zero_grad` knows the matrices alone.

    packed: parameters with their numbers of maps, by how many layers they lie below the last
    """
    groups, shared = [], []
    for below in sorted(packed):
        own = [(parameter, _matrices(parameter.detach(), parts)) for parameter, parts in packed[below]]
        matrices = [matrix for _, of_one in own for matrix in of_one]
        groups.append({"params": matrices, "lr": config.muon_lr * config.layer_decay**below})
        shared += own
    optimizer = Muon(groups, config.muon_lr, config.weight_decay, config.muon_momentum, config.muon_steps)

    def share_gradients(*_: object) -> None:
        for parameter, matrices in shared:
            assert parameter.grad is not None
            for matrix, gradient in zip(matrices, _matrices(parameter.grad, len(matrices)), strict=True):
                matrix.grad = gradient

    optimizer.register_step_pre_hook(share_gradients)
    return optimizer


def _matrices(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """[parts · m, …] → `parts` matrices [m, n], views of it."""
    return x.view(len(x), -1).chunk(parts)


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
    """Moving average of a model's parameters and of BatchNorm's statistics, which have to belong to the weights.

    With the last weights' statistics the averaged ones lost 0.6 points of 64 while the learning rate was high (preset
    fast, 200 steps, 2,000 pictures); statistics made anew from 1,024 to 8,192 pictures were no better than averaged.

    The decay rises with the number of updates, (1 + n) / (10 + n), until it reaches its setting: a short run is not
    held back by its random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._averaged = [name for name, value in self.weights.items() if value.is_floating_point()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After an optimiser's step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        now = model.state_dict()
        mine, theirs = [self.weights[n] for n in self._averaged], [now[n] for n in self._averaged]
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for name in self.weights.keys() - set(self._averaged):  # counters
            self.weights[name].copy_(now[name])

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"updates": self.updates, "weights": self.weights}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.updates = state["updates"]
        for name, value in self.weights.items():
            value.copy_(state["weights"][name])
