"""The classes of a set, each by itself, over the runs that were judged on it: accuracy, and what it is taken for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nkat.host.tables import Column, Table
from nkat_vit.judging import Judgement, class_accuracies, most_taken_for
from nkat_vit.metrics import Spread


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """A set's figures by class.

    confusion: counts [classes, classes] of all runs together, a row for each true class
    accuracies: over the runs; None for a class without pictures
    """

    dataset: str
    names: Sequence[str]
    confusion: Tensor
    accuracies: list[Spread | None]
    runs: int

    @classmethod
    def of(cls, dataset: str, names: Sequence[str], judged: Sequence[Judgement]) -> ClassFigures:
        """Of at least one run."""
        by_run = [class_accuracies(one.confusion) for one in judged]
        spreads = []
        for values in zip(*by_run, strict=True):
            there = [value for value in values if value is not None]
            spreads.append(Spread.of(there) if there else None)
        whole = torch.stack([one.confusion for one in judged]).sum(dim=0)
        return cls(dataset, names, whole, spreads, len(judged))

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "names": list(self.names),
            "accuracy": [spread and spread.record() for spread in self.accuracies],
            "confusion": self.confusion.tolist(),
            "runs": self.runs,
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row for each class that has pictures. images: of one run"""
        rows = []
        for label, (name, spread) in enumerate(zip(self.names, self.accuracies, strict=True)):
            if spread is None:
                continue
            taken = most_taken_for(self.confusion, label)
            row = {"dataset": self.dataset, "class": name, "images": int(self.confusion[label].sum()) // self.runs}
            mistake = {"taken_for": self.names[taken[0]], "taken_share": taken[1]} if taken else {}
            rows.append(row | spread.record() | mistake)
        return rows


def class_table(figures: ClassFigures, caption: str) -> Table:
    """A line a class."""
    columns = [
        Column("class", ("class", "dataset"), lambda name, _: name),
        Column("pictures", "images", ",d"),
        Column("accuracy", ("mean", "sd", "n"), lambda *spread: Spread(*spread).text()),
        Column("most taken for", ("taken_for", "taken_share"), lambda name, share: f"{name} {100 * share:.1f} %"),
    ]
    return Table("classes", columns, figures.rows(), caption)
