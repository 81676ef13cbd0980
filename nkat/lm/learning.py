"""What lies between a block's linear layers of a model that learns on a CPU: each a kernel forward and one backward.

torch's operations read and write a tensor once for every sign and cast in a formula, and again for each in its
gradient; those of a fit took as long as its products. Here each is one pass (`nkat.kernels.cpu.learning`), what linear
layers read is written in their dtype at once, and the gradients of its readers are summed where they are used.
Attention's gradients are products of matrices for every sequence and KV head at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch

from nkat.kernels.cpu.beside_torch import run
from nkat.kernels.cpu.learning import (
    gate_backward_kernel,
    gate_kernel,
    norm_backward_kernel,
    norm_kernel,
    number,
    turn_kernel,
    weights_kernel,
    widen_kernel,
)
from nkat.lm.activation import kernel_clamp
from nkat.lm.architectures import Architecture
from nkat.lm.attention import View
from nkat.lm.operations import Operations

_SCORES = 1 << 23  # of one KV head, up to which its attention's gradients are made from all of them: 16 MB in bfloat16
_WIDER = 8  # numbers behind a row of attention's factors, for `widen_kernel`


def operations_for(x: torch.Tensor, dtype: torch.dtype) -> Operations:
    """Of a model that learns, whose residual stream is x and whose linear layers compute in `dtype`."""
    known = x.device.type == "cpu" and x.dtype == torch.float32 and dtype in (torch.float32, torch.bfloat16)
    return LearningOperations() if known else Operations()


class LearningOperations(Operations):
    """For a float32 residual stream on a CPU and linear layers in float32 or bfloat16."""

    def normed(
        self, x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype, readers: int = 1
    ) -> Sequence[torch.Tensor]:
        return _Norm.apply(x.contiguous(), weight, epsilon, dtype, readers)

    def turned(
        self, heads: torch.Tensor, view: View, interleaved: bool, dtype: torch.dtype, factor: torch.Tensor | None
    ) -> torch.Tensor:
        factor = torch.ones(len(view.cos)) if factor is None else factor
        return _Turn.apply(heads, view.cos, view.sin, factor, interleaved, dtype)

    def attended(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        view: View,
        scale: float,
        cap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        plain = view.causal and not cap and sinks is None
        if not plain or q.shape[1] // k.shape[1] * q.shape[2] ** 2 > _SCORES:
            return super().attended(q, k, v, view, scale, cap, sinks)
        return _Attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), scale)

    def gated(self, architecture: Architecture, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return _Gate.apply(gate, up, architecture.gelu, kernel_clamp(architecture))


class _Context(Protocol):
    """What the two directions of a function share; torch's own class takes any attribute."""

    given: Any  # what is no tensor

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...

    @property
    def saved_tensors(self) -> tuple[torch.Tensor, ...]: ...


