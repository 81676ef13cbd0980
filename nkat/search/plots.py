"""The picture of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nkat.host.figures import BASE, BEST, PRUNED, TRIAL, new_figure, save_figure
from nkat.search.objective import GUARD
from nkat.study.plots import draw_importances, pareto_front


def plot_search(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    record: Mapping[str, Any],
    title: str,
) -> None:
    """Four panels as PNG: score by trial, rank–γ map, parameter importances, perplexity against bytes of Θ.

    Where a guard judged, two more: what trials cost elsewhere, and how the fit went. Replaces an earlier picture.
    rows: `nkat.study.study.history` of a language-model search; the trial without parameters is the model without Θ
    record: the search's, of which "importances", "fit" (of a learned Θ, or None) and "gamma_range" are drawn
    """
    fit, edges = record["fit"], record["gamma_range"]
    columns = 2 if fit is None else 3
    figure = new_figure(title, (6.5 * columns, 9))
    panels = figure.subplots(2, columns)
    complete = [row for row in rows if row["state"] == "COMPLETE"]
    base = next((row for row in complete if not row["parameters"]), None)
    searched = [row for row in complete if row["parameters"]]
    best = max((row for row in searched if row["feasible"]), key=lambda row: row["value"], default=None)
    _history(panels[0][0], rows, base, searched, best)
    _rank_gamma(panels[0][1], figure, searched, best, edges)
    draw_importances(panels[1][0], record["importances"])
    _front(panels[1][1], base, searched, best)
    if fit is not None:
        _prices(panels[0][2], searched, best)
        _learning(panels[1][2], fit)
    save_figure(figure, path, force=True)


def _history(axes: Any, rows: Sequence[Mapping], base: Any, searched: list[Mapping], best: Any) -> None:
    axes.set(title="TPE by trial (higher is better)", xlabel="trial", ylabel="TPE")
    pruned = [r["number"] for r in rows if r["state"] == "PRUNED"]
    allowed = [r for r in searched if r["feasible"]]
    for group, color, label in ((allowed, TRIAL, "trial"), (_broken(searched), PRUNED, "breaks a limit")):
        if group:
            axes.plot([r["number"] for r in group], [r["value"] for r in group], "o", color=color, label=label)
    if allowed:
        ordered = sorted(allowed, key=lambda r: r["number"])
        running = [max(r["value"] for r in ordered[: i + 1]) for i in range(len(ordered))]
        axes.step([r["number"] for r in ordered], running, where="post", color=BEST, label="best so far")
    axes.margins(y=0.1)
    if pruned:  # they have no TPE: at the foot of the panel, below every trial
        foot = axes.get_xaxis_transform()
        axes.plot(pruned, [0.03] * len(pruned), "x", color=PRUNED, transform=foot, label="stopped early (no TPE)")
    if base:
        axes.axhline(base["value"], color=BASE, linestyle="--", label="without Θ")
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)  # below, where it covers no trial


def _rank_gamma(
    axes: Any, figure: Any, searched: list[Mapping], best: Any, edges: Sequence[float] | None = None
) -> None:
    """edges: between which γ was searched; None: it was fixed"""
    axes.set(title="perplexity change by rank and γ, %", xlabel="γ (lower is stronger)", ylabel="rank")
    if not searched:
        axes.text(0.5, 0.5, "no finished trial", ha="center", transform=axes.transAxes)
        return
    ranks = sorted({r["parameters"]["rank"] for r in searched})
    axes.set_yticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_ylim(-0.5, len(ranks) - 0.5)
    for between in range(1, len(ranks)):
        axes.axhline(between - 0.5, color=PRUNED, lw=0.5)
    spread = max(abs(r["change_percent"]) for r in searched) or 1.0
    # Trials of one rank and γ differ in their other parameters: drawn beside each other, not on top.
    # They stay within their rank's band, however many they are.
    keys = [(row["parameters"]["rank"], row["parameters"]["gamma"]) for row in searched]
    seen: dict[tuple, int] = {}
    x, y = [], []
    for row in searched:
        key = row["parameters"]["rank"], row["parameters"]["gamma"]
        x.append(key[1])
        beside = keys.count(key)
        y.append(ranks.index(key[0]) + min(0.13, 0.7 / beside) * (seen.get(key, 0) - (beside - 1) / 2))
        seen[key] = seen.get(key, 0) + 1
    colors = [r["change_percent"] for r in searched]
    points = axes.scatter(x, y, c=colors, cmap="RdYlGn_r", vmin=-spread, vmax=spread, s=90, edgecolors="black", lw=0.5)
    figure.colorbar(points, ax=axes, label="change, %")
    if best is None:
        return
    at = searched.index(best)
    if edges is not None:
        for edge in edges:
            axes.axvline(edge, color=PRUNED, linestyle=":", lw=1)
        if x[at] in edges:
            axes.set_title(f"{axes.get_title()}\nthe best γ is an edge of what was searched")
    axes.scatter([x[at]], [y[at]], s=240, facecolors="none", edgecolors=BEST, lw=2, label=f"trial {best['number']}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)  # below, where it covers no trial


def _front(axes: Any, base: Any, searched: list[Mapping], best: Any) -> None:
    axes.set(title="perplexity against bytes", xlabel="bytes of Θ, MB", ylabel="perplexity (lower is better)")
    points = [*([base] if base else []), *searched]
    if not points:
        return
    allowed = [row for row in searched if row["feasible"]]
    groups = (([base] if base else [], BASE, "without Θ"), (allowed, TRIAL, "trial"))
    for group, color, label in (*groups, (_broken(searched), PRUNED, "breaks a limit")):
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
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)  # below, where it covers no trial


def _prices(axes: Any, searched: list[Mapping], best: Any) -> None:
    """Of each trial that was better at home: the change there, and the worst on the guard's texts."""
    axes.set(
        title="the price elsewhere, %", xlabel="change on the trials' chunks", ylabel="at most, on the guard's texts"
    )
    judged = [row for row in searched if GUARD in row]
    if not judged:
        axes.text(0.5, 0.5, "no trial that was better at home, or no guard", ha="center", transform=axes.transAxes)
        return
    for admitted, color, label in ((True, TRIAL, "admitted"), (False, PRUNED, "turned away")):
        group = [row for row in judged if row[GUARD]["admitted"] == admitted]
        if group:
            axes.plot([r["change_percent"] for r in group], [_bound(r) for r in group], "o", color=color, label=label)
    limit = judged[0][GUARD]["limit_percent"]
    axes.axhline(limit, color=BEST, linestyle="--", label=f"limit, {limit:g} %")
    if best is not None and GUARD in best:
        place = [best["change_percent"]], [_bound(best)]
        axes.plot(*place, "o", ms=14, mfc="none", mec=BEST, label=f"trial {best['number']}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)


def _learning(axes: Any, fit: Mapping[str, Any]) -> None:
    axes.set(title="the fit: −ln p a token", xlabel="step")
    steps = [row["step"] for row in fit["history"]]
    axes.plot(steps, [row["loss"] for row in fit["history"]], "o-", color=PRUNED, label="the step's batch")
    validation = [row["validation_nll"] for row in fit["history"]]
    axes.plot(steps, validation, "o-", color=TRIAL, label="kept-back slice, rank as learned")
    axes.axvline(fit["kept_step"], color=BEST, linestyle="--", label="kept step")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)


def _bound(row: Mapping[str, Any]) -> float:
    """The worst price of a trial by the guard's rule, in per cent."""
    return max(price["bound_percent"] for price in row[GUARD]["prices"])


def _broken(searched: list[Mapping]) -> list[Mapping]:
    return [row for row in searched if not row["feasible"]]
