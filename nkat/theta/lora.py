"""Θ as a LoRA adapter: what programs that have never heard of it can run."""

from __future__ import annotations

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from nkat.gguf.writer import (
    BaseView,
    MetadataValue,
    NewTensor,
    Part,
    gguf_parts,
)
from nkat.theta.algebra import Theta, ThetaError, coupling, low_rank_form
from nkat.theta.modelfile import architecture_of
from nkat.theta.set import ThetaSet


def lora_parts(theta_set: ThetaSet, base: BaseView, gamma: float | None = None) -> list[Part]:
    """κ(γ)Θ as a llama.cpp LoRA adapter of rank 2r: W x + lora_b (lora_a x), in F16.

    lora_a [2r, n] = [Qᵀ; Pᵀ], lora_b [m, 2r] = κ [P, −Q]; `adapter.lora.alpha` = 2r, so that llama.cpp's own factor
    alpha / rank is 1. A layer of lower rank than the largest has that factor divided out. Those of a mixture's experts
    lie behind one another.
    """
    used = theta_set.gamma if gamma is None else gamma
    kappa, alpha = coupling(used), 2 * theta_set.rank
    tensors = []
    for name, theta in theta_set.layers.items():
        m, n = base.tensors[name].shape[-2:]
        down, up = _factors(theta, m, n)
        up = up * (kappa * (2 * theta.rank) / alpha)
        for suffix, factor in ((".lora_a", down), (".lora_b", up)):
            half = factor.to(torch.float16)
            if not bool(torch.isfinite(half).all()):
                raise ThetaError(f"{name}: Θ's factors are too large for a LoRA adapter in F16")
            tensors.append(NewTensor(name + suffix, GGMLQuantizationType.F16, half.contiguous().numpy()))
    metadata: dict[str, MetadataValue] = {
        "general.type": "adapter",
        "general.architecture": architecture_of(base.file),
        "general.name": f"NKAT theta for {theta_set.base_name}",
        "adapter.type": "lora",
        "adapter.lora.alpha": np.float32(alpha),
        "nkat.theta.gamma": used,
        "nkat.base.sha256": theta_set.base_sha256,
    }
    return gguf_parts(metadata, tensors)


def _factors(theta: Theta, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(down [2r, n], up [m, 2r]), with the experts in front where there are some."""
    if theta.experts is None:
        return low_rank_form(*theta.factors(), m, n)
    forms = [low_rank_form(*theta.expert(i).factors(), m, n) for i in range(theta.experts)]
    return torch.stack([down for down, _ in forms]), torch.stack([up for _, up in forms])
