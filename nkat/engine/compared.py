"""What two predictions of the same tokens come to."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """A base and a model on the scored tokens of chunks.

    base_nll, nll: −ln p of the text's token by either;  kl: Σ p ln(p / q), nats: each float64 [B, scored]
    same_top: whether both find the same token likeliest, bool [B, scored]
    """

    base_nll: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    same_top: torch.Tensor

    @classmethod
    def joined(cls, parts: list[Compared]) -> Compared:
        """Of chunks that follow one another."""
        columns = zip(*((p.base_nll, p.nll, p.kl, p.same_top) for p in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))
