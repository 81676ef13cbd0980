"""The image search's picture: a legend names what is there, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nkat_vit import search_plots
from nkat_vit.search import BASELINE, FIRST_SET


def row(number: int, state: str, passed: bool = False) -> dict[str, Any]:
    return {
        "number": number,
        "state": state,
        "feasible": passed,
        "value": 0.4 + number / 10 if passed else None,
        "local_tpe": 0.2 + number / 50,
        "lambda_theory": 20.0 + number,
        "accuracies": {FIRST_SET: 0.3 + number / 100},
        "setting": dict(BASELINE),
    }


def legends(monkeypatch: pytest.MonkeyPatch, path: Path, rows: list[dict[str, Any]]) -> list[set[str]]:
    """What the legends of the first and the last panel say. Every named line must have points."""
    figures = []
    save = search_plots.save_figure
    monkeypatch.setattr(
        search_plots,
        "save_figure",
        lambda figure, *more, **options: figures.append(figure) or save(figure, *more, **options),
    )
    search_plots.plot_image_search(path, rows, {}, 0.25, 0.5, "t")
    named = []
    for axes in (figures[0].axes[0], figures[0].axes[3]):
        lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
        assert all(len(line.get_xdata()) for line in lines)
        named.append({line.get_label() for line in lines})
    return named


def test_a_legend_has_no_name_without_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = f"gate: Local TPE 0.25 on {FIRST_SET}"
    scores, accuracy = legends(monkeypatch, tmp_path / "a.png", [row(0, "PRUNED"), row(1, "PRUNED")])
    assert scores == {gate, "Local TPE, ended at a rung"}
    assert accuracy == {"ended at a rung", "asked for: 50 %"}
    every = [row(0, "COMPLETE", passed=True), row(1, "PRUNED"), row(2, "COMPLETE")]
    scores, accuracy = legends(monkeypatch, tmp_path / "b.png", every)
    assert scores == {gate, "Local TPE, ended at a rung", "Local TPE at the end", "Global TPE"}
    assert accuracy == {"ended at a rung", "trained to the end", "front", "asked for: 50 %"}
    assert legends(monkeypatch, tmp_path / "c.png", []) == [{gate}, {"asked for: 50 %"}]
