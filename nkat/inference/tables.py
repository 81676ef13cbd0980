"""What `--benchmark` and `--compare` report: speed, loading, memory, perplexity and TPE, as records and tables.

Speed is measured with both arms alternating in one process; loading and memory in a fresh process for each arm, both
from the same file; perplexity on the same chunks, paired. `estimated_perplexity_improvement` is the guide's name for
the change of perplexity in per cent; here it is measured, and null when it was not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nkat.host.console import format_bytes
from nkat.host.tables import Column, Table
from nkat.measure.columns import CHANGE, PERPLEXITY, TPE
from nkat.measure.divergence import divergence_columns, divergence_row
from nkat.measure.judge import Score
from nkat.measure.perplexity import PairedChange, Perplexity, change_text
from nkat.measure.provenance import conditions_of
from nkat.measure.speed import Arms, Timings
from nkat.measure.startup import Startup
from nkat.measure.tpe import tpe


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity of both arms on the same chunks.

    rounding: what 8-bit activations change without Θ; None: they are exact
    """

    without: Perplexity
    with_theta: Score
    rounding: PairedChange | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that was measured. starts: without and with Θ; quality: None when no chunk was asked for."""

    prefill: Arms
    decode: Arms
    starts: tuple[Startup, Startup]
    quality: Quality | None
    byte_ratio: float


def benchmark_record(prefill: Arms, decode: Arms, start: Startup) -> dict[str, Any]:
    """The guide's keys first, of the model as it was given; a model without Θ has no overhead and one arm."""
    costs = prefill.overhead, decode.overhead
    speed = decode.as_asked.record()
    return {
        **{key: speed.pop(key) for key in ("tokens_per_second", "avg_latency_ms")},
        "overhead_percentage": costs[1] and costs[1].percent,
        **speed,
        "prefill_tokens_per_second": prefill.as_asked.tokens_per_second,
        "prefill_overhead_percentage": costs[0] and costs[0].percent,
        "overhead": costs[1] and costs[1].record(),
        "prefill_overhead": costs[0] and costs[0].record(),
        "baseline": {"decode": decode.without.record(), "prefill": prefill.without.record()},
        "nkat": decode.with_theta
        and prefill.with_theta
        and {"decode": decode.with_theta.record(), "prefill": prefill.with_theta.record()},
        **start.record(),
    }


def comparison_record(result: Comparison) -> dict[str, Any]:
    """The guide's keys first, then each arm, then everything behind them."""
    prefill, decode, quality = result.prefill, result.decode, result.quality
    assert prefill.overhead  # there are two arms
    assert decode.overhead
    change = None if quality is None else quality.with_theta.change
    rounding = None if quality is None else quality.rounding
    divergence = None if quality is None else quality.with_theta.divergence
    return {
        "nkat_tokens_per_second": decode.as_asked.tokens_per_second,
        "baseline_tokens_per_second": decode.without.tokens_per_second,
        "overhead_percentage": decode.overhead.percent,
        "estimated_perplexity_improvement": None if change is None else change.percent,
        "perplexity_change_stderr": None if change is None else change.percent_stderr,
        "chunks": 0 if quality is None else quality.without.chunks,
        "scored_tokens": 0 if quality is None else quality.without.tokens,
        "overhead": decode.overhead.record(),
        "prefill_overhead": prefill.overhead.record(),
        "baseline": _arm_record(
            prefill.without, decode.without, result.starts[0], None if quality is None else quality.without, 1.0
        ),
        "nkat": _arm_record(
            prefill.as_asked,
            decode.as_asked,
            result.starts[1],
            None if quality is None else quality.with_theta.perplexity,
            result.byte_ratio,
        ),
        "byte_ratio": result.byte_ratio,
        "divergence": divergence and divergence.record(),
        "rounding_perplexity_change": None if rounding is None else rounding.percent,
        "rounding_perplexity_change_stderr": None if rounding is None else rounding.percent_stderr,
    }


def benchmark_table(record: Mapping[str, Any], caption: str) -> Table:
    """Speed of both arms, or of the one there is."""
    arms = [record["baseline"]] if record["nkat"] is None else [record["baseline"], record["nkat"]]
    rows = [_speed_row(name, arm) for name, arm in zip(("without", "with"), arms, strict=False)]
    if len(rows) == 2:
        rows[1] |= _cost_row(record)
    columns = [_arm(record), *_speed_columns(len(rows) == 2)]
    return Table("benchmark", columns, rows, caption, conditions_of(record), sideways=True, beside="what Θ costs")


def benchmark_words(record: Mapping[str, Any]) -> str:
    """Loading and memory, below the table."""
    lines = [
        f"loaded in {record['load_seconds']:.3f} s, first token after {record['first_token_seconds']:.3f} s"
        f" (and {record['compile_seconds']:.3f} s once in each process)",
    ]
    if record["peak_memory_bytes"] is not None:
        held = record["memory"]
        parts = [f"peak memory {format_bytes(record['peak_memory_bytes'])}"]
        if held["anonymous"] is not None and held["model_file"] is not None:
            parts.append(
                f"now {format_bytes(held['anonymous'])} of its own and "
                f"{format_bytes(held['model_file'])} of the model file's pages"
            )
        if held["gpu_peak"] is not None:
            parts.append(f"GPU peak {format_bytes(held['gpu_peak'])}")
        lines.append(f"{', '.join(parts)}; KV cache {format_bytes(record['kv_cache_bytes'])}")
    return "\n".join(lines)


