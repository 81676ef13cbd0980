"""The stem's convolutions, each with its BatchNorm and GELU: on a processor that learns, by a kernel for both.

The parameters are those of torch's modules, and elsewhere (in evaluation, on a GPU, in an exported model) so are the
operations; the numbers agree to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nkat.kernels.cpu.beside_torch import run
from nkat.kernels.cpu.learning import LANES, number
from nkat.kernels.cpu.norm_gelu import backward_kernel, forward_kernel, gradient_sums_kernel, moments_kernel


class Stem(nn.Sequential):
    """Convolution, BatchNorm2d and GELU, once for each (channels, stride) of `layers`; [b, c, h, w] in and out."""

    def __init__(self, channels: int, layers: tuple[tuple[int, int], ...]) -> None:
        modules: list[nn.Module] = []
        for width, stride in layers:
            modules += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.GELU()]
            channels = width
        super().__init__(*modules)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures or whatever is before, to the last layer's channels."""
        if x.device.type == "cpu":  # where oneDNN's convolutions, and the norms behind them, want it so
            x = x.contiguous(memory_format=torch.channels_last)
        for convolution, norm in self.layers():
            x = norm_gelu(convolution(x), norm)
        return x

    def layers(self) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Each convolution and its norm."""
        modules = list(self)
        return zip(cast(Any, modules[::3]), cast(Any, modules[1::3]), strict=True)


def norm_gelu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """GELU(BatchNorm(x)) of a convolution's output [b, c, h, w]; in training mode the norm's averages move on."""
    if not (norm.training and _suits(x)):
        return F.gelu(norm(x))
    out, mean, variance = cast(tuple[Tensor, ...], _NormGelu.apply(x, norm.weight, norm.bias, norm.eps))
    count = x.numel() // x.shape[1]
    with torch.no_grad():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, cast(float, norm.momentum))
        norm.running_var.lerp_(variance * (count / max(count - 1, 1)), cast(float, norm.momentum))
    return out


def _suits(x: Tensor) -> bool:
    """Whether the kernels take it."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.shape[1] % LANES == 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


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
