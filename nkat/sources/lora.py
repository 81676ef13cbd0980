"""The Θ that comes nearest to a LoRA: where a fit can begin, and how far from the LoRA that is.

A LoRA adds any matrix of its rank, Θ one whose leading corner is antisymmetric: what is symmetric there cannot be said
by Θ. Nearest is meant in the Frobenius norm, and found as for source residual with inputs of which nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nkat.host.tables import Column, Table
from nkat.sources.residual import factors_from_residual
from nkat.theta.algebra import low_rank_form
from nkat.theta.lowrank import LowRank

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Missed:
    """Of one layer the squared norm of the LoRA's matrix, and of what the nearest Θ leaves of it."""

    norm: float
    left: float

    @property
    def share(self) -> float:
        """‖Δ − Θ‖ / ‖Δ‖"""
        return (self.left / self.norm) ** 0.5 if self.norm > 0.0 else 0.0


def nearest_theta(term: LowRank, rank: int, seed: int = 0) -> tuple[Factors, Missed]:
    """Float32 P, Q [max(m, n), rank] whose Θ comes nearest to the term, and what that leaves of it."""
    wanted = term.product()
    p, q = factors_from_residual(wanted, rank, 1.0, seed=seed)
    down, up = low_rank_form(p, q, *wanted.shape)
    left = wanted - up @ down
    return (p, q), Missed(*(float(matrix.square().sum(dtype=torch.float64)) for matrix in (wanted, left)))


def lora_starts(
    terms: Mapping[str, LowRank],
    names: Sequence[str],
    zero: Sequence[Factors],
    rank: int,
    seed: int,
    on_layer: Callable[[], object],
) -> tuple[list[Factors], dict[str, Missed]]:
    """Factors to begin at for each name, and by name what they miss of each of the LoRA's layers.

    zero: where a layer begins that the LoRA leaves alone. A layer of the LoRA's that gets no Θ is missed as a whole.
    """
    starts, missed = [], {}
    for name, nothing in zip(names, zero, strict=True):
        if name in terms:
            start, missed[name] = nearest_theta(terms[name], rank, seed)
            starts.append(start)
        else:
            starts.append(nothing)
        on_layer()
    for name in terms.keys() - {*names}:
        norm = float(terms[name].product().square().sum(dtype=torch.float64))
        missed[name] = Missed(norm, norm)
    return starts, missed


def missed_record(missed: Mapping[str, Missed]) -> dict[str, Any]:
    """What of the LoRA the start is not: relative errors in the Frobenius norm, of each layer, each kind, and all."""
    kinds: dict[str, list[Missed]] = {}
    for name, one in missed.items():
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(one)
    return {
        "layers": {name: one.share for name, one in missed.items()},
        "kinds": {kind: _total(found) for kind, found in kinds.items()},
        "all": _total(list(missed.values())),
    }


def missed_table(record: Mapping[str, Any]) -> Table:
    """The record by kind of layer."""
    count = {kind: sum(f".{kind}." in name for name in record["layers"]) for kind in record["kinds"]}
    rows = [{"layer": kind, "count": count[kind], "error": share} for kind, share in record["kinds"].items()]
    rows.append({"layer": "all", "count": len(record["layers"]), "error": record["all"]})
    columns = [Column("layer", "layer"), Column("count", "count"), Column("relative error", "error", ".4f")]
    caption = "\nof the LoRA that the fit began with, the nearest Θ misses (1: nothing of it was kept):"
    return Table("start", columns, rows, caption)


def _total(missed: Sequence[Missed]) -> float:
    return Missed(sum(one.norm for one in missed), sum(one.left for one in missed)).share
