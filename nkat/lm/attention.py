"""Attention: what the tokens of one forward pass see, how RoPE turns them, and the softmax over what they see.

Shapes: B sequences, T new tokens, S tokens seen so far, H heads of D elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nkat.lm.config import ModelConfig
from nkat.lm.rope import Rope

_ROWS = 256  # queries at a time, so that scores take memory for so many × tokens seen


def rope_frequencies(rope: Rope, factors: torch.Tensor | None = None) -> torch.Tensor:
    """Radians a position by which each pair turns, float64 [dimensions / 2].

    factors: one divisor a pair (`rope_freqs.weight`, Llama 3.1). YaRN (Peng et al., 2023, arXiv 2309.00071) leaves the
    pairs that turn more than 32 times (`rope.fast`) within the original context as they are, scales those that turn
    less than once (`rope.slow`), and blends in between.
    """
    half = rope.dimensions // 2
    index = torch.arange(half, dtype=torch.float64)
    frequencies = rope.base ** (-index / half)
    frequencies[list(rope.still)] = 0.0
    if factors is not None:
        frequencies = frequencies / factors.double().cpu()
    if not rope.yarn:
        return frequencies * rope.scale

    def pair_turning(times: float) -> float:
        return half * math.log(rope.original_context / (times * 2 * math.pi)) / math.log(rope.base)

    low = max(0.0, math.floor(pair_turning(rope.fast)))
    high = min(rope.dimensions - 1.0, math.ceil(pair_turning(rope.slow)))
    unscaled = 1.0 - ((index - low) / max(0.001, high - low)).clamp(0.0, 1.0)
    return frequencies * (unscaled + rope.scale * (1.0 - unscaled))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """RoPE of x [B, T, H, D] by cos, sin [T, dimensions / 2]; elements beyond `dimensions` pass unchanged."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    turning, passing = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turning.unflatten(-1, (half, 2)).unbind(-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turning.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return turned if passing.shape[-1] == 0 else torch.cat((turned, passing), dim=-1)


@dataclass(frozen=True, slots=True)
class View:
    """What the blocks of one kind (with or without a sliding window) share in one forward pass.

    cos, sin: [T, dimensions / 2] for the new tokens
    first_key: the first of the S keys that any new token can see
    causal: new token i sees new tokens up to i and there is nothing before them; then mask is None
    mask: bool [T, S - first_key], True where token sees key; None otherwise: everything is seen
    warmth: [T], multiplies the queries (`ModelConfig.query_scale`); None: all are 1
    """

    cos: torch.Tensor
    sin: torch.Tensor
    first_key: int
    causal: bool
    mask: torch.Tensor | None
    warmth: torch.Tensor | None = None


def query_scales(config: ModelConfig, start: int, count: int) -> torch.Tensor | None:
    """`config.query_scale` of so many positions, float64, on the CPU; None where it is 1 at every one."""
    if not config.temperature:
        return None
    return torch.tensor([config.query_scale(p) for p in range(start, start + count)], dtype=torch.float64)


def make_view(
    frequencies: torch.Tensor,
    magnitude: float,
    start: int,
    count: int,
    window: int,
    like: torch.Tensor,
    warmth: torch.Tensor | None = None,
) -> View:
    """View of `count` tokens at positions start, start + 1, ...; window 0: none. `like` sets dtype and device."""
    positions = torch.arange(start, start + count, device=like.device)
    angles = positions[:, None].double() * frequencies
    cos, sin = (magnitude * angles.cos()).to(like.dtype), (magnitude * angles.sin()).to(like.dtype)
    warmth = None if warmth is None else warmth.to(like)
    first_key = max(0, start - window + 1) if window else 0
    if count == 1:
        return View(cos, sin, first_key, False, None, warmth)
    if start == 0 and (window == 0 or count <= window):
        return View(cos, sin, first_key, True, None, warmth)
    distance = positions[:, None] - torch.arange(first_key, start + count, device=like.device)
    mask = distance >= 0
    if window:
        mask &= distance < window
    return View(cos, sin, first_key, False, mask, warmth)


def capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    """c·tanh(x/c): within ±c; 0: x itself."""
    return cap * torch.tanh(x / cap) if cap else x


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    view: View,
    scale: float,
    cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of q [B, H, T, D] over those of k and v [B, H_kv, S, D] that `view` says are seen.

    Returns [B, H, T, D], as q.

    cap: scores are kept within ±it; 0: not
    sinks: [H], a score of each head that takes part in the softmax and has no value
    """
    k, v = k[:, :, view.first_key :], v[:, :, view.first_key :]
    if not cap and sinks is None:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=view.mask,
            is_causal=view.causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    groups = q.unflatten(1, (k.shape[1], -1))  # query heads of one KV head together
    k, v = k[:, :, None], v[:, :, None]
    if sinks is not None:
        sinks = sinks.view(*groups.shape[1:3], 1, 1)
    parts = [
        _attend_rows(groups[..., start : start + _ROWS, :], k, v, view, start, scale, cap, sinks)
        for start in range(0, q.shape[2], _ROWS)
    ]
    return torch.cat(parts, dim=-2).flatten(1, 2)


def _attend_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    view: View,
    start: int,
    scale: float,
    cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q: the rows from `start` on."""
    precise = q.dtype if q.dtype == torch.float64 else torch.float32
    scores = capped((q @ k.mT).to(precise) * scale, cap)
    rows = torch.arange(start, start + q.shape[-2], device=q.device)
    if view.mask is not None:
        scores = scores.masked_fill(~view.mask[rows], -torch.inf)
    elif view.causal:
        seen = rows[:, None] >= torch.arange(k.shape[-2], device=q.device)
        scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        with_sinks = torch.cat((scores, sinks.to(precise).expand(*scores.shape[:-1], 1)), dim=-1)
        return with_sinks.softmax(dim=-1)[..., :-1].to(v.dtype) @ v
    return scores.softmax(dim=-1).to(v.dtype) @ v
