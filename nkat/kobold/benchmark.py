"""Speeds of a program that serves a model, as it measures them itself, and which split is the fastest.

A benchmark processes a full context of tokens but for the last hundred and generates those. One run of it is one
measurement: differences of a few per cent are noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nkat.errors import NKATError
from nkat.kobold.choose import Choice

GENERATED = 100  # tokens


@dataclass(frozen=True, slots=True)
class Speed:
    """processing, generation: tokens a second; seconds: of both together; context, generated: tokens"""

    processing: float
    generation: float
    seconds: float
    context: int
    generated: int


def layer_splits(choice: Choice) -> list[Choice]:
    """The layer splits worth measuring: what fits, half of it, and none (the GPU then only processes prompts)."""
    if not choice.backend.on_gpu or choice.layers is None:
        return [choice]
    counts = dict.fromkeys([choice.layers, choice.layers // 2, 0])
    return [replace(choice, layers=count) for count in counts]


def fastest(measured: Sequence[tuple[Choice, Speed]]) -> tuple[Choice, Speed]:
    """The one that generates fastest; of those within 3 % of it, the one that processes prompts fastest."""
    if not measured:
        raise NKATError("no backend could be measured")
    best = max(speed.generation for _, speed in measured)
    near = [item for item in measured if item[1].generation >= 0.97 * best]
    return max(near, key=lambda item: item[1].processing)
