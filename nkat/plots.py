"""Pictures of a search and of a comparison. matplotlib is imported when one is drawn, without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nkat.host.figures import BASE, BEST, PRUNED, TRIAL, new_figure, save_figure
from nkat.study.plots import draw_importances, pareto_front

_LATENCIES = "p90_latency_ms", "p10_latency_ms"


def plot_search(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    importances: Mapping[str, float],
    title: str,
) -> None:
    """Four panels as PNG: score by trial, rank–γ map, parameter importances, perplexity against bytes of Θ.

    Replaces an earlier picture.
    rows: `nkat.study.study.history` of a language-model search; the trial without parameters is the model without Θ
    """
    figure = new_figure(title, (13, 9))
    panels = figure.subplots(2, 2)
    complete = [row for row in rows if row["state"] == "COMPLETE"]
    base = next((row for row in complete if not row["parameters"]), None)
    searched = [row for row in complete if row["parameters"]]
    best = max(searched, key=lambda row: row["value"], default=None)
    _history(panels[0][0], rows, base, searched, best)
    _rank_gamma(panels[0][1], figure, searched, best)
    draw_importances(panels[1][0], importances)
    _front(panels[1][1], base, searched, best)
    save_figure(figure, path, force=True)


def plot_comparison(path: Path, record: Mapping[str, Any], title: str, force: bool) -> None:
    """Decoding, prefill and perplexity without and with Θ as PNG, from the record of `nkat.compare`.

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
        panels[2].set_title(f"perplexity: {change:+.3f} % ± {error:.3f}", fontsize=10)
        errors = [arm["perplexity_stderr"] for arm in arms]
        _bars(panels[2], "perplexity (lower is better)", [arm["perplexity"] for arm in arms], errors, "{:.3f}")
    save_figure(figure, path, force)


def _bars(axes: Any, label: str, values: list[float], errors: Any, form: str) -> None:
    axes.set(ylabel=label)
    axes.bar(["without Θ", "with Θ"], values, yerr=errors, color=[BASE, TRIAL], width=0.6, capsize=8)
    for at, value in enumerate(values):  # at the foot, out of the error bar's way
        axes.annotate(form.format(value), (at, 0), (0, 6), textcoords="offset points", ha="center", color="white")


def _history(axes: Any, rows: Sequence[Mapping], base: Any, searched: list[Mapping], best: Any) -> None:
    axes.set(title="TPE by trial (higher is better)", xlabel="trial", ylabel="TPE")
    axes.plot([r["number"] for r in searched], [r["value"] for r in searched], "o", color=TRIAL, label="trial")
    pruned = [r["number"] for r in rows if r["state"] == "PRUNED"]
    if searched:
        ordered = sorted(searched, key=lambda r: r["number"])
        running = [max(r["value"] for r in ordered[: i + 1]) for i in range(len(ordered))]
        axes.step([r["number"] for r in ordered], running, where="post", color=BEST, label="best so far")
    if pruned:
        low = min([r["value"] for r in searched] or [base["value"] if base else 0.0])
        axes.plot(pruned, [low] * len(pruned), "x", color=PRUNED, label="stopped early")
    if base:
        axes.axhline(base["value"], color=BASE, linestyle="--", label="without Θ")
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.legend()


def _rank_gamma(axes: Any, figure: Any, searched: list[Mapping], best: Any) -> None:
    axes.set(title="perplexity change by rank and γ, %", xlabel="γ (lower is stronger)", ylabel="rank")
    if not searched:
        axes.text(0.5, 0.5, "no finished trial", ha="center", transform=axes.transAxes)
        return
    ranks = sorted({r["parameters"]["rank"] for r in searched})
    axes.set_yticks(range(len(ranks)), [str(rank) for rank in ranks])
    spread = max(abs(r["change_percent"]) for r in searched) or 1.0
    # Trials of one rank and γ differ in their other parameters: drawn beside each other, not on top.
    seen: dict[tuple, int] = {}
    x, y = [], []
    for row in searched:
        key = row["parameters"]["rank"], row["parameters"]["gamma"]
        x.append(key[1])
        y.append(ranks.index(key[0]) + 0.13 * seen.get(key, 0))
        seen[key] = seen.get(key, 0) + 1
    colors = [r["change_percent"] for r in searched]
    points = axes.scatter(x, y, c=colors, cmap="RdYlGn_r", vmin=-spread, vmax=spread, s=90, edgecolors="black", lw=0.5)
    figure.colorbar(points, ax=axes, label="change, %")
    at = searched.index(best)
    axes.scatter([x[at]], [y[at]], s=240, facecolors="none", edgecolors=BEST, lw=2, label=f"trial {best['number']}")
    axes.legend()


def _front(axes: Any, base: Any, searched: list[Mapping], best: Any) -> None:
    axes.set(title="perplexity against bytes", xlabel="bytes of Θ, MB", ylabel="perplexity (lower is better)")
    points = [*([base] if base else []), *searched]
    if not points:
        return
    for group, color, label in (([base] if base else [], BASE, "without Θ"), (searched, TRIAL, "trial")):
        if group:
            axes.plot(
                [r["theta_bytes"] / 1e6 for r in group], [r["perplexity"] for r in group], "o", color=color, label=label
            )
    front = pareto_front([(r["theta_bytes"] / 1e6, r["perplexity"]) for r in points])
    axes.plot(*zip(*front, strict=True), "-", color=BEST, label="front")
    if best:
        axes.plot(
            [best["theta_bytes"] / 1e6], [best["perplexity"]], "o", ms=14, mfc="none", mec=BEST, label="highest TPE"
        )
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.legend()
