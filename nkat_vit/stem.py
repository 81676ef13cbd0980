"""The stems: convolutions, each with its BatchNorm and GELU, in ways that suit a processor while it trains.

`Stem` is a row of them; `WhiteStem` begins with whitened patches and has a residual group for each halving. The
parameters are those of torch's modules, and elsewhere (in evaluation, on a GPU, in an exported model) so are the
operations; the numbers agree to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Up to so many points of a picture's output the gradient by a weight is faster as a product of matrices than in oneDNN.
# 256 to 256 channels, 4 × 4 points, batches of 128: a third of the time; at 8 × 8 it is not (AMX, torch 2.13).
_FEW_POINTS = 16
_PATCH = 2  # side of the whitened patches
# Added to their variances. Airbench's 5e-4 makes the finest detail so strong that faint noise hides the picture: of
# CIFAR-10's slightly noisy ones 30 % are right with it, 69 % with this, and of clean ones as many.
_EPSILON = 0.1


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
        x = _laid_out(x)
        for convolution, norm in self.layers():
            x = norm_gelu(convolve(x, convolution), norm)
        return x

    def layers(self) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Each convolution and its norm."""
        modules = list(self)
        return zip(cast(Any, modules[::3]), cast(Any, modules[1::3]), strict=True)


class WhiteStem(nn.Module):
    """Whitening, GELU, and a group for each (channels, 2) of `layers`: [b, c, h, w] → [b, channels, h/2ⁿ, w/2ⁿ].

    After airbench94 (Jordan, 2024, arXiv 2404.00498), with padding, so that a token is a square of pixels, and with a
    sum around the second convolution of each group.
    """

    def __init__(self, channels: int, layers: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.white = Whitening(channels)
        widths = (len(self.white.weight), *(width for width, _ in layers))
        self.groups = nn.Sequential(*(_Group(*pair) for pair in itertools.pairwise(widths)))

    def forward(self, x: Tensor) -> Tensor:
        """Pictures, or whatever is before, to the last group's channels."""
        return cast(Tensor, self.groups(F.gelu(self.white(_laid_out(x)))))


class Whitening(nn.Module):
    """A convolution [b, c, h, w] → [b, 8c, h, w] whose filters make patches of 2 × 2 uncorrelated and of one spread.

    The filters are the patches' principal components over their standard deviations, and the negatives of those. They
    come from pictures (`fit`), not from training, which moves the biases alone; before that, they pass each pixel on.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        patch = channels * _PATCH**2
        basis = torch.eye(patch).view(patch, channels, _PATCH, _PATCH)
        self.weight = nn.Parameter(torch.cat([basis, -basis]), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(2 * patch))

    def forward(self, x: Tensor) -> Tensor:
        """The last row and column of patches reach over the edge, where there are zeros."""
        return F.conv2d(F.pad(x, (0, _PATCH - 1, 0, _PATCH - 1)), self.weight, self.bias)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Takes the filters from what it is going to see [n, c, h, w]."""
        self.weight.copy_(whitening_filters(x, _EPSILON))


def whitening_filters(x: Tensor, epsilon: float) -> Tensor:
    """Filters float32 [8c, c, 2, 2] that make patches of 2 × 2 of x [n, c, h, w] uncorrelated, and their negatives.

    epsilon: added to the patches' variances
    """
    patches = F.unfold(x.float(), _PATCH).transpose(1, 2).flatten(0, 1).double().cpu()
    variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (components / (variances.clamp(min=0) + epsilon).sqrt()).T.flip(0).float()  # the strongest first
    return torch.cat([filters, -filters]).view(-1, x.shape[1], _PATCH, _PATCH)


class _Group(nn.Module):
    """A convolution with pooling behind it, and one with its input added."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = norm_gelu(F.max_pool2d(convolve(x, self.first), 2), self.first_norm)
        return x + norm_gelu(convolve(x, self.second), self.second_norm)


def _laid_out(x: Tensor) -> Tensor:
    """The same, on a processor as oneDNN's convolutions, and the norms behind them, want it."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def convolve(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """A convolution of [b, c, h, w] without bias; on a processor its gradients are made in the fastest way known."""
    if not (convolution.training and _suits(x)):
        return cast(Tensor, convolution(x))
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    stride, padding = convolution.stride[0], cast(int, convolution.padding[0])
    return cast(Tensor, _Convolution.apply(x.to(dtype), convolution.weight.to(dtype), stride, padding))


class _Convolution(torch.autograd.Function):
    """(x, weight, stride, padding) → their convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        given = given.contiguous(memory_format=torch.channels_last)

        def gradient(which: int) -> Tensor:
            places = [ctx.stride] * 2, [ctx.padding] * 2, [1, 1]
            wanted = [which == index for index in range(3)]
            found = torch.ops.aten.convolution_backward(given, x, weight, None, *places, False, [0, 0], 1, wanted)
            return cast(Tensor, found[which])

        # One after the other: oneDNN takes up to a third longer for both at once.
        by_x = gradient(0) if ctx.needs_input_grad[0] else None
        few = given.shape[2] * given.shape[3] <= _FEW_POINTS
        return by_x, _by_weight(given, x, weight, ctx.stride, ctx.padding) if few else gradient(1), None, None


def _by_weight(given: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """A convolution's gradient by its weight [o, c, k, k] as one product of matrices over all points."""
    outputs, channels, size, _ = weight.shape
    cells = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    cells = cells.unfold(1, size, stride).unfold(2, size, stride)  # [b, h, w, c, k, k]
    columns = cells.permute(0, 1, 2, 4, 5, 3).reshape(-1, size * size * channels)
    # A copy that lies as the product wants it costs a tenth of what the product gains.
    product = given.permute(0, 2, 3, 1).reshape(-1, outputs).T.contiguous() @ columns
    return product.view(outputs, size, size, channels).permute(0, 3, 1, 2)


def norm_gelu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """GELU(BatchNorm(x)) of a convolution's output [b, c, h, w]; in training mode the norm's averages move on."""
    if not (norm.training and _suits(x)):
        return F.gelu(norm(x))
    from nkat_vit.norm_gelu import LANES, batch_norm_gelu  # LLVM is loaded only where it is used

    if x.shape[1] % LANES:
        return F.gelu(norm(x))
    out, mean, variance = batch_norm_gelu(x, norm.weight, norm.bias, norm.eps)
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
    """Whether it is a processor's, in an order and of a kind that is taken here."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )
