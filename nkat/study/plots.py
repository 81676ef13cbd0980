"""Panels that any search can draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nkat.host.figures import TRIAL
from nkat.study.study import FEWEST_FOR_IMPORTANCES


def draw_importances(axes: Any, importances: Mapping[str, float]) -> None:
    """One panel: `nkat.study.study.importances` as bars."""
    axes.set(title="which parameter decides (PED-ANOVA)", xlabel="importance")
    if not importances:
        text = f"fewer than {FEWEST_FOR_IMPORTANCES} finished trials, or all score alike"
        axes.set(xlabel="", xticks=[], yticks=[])
        axes.text(0.5, 0.5, text, ha="center", transform=axes.transAxes)
        return
    names = sorted(importances, key=lambda name: importances[name])
    axes.barh(names, [importances[name] for name in names], color=TRIAL)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is at least as small as in both coordinates, from the left."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
