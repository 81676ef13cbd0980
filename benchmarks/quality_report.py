"""The tables and the picture of `benchmarks.quality`, from its cases' records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nkat.host.console import format_bytes
from nkat.host.figures import new_figure, save_figure
from nkat.host.tables import Column, Table
from nkat.measure.columns import PERPLEXITY_3

_SHORT = {
    "wiki.test.raw": "wiki",
    "tinyshakespeare.txt": "Shakespeare",
    "plrabn12.txt": "Milton",
    "alice29.txt": "Alice",
}


def tables(results: Mapping[str, Any]) -> list[Table]:
    """One row a case: perplexity on the first text, the paired change on each, bytes and TPE; and what repairs won."""
    rows = []
    names = list(dict.fromkeys(text for result in results.values() for text in result["texts"]))
    for name, result in results.items():
        texts = result["texts"]
        first = next(iter(texts.values()))
        row = {key: first[key] for key in ("perplexity", "perplexity_stderr", "tpe")}
        for text, found in texts.items():
            row |= {f"{text}_{key}": found[key] for key in ("change_percent", "change_percent_stderr")}
        bytes_of = {"bytes": result["model_bytes"] + result["theta_bytes"], "theta_bytes": result["theta_bytes"]}
        rows.append({"case": name, **row, **bytes_of})
    changes = [
        Column(
            f"{_SHORT.get(text, text)} %",
            (f"{text}_change_percent", f"{text}_change_percent_stderr"),
            "{:+.2f} ± {:.2f}".format,
        )
        for text in names
    ]
    columns = [
        Column("case", "case"),
        PERPLEXITY_3,
        *changes,
        Column("bytes", "bytes", format_bytes),
        Column("of them Θ", "theta_bytes", format_bytes),
        Column("TPE", "tpe", ".5f"),
    ]
    won = _won_back(results)
    return [Table("quality", columns, rows), *([won] if won.rows else [])]


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


def _won_back(results: Mapping[str, Any]) -> Table:
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
        rows.append(
            {"repair": name, "original": original, "coarse": coarse, "repaired": now, "won_back_percent": share}
        )
    columns = [
        Column("repair", "repair"),
        *(Column(name, name, ".3f") for name in ("original", "coarse", "repaired")),
        Column("won back, %", "won_back_percent", ".0f"),
    ]
    return Table("won back", columns, rows)


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nIt is a part of another command: python -m benchmarks.quality --help")
