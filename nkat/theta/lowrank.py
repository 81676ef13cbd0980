"""A plain low-rank term beside a weight, W x + U D x: what a LoRA adapter is, and what Θ in general is not.

Θ's leading corner is antisymmetric and U D's in general is not, so that a LoRA runs as what it is; the Θ that comes
nearest to it is made by `nkat.sources.lora`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nkat.theta.algebra import ThetaError, quantise_columns


@dataclass(frozen=True, slots=True)
class LowRank:
    """U D beside one weight [m, n]: float32 up = U [m, k], down = D [k, n], k from 1 on."""

    up: torch.Tensor
    down: torch.Tensor

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != len(self.down) or not len(self.down):
            raise ThetaError(
                f"the factors of a low-rank term do not fit together: up {tuple(self.up.shape)}, down "
                f"{tuple(self.down.shape)}"
            )
        if not bool(torch.isfinite(self.up).all() and torch.isfinite(self.down).all()):
            raise ThetaError("the factors of a low-rank term hold NaN or infinity")

    @property
    def rank(self) -> int:
        """k"""
        return len(self.down)

    @property
    def nbytes(self) -> int:
        """Of the factors as adapters store them, in 16 bits."""
        return 2 * (self.up.numel() + self.down.numel())

    @property
    def experts(self) -> None:
        """It is that of a single weight."""
        return None

    def is_zero(self) -> bool:
        """True when it has no effect at all, as a LoRA that was not trained yet."""
        return not bool((self.up.any(dim=0) & self.down.any(dim=1)).any())

    def check(self, m: int, n: int) -> None:
        """Raises ThetaError where it cannot stand beside a weight [m, n]."""
        found = len(self.up), self.down.shape[1]
        if found != (m, n):
            raise ThetaError(f"a low-rank term of shape {found[0]}x{found[1]} does not fit a {m}x{n} weight")

    def form(self, m: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """(down [k, n], up [m, k])"""
        return self.down.to(dtype), self.up.to(dtype)

    @property
    def columns(self) -> int:
        return -(-3 * self.rank // 2)

    @property
    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.up, self.down

    def int8_form(self, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(down int8 [3k, n], up int8 [m, 3k])

        A factor is the sum of two of INT8, the second of what the first leaves; of the four products of a pair the
        smallest is left out. What is lost is about 1e-4 of the term, less than F16 loses.
        """
        (up, _), (up_rest, _) = _two_parts(self.up)
        (down, _), (down_rest, _) = _two_parts(self.down.T)
        return torch.cat([down, down_rest, down], dim=1).T.contiguous(), torch.cat([up, up, up_rest], dim=1)

    def int8_scales(self) -> torch.Tensor:
        """float32 [3k]"""
        (_, up), (_, up_rest) = _two_parts(self.up)
        (_, down), (_, down_rest) = _two_parts(self.down.T)
        return torch.cat([up * down, up * down_rest, up_rest * down])

    def product(self) -> torch.Tensor:
        """U D, float32 [m, n]."""
        return self.up @ self.down


def sum_of(terms: Sequence[LowRank]) -> LowRank:
    """The terms of one weight added up: their factors beside one another."""
    return LowRank(torch.cat([term.up for term in terms], dim=1), torch.cat([term.down for term in terms]))


def _two_parts(factor: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[rows, k] as two int8 factors with a scale for each column."""
    first, scale = quantise_columns(factor)
    return [(first, scale), quantise_columns(factor - first * scale)]
