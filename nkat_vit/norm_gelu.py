"""GELU(BatchNorm(x)) of a batch on a processor and its gradients, by kernels: two passes in each direction."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nkat.kernels.cpu.beside_torch import run
from nkat.kernels.cpu.learning import LANES as LANES
from nkat.kernels.cpu.learning import number
from nkat.kernels.cpu.norm_gelu import backward_kernel, forward_kernel, gradient_sums_kernel, moments_kernel


def batch_norm_gelu(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """GELU of the norm of x [b, c, h, w], channels last, c a multiple of LANES; and the mean and variance [c] that
    it was made with.
    """
    return cast(tuple[Tensor, Tensor, Tensor], _NormGelu.apply(x, weight, bias, epsilon))


class _NormGelu(torch.autograd.Function):
    """(x, weight, bias, ε) → GELU of the batch's norm, and the mean and variance [c] that it was made with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        channels, rows, kind = x.shape[1], x.numel() // x.shape[1], number(x)
        # Sums of what lies about one of the numbers: squares of large ones would leave nothing of the variance.
        shift = x[0, :, 0, 0].float()
        partial = x.new_empty(torch.get_num_threads(), 2, channels, dtype=torch.float32)
        run(moments_kernel(channels, kind), x, shift, partial, rows)
        moved, squares = partial.sum(dim=0) / rows
        mean, variance = shift + moved, (squares - moved * moved).clamp_(min=0)
        inverse = torch.rsqrt(variance + epsilon)
        scale = weight * inverse
        offset = bias - mean * scale
        out, slope = torch.empty_like(x), torch.empty_like(x)
        run(forward_kernel(channels, kind), x, scale, offset, out, slope, rows)
        ctx.save_for_backward(x, slope, scale, mean, inverse)
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, slope, scale, mean, inverse = ctx.saved_tensors
        channels, rows, kind = x.shape[1], x.numel() // x.shape[1], number(x)
        given = given.to(x.dtype).contiguous(memory_format=torch.channels_last)
        partial = x.new_empty(torch.get_num_threads(), 2, channels, dtype=torch.float32)
        run(gradient_sums_kernel(channels, kind), given, slope, x, mean, partial, rows)
        sums, products = partial.sum(dim=0)
        along, constant = -scale * inverse**2 * products / rows, -scale * sums / rows
        by_x = torch.empty_like(x)
        run(backward_kernel(channels, kind), given, slope, x, mean, scale, along, constant, by_x, rows)
        return by_x, products * inverse, sums, None
