"""How far one model's predictions are from another's, as llama-perplexity's `--kl-divergence` has it. Pure statistics.

For each scored token, of the base's probabilities p over the vocabulary and the model's q:

    KL divergence   Σ p ln(p / q) in nats: 0 where they agree, and what the tail costs is weighed by the base
    Δp              q − p of the token that the text has there: positive where the model predicts it better
    same top        whether both find the same token likeliest

    mean ±          sqrt(variance / (n − 1));  RMS ± = the mean square's ± over twice the RMS
    quantiles       between the two nearest of the sorted values, linearly
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nkat.host.tables import Column, Table
from nkat.measure.perplexity import standard_error

KL_QUANTILES = (0.1, 1.0, 5.0, 10.0, 50.0, 90.0, 95.0, 99.0, 99.9)  # per cent
CHANGE_QUANTILES = (0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True, slots=True, eq=False)
class Divergence:
    """A model beside a base on the same n tokens.

    kl: nats, float64 [n];  change: Δp, float64 [n];  same_top: bool [n]
    """

    kl: torch.Tensor
    change: torch.Tensor
    same_top: torch.Tensor

    @classmethod
    def of(cls, base_nll: torch.Tensor, nll: torch.Tensor, kl: torch.Tensor, same_top: torch.Tensor) -> Divergence:
        """base_nll, nll: −ln p of the text's tokens by either, any shape."""
        change = (-nll.double()).exp() - (-base_nll.double()).exp()
        return cls(kl.double().flatten(), change.flatten(), same_top.flatten())

    @property
    def mean(self) -> float:
        return float(self.kl.mean())

    @property
    def stderr(self) -> float:
        return standard_error(self.kl)

    @property
    def agreement(self) -> float:
        """Share of the tokens for which both find the same one likeliest."""
        return float(self.same_top.double().mean())

    @property
    def agreement_stderr(self) -> float:
        return standard_error(self.same_top.double())

    @property
    def rms_change(self) -> float:
        return math.sqrt(float(self.change.square().mean()))

    @property
    def rms_change_stderr(self) -> float:
        rms = self.rms_change
        return standard_error(self.change.square()) / (2.0 * rms) if rms else 0.0

    def record(self) -> dict[str, Any]:
        """JSON values. Keys of quantiles are per cent, as are Δp and the agreement: so llama-perplexity prints them."""
        change = 100.0 * self.change
        return {
            "tokens": self.kl.numel(),
            "kl": {
                "mean": self.mean,
                "stderr": self.stderr,
                "quantiles": _quantiles(self.kl, KL_QUANTILES),
                "min": float(self.kl.min()),
                "max": float(self.kl.max()),
            },
            "same_top_percent": 100.0 * self.agreement,
            "same_top_percent_stderr": 100.0 * self.agreement_stderr,
            "delta_p_percent": {
                "mean": float(change.mean()),
                "stderr": standard_error(change),
                "rms": 100.0 * self.rms_change,
                "rms_stderr": 100.0 * self.rms_change_stderr,
                "quantiles": _quantiles(change, CHANGE_QUANTILES),
                "min": float(change.min()),
                "max": float(change.max()),
            },
        }


def _quantiles(values: torch.Tensor, percents: Sequence[float]) -> dict[str, float]:
    ordered = values.sort().values
    return {f"{percent:g}": quantile(ordered, percent / 100.0) for percent in percents}


def quantile(ordered: torch.Tensor, share: float) -> float:
    """Of ascending values [n], between two of them linearly."""
    place = share * (ordered.numel() - 1)
    low = min(int(place), ordered.numel() - 1)
    high = min(low + 1, ordered.numel() - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))


def divergence_row(record: Mapping[str, Any]) -> dict[str, float]:
    """What `Divergence.record` gave, as one row of a table: quantiles are `kl_p99` and `delta_p_p99`."""
    kl, change = record["kl"], record["delta_p_percent"]
    row = {f"kl_{name}": kl[name] for name in ("mean", "stderr", "min", "max")}
    row |= {f"kl_p{name}": value for name, value in kl["quantiles"].items()}
    row |= {name: record[name] for name in ("same_top_percent", "same_top_percent_stderr")}
    row |= {f"delta_p_{name}": change[name] for name in ("mean", "stderr", "rms", "rms_stderr", "min", "max")}
    return row | {f"delta_p_p{name}": value for name, value in change["quantiles"].items()}


def divergence_columns() -> list[Column]:
    """Of a table whose rows have what `divergence_row` gives."""

    def percentile(name: str) -> str:
        return "  median" if name == "50" else f"  {name} %"

    return [
        Column("KL divergence", ("kl_mean", "kl_stderr"), "{:.6f} ± {:.6f}".format),
        *(Column(percentile(name), f"kl_p{name}", ".6f") for name in ("50", "90", "95", "99")),
        Column("  maximum", "kl_max", ".6f"),
        Column("same top token, %", ("same_top_percent", "same_top_percent_stderr"), "{:.3f} ± {:.3f}".format),
        Column("Δp, %", ("delta_p_mean", "delta_p_stderr"), "{:+.3f} ± {:.3f}".format),
        Column("  RMS", ("delta_p_rms", "delta_p_rms_stderr"), "{:.3f} ± {:.3f}".format),
        *(Column(percentile(name), f"delta_p_p{name}", "+.3f") for name in ("1", "5", "50", "95", "99")),
    ]


def divergence_table(records: Mapping[str, Mapping[str, Any]], caption: str = "") -> Table:
    """What `Divergence.record` gave: a row, and for people a column, for each model by its name."""
    columns = [Column("", "arm"), *divergence_columns()]
    rows = [{"arm": arm, **divergence_row(record)} for arm, record in records.items()]
    return Table("divergence", columns, rows, caption, sideways=True)
