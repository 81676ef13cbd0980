"""The picture of an image search: scores with the gate, parallel coordinates, importances, accuracy against λ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nkat.host.figures import BASE, BEST, PRUNED, TRIAL, new_figure, save_figure, whole_ticks
from nkat.study.plots import draw_importances, pareto_front
from nkat_vit.search import BASELINE, FIRST_SET

Rows = Sequence[Mapping[str, Any]]


def plot_image_search(
    path: Path, rows: Rows, importances: Mapping[str, float], gate: float, accuracy: float, title: str
) -> None:
    """Four panels as PNG; replaces an earlier picture.

    rows: `nkat.study.study.history` of the search, each with its "local_tpe"
    """
    figure = new_figure(title, (13, 9))
    panels = figure.subplots(2, 2)
    tried = [row for row in rows if row["state"] in ("COMPLETE", "PRUNED")]
    _scores(panels[0][0], tried, gate)
    _parallel(panels[0][1], figure, tried)
    draw_importances(panels[1][0], importances)
    _accuracy(panels[1][1], tried, accuracy)
    save_figure(figure, path, force=True)


def _scores(axes: Any, rows: Rows, gate: float) -> None:
    axes.set(title="score by trial (higher is better)", xlabel="trial", ylabel="TPE")
    ended = [row for row in rows if row["state"] == "PRUNED"]
    whole = [row for row in rows if row["state"] == "COMPLETE"]
    for group, color, label in ((ended, PRUNED, "Local TPE, ended at a rung"), (whole, TRIAL, "Local TPE at the end")):
        _points(axes, [(r["number"], r["local_tpe"]) for r in group], color, label)
    passed = [(row["number"], row["value"]) for row in rows if row["feasible"]]
    _points(axes, passed, BEST, "Global TPE", marker="*", ms=14)
    whole_ticks(axes.xaxis)
    axes.axhline(gate, color=BASE, linestyle="--", label=f"gate: Local TPE {gate:g} on {FIRST_SET}")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.3 * (high - low))  # room for the legend above the points
    axes.legend(loc="upper right", ncols=2)


def _parallel(axes: Any, figure: Any, rows: Rows) -> None:
    """One line a trial over all parameters; each axis goes from its lowest to its highest value tried."""
    axes.set(title="parameters by Local TPE")
    axes.set_xticks(range(len(BASELINE)), list(BASELINE), rotation=20)
    axes.set_yticks([])
    if not rows:
        return
    scores = [row["local_tpe"] for row in rows]
    colors = _scale(min(scores), max(scores))
    figure.colorbar(colors, ax=axes, label="Local TPE")
    heights = {name: _heights([row["setting"][name] for row in rows]) for name in BASELINE}
    for at, places in enumerate(heights.values()):
        for value in places if isinstance(next(iter(places)), str) else (min(places), max(places)):
            axes.annotate(str(value), (at, places[value]), (3, 3), textcoords="offset points", fontsize=8)
    for row in sorted(rows, key=lambda row: row["local_tpe"]):  # the best on top
        line = [places[row["setting"][name]] for name, places in heights.items()]
        axes.plot(range(len(line)), line, color=colors.to_rgba(row["local_tpe"]), lw=1.5, alpha=0.8)


def _heights(values: Sequence[Any]) -> dict[Any, float]:
    """Where a parameter's values lie on its axis: numbers in proportion, names evenly."""
    distinct = sorted(set(values))
    numbers = list(range(len(distinct))) if isinstance(distinct[0], str) else distinct
    width = (numbers[-1] - numbers[0]) or 1
    return {value: (number - numbers[0]) / width for value, number in zip(distinct, numbers, strict=True)}


def _scale(low: float, high: float) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(low, high), "viridis")


def _accuracy(axes: Any, rows: Rows, floor: float) -> None:
    axes.set(title=f"accuracy on {FIRST_SET} against size", xlabel="λ (lower is smaller)")
    axes.set_ylabel("validation accuracy, %")
    ended, whole = (
        [(r["lambda_theory"], 100 * r["accuracies"][FIRST_SET]) for r in rows if r["state"] == state]
        for state in ("PRUNED", "COMPLETE")
    )
    for points, color, label in ((ended, PRUNED, "ended at a rung"), (whole, TRIAL, "trained to the end")):
        _points(axes, points, color, label)
    front = pareto_front([(lam, -accuracy) for lam, accuracy in whole])
    if len(front) > 1:
        axes.plot([lam for lam, _ in front], [-negative for _, negative in front], "-", color=BEST, label="front")
    axes.axhline(100 * floor, color=BASE, linestyle="--", label=f"asked for: {100 * floor:.0f} %")
    axes.legend()


def _points(axes: Any, points: Sequence[tuple[float, float]], color: str, label: str, **how: Any) -> None:
    """Points that the legend names, if there are any."""
    if points:
        axes.plot(*zip(*points, strict=True), **{"ls": "", "marker": "o", "color": color, "label": label} | how)
