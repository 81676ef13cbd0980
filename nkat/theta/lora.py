"""Θ as a LoRA adapter: what programs that have never heard of it can run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
    used = theta_set if gamma is None else replace(theta_set, gamma=gamma)
    metadata: dict[str, MetadataValue] = {
        "general.name": f"NKAT theta for {theta_set.base_name}",
        "nkat.theta.gamma": used.gamma,
        "nkat.base.sha256": theta_set.base_sha256,
    }
    return _adapter_parts([(used, 1.0)], base, metadata)


def combined_lora_parts(weighted: Sequence[tuple[ThetaSet, float]], base: BaseView) -> list[Part]:
    """Σ weight κ(γ) Θ over several Θ of one model as one adapter, whose rank is the sum of theirs: for programs that
    take a single one.
    """
    first = weighted[0][0]
    metadata: dict[str, MetadataValue] = {
        "general.name": f"{len(weighted)} NKAT thetas for {first.base_name}",
        "nkat.base.sha256": first.base_sha256,
    }
    return _adapter_parts(weighted, base, metadata)


def _adapter_parts(
    weighted: Sequence[tuple[ThetaSet, float]], base: BaseView, about: dict[str, MetadataValue]
) -> list[Part]:
    names = dict.fromkeys(name for theta_set, _ in weighted for name in theta_set.layers)
    shares = {name: [(one, weight) for one, weight in weighted if name in one.layers] for name in names}
    ranks = {name: sum(2 * one.layers[name].rank for one, _ in parts) for name, parts in shares.items()}
    alpha = max(ranks.values())
    tensors = []
    for name, parts in shares.items():
        m, n = base.tensors[name].shape[-2:]
        downs, ups = [], []
        for theta_set, weight in parts:
            down, up = _factors(theta_set.layers[name], m, n)
            downs.append(down)
            ups.append(up * (coupling(theta_set.gamma) * weight * ranks[name] / alpha))
        for suffix, factor in ((".lora_a", torch.cat(downs, dim=-2)), (".lora_b", torch.cat(ups, dim=-1))):
            half = factor.to(torch.float16)
            if not bool(torch.isfinite(half).all()):
                raise ThetaError(f"{name}: Θ's factors are too large for a LoRA adapter in F16")
            tensors.append(NewTensor(name + suffix, GGMLQuantizationType.F16, half.contiguous().numpy()))
    metadata: dict[str, MetadataValue] = {
        "general.type": "adapter",
        "general.architecture": architecture_of(base.file),
        "general.name": about["general.name"],
        "adapter.type": "lora",
        "adapter.lora.alpha": np.float32(alpha),
    }
    return gguf_parts(metadata | about, tensors)


def _factors(theta: Theta, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(down [2r, n], up [m, 2r]), with the experts in front where there are some."""
    if theta.experts is None:
        return low_rank_form(*theta.factors(), m, n)
    forms = [low_rank_form(*theta.expert(i).factors(), m, n) for i in range(theta.experts)]
    return torch.stack([down for down, _ in forms]), torch.stack([up for _, up in forms])