class _Norm(torch.autograd.Function):
    """x [..., d], contiguous → its RMS norm in a dtype, once for each reader."""

    @staticmethod
    def forward(
        ctx: _Context, x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype, readers: int
    ) -> tuple[torch.Tensor, ...]:
        out, factors = torch.empty_like(x, dtype=dtype), torch.empty(x.numel() // x.shape[-1])
        kernel = norm_kernel(x.shape[-1], epsilon, number(x), number(out))
        run(kernel, x, weight, out, factors, len(factors))
        ctx.save_for_backward(x, weight, factors)
        return tuple(out.view_as(out) for _ in range(readers))

    @staticmethod
    def backward(ctx: _Context, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        x, weight, factors = ctx.saved_tensors
        gradients, of_x = tuple(g.contiguous() for g in gradients), torch.empty_like(x)
        kernel = norm_backward_kernel(x.shape[-1], number(x), number(gradients[0]), len(gradients))
        run(kernel, x, weight, factors, of_x, len(factors), *gradients)
        return of_x, None, None, None, None


class _Gate(torch.autograd.Function):
    """activation(gate) · up, [..., columns]."""

    @staticmethod
    def forward(
        ctx: _Context, gate: torch.Tensor, up: torch.Tensor, gelu: bool, clamp: tuple[float, float] | None
    ) -> torch.Tensor:
        ctx.given = gelu, clamp
        ctx.save_for_backward(gate, up)
        out = torch.empty(gate.shape, dtype=gate.dtype)
        run(gate_kernel(gate.shape[-1], number(gate), gelu, clamp), *_rows(gate, up), out, _count(gate))
        return out

    @staticmethod
    def backward(ctx: _Context, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
        kernel = gate_backward_kernel(gate.shape[-1], number(gate), *ctx.given)
        run(kernel, *_rows(gate, up), gradient.contiguous(), of_gate, of_up, _count(gate))
        return of_gate, of_up, None, None


def _count(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1]


def _rows(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Both and the bytes of a row of each: halves of one tensor have rows twice as long."""
    gate, up = gate.flatten(0, -2), up.flatten(0, -2)
    return gate, up, gate.stride(0) * gate.itemsize, up.stride(0) * up.itemsize


class _Turn(torch.autograd.Function):
    """RoPE of heads [B, T, H, D], times a factor of each position [T], → [B, H, T, D] in a dtype."""

    @staticmethod
    def forward(
        ctx: _Context,
        heads: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        factor: torch.Tensor,
        interleaved: bool,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        batch, count, number_of_heads, size = heads.shape
        out = torch.empty(batch, number_of_heads, count, size, dtype=dtype)
        ctx.given = interleaved, heads.dtype
        ctx.save_for_backward(cos, sin, factor)
        _turn(heads.contiguous(), out, cos, sin, factor, interleaved, backward=False)
        return out

    @staticmethod
    def backward(ctx: _Context, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        interleaved, dtype = ctx.given
        of_heads = torch.empty(gradient.transpose(1, 2).shape, dtype=dtype)
        cos, sin, factor = ctx.saved_tensors
        _turn(of_heads, gradient.contiguous(), cos, sin, factor, interleaved, backward=True)
        return of_heads, None, None, None, None, None


def _turn(
    by_token: torch.Tensor,
    by_head: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    factor: torch.Tensor,
    interleaved: bool,
    *,
    backward: bool,
) -> None:
    batch, count, heads, size = by_token.shape
    kernel = turn_kernel(size, cos.shape[-1], interleaved, number(by_token), number(by_head), backward)
    row = heads * size * by_token.itemsize
    run(kernel, by_token, row, by_head, cos.contiguous(), sin.contiguous(), factor, batch * count, count, heads)


class _Attention(torch.autograd.Function):
    """Causal softmax attention of q [B, H, T, D] over k and v [B, H_kv, T, D], contiguous → [B, H, T, D].

    The weights P are made again from the scores and their logsumexp L. With G the gradient by the result O and Δ the
    row sums of G·O (Dao, 2023, arXiv 2307.08691): ∂v = Pᵀ G, S = P·(G vᵀ − Δ), ∂q = scale · S k, ∂k = scale · Sᵀ q.
    L and Δ are subtracted within the products, before they are rounded: what is left of large scores is small.
    """

    @staticmethod
    def forward(ctx: _Context, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        every = [t if group == 1 else t.repeat_interleave(group, dim=1) for t in (k, v)]
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        result, log_sums = attention(q, *every, 0.0, True, scale=scale)
        ctx.given = scale
        ctx.save_for_backward(q, k, v, result, log_sums)
        return cast(torch.Tensor, result)

    @staticmethod
    def backward(ctx: _Context, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        q, k, v, result, log_sums = ctx.saved_tensors
        scale = ctx.given
        batch, heads, count, size = q.shape
        kind = number(q)
        wide_q, wide_gradient = (q.new_empty(batch, heads, count, size + _WIDER) for _ in range(2))
        strides = [t.stride(i) * t.itemsize for t in (gradient, result) for i in range(3)]
        run(
            widen_kernel(size, size + _WIDER, kind),
            *(q, (log_sums / scale).contiguous(), wide_q, gradient, result, wide_gradient),
            *(batch * heads * count, heads, count, *strides),
        )
        minus = q.new_zeros(_WIDER)
        minus[: kind.pieces] = -1.0
        wide_k, wide_v = (torch.cat((t, minus.expand(*t.shape[:3], -1)), dim=-1).flatten(0, 1) for t in (k, v))
        # query heads of one KV head behind one another
        wide_q, wide_gradient = (t.view(len(wide_k), -1, size + _WIDER) for t in (wide_q, wide_gradient))
        of_q, of_k, of_v = (torch.empty_like(t) for t in (q, k, v))
        flat_q, flat_k, of_flat_q = q.view(len(wide_k), -1, size), k.flatten(0, 1), of_q.view(len(wide_k), -1, size)
        step = max(1, _SCORES // (wide_q.shape[1] * count))
        for start in range(0, len(wide_k), step):
            part = slice(start, start + step)
            weights = torch.bmm(wide_q[part], wide_k[part].mT)
            of_scores = torch.bmm(wide_gradient[part], wide_v[part].mT)
            run(weights_kernel(kind, scale), weights, of_scores, weights.shape[0] * weights.shape[1], count)
            torch.bmm(weights.mT, wide_gradient[part, :, :size], out=of_v.flatten(0, 1)[part])
            torch.bmm(of_scores.mT, flat_q[part], out=of_k.flatten(0, 1)[part])
            torch.bmm(of_scores, flat_k[part], out=of_flat_q[part])
        return of_q, of_k, of_v, None
