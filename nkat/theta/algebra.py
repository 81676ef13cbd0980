"""Θ: antisymmetric low-rank INT8 tensors and the star product. Pure functions, no I/O.

W ∈ R^{m×n} is a linear layer's weight (m outputs, n inputs), N = max(m, n).

    Θ = P Qᵀ − Q Pᵀ          P, Q ∈ R^{t×r}, t ≤ N; Θ ∈ R^{N×N} is zero outside its leading t×t corner
    θ x = Θ[:m, :n] x        the block that fits the layer
    W ⋆ x = W x + κ(γ) θ x   κ(γ) = ½ γ (1 − γ)

Antisymmetry is exact after quantisation because the factors are quantised and not the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from nkat.errors import NKATError

_INT8_MAX = 127


class ThetaError(NKATError):
    """A Θ that cannot be made: impossible rank, γ out of range, or a weight with NaN or infinity."""


class Term(Protocol):
    """What can stand beside a weight's product, in two thin factors: a Θ, or a plain low-rank term (`LowRank`)."""

    @property
    def rank(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def experts(self) -> int | None: ...

    def is_zero(self) -> bool:
        """True when it has no effect at all."""
        ...

    def check(self, m: int, n: int) -> None:
        """Raises ThetaError where it cannot stand beside a weight [m, n]."""
        ...

    def form(self, m: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """(down [k, n], up [m, k]) of the term up @ down."""
        ...

    @property
    def columns(self) -> int:
        """Half of the products that its INT8 form has, rounded up: the room that kernels need for it."""
        ...

    @property
    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What `int8_form` is made of: of another term with the very same two it is the same."""
        ...

    def int8_form(self, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(down int8 [k, n], up int8 [m, k]) of the term up @ diag(int8_scales) @ down."""
        ...

    def int8_scales(self) -> torch.Tensor:
        """float32 [k]: a factor for each product of `int8_form`."""
        ...


@dataclass(frozen=True, slots=True)
class Theta:
    """One layer's Θ as it is stored: INT8 factors with one float32 scale per column.

    p, q:  int8 [t, r], the factors; rows beyond t are zero
    scale: float32 [2, r], scale[0] belongs to p's columns and scale[1] to q's
    Of a mixture's experts, whose weight is [experts, m, n], each has its own: p and q [experts, t, r], scale
    [experts, 2, r].
    """

    p: torch.Tensor
    q: torch.Tensor
    scale: torch.Tensor

    def __post_init__(self) -> None:
        if self.p.dtype != torch.int8 or self.q.dtype != torch.int8 or self.scale.dtype != torch.float32:
            raise ThetaError("Θ factors must be int8 and their scales float32")
        expected = (*self.p.shape[:-2], 2, *self.p.shape[-1:])
        if self.p.ndim not in (2, 3) or self.p.shape != self.q.shape or self.scale.shape != expected:
            raise ThetaError(
                f"Θ shapes do not fit together: p {tuple(self.p.shape)}, q {tuple(self.q.shape)}, "
                f"scale {tuple(self.scale.shape)}"
            )

    @property
    def size(self) -> int:
        """t: Θ is zero outside its leading t×t corner."""
        return self.p.shape[-2]

    @property
    def rank(self) -> int:
        """r, the number of columns of P and of Q; the matrix rank of Θ is at most 2r."""
        return self.p.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors: 2·t·r of INT8 and 8·r of scales."""
        return self.p.nbytes + self.q.nbytes + self.scale.nbytes

    def is_zero(self) -> bool:
        """True when Θ has no effect at all: every column of P or of Q is zero."""
        p_zero = (self.p == 0).all(dim=-2) | (self.scale[..., 0, :] == 0)
        q_zero = (self.q == 0).all(dim=-2) | (self.scale[..., 1, :] == 0)
        return bool((p_zero | q_zero).all())

    @property
    def experts(self) -> int | None:
        """How many experts have a Θ here; None: it is that of a single weight."""
        return None if self.p.ndim == 2 else self.p.shape[0]

    def expert(self, index: int) -> Theta:
        """One expert's."""
        return Theta(self.p[index], self.q[index], self.scale[index])

    def check(self, m: int, n: int) -> None:
        """Raises ThetaError where it cannot stand beside a weight [m, n]."""
        if self.size > max(m, n):
            raise ThetaError(f"Θ of size {self.size} does not fit a {m}x{n} weight")

    def form(self, m: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """`low_rank_form` of the dequantised factors, in `dtype`; rounded once."""
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        down, up = low_rank_form(*self.factors(precise), m, n)
        return down.to(dtype), up.to(dtype)

    @property
    def columns(self) -> int:
        return self.rank

    @property
    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.p, self.q

    def int8_form(self, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`low_rank_form` of the factors as they are stored."""
        return low_rank_form(self.p, self.q, m, n)

    def int8_scales(self) -> torch.Tensor:
        """All scales in one factor for each product."""
        return (self.scale[0] * self.scale[1]).repeat(2)

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantised P and Q, each as they are stored."""
        p_scale, q_scale = self.scale.to(dtype).unsqueeze(-2).unbind(dim=-3)
        return self.p.to(dtype) * p_scale, self.q.to(dtype) * q_scale


def of_experts(thetas: Sequence[Theta]) -> Theta:
    """The Θ of all experts of one name, from each one's."""
    p, q, scale = (torch.stack([getattr(theta, name) for theta in thetas]) for name in ("p", "q", "scale"))
    return Theta(p, q, scale)


def coupling(gamma: float) -> float:
    """κ(γ) = ½ γ (1 − γ): the factor before θ x. γ = 1 gives exactly 0, lower γ a stronger effect."""
    if not 0.0 < gamma <= 1.0:
        raise ThetaError(f"gamma must lie in 0 < gamma <= 1, got {gamma}")
    return 0.5 * gamma * (1.0 - gamma)


def quantise_factors(p: torch.Tensor, q: torch.Tensor) -> Theta:
    """Rounds float factors [t, r] to INT8, symmetric, one scale per column (absmax / 127)."""
    if not bool(torch.isfinite(p).all() and torch.isfinite(q).all()):
        raise ThetaError("the Θ factors hold NaN or infinity")
    (p8, p_scale), (q8, q_scale) = quantise_columns(p), quantise_columns(q)
    return Theta(p8, q8, torch.stack([p_scale, q_scale]))


def low_rank_form(p: torch.Tensor, q: torch.Tensor, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(down [2r, n], up [m, 2r]) with Θ[:m, :n] = up @ down: down = [Qᵀ; Pᵀ], up = [P, −Q], zero-padded from t.

    p, q: of one weight, [t, r]
    """
    down = torch.cat([pad_rows(q[:n], n), pad_rows(p[:n], n)], dim=1).T.contiguous()
    up = torch.cat([pad_rows(p[:m], m), -pad_rows(q[:m], m)], dim=1)
    return down, up


def quantise_columns(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [t, r] and float32 [r]: a column's largest magnitude becomes 127."""
    scale = factor.abs().amax(dim=0).float() / _INT8_MAX
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))  # a zero column stays zero
    rounded = torch.round(factor / divisor).clamp_(-_INT8_MAX, _INT8_MAX)
    return rounded.to(torch.int8), scale


def pad_rows(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    missing = rows - matrix.shape[0]
    if missing <= 0:
        return matrix
    return torch.cat([matrix, matrix.new_zeros(missing, matrix.shape[1])])
