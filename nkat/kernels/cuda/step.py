"""The operations of a decode step in Triton, and what they work on: one token of one sequence, float32 throughout.

`nkat.engine.plan` makes the operands from a model and puts the operations in order; its `TorchOps` are the same
operations in plain torch, against which these are tested. Nothing here waits for the GPU or asks it for a number, so
that a CUDA graph can record it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nkat.kernels.cuda import linear as cuda
from nkat.kernels.cuda import step_kernels
from nkat.kernels.cuda.planes import FileWeight, PackedWeight
from nkat.kernels.cuda.triton import require_triton

_MOST_KEYS = 64  # of a tile, whose keys, like its values, take at most so many bytes of shared memory:
_KEY_BYTES = 16 << 10
_ATTENTION_PROGRAMS = 264  # two for each of an H100's 132 multiprocessors
_MOST_SPLITS = 64
_MOST_SLICES = 16  # of an input: each is a program that reads all of it, and a row of `inner` for everyone to add up


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Layers multiplied at once: their rows follow each other in `weight`.

    bias: [m] or None
    up: [m, R] or None, as in `Siblings`
    segments: first row of each layer but the first; first_segment: the first layer's number among its siblings
    """

    weight: PackedWeight
    bias: Tensor | None
    up: Tensor | None
    first_segment: int
    segments: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Siblings:
    """Linear layers that read the same input of n; their outputs follow each other.

    down: [S·R, n], or None where no layer has Θ; layers without, or with a smaller one, have zeros in it and in `up`
    kappas: float32 [S], read whenever the layers run
    """

    groups: tuple[Group, ...]
    inputs: int
    outputs: int
    rank: int
    down: Tensor | None
    kappas: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Input:
    """What siblings multiply: x [n], the same in `cuda.permute`'s order [1, n], down @ x in parts [S, 1, parts, R]."""

    natural: Tensor
    permuted: Tensor
    inner: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """A block's attention. keys, values: [H_kv, capacity, D]; cos, sin: float32 [capacity, rotated elements / 2].

    cap: scores are kept within ±it (c·tanh(x/c)); 0: not
    warmth: float32 [capacity], multiplies the query at each position; None: all are 1
    """

    heads: int
    scale: float
    window: int
    interleaved: bool
    epsilon: float
    q_norm: Tensor | None
    k_norm: Tensor | None
    cos: Tensor
    sin: Tensor
    keys: Tensor
    values: Tensor
    cap: float = 0.0
    warmth: Tensor | None = None


