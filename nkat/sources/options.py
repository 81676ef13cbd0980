"""How Θ is made: the options every source shares, and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nkat.gguf.file import GGUFFile
from nkat.gguf.writer import MetadataValue

SOURCES = ("weight", "residual")
DEFAULT_RANK = 4
DEFAULT_GAMMA = 0.97


@dataclass(frozen=True, slots=True)
class ThetaOptions:
    """How Θ is made. `reference`: for source `residual`, the same model at a higher precision.

    input_weights: for source `residual`, by tensor name E[x xᵀ] [n, n] or E[x_j²] [n] of each adapted weight's inputs
    """

    rank: int = DEFAULT_RANK
    gamma: float = DEFAULT_GAMMA
    seed: int = 0
    target_size: int | None = None
    source: str = "weight"
    reference: GGUFFile | None = None
    input_weights: Mapping[str, torch.Tensor] | None = None
    notes: Mapping[str, MetadataValue] = field(default_factory=dict)
