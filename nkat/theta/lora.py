"""LoRA adapters of llama.cpp: Θ written as one, for programs that have never heard of it; and any of them read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from nkat.errors import NKATError
from nkat.gguf.file import GGUFError, GGUFFile, TensorInfo
from nkat.gguf.names import EXPERTS_IN_NAME, block_number
from nkat.gguf.weights import read_weight
from nkat.gguf.writer import (
    BaseView,
    MetadataValue,
    NewTensor,
    Part,
    gguf_parts,
)
from nkat.theta.algebra import ThetaError, coupling, low_rank_form
from nkat.theta.lowrank import LowRank
from nkat.theta.modelfile import architecture_of
from nkat.theta.set import ThetaSet

_FACTORS = (".lora_a", ".lora_b")
_INVOCATION = "adapter.alora.invocation_tokens"


def read_lora(path: Path, architecture: str) -> dict[str, LowRank]:
    """The terms of a llama.cpp adapter by weight name, at scale 1: alpha / rank · lora_b lora_a, alpha 0 meaning rank.

    Raises NKATError for a file that is none, one for another architecture, and naming what no low-rank term can hold.
    """
    file = GGUFFile.open(path)
    keys = ("general.type", "adapter.type", "general.architecture")
    for key, wanted in zip(keys, ("adapter", "lora", architecture), strict=True):
        if file.metadata.get(key) != wanted:
            found = file.metadata.get(key)
            raise GGUFError(f"{path}: is no LoRA adapter for this model: {key} is {found!r:.80} and not {wanted!r}")
    if _INVOCATION in file.metadata:
        raise GGUFError(f"{path}: has {_INVOCATION}: it acts only behind an invocation (aLoRA)")
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise GGUFError(f"{path}: adapter.lora.alpha is {alpha!r:.80}, not a number")
    terms = {}
    for tensor in file.tensors:
        name = tensor.removesuffix(_FACTORS[0])
        if not tensor.endswith(_FACTORS):
            raise GGUFError(f"{path}: tensor {tensor!r} is no factor of a LoRA, and would be left out")
        if name == tensor:  # lora_b
            continue
        down, up = (_factor(file, name + suffix) for suffix in _FACTORS)
        scale = alpha / len(down) if alpha else 1.0
        try:
            terms[name] = LowRank(up * scale, down)
        except ThetaError as error:
            raise ThetaError(f"{path}: {name}: {error}") from None
    if not terms or len(file.tensors) != 2 * len(terms):
        raise GGUFError(f"{path}: its {len(file.tensors)} tensors are no pairs of lora_a and lora_b")
    return terms


def check_lora(terms: Mapping[str, LowRank], tensors: Mapping[str, TensorInfo], path: Path) -> None:
    """Raises NKATError unless every term belongs to a linear weight of the model and has its shape."""
    for name, term in terms.items():
        info = tensors.get(name)
        if info is None:
            hint = "; it is tied to the embedding" if name == "output.weight" else ""
            raise NKATError(f"{path}: adapts {name}, which the model does not have{hint}")
        if block_number(name) < 0 and name != "output.weight":
            raise NKATError(f"{path}: adapts {name}, which no input is multiplied by")
        if len(info.shape) != 2:
            raise NKATError(f"{path}: adapts {name}, which is no matrix of one linear layer")
        try:
            term.check(*info.shape)
        except ThetaError as error:
            raise NKATError(f"{path}: {name}: was made for another model: {error}") from None


def _factor(file: GGUFFile, name: str) -> torch.Tensor:
    info = file.tensors.get(name)
    if info is None:
        raise GGUFError(f"{file.path}: tensor {name!r} is missing")
    if EXPERTS_IN_NAME in name:
        raise GGUFError(f"{file.path}: {name}: is of a mixture's experts, which take a Θ and no other low-rank term")
    if len(info.shape) != 2:
        raise GGUFError(f"{file.path}: {name} has shape {info.shape}, and a factor is a matrix")
    return read_weight(file, name)


def lora_parts(theta_set: ThetaSet, base: BaseView, gamma: float | None = None) -> list[Part]:
    """κ(γ)Θ as a llama.cpp LoRA adapter of rank 2r: W x + lora_b (lora_a x), in F16.

    lora_a [2r, n] = [Qᵀ; Pᵀ], lora_b [m, 2r] = κ [P, −Q]; `adapter.lora.alpha` = 2r, so that llama.cpp's own factor
    alpha / rank is 1. A layer of lower rank than the largest has that factor divided out. Those of a mixture's experts
    lie behind one another.
    """
    kappa = coupling(theta_set.gamma if gamma is None else gamma)
    alpha = 2 * theta_set.rank
    tensors = []
    for name, theta in theta_set.layers.items():
        m, n = base.tensors[name].shape[-2:]
        each = [theta] if theta.experts is None else [theta.expert(i) for i in range(theta.experts)]
        forms = [low_rank_form(*one.factors(), m, n) for one in each]
        down, up = forms[0] if theta.experts is None else (torch.stack(parts) for parts in zip(*forms, strict=True))
        up *= kappa * (2 * theta.rank) / alpha
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
        "nkat.theta.gamma": theta_set.gamma if gamma is None else gamma,
        "nkat.base.sha256": theta_set.base_sha256,
    }
    return gguf_parts(metadata, tensors)
