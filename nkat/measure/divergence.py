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

from nkat.host.console import format_table
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


def divergence_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """What `Divergence.record` gave, for people: a column for each model by its name."""
    found = list(records.values())

    def line(label: str, form: str, *path: str, error: Sequence[str] = ()) -> list[str]:
        cells = []
        for record in found:
            cell = format(_at(record, path), form)
            cells.append(f"{cell} ± {format(_at(record, error), form.lstrip('+'))}" if error else cell)
        return [label, *cells]

    rows = [line("KL divergence", ".6f", "kl", "mean", error=("kl", "stderr"))]
    for name in ("50", "90", "95", "99"):
        label = "median" if name == "50" else f"{name} %"
        rows.append(line(f"  {label}", ".6f", "kl", "quantiles", name))
    rows.append(line("  maximum", ".6f", "kl", "max"))
    rows.append(line("same top token, %", ".3f", "same_top_percent", error=("same_top_percent_stderr",)))
    rows.append(line("Δp, %", "+.3f", "delta_p_percent", "mean", error=("delta_p_percent", "stderr")))
    rows.append(line("  RMS", ".3f", "delta_p_percent", "rms", error=("delta_p_percent", "rms_stderr")))
    for name in ("1", "5", "50", "95", "99"):
        label = "median" if name == "50" else f"{name} %"
        rows.append(line(f"  {label}", "+.3f", "delta_p_percent", "quantiles", name))
    return format_table(rows, ["", *records])


def divergence_cells(record: Mapping[str, Any] | None) -> list[str]:
    """The two figures that stand for all: the mean KL divergence ± and the same top token, per cent."""
    if record is None:
        return ["", ""]
    kl = record["kl"]
    same = f"{record['same_top_percent']:.2f} ± {record['same_top_percent_stderr']:.2f}"
    return [f"{kl['mean']:.5f} ± {kl['stderr']:.5f}", same]


def _at(record: Mapping[str, Any], path: Sequence[str]) -> float:
    value: Any = record
    for key in path:
        value = value[key]
    return float(value)
