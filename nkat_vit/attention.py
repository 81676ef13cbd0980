"""Attention of the image model: gauge terms, colour-bound heads, temperature, and filtering of keys.

Three ways to the same numbers (to 1e-5 in float32): torch's fused attention; the scores written out, where keys are
filtered or the weights are asked for; and the latter too on a processor with few keys, where it is faster than the
fused kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nkat_vit.dropout import dropout
from nkat_vit.filtering import acts, filter_scores_
from nkat_vit.gauge import Gauge

# On a processor fused attention is faster from about so many keys (8 heads of 48, one core, torch 2.13: even at 65,
# a third faster at 145), but its backward in bfloat16 is slower at all sizes tried (8x at 17 keys, 2x at 577).
_FUSED_FROM_KEYS = 128
COLOR_GROUPS = 4  # red, green, blue, shared


class Attention(nn.Module):
    """Multi-head self-attention of tokens [b, n, dim].

    gauge: the layer's gauge term, or None
    color_dim: width of the colours' local features (split heads), or 0: the heads in four equal groups see, in their
        keys and values, the features of red, green, blue, and the mean of the three
    """

    sees: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        dropout: float,
        gauge: Gauge | None,
        color_dim: int,
    ) -> None:
        super().__init__()
        self.heads, self.top_k, self.top_p, self.dropout = heads, top_k, top_p, dropout
        self.scale = (dim // heads) ** -0.5 / temperature
        # Keys and values apart from queries, whose weight is folded anew in each step: no copy of the others then.
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.gauge = gauge
        if color_dim:
            # Zero at first: the heads learn to use colour, and start as those of a plain model.
            self.color = nn.Parameter(torch.zeros(COLOR_GROUPS, color_dim, 2 * dim // COLOR_GROUPS))
            # Which colour each group sees: its own, and the shared one their mean.
            sees = torch.cat([torch.eye(3), torch.full((3, 1), 1 / 3)], dim=1)
            self.register_buffer("sees", sees.view(3, 1, 1, COLOR_GROUPS, 1), persistent=False)

    def forward(self, x: Tensor, color: Tensor | None, with_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Returns the tokens [b, n, dim] and, on request, the weights [b, heads, n, n] before dropout.

        color: [b·n, 3 · color_dim] of split heads, red then green then blue; None without them
        """
        b, n, dim = x.shape
        q, k, v = self.project(x, color)
        filtered = acts(self.top_k, self.top_p, n)
        if not (filtered or with_weights) and _fused_is_faster(q):
            chance = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=chance, scale=1.0)
            return self.out(mixed.transpose(1, 2).reshape(b, n, dim)), None
        scores = q @ k.mT
        if filtered:
            scores = filter_scores_(scores, self.top_k, self.top_p)
        weights = scores.softmax(dim=-1)
        mixed = dropout(weights, self.dropout, self.training) @ v
        return self.out(mixed.transpose(1, 2).reshape(b, n, dim)), weights if with_weights else None

    def project(self, x: Tensor, color: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries with the gauge term and 1/(√d · temperature) in them, keys and values, each [b, heads, n, d]."""
        b, n, _ = x.shape
        if torch.is_autocast_enabled(x.device.type):  # once, not by each of the two layers
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight, bias = self.q.weight, self.q.bias
        if self.gauge is not None:
            weight, bias = self.gauge(weight, bias)
        # Scaling the weight is a small fraction of the work of scaling the queries or the scores.
        q = F.linear(x, weight * self.scale, bias * self.scale)
        kv = self.kv(x)
        if color is not None:  # in place: nobody needs what the layer gave
            kv = kv.flatten(0, 1).addmm_(color.to(kv.dtype), self.color_weight().to(kv.dtype)).view(b, n, -1)
        # Products of batches want each head's rows side by side: one copy for keys and values together.
        q = q.view(b, n, self.heads, -1).transpose(1, 2).contiguous()
        k, v = kv.view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        return q, k, v

    def color_weight(self) -> Tensor:
        """What the colours' features add to keys and values: [3 · color_dim, 2 · dim].

        Half of it is zeros, but one product that adds to what is there costs less than four and a shuffle.
        """
        _, width, columns = self.color.shape
        parts = self.color.view(COLOR_GROUPS, width, 2, columns // 2).permute(1, 2, 0, 3)  # [width, k or v, group, …]
        return (self.sees * parts).flatten(0, 1).flatten(1)


def _fused_is_faster(q: Tensor) -> bool:
    """Whether to use torch's fused attention for queries [b, heads, n, d]."""
    if q.device.type != "cpu":
        return True
    return q.shape[2] >= _FUSED_FROM_KEYS and not (q.requires_grad and q.dtype == torch.bfloat16)
