"""The picture of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nkat.host.figures import BASE, TRIAL, new_figure, save_figure
from nkat.measure.perplexity import change_text

_LATENCIES = "p90_latency_ms", "p10_latency_ms"


def plot_comparison(path: Path, record: Mapping[str, Any], title: str, force: bool) -> None:
    """Decoding, prefill and perplexity without and with Θ as PNG, from the record of `nkat.inference.tables`.

    Bars are medians with the 10th to 90th percentile of single runs, perplexity with its standard error; the heading of
    a panel has the paired change, which is surer than the bars. Without perplexity there are two panels.
    """
    arms = record["baseline"], record["nkat"]
    figure = new_figure(title, (12 if record["chunks"] else 8, 4.5))
    panels = figure.subplots(1, 3 if record["chunks"] else 2)
    for axes, part, overhead in zip(panels, ("decode", "prefill"), ("overhead", "prefill_overhead"), strict=False):
        speeds = [arm[part]["tokens_per_second"] for arm in arms]
        # a percentile of the latency is the opposite one of the speed
        relative = [[arm[part]["median_latency_ms"] / arm[part][key] for arm in arms] for key in _LATENCIES]
        low = [v * (1 - r) for v, r in zip(speeds, relative[0], strict=True)]
        high = [v * (r - 1) for v, r in zip(speeds, relative[1], strict=True)]
        bottom, top = record[overhead]["interval"]
        axes.set_title(
            f"{part}: time {record[overhead]['percentage']:+.2f} % ({bottom:+.2f} to {top:+.2f})", fontsize=10
        )
        _bars(axes, "tokens per second", speeds, [low, high], "{:.1f}")
    if record["chunks"]:
        change, error = record["estimated_perplexity_improvement"], record["perplexity_change_stderr"]
        panels[2].set_title(f"perplexity: {change_text(change, error)}", fontsize=10)
        errors = [arm["perplexity_stderr"] for arm in arms]
        _bars(panels[2], "perplexity (lower is better)", [arm["perplexity"] for arm in arms], errors, "{:.3f}")
    bars = "bars: median; lines on them: 10th to 90th percentile of single runs"
    figure.supxlabel(bars + (", of perplexity ± its standard error" if record["chunks"] else ""), fontsize=9)
    save_figure(figure, path, force)


def _bars(axes: Any, label: str, values: list[float], errors: Any, form: str) -> None:
    axes.set(ylabel=label)
    axes.bar(["without Θ", "with Θ"], values, yerr=errors, color=[BASE, TRIAL], width=0.6, capsize=8)
    for at, value in enumerate(values):  # at the foot, out of the error bar's way
        axes.annotate(form.format(value), (at, 0), (0, 6), textcoords="offset points", ha="center", color="white")
