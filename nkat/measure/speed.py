"""Speed of prefill and decoding, and what Θ costs: both arms alternate in short blocks of one process.

Machines change speed while one measures (other programs, heat), so each block with Θ is compared with its neighbour
without it, and the overhead is the median of those ratios. Its interval is that of the sign test: two of the measured
ratios, chosen by rank, between which the true median lies; nothing is assumed about how the ratios are distributed.

Every decode step is waited for, as a sampler would, and fed a given token: sampling is not in the times. The first step
behind a change of arm is not timed, because no real decoding switches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from nkat.engine.decoder import Decoder
from nkat.errors import NKATError
from nkat.host.console import bar

BLOCK_STEPS = 10
COVERAGE = 0.95


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of single runs of the same work, each of which handles `tokens` tokens."""

    seconds: tuple[float, ...]
    tokens: int = 1

    @property
    def mean(self) -> float:
        return fmean(self.seconds)

    @property
    def median(self) -> float:
        return median(self.seconds)

    def percentile(self, q: float) -> float:
        """Seconds below which q per cent of the runs lie."""
        return float(np.percentile(self.seconds, q))

    @property
    def tokens_per_second(self) -> float:
        """Of the median run: one stall of the machine would ruin the mean."""
        return self.tokens / self.median

    def record(self) -> dict[str, Any]:
        return {
            "tokens_per_second": self.tokens_per_second,
            "avg_latency_ms": 1e3 * self.mean,
            "median_latency_ms": 1e3 * self.median,
            "p10_latency_ms": 1e3 * self.percentile(10),
            "p90_latency_ms": 1e3 * self.percentile(90),
            "runs": len(self.seconds),
        }


