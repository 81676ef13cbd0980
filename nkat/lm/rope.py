"""Rotary position embedding: what a file's metadata say of it (as llama.cpp reads them, src/llama-model.cpp)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from nkat.lm.architectures import ROPE_SECTIONS, YARN_KEYS
from nkat.lm.keys import ConfigError, Keys


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding of one kind of block.

    interleaved: pairs are elements (2i, 2i+1) ("norm"); otherwise (i, i + dimensions/2) ("neox")
    dimensions: leading elements of a head that are rotated; the others pass unchanged
    base: pair i turns by base^(-2i/dimensions) radians a position
    scale: multiplies positions; 1/factor of linear scaling and, for the slow pairs only, of YaRN
    yarn: blend between scaled and unscaled by pair, for a model trained on `original_context` tokens: pairs that turn
    more than `fast` times in them are not scaled, those that turn less than `slow` times are
    magnitude: multiplies both sine and cosine
    still: pairs that a text's positions do not turn
    The factors for long contexts (longrope) take effect where there is room for more than `original_context` tokens.
    """

    interleaved: bool
    dimensions: int
    base: float
    scale: float
    yarn: bool
    original_context: int
    magnitude: float
    fast: float = 32.0
    slow: float = 1.0
    still: frozenset[int] = frozenset()


def read_rope(keys: Keys, head_dim: int, local_dim: int, context: int) -> tuple[Rope, Rope]:
    """RoPE of blocks that see everything, and of blocks with a sliding window: of heads of so many elements."""
    dimensions = keys.integer("rope.dimension_count", head_dim)
    if dimensions % 2 or dimensions > head_dim:
        raise ConfigError(
            f"metadata {keys.name('rope.dimension_count')} must be even and at most {head_dim}, got {dimensions}"
        )
    window = keys.architecture.window
    local_dimensions = dimensions if window is None else keys.integer("rope.dimension_count_swa", dimensions)
    if local_dimensions != dimensions and not keys.architecture.varied:
        raise ConfigError(f"metadata {keys.name('rope.dimension_count_swa')} differs from the other: not supported")
    if keys.architecture.varied and (local_dimensions % 2 or local_dimensions > local_dim):
        raise ConfigError(
            f"metadata {keys.name('rope.dimension_count_swa')} must be even and at most {local_dim}, "
            f"got {local_dimensions}"
        )
    kind = keys.text("rope.scaling.type", "linear")
    kinds = ("none", "linear", "yarn", *(("longrope",) if keys.architecture.long_rope else ()))
    if kind not in kinds:
        raise ConfigError(
            f"metadata {keys.name('rope.scaling.type')} {kind!r} is not supported, only {' and '.join(kinds)}"
        )
    # Files older than rope.scaling.* wrote rope.scale_linear; 0 stands for "no scaling" in both.
    factor_key = "rope.scaling.factor" if keys.get("rope.scaling.factor") is not None else "rope.scale_linear"
    factor = keys.number(factor_key, 1.0) if keys.get(factor_key) not in (None, 0) else 1.0
    if kind == "none":
        factor = 1.0
    if kind == "yarn" and factor < 1.0:
        raise ConfigError(f"metadata {keys.name('rope.scaling.factor')} must be at least 1 for yarn, got {factor:g}")
    attention_factor = keys.number("rope.scaling.attn_factor", 1.0)
    fast, slow, log_multiplier = (
        keys.number(key, usual, above=-1.0) if key in keys.architecture.reads else usual
        for key, usual in zip(YARN_KEYS, (32.0, 1.0, 0.0), strict=True)
    )
    # YaRN's attention temperature, folded into q and k as llama.cpp does it
    warmth = (1.0 + 0.1 * math.log(factor)) / (1.0 + 0.1 * log_multiplier * math.log(factor)) if kind == "yarn" else 1.0
    rope = Rope(
        interleaved=keys.architecture.interleaved_rope,
        dimensions=dimensions,
        base=keys.number("rope.freq_base", 10000.0, above=1.0),
        scale=1.0 / factor,
        yarn=kind == "yarn",
        original_context=keys.integer("rope.scaling.original_context_length", 0, minimum=0) or context,
        magnitude=attention_factor * warmth,
        fast=fast,
        slow=slow,
        still=_read_still(keys, dimensions // 2),
    )
    if window is not None and window.plain_rope:
        return rope, replace(rope, scale=1.0, yarn=False, magnitude=1.0)
    if window is None or window.rope_base is None:
        return rope, replace(rope, base=keys.number("rope.freq_base_swa", rope.base, above=1.0))
    local_base = keys.number("rope.freq_base_swa", window.rope_base, above=1.0)
    local = replace(rope, base=local_base, scale=1.0, yarn=False, magnitude=attention_factor)
    return rope, replace(local, dimensions=local_dimensions)


def _read_still(keys: Keys, pairs: int) -> frozenset[int]:
    """Pairs of a position's fourth part, which is 0 in text, where the others are its place (interleaved M-RoPE,
    `ggml_mrope_cache_init` in llama.cpp's ggml/src/ggml-cpu/ops.cpp).

    Every third pair is of the same one of the first three parts, as far as that part's section reaches.
    """
    if ROPE_SECTIONS not in keys.architecture.reads:
        return frozenset()
    value = keys.metadata.get(keys.name(ROPE_SECTIONS))
    if value is None:
        return frozenset()
    lengths = value.tolist() if isinstance(value, np.ndarray) else [value] * 4
    sections = [n for n in lengths if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
    total = sum(sections)
    if len(sections) != len(lengths) or len(sections) > 4 or not 0 < total <= 2 * pairs:
        raise ConfigError(
            f"metadata {keys.name(ROPE_SECTIONS)} must be at most four lengths, together 1 to {2 * pairs}, "
            f"got {lengths[:9]}"
        )
    sections += [0] * (4 - len(sections))
    return frozenset(i for i in range(pairs) if (place := i % total) >= 3 * sections[place % 3])
