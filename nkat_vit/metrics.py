"""The scores of an image model: TPE, Global TPE, Consistency, Robustness, corruption error, flip rate. Pure functions.

    TPE = accuracy / log10(1 + λ)          λ = 20 · parameters / parameters of STAGE2's baseline
    Global TPE = mean accuracy over the sets / log10(1 + λ)
    Consistency = 1 − std(TPE of the sets) / mean(TPE of the sets)          (std of the population: the sets are all)
    Robustness = mean over corruptions and severities of accuracy when corrupted / accuracy when clean, at most 1 each

Accuracies and errors are shares from 0 to 1. TPE rises without bound as λ falls, whatever a model does: one of 42,449
parameters has 2.5 at chance. So a target counts as met only with the accuracy that STAGE2 asks for of the same set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev, stdev
from typing import Any

import numpy as np

from nkat.errors import NKATError
from nkat.host.console import bar
from nkat_vit.corruptions import CORRUPTIONS, SEVERITIES, Frost, corrupt
from nkat_vit.model import ViTConfig, count_parameters

LAMBDA_OF_BASELINE = 20.0


@dataclass(frozen=True, slots=True)
class Target:
    """What STAGE2 asks for of a set."""

    accuracy: float
    tpe: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, standard deviation of the sample (None for one value), and number."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))

    def text(self, factor: float = 1.0, digits: int = 4) -> str:
        """`0.7012 ± 0.0031 (n = 3)`"""
        spread = f" ± {factor * self.sd:.{digits}f}" if self.sd is not None else ""
        return f"{factor * self.mean:.{digits}f}{spread} (n = {self.n})"

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"mean": self.mean, "sd": self.sd, "n": self.n}


TARGETS = {
    "mnist": Target(0.91, 0.69),
    "fashion": Target(0.87, 0.67),
    "emnist": Target(0.75, 0.60),
    "cifar10": Target(0.60, 0.45),
}
GLOBAL_TARGETS = {"Global TPE": 0.70, "Consistency": 0.80, "Robustness": 0.75}

Predict = Callable[[np.ndarray], np.ndarray]  # pictures uint8 [n, c, h, w] → classes [n]


def lambda_theory(parameters: int) -> float:
    """λ of a model with so many parameters; 20 for the baseline of STAGE2."""
    return LAMBDA_OF_BASELINE * parameters / count_parameters(ViTConfig())


def tpe(accuracy: float, lam: float) -> float:
    """Local TPE of one set."""
    if lam <= 0:
        raise NKATError(f"lambda must be positive, got {lam}")
    return accuracy / math.log10(1 + lam)


def accuracy_needed(score: float, lam: float) -> float:
    """What a TPE takes, or the mean accuracy that a Global TPE takes; above 1 no accuracy gives it."""
    return score * math.log10(1 + lam)


def bought_by_size(accuracy: float, score: float, target: Target) -> bool:
    """Whether a set's TPE target is reached although its accuracy target is not."""
    return accuracy < target.accuracy and score >= target.tpe


def global_tpe(accuracies: Sequence[float], lam: float) -> float:
    """TPE of the mean accuracy."""
    return tpe(fmean(accuracies), lam)


def consistency(tpes: Sequence[float]) -> float:
    """1 when all sets score alike."""
    mean = fmean(tpes)
    return 1 - pstdev(tpes) / mean if mean > 0 else 0.0


@dataclass(frozen=True, slots=True)
class RobustnessResult:
    """What corruption does to a model.

    accuracies: by corruption, one for each severity
    flips: share of predictions that corruption changes, by corruption, over all severities
    """

    clean: float
    accuracies: Mapping[str, tuple[float, ...]]
    flips: Mapping[str, float]
    images: int
    frost: str

    @property
    def robustness(self) -> float:
        """Mean relative accuracy, 0 to 1."""
        if self.clean == 0:
            return 0.0
        return fmean(min(a / self.clean, 1.0) for row in self.accuracies.values() for a in row)

    @property
    def mean_corruption_error(self) -> float:
        """Mean error over corruptions and severities, not divided by another model's (there is no agreed one here)."""
        return 1 - fmean(a for row in self.accuracies.values() for a in row)

    @property
    def flip_rate(self) -> float:
        """Share of predictions that corruption changes."""
        return fmean(self.flips.values())

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "robustness": self.robustness,
            "mean_corruption_error": self.mean_corruption_error,
            "flip_rate": self.flip_rate,
            "clean_accuracy": self.clean,
            "images": self.images,
            "frost": self.frost,
            "accuracy": {name: list(row) for name, row in self.accuracies.items()},
            "flips": dict(self.flips),
        }


def measure_robustness(
    predict: Predict, images: np.ndarray, labels: np.ndarray, seed: int, frost: Frost
) -> RobustnessResult:
    """Accuracy under every corruption and severity, for uint8 pictures [n, 3, 32, 32] and labels [n]."""
    before = predict(images)
    upright = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    accuracies, flips = {}, {}
    with bar(len(CORRUPTIONS) * len(SEVERITIES), "corruptions", "setting") as progress:
        for name in CORRUPTIONS:
            row, changed = [], []
            for severity in SEVERITIES:
                damaged = corrupt(upright, name, severity, seed, frost)
                after = predict(np.ascontiguousarray(damaged.transpose(0, 3, 1, 2)))
                row.append(float((after == labels).mean()))
                changed.append(float((after != before).mean()))
                progress.update()
            accuracies[name], flips[name] = tuple(row), fmean(changed)
    return RobustnessResult(float((before == labels).mean()), accuracies, flips, len(images), frost.source)