@dataclass(frozen=True, slots=True)
class PairedOverhead:
    """Seconds per token of each block, with and without Θ, paired by position."""

    with_theta: tuple[float, ...]
    without: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.with_theta, self.without, strict=True)]

    @property
    def percent(self) -> float:
        """Median overhead in per cent of the time without Θ."""
        return _percent(median(self.ratios))

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest overhead of a block, in per cent."""
        return _percent(min(self.ratios)), _percent(max(self.ratios))

    def interval(self) -> tuple[float, float, float]:
        """Per cent between which the median overhead lies, and how surely (see `median_interval`)."""
        low, high, coverage = median_interval(self.ratios)
        return _percent(low), _percent(high), coverage

    def record(self) -> dict[str, Any]:
        low, high, coverage = self.interval()
        return {
            "percentage": self.percent,
            "interval": [low, high],
            "interval_coverage": coverage,
            "p10": _percent(float(np.percentile(self.ratios, 10))),
            "p90": _percent(float(np.percentile(self.ratios, 90))),
            "pairs": len(self.ratios),
        }


@dataclass(frozen=True, slots=True)
class Arms:
    """Both arms of one measurement; a model without Θ has only one."""

    without: Timings
    with_theta: Timings | None = None
    overhead: PairedOverhead | None = None

    @property
    def as_asked(self) -> Timings:
        """The model as it was given: with its Θ where it has one."""
        return self.with_theta or self.without


def median_interval(values: Sequence[float], coverage: float = COVERAGE) -> tuple[float, float, float]:
    """(low, high, probability): between these two of the values the median they were drawn from lies.

    The narrowest pair of the k-th smallest and k-th largest whose probability 1 − 2·P(Binomial(n, ½) < k) is at least
    `coverage`; with fewer than six values none is, and the extremes are given with their own probability (David and
    Nagaraja, Order Statistics, 2003, 7.1).
    """
    ordered, n = sorted(values), len(values)
    below, k = 0.5**n, 1  # P(Binomial(n, ½) < k)
    while k < (n + 1) // 2:
        following = below + math.comb(n, k) * 0.5**n
        if 1.0 - 2.0 * following < coverage:
            break
        below, k = following, k + 1
    return ordered[k - 1], ordered[n - k], max(0.0, 1.0 - 2.0 * below)


def bench_prefill(decoder: Decoder, tokens: Sequence[int], gamma: float | None, *, repetitions: int) -> Arms:
    """Times `tokens` through an empty cache, `repetitions` times for each arm; one untimed run of each warms up.

    gamma: Θ's strength, which also holds afterwards; None: the model has no Θ. The cache then holds `tokens`.
    """
    _check(len(tokens), repetitions)

    def run(strength: float | None, _: int) -> list[float]:
        decoder.set_gamma(strength)
        decoder.length = 0
        started = perf_counter()
        _wait(decoder.prefill(tokens))
        return [perf_counter() - started]

    return _alternate(decoder, run, gamma, 1, repetitions, len(tokens), "prefill")


def bench_decode(
    decoder: Decoder,
    tokens: Sequence[int],
    gamma: float | None,
    *,
    start: int,
    repetitions: int,
    block: int = BLOCK_STEPS,
) -> Arms:
    """Times a step for each of `tokens` behind the first `start` in the cache, which must be there already.

    `repetitions` times over; `block` steps of one arm, then the same positions with the other. One untimed pair of
    blocks warms up. gamma: as for `bench_prefill`. The cache then holds `start` tokens and those of the last block.
    """
    _check(len(tokens), repetitions)
    if not 0 < start <= decoder.length or decoder.reach(start) != start:
        raise NKATError(f"decoding starts behind {start} tokens, but {decoder.length} are in the KV cache")
    blocks = [(start + i, tokens[i : i + block]) for i in range(0, len(tokens), block)]

    def run(strength: float | None, index: int) -> list[float]:
        position, fed = blocks[index]
        decoder.set_gamma(strength)
        decoder.length = position
        decoder.keep_state(len(blocks) + 1)
        _wait(decoder.step(fed[0]))
        decoder.length = position
        seconds = []
        for token in fed:
            started = perf_counter()
            _wait(decoder.step(token))
            seconds.append(perf_counter() - started)
        return seconds

    return _alternate(decoder, run, gamma, len(blocks), repetitions, 1, "decode")


def paired_overhead(
    decoder: Decoder, prompt: Sequence[int], gamma: float, *, blocks: int = 8, steps: int = 4
) -> PairedOverhead:
    """Decodes `blocks` pairs of `steps` tokens behind `prompt`, at the same position; leaves Θ's strength at `gamma`.

    The decoder needs room for the prompt and `steps` tokens; what is in its cache is forgotten.
    """
    if len(prompt) < 1 or blocks < 1 or steps < 1:
        raise NKATError("the overhead needs at least one prompt token, one block and one step")
    decoder.length = 0
    decoder.prefill(prompt)
    fed = [prompt[-1]] * steps
    arms = bench_decode(decoder, fed, gamma, start=len(prompt), repetitions=blocks, block=steps)
    assert arms.overhead is not None  # there is a γ
    return arms.overhead


def _alternate(
    decoder: Decoder,
    run: Callable[[float | None, int], list[float]],
    gamma: float | None,
    blocks: int,
    repetitions: int,
    tokens: int,
    what: str,
) -> Arms:
    """Runs every block with both arms, `repetitions` times, each arm first in turn; block 0 warms up, untimed.

    run: the arm's strength and the block's number → seconds of its runs
    """
    strengths = [None] if gamma is None else [None, gamma]
    seconds: dict[float | None, list[float]] = {strength: [] for strength in strengths}
    means: dict[float | None, list[float]] = {strength: [] for strength in strengths}
    with bar((repetitions * blocks + 1) * len(strengths), what, "block") as progress:
        for strength in strengths:
            run(strength, 0)
            progress.update()
        for count in range(repetitions * blocks):
            for strength in strengths[:: -1 if count % 2 else 1]:
                took = run(strength, count % blocks)
                seconds[strength] += took
                means[strength].append(fmean(took) / tokens)
                progress.update()
    decoder.set_gamma(gamma)
    without = Timings(tuple(seconds[None]), tokens)
    if gamma is None:
        return Arms(without)
    run_with = Timings(tuple(seconds[gamma]), tokens)
    return Arms(without, run_with, PairedOverhead(tuple(means[gamma]), tuple(means[None])))


def _check(tokens: int, repetitions: int) -> None:
    if tokens < 1 or repetitions < 1:
        raise NKATError("a speed measurement needs at least one token and one repetition")


def _wait(logits: torch.Tensor) -> None:
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)


def _percent(ratio: float) -> float:
    return 100.0 * (ratio - 1.0)
