"""The picture of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nkat.host.figures import BASE, BEST, TRIAL, new_figure, save_figure
from nkat.inference.tables import term_of
from nkat.measure.perplexity import change_text

_LATENCIES = "p90_latency_ms", "p10_latency_ms"


@dataclass(frozen=True, slots=True)
class _Measure:
    """One thing that both arms were measured by.

    values, spread: of the arms; spread below and above, or a ± for both;  form: of a value
    change: per cent, and between which it lies;  said: the same for people;  sure: what the interval is
    """

    name: str
    label: str
    values: list[float]
    spread: Any
    form: str
    change: tuple[float, float, float]
    said: str
    sure: str


def plot_comparison(path: Path, record: Mapping[str, Any], title: str, force: bool) -> None:
    """Decoding, prefill and perplexity without and with Θ as PNG, from the record of `nkat.inference.tables`.

    Each as bars from zero, and beside them the paired difference with its interval, which is what decides (Gardner and
    Altman, BMJ 292, 1986): two bars may overlap where the difference is sure. Without perplexity there are two pairs.
    """
    measures = [_speed(record, "decode", "overhead"), _speed(record, "prefill", "prefill_overhead")]
    measures += [_perplexity(record)] if record["chunks"] else []
    figure = new_figure(title, (4.6 * len(measures), 4.6))
    panels = figure.subplots(1, 2 * len(measures), width_ratios=[1.6, 1] * len(measures))
    for measure, bars, difference in zip(measures, panels[::2], panels[1::2], strict=True):
        _bars(bars, measure, term_of(record))
        _difference(difference, measure)
    bars = "bars: median, lines: 10th to 90th percentile of single runs"
    figure.supxlabel(bars + ("; of perplexity ± its standard error" if record["chunks"] else ""), fontsize=9)
    save_figure(figure, path, force)


def _speed(record: Mapping[str, Any], part: str, overhead: str) -> _Measure:
    arms, cost = (record["baseline"], record["nkat"]), record[overhead]
    speeds = [arm[part]["tokens_per_second"] for arm in arms]
    # a percentile of the latency is the opposite one of the speed
    relative = [[arm[part]["median_latency_ms"] / arm[part][key] for arm in arms] for key in _LATENCIES]
    low = [v * (1 - r) for v, r in zip(speeds, relative[0], strict=True)]
    high = [v * (r - 1) for v, r in zip(speeds, relative[1], strict=True)]
    percent, (bottom, top) = cost["percentage"], cost["interval"]
    said, sure = f"{percent:+.2f} %", f"{bottom:+.2f} to {top:+.2f}, {cost['interval_coverage']:.0%} sure"
    return _Measure(part, "tokens per second", speeds, [low, high], "{:.1f}", (percent, bottom, top), said, sure)


def _perplexity(record: Mapping[str, Any]) -> _Measure:
    arms = record["baseline"], record["nkat"]
    change, error = record["estimated_perplexity_improvement"], record["perplexity_change_stderr"]
    values, errors = [arm["perplexity"] for arm in arms], [arm["perplexity_stderr"] for arm in arms]
    interval = change, change - 2 * error, change + 2 * error
    said = change_text(change, error)
    return _Measure(
        "perplexity",
        "perplexity (lower is better)",
        values,
        errors,
        "{:.3f}",
        interval,
        said,
        "line: twice the ±",
    )


def _bars(axes: Any, measure: _Measure, term: str) -> None:
    axes.set_title(measure.name)
    axes.set(ylabel=measure.label)
    names = [
        f"{arm} {term}\n{measure.form.format(v)}" for arm, v in zip(("without", "with"), measure.values, strict=True)
    ]
    axes.bar(names, measure.values, yerr=measure.spread, color=[BASE, TRIAL], width=0.6, capsize=6)
    axes.set_ylim(bottom=0)


def _difference(axes: Any, measure: _Measure) -> None:
    """A point with its interval, and where there is no difference."""
    value, low, high = measure.change
    what = "perplexity" if measure.name == "perplexity" else "time"
    axes.set_title("paired", fontsize=10)
    axes.set(xlim=(-1, 1), xticks=[])
    axes.set_ylabel(f"change of {what}, % (lower is better)", fontsize=9)
    axes.axhline(0, color=BASE, linestyle="--", lw=1)
    axes.errorbar([0], [value], yerr=[[value - low], [high - value]], fmt="o", color=BEST, capsize=6)
    reach = 1.25 * max(abs(value), abs(low), abs(high), 1e-9)
    axes.set_ylim(-reach, reach)  # no difference is in the middle, whichever way the point lies
    axes.set_xlabel(f"{measure.said}\n{measure.sure}", fontsize=9)
