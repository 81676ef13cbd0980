"""What `--benchmark` and `--compare` report: speed, loading, memory, perplexity and TPE, as records and tables.

Speed is measured with both arms alternating in one process; loading and memory in a fresh process for each arm, both
from the same file; perplexity on the same chunks, paired. `estimated_perplexity_improvement` is the guide's name for
the change of perplexity in per cent; here it is measured, and null when it was not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nkat.host.console import format_bytes, format_table
from nkat.measure.divergence import divergence_cells
from nkat.measure.judge import Score
from nkat.measure.perplexity import PairedChange, Perplexity, change_text, perplexity_text
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


def benchmark_text(record: Mapping[str, Any]) -> str:
    """The table, loading and memory."""
    arms = [record["baseline"]] if record["nkat"] is None else [record["baseline"], record["nkat"]]
    costs = [] if record["nkat"] is None else [record["prefill_overhead"], record["overhead"]]
    header = ["", "without Θ", "with Θ", "what Θ costs"] if costs else ["", "without Θ"]
    lines = [
        format_table(_speed_rows(arms, costs), header),
        "",
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


def comparison_text(record: Mapping[str, Any]) -> str:
    """The table, and below it what rounding activations does."""
    arms = base, nkat = record["baseline"], record["nkat"]
    rows = _speed_rows(arms, (record["prefill_overhead"], record["overhead"]))

    def startup(label: str, key: str) -> list[str]:
        return [label, *[f"{arm['startup'][key]:.3f}" for arm in arms], ""]

    rows += [
        startup("load, s", "load_seconds"),
        startup("first token, s", "first_token_seconds"),
        startup("  once in a process, s", "compile_seconds"),
        ["memory of the model", *[format_bytes(arm["startup"]["model_memory_bytes"]) for arm in arms], ""],
    ]
    if record["chunks"]:
        change, error = record["estimated_perplexity_improvement"], record["perplexity_change_stderr"]
        figures = [perplexity_text(arm["perplexity"], arm["perplexity_stderr"]) for arm in arms]
        rows += [
            ["perplexity", *figures, change_text(change, error)],
            ["TPE", *[f"{arm['tpe']:.6f}" for arm in arms], f"{100 * (nkat['tpe'] / base['tpe'] - 1):+.2f} %"],
        ]
    if divergence := record["divergence"]:
        kl, same = divergence_cells(divergence)
        rows += [
            ["KL divergence", "", kl, f"99 %: {divergence['kl']['quantiles']['99']:.5f}"],
            ["same top token, %", "", same, ""],
        ]
    text = format_table(rows, ["", "without Θ", "with Θ", "change"])
    if record["rounding_perplexity_change"] is not None:
        change = change_text(record["rounding_perplexity_change"], record["rounding_perplexity_change_stderr"])
        text += f"\n\nActivations are rounded to 8 bits; that changes the perplexity without Θ by {change}."
    return text


def _speed_rows(arms: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines of a table: each arm's speed, and, where there are two, what Θ costs in prefill and in decoding."""

    def line(label: str, part: str, key: str, form: str, cost: str = "") -> list[str]:
        return [label, *[format(arm[part][key], form) for arm in arms], *([cost] if costs else [])]

    return [
        line("prefill, tok/s", "prefill", "tokens_per_second", ".1f", _cost(costs[0]) if costs else ""),
        line("decode, tok/s", "decode", "tokens_per_second", ".2f", _cost(costs[1]) if costs else ""),
        line("  median step, ms", "decode", "median_latency_ms", ".3f"),
        line("  fastest 10 %, ms", "decode", "p10_latency_ms", ".3f"),
        line("  slowest 10 %, ms", "decode", "p90_latency_ms", ".3f"),
    ]


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


def _cost(overhead: Mapping[str, Any]) -> str:
    low, high = overhead["interval"]
    text = f"time {overhead['percentage']:+.2f} %"
    if overhead["pairs"] < 2:
        return text
    return f"{text} ({overhead['interval_coverage']:.0%} sure: {low:+.2f} to {high:+.2f})"