def comparison_table(record: Mapping[str, Any], caption: str) -> Table:
    """Both arms: speed, loading, memory, and perplexity where it was measured."""
    base, nkat = record["baseline"], record["nkat"]
    rows = [
        {
            **_speed_row(name, arm),
            **{key: arm["startup"][key] for key in _STARTUP},
            **{key: arm[key] for key in ("perplexity", "perplexity_stderr", "tpe")},
        }
        for name, arm in (("without", base), ("with", nkat))
    ]
    rows[1] |= _cost_row(record)
    startup = [Column(title, key, *form) for key, (title, *form) in _STARTUP.items()]
    columns = [_arm(record), *_speed_columns(True), *startup]
    if record["chunks"]:
        change, error = record["estimated_perplexity_improvement"], record["perplexity_change_stderr"]
        rows[1] |= {"change_percent": change, "change_percent_stderr": error}
        rows[1]["tpe_change_percent"] = 100 * (nkat["tpe"] / base["tpe"] - 1)
        columns += [
            replace(PERPLEXITY, beside=CHANGE),
            replace(TPE, beside=Column("", "tpe_change_percent", "{:+.2f} %".format)),
        ]
    if divergence := record["divergence"]:
        rows[1] |= divergence_row(divergence)
        columns += divergence_columns()
    return Table("compare", columns, rows, caption, conditions_of(record), sideways=True, beside="change")


def comparison_words(record: Mapping[str, Any]) -> str:
    """What rounding activations does, where they are."""
    if record["rounding_perplexity_change"] is None:
        return ""
    change = change_text(record["rounding_perplexity_change"], record["rounding_perplexity_change_stderr"])
    return f"Activations are rounded to 8 bits; that changes the perplexity without Θ by {change}."


def _arm(record: Mapping[str, Any]) -> Column:
    """The column that says "without" or "with"."""
    return Column("", "arm", f"{{}} {term_of(record)}".format)


def term_of(record: Mapping[str, Any]) -> str:
    """What the model is measured with, for people."""
    return "LoRA" if record.get("lora") else "Θ"


_STARTUP: dict[str, tuple[str, Any, str] | tuple[str, Any]] = {
    "load_seconds": ("load", ".3f", "s"),
    "first_token_seconds": ("first token", ".3f", "s"),
    "compile_seconds": ("  once in a process", ".3f", "s"),
    "model_memory_bytes": ("memory of the model", format_bytes),
}
_LATENCIES = {"median": "  median step", "p10": "  fastest 10 %", "p90": "  slowest 10 %"}
_COST = "percentage", "low", "high", "coverage", "pairs"


def _speed_columns(costs: bool) -> list[Column]:
    """costs: whether there are two arms, so that Θ costs something in prefill and in decoding"""

    def cost(part: str) -> Column | None:
        return Column("", tuple(f"{part}_cost_{name}" for name in _COST), _cost_text) if costs else None

    return [
        Column("prefill", "prefill_tokens_per_second", ".1f", "tok/s", cost("prefill")),
        Column("decode", "decode_tokens_per_second", ".2f", "tok/s", cost("decode")),
        *(Column(title, f"decode_{name}_ms", ".3f", "ms") for name, title in _LATENCIES.items()),
    ]


def _speed_row(arm: str, record: Mapping[str, Any]) -> dict[str, Any]:
    speeds = {f"{part}_tokens_per_second": record[part]["tokens_per_second"] for part in ("prefill", "decode")}
    steps = {f"decode_{name}_ms": record["decode"][f"{name}_latency_ms"] for name in _LATENCIES}
    return {"arm": arm, **speeds, **steps}


def _cost_row(record: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part, cost in (("prefill", record["prefill_overhead"]), ("decode", record["overhead"])):
        values = cost["percentage"], *cost["interval"], cost["interval_coverage"], cost["pairs"]
        found |= {f"{part}_cost_{name}": value for name, value in zip(_COST, values, strict=True)}
    return found


def _cost_text(percent: float, low: float, high: float, coverage: float, pairs: int) -> str:
    text = f"time {percent:+.2f} %"
    return text if pairs < 2 else f"{text} ({coverage:.0%} sure: {low:+.2f} to {high:+.2f})"


def _arm_record(
    prefill: Timings, decode: Timings, start: Startup, quality: Perplexity | None, ratio: float
) -> dict[str, Any]:
    return {
        "decode": decode.record(),
        "prefill": prefill.record(),
        "startup": start.record(),
        "perplexity": None if quality is None else quality.ppl,
        "perplexity_stderr": None if quality is None else quality.stderr,
        "tpe": None if quality is None else tpe(quality.ppl, ratio),
    }