class TritonOps:
    """star: with Θ; without, its memory is not even read."""

    def __init__(self, star: bool) -> None:
        require_triton()
        self.star = star

    def embed(self, weight: PackedWeight, token: Tensor, scale: float) -> Tensor:
        """The token's row times `scale`: [d]. token: int64 [1]"""
        row = cuda.rows(weight, token)[0]
        return row if scale == 1.0 else row * scale

    def norm(
        self,
        x: Tensor,
        branch: Tensor | None,
        branch_weight: Tensor | None,
        weight: Tensor | None,
        epsilon: float,
        readers: Siblings,
    ) -> tuple[Tensor, Input]:
        """(x + branch, its RMS norm for `readers`); with branch_weight, the branch gets its RMS norm first.

        Without weight, the readers get x + branch itself.
        """
        total = x if branch is None else torch.empty_like(x)
        size = len(x)
        slice_width = _slice_width(size)
        target = self._target(readers, slices(size))
        step_kernels.norm_kernel[(slices(size),)](
            x,
            x if branch is None else branch,
            x if branch_weight is None else branch_weight,
            x if weight is None else weight,
            total,
            *self._pointers(target, readers),
            size,
            epsilon,
            has_branch=branch is not None,
            branch_norm=branch_weight is not None,
            has_norm=weight is not None,
            width=_power(size),
            slice_width=slice_width,
            **self._columns(readers),
            num_warps=8,
            enable_fp_fusion=True,
        )
        return total, target

    def linear(self, siblings: Siblings, x: Input) -> Tensor:
        """All siblings' outputs, [m]."""
        y = torch.empty(1, siblings.outputs, device=x.natural.device)
        start = 0
        for group in siblings.groups:
            stop = start + group.weight.shape[0]
            star = None
            if self.star and group.up is not None and x.inner is not None:
                own = slice(group.first_segment, group.first_segment + len(group.segments) + 1)
                star = cuda.Star(group.up, x.inner[own], siblings.kappas[own])
            out = y[:, start:stop]
            if isinstance(group.weight, FileWeight):
                whole = None if star is None else star._replace(inner=star.inner[0].sum(dim=1))
                out.copy_(cuda.dequantised(group.weight, x.natural[None], group.bias, whole))
            else:
                cuda.vector(group.weight, x.permuted, group.bias, star, segments=group.segments, out=out)
            start = stop
        return y[0]

    def attend(self, qkv: Tensor, attention: Attention, position: Tensor, readers: Siblings) -> Input:
        """Writes the new key and value into the cache at `position` (int64 [1]) and attends to all that is seen."""
        kv_heads, capacity, head_dim = attention.keys.shape
        heads = attention.heads
        padded_dim = max(16, _power(head_dim))
        block_keys = max(16, min(_MOST_KEYS, _KEY_BYTES // (padded_dim * attention.keys.element_size())))
        splits = max(1, min(_MOST_SPLITS, _ATTENTION_PROGRAMS // kv_heads, -(-capacity // block_keys)))
        mixed = torch.empty(splits, heads, head_dim, device=qkv.device)
        peak, mass = torch.empty(2, splits, heads, device=qkv.device)
        has_norm = attention.q_norm is not None
        step_kernels.attention_kernel[(kv_heads, splits)](
            qkv,
            attention.q_norm if has_norm else qkv,
            attention.k_norm if has_norm else qkv,
            attention.cos,
            attention.sin,
            attention.cos if attention.warmth is None else attention.warmth,
            attention.keys,
            attention.values,
            position,
            mixed,
            peak,
            mass,
            capacity,
            attention.window,
            attention.scale,
            attention.epsilon,
            attention.cap,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            half=attention.cos.shape[1],
            interleaved=attention.interleaved,
            has_norm=has_norm,
            has_cap=attention.cap != 0.0,
            has_warmth=attention.warmth is not None,
            splits=splits,
            padded_group=max(16, _power(heads // kv_heads)),
            padded_dim=padded_dim,
            block_keys=block_keys,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=True,
        )
        target = self._target(readers, heads)
        step_kernels.combine_kernel[(heads,)](
            mixed,
            peak,
            mass,
            *self._pointers(target, readers),
            heads * head_dim,
            heads=heads,
            head_dim=head_dim,
            splits=splits,
            padded_splits=_power(splits),
            padded_dim=_power(head_dim),
            **self._columns(readers),
            num_warps=4,
            enable_fp_fusion=True,
        )
        return target

    def activate(self, gate_up: Tensor, gelu: bool, readers: Siblings) -> Input:
        """activation(gate) · up for both, one behind the other, [2·n]."""
        size = len(gate_up) // 2
        slice_width = _slice_width(size)
        target = self._target(readers, slices(size))
        step_kernels.activation_kernel[(slices(size),)](
            gate_up,
            *self._pointers(target, readers),
            size,
            gelu=gelu,
            slice_width=slice_width,
            **self._columns(readers),
            num_warps=4,
            enable_fp_fusion=True,
        )
        return target

    def _target(self, readers: Siblings, parts: int) -> Input:
        natural, permuted = torch.empty(2, readers.inputs, device=readers.kappas.device)
        inner = None
        if self.star and readers.down is not None:
            inner = torch.empty(len(readers.kappas), 1, parts, readers.rank, device=natural.device)
        return Input(natural, permuted[None], inner)

    def _pointers(self, target: Input, readers: Siblings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if readers.down is None or target.inner is None:  # any memory will do
            return target.natural, target.permuted, target.natural, target.natural
        return target.natural, target.permuted, readers.down, target.inner

    def _columns(self, readers: Siblings) -> dict[str, int]:
        columns = len(readers.down) if self.star and readers.down is not None else 0
        return {"columns": columns, "padded_columns": _power(max(1, columns)), "rank": max(1, readers.rank)}


def _power(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def slices(size: int) -> int:
    """Programs that make an input of this size, each a part of `down @ x`, where no attention does."""
    return -(-size // _slice_width(size))


def _slice_width(size: int) -> int:
    return max(256, _power(-(-size // _MOST_SLICES)))
