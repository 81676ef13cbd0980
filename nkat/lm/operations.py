"""What lies between a block's linear layers, written with torch's operations, which know their own gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from nkat.lm.activation import activate
from nkat.lm.architectures import Architecture
from nkat.lm.attention import View, attend, rotate


class Operations:
    """For any device and dtype. `nkat.lm.learning.LearningOperations` computes the same for a model that learns.

    Shapes: B sequences, T tokens, H heads of D elements.
    """

    def normed(
        self, x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype, readers: int = 1
    ) -> Sequence[torch.Tensor]:
        """RMS norm of x [..., d], for so many readers, which cast it to `dtype` anyway."""
        return [F.rms_norm(x, weight.shape, weight, epsilon)] * readers

    def turned(
        self, heads: torch.Tensor, view: View, interleaved: bool, dtype: torch.dtype, factor: torch.Tensor | None
    ) -> torch.Tensor:
        """RoPE of queries or keys [B, T, H, D], times a factor of each position [T] → [B, H, T, D] in `dtype`."""
        turned = rotate(heads.to(view.cos.dtype), view.cos, view.sin, interleaved)
        if factor is not None:
            turned = turned * factor[:, None, None]
        return turned.to(dtype).transpose(1, 2)

    def attended(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        view: View,
        scale: float,
        cap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `attend`."""
        return attend(q, k, v, view, scale, cap, sinks)

    def gated(self, architecture: Architecture, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """As `activate`."""
        return activate(architecture, gate, up)
