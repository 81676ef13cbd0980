"""Θ made of seeded whole numbers: the same bits everywhere."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch

from nkat.gguf.file import TensorInfo
from nkat.theta.algebra import Theta
from nkat.theta.layers import adaptable_layers
from nkat.theta.set import ThetaSet


def seeded_theta_set(tensors: Mapping[str, TensorInfo], rank: int = 2, gamma: float = 0.5) -> ThetaSet:
    """A Θ for every weight that gets one by default; scales and κ(½) are powers of two, so that nothing is rounded."""
    layers = {}
    for name in adaptable_layers(tensors):
        random = np.random.RandomState(zlib.crc32(name.encode()))
        p, q = (torch.from_numpy(random.randint(-127, 128, (max(tensors[name].shape), rank), np.int8)) for _ in "pq")
        layers[name] = Theta(p, q, torch.full((2, rank), 2.0**-8))
    return ThetaSet(layers, gamma, "weight", 0, "0" * 64, "seeded", 0)
