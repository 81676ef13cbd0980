"""What Θ costs in time: decode steps with Θ on and off, alternating in short blocks of one process.

Machines change speed while one measures (other programs, heat), so each block with Θ is compared with its neighbour
without it, and the overhead is the median of those ratios.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from nkat.errors import NKATError
from nkat.transformer import Transformer


@dataclass(frozen=True, slots=True)
class PairedOverhead:
    """Seconds per decoded token of each block, with and without Θ, paired by position."""

    with_theta: tuple[float, ...]
    without: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.with_theta, self.without, strict=True)]

    @property
    def percent(self) -> float:
        """Median overhead in per cent of the time without Θ."""
        return 100.0 * (median(self.ratios) - 1.0)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest overhead of a block, in per cent."""
        ratios = self.ratios
        return 100.0 * (min(ratios) - 1.0), 100.0 * (max(ratios) - 1.0)


@torch.inference_mode()
def paired_overhead(
    model: Transformer, prompt: torch.Tensor, gamma: float, *, blocks: int = 8, steps: int = 4
) -> PairedOverhead:
    """Decodes `blocks` pairs of `steps` tokens behind `prompt` (int64 [T]); leaves Θ's strength at `gamma`.

    Every block starts at the same position, and which arm goes first alternates. One untimed pair warms up.
    """
    if len(prompt) < 1 or blocks < 1 or steps < 1:
        raise NKATError("the overhead needs at least one prompt token, one block and one step")
    cache = model.new_cache(1, len(prompt) + steps)
    token = prompt[-1:].to(model.device).view(1, 1)
    model.hidden(prompt.to(model.device).view(1, -1), cache)

    def seconds_per_token(strength: float | None) -> float:
        model.set_gamma(strength)
        cache.length = len(prompt)
        _synchronize(model.device)
        started = perf_counter()
        for _ in range(steps):
            model(token, cache, logits="last")
        _synchronize(model.device)
        return (perf_counter() - started) / steps

    times: list[tuple[float, float]] = []
    for block in range(blocks + 1):
        if block % 2:
            without = seconds_per_token(None)
            times.append((seconds_per_token(gamma), without))
        else:
            times.append((seconds_per_token(gamma), seconds_per_token(None)))
    model.set_gamma(gamma)
    with_theta, without_theta = zip(*times[1:], strict=True)
    return PairedOverhead(with_theta, without_theta)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
