"""The tables and the picture of `benchmarks.quality`, from its cases' records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nkat.host.console import format_bytes, format_table
from nkat.host.figures import new_figure, save_figure

_SHORT = {
    "wiki.test.raw": "wiki",
    "tinyshakespeare.txt": "Shakespeare",
    "plrabn12.txt": "Milton",
    "alice29.txt": "Alice",
}


def tables(results: Mapping[str, Any]) -> str:
    """One row a case: perplexity on the first text, the paired change on each, bytes and TPE."""
    rows = []
    names = list(dict.fromkeys(text for result in results.values() for text in result["texts"]))
    for name, result in results.items():
        texts = result["texts"]
        first = next(iter(texts.values()))
        changes = [_change(texts.get(text)) for text in names]
        rows.append(
            [
                name,
                f"{first['perplexity']:.3f} ± {first['perplexity_stderr']:.3f}",
                *changes,
                format_bytes(result["model_bytes"] + result["theta_bytes"]),
                format_bytes(result["theta_bytes"]),
                f"{first['tpe']:.5f}",
            ]
        )
    header = ["case", "perplexity", *[f"{_SHORT.get(name, name)} %" for name in names], "bytes", "of them Θ", "TPE"]
    return format_table(rows, header) + "\n" + _won_back(results)


def _change(text: Mapping[str, Any] | None) -> str:
    return f"{text['change_percent']:+.2f} ± {text['change_percent_stderr']:.2f}" if text else ""


def plot_ranks(path: Path, results: Mapping[str, Any]) -> None:
    """Perplexity and TPE by rank, fitted and data-free, where those cases are there."""
    series = {
        "fit": {r: results.get(f"fit-r{r}-of-r8") for r in (2, 4, 6, 8)},
        "weight": {r: results.get(f"weight-r{r}") for r in (2, 4, 6, 8)},
    }
    found = {name: {r: c for r, c in cases.items() if c is not None} for name, cases in series.items()}
    if not any(found.values()):
        return
    figure = new_figure("SmolLM2, by rank", (10, 4))
    left, right = figure.subplots(1, 2)
    for name, cases in found.items():
        if not cases:
            continue
        texts = [next(iter(case["texts"].values())) for case in cases.values()]
        left.errorbar(
            list(cases),
            [text["change_percent"] for text in texts],
            [text["change_percent_stderr"] for text in texts],
            marker="o",
            capsize=3,
            label=name,
        )
        right.plot(list(cases), [text["tpe"] for text in texts], marker="o", label=name)
    right.axhline(texts[0]["base_tpe"], color="grey", linestyle="--", label="without Θ")
    left.set(xlabel="rank", ylabel="change of perplexity, %", title="wiki.test.raw, held out")
    right.set(xlabel="rank", ylabel="TPE", title="perplexity against bytes")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    save_figure(figure, path, force=True)


def _won_back(results: Mapping[str, Any]) -> str:
    """The share of the perplexity that a quantisation lost which each repair wins back, on the first text."""
    rows = []
    for name, result in results.items():
        lost = results.get(f"{result['model']}-lost")
        if lost is None or result["theta_bytes"] == 0:
            continue
        original, coarse, now = (
            next(iter(record["texts"].values()))[key]
            for record, key in ((lost, "base_perplexity"), (lost, "perplexity"), (result, "perplexity"))
        )
        share = 100 * (coarse - now) / (coarse - original)
        rows.append([name, f"{original:.3f}", f"{coarse:.3f}", f"{now:.3f}", f"{share:.0f}"])
    if not rows:
        return ""
    return "\n" + format_table(rows, ["repair", "original", "coarse", "repaired", "won back, %"])


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nIt is a part of another command: python -m benchmarks.quality --help")
