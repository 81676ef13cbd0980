"""Muon, matrices of the same sides together: the numbers of `torch.optim.Muon`, which takes one matrix after the other.

Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks": a matrix moves by its momentum with all
singular values made about 1. The quintic Newton–Schulz coefficients are theirs. Products of small matrices keep neither
a processor's matrix unit nor a GPU busy: those of preset fast take a third of the time when a batch has them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices [..., m, n] with their singular values moved near 1 (0.7 to 1.2; fewer steps leave small ones small).

    In bfloat16, which the quintic was made for. At most one dimension before the last two.
    """
    a, b, c = _COEFFICIENTS
    add_product = torch.addmm if matrices.ndim == 2 else torch.baddbmm
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised in `ns_steps` steps, for matrices [m, n]; decoupled weight decay."""

    def __init__(
        self, params: Iterable[Any], lr: float, weight_decay: float, momentum: float = 0.95, ns_steps: int = 5
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": ns_steps})

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
            alike: defaultdict[tuple[object, ...], list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[(*sorted(matrix.shape), matrix.device)].append(matrix)  # tall ones are laid down
            for matrices in alike.values():
                self._move(matrices, group)
        return loss

    def _move(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """The step of a group's matrices of one shape, upright or lying."""
        lr, momentum, steps = group["lr"], group["momentum"], group["ns_steps"]
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        averages = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, averages, momentum)
        lying = [x.mT if x.shape[0] > x.shape[1] else x for x in ahead]
        if len(lying) == 1:
            directions = [orthogonalise(lying[0], steps)]
        else:
            directions = list(orthogonalise(torch.stack(lying), steps))
        torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
        for matrix, direction in zip(matrices, directions, strict=True):
            rows, columns = matrix.shape
            upright = direction.mT if rows > columns else direction
            matrix.add_(upright, alpha=-lr * max(1.0, rows / columns) ** 0.5)
