"""Gauge terms of attention: a learned antisymmetric θ in each head, and the star product of query and key.

    q ⋆ k = qᵀk + ½ s qᵀθk        θ = P Qᵀ − Q Pᵀ,  P, Q ∈ R^{d×r},  d = size of a head
    q ⋆ k − k ⋆ q = s qᵀθk        because θᵀ = −θ: the non-commutative part
    s = strength · decay^layer · gain        the gain is learned and starts at 1

    rotation: q is turned by exp(s θᵀ) instead, which keeps its length and is q + s θᵀq to first order

The term is bilinear, so it moves into the query: q ⋆ k = (q + ½ s θᵀq)ᵀk. A linear layer makes q, so it moves on into
that layer's weight (`fold`), and attention itself, fused or not, is the same with the term and without. Strength 0 is
no term at all: nothing is added, and the results are bit-identical to plain attention.

In bfloat16 the folded weight is rounded to 8 bits of mantissa, as every weight is: a term much smaller than 1/256 of
the query is then partly lost. Fold in float32, round after.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def antisymmetric(p: Tensor, q: Tensor) -> Tensor:
    """θ = P Qᵀ − Q Pᵀ [..., d, d] of factors [..., d, r]: exactly antisymmetric in floating point."""
    product = p @ q.mT
    return product - product.mT


def star(q: Tensor, k: Tensor, theta: Tensor, strength: Tensor | float) -> Tensor:
    """The scores q ⋆ k [..., n, m] of queries [..., n, d] and keys [..., m, d], written out: the reference."""
    return q @ k.mT + 0.5 * strength * (q @ theta @ k.mT)


def fold(weight: Tensor, theta: Tensor, strength: Tensor | float) -> Tensor:
    """(I + ½ s θᵀ) W: the weight [h, d, n] that makes q + ½ s θᵀq instead of q. A bias is a weight with n = 1."""
    return weight + 0.5 * strength * (theta.mT @ weight)


def turn(weight: Tensor, theta: Tensor, strength: Tensor | float) -> Tensor:
    """exp(s θᵀ) W: the weight [h, d, n] that makes queries turned by a rotation, for θᵀ is antisymmetric."""
    return torch.linalg.matrix_exp(strength * theta.mT) @ weight


FORMS = {"star": fold, "rotation": turn}


class Gauge(nn.Module):
    """One layer's gauge term.

    heads, head_dim, rank: shapes of P and Q, [heads, head_dim, rank]
    strength: strength · decay^layer, positive
    layer: seeds the start, from a generator of its own: with and without the term all other weights start equal
    form: one of `FORMS`
    """

    def __init__(self, heads: int, head_dim: int, rank: int, strength: float, layer: int, form: str = "star") -> None:
        super().__init__()
        self.act = FORMS[form]
        generator = torch.Generator().manual_seed(layer)
        shape = (heads, head_dim, rank)
        # Columns of about unit length: θ starts with a spectral norm near 1, so that the strength is the strength.
        self.p = nn.Parameter(torch.randn(shape, generator=generator) * head_dim**-0.5)
        self.q = nn.Parameter(torch.randn(shape, generator=generator) * head_dim**-0.5)
        self.gain = nn.Parameter(torch.ones(()))
        self.base_strength = strength

    def theta(self) -> Tensor:
        """θ [heads, d, d]."""
        return antisymmetric(self.p, self.q)

    def strength(self) -> Tensor:
        """s, with the learned gain: a scalar."""
        return self.base_strength * self.gain

    def forward(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The query layer's weight [h·d, n] and bias [h·d] with the term folded in, in their own dtype."""
        heads, size = self.p.shape[:2]
        with torch.autocast(weight.device.type, enabled=False):  # it would make this in bfloat16 and lose the term
            theta, strength = self.theta(), self.strength()
            folded = self.act(weight.view(heads, size, -1), theta, strength).flatten(0, 1)
            return folded, self.act(bias.view(heads, size, 1), theta, strength).flatten()

    def change(self, q: Tensor, k: Tensor) -> Tensor:
        """What the term adds to the scores of queries [b, h, n, d] without it and keys [b, h, m, d]: [b, h, n, m]."""
        queries = q.mT  # [b, h, d, n]: as a weight is, which has them in its rows
        return (self.act(queries, self.theta(), self.strength()) - queries).mT @ k.mT
