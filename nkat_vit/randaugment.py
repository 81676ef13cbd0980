"""RandAugment(N, M) on whole batches (Cubuk et al., arXiv 1909.13719), with torchvision's fourteen operations.

Each picture draws N operations in turn, each at magnitude M of 30 and with a random sign where a sign makes sense.
Pictures that drew the same operation go through it together. Pixels are floats from 0 to 255; operations that PIL
defines on whole numbers (posterize, equalize) round first. Geometry is bilinear and leaves black behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GREATEST_MAGNITUDE = 30
_GREY = (0.299, 0.587, 0.114)  # ITU-R 601-2 luma, as PIL
_SMOOTH = ((1, 1, 1), (1, 5, 1), (1, 1, 1))  # PIL's SMOOTH, which its Sharpness blends with

# An operation takes pictures [k, c, h, w] and signed strengths [k] from −1 to 1 (M / 30).
Operation = Callable[[Tensor, Tensor], Tensor]


def randaugment(images: Tensor, operations: int, magnitude: int, random: np.random.Generator) -> Tensor:
    """Pictures [b, c, h, w], floats from 0 to 255, each through `operations` randomly chosen ones."""
    table = list(OPERATIONS.values())
    for _ in range(operations):
        choice = random.integers(0, len(table), len(images))
        strength = random.choice([-1.0, 1.0], len(images)) * magnitude / GREATEST_MAGNITUDE
        images = each_its_own(images, table, choice, strength)
    return images


def each_its_own(images: Tensor, table: Sequence[Operation], choice: np.ndarray, strength: np.ndarray) -> Tensor:
    """Pictures [b, c, h, w], each through the operation of the table that `choice` [b] says, at its `strength` [b]."""
    # Sorted by operation, each operation's pictures are one slice.
    order = np.argsort(choice, kind="stable")
    ends = np.cumsum(np.bincount(choice, minlength=len(table)))
    index = torch.from_numpy(order).to(images.device)
    grouped = images[index]
    strengths = torch.from_numpy(strength[order]).to(images)
    for operation, start, end in zip(table, [0, *ends[:-1]], ends, strict=True):
        if start < end and operation is not _identity:
            grouped[start:end] = operation(grouped[start:end], strengths[start:end])
    return torch.empty_like(grouped).index_copy_(0, index, grouped)


def _identity(x: Tensor, _strength: Tensor) -> Tensor:
    return x


def _affine(x: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
    """rows: the six numbers [k] of the map from output to input, in units of half a side."""
    matrix = torch.stack(rows, dim=-1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _shear_x(x: Tensor, strength: Tensor) -> Tensor:
    one, zero, slope = torch.ones_like(strength), torch.zeros_like(strength), 0.3 * strength
    return _affine(x, (one, slope, slope, zero, one, zero))


def _shear_y(x: Tensor, strength: Tensor) -> Tensor:
    one, zero, slope = torch.ones_like(strength), torch.zeros_like(strength), 0.3 * strength
    return _affine(x, (one, zero, zero, slope, one, slope))


def _translate_x(x: Tensor, strength: Tensor) -> Tensor:
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    return _affine(x, (one, zero, 2 * (150 / 331) * strength, zero, one, zero))


def _translate_y(x: Tensor, strength: Tensor) -> Tensor:
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    return _affine(x, (one, zero, zero, zero, one, 2 * (150 / 331) * strength))


def _rotate(x: Tensor, strength: Tensor) -> Tensor:
    angle = strength * math.radians(30)
    zero = torch.zeros_like(strength)
    return _affine(x, (angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero))


def _blend(x: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """PIL's ImageEnhance: from `other` (factor 0) over the picture itself (1) and beyond; factor = 1 ± 0.9 M/30."""
    factor = (1 + 0.9 * strength).view(-1, 1, 1, 1)
    return torch.lerp(other, x, factor).clamp_(0, 255)


def _grey(x: Tensor) -> Tensor:
    """[k, 1, h, w]"""
    if x.shape[1] == 1:
        return x
    return (x * x.new_tensor(_GREY).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def _brightness(x: Tensor, strength: Tensor) -> Tensor:
    return _blend(x, torch.zeros_like(x), strength)


def _color(x: Tensor, strength: Tensor) -> Tensor:
    return _blend(x, _grey(x).expand_as(x), strength)


def _contrast(x: Tensor, strength: Tensor) -> Tensor:
    return _blend(x, _grey(x).mean(dim=(1, 2, 3), keepdim=True).expand_as(x), strength)


def _sharpness(x: Tensor, strength: Tensor) -> Tensor:
    channels = x.shape[1]
    kernel = x.new_tensor(_SMOOTH).div_(13).expand(channels, 1, 3, 3)
    smooth = x.clone()  # PIL leaves the border as it is
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(x, kernel, groups=channels)
    return _blend(x, smooth, strength)


def _posterize(x: Tensor, strength: Tensor) -> Tensor:
    bits = 8 - (strength.abs() * 4).round()
    step = torch.exp2(8 - bits).view(-1, 1, 1, 1)
    return (x.round() / step).floor_() * step


def _solarize(x: Tensor, strength: Tensor) -> Tensor:
    threshold = (255 * (1 - strength.abs())).view(-1, 1, 1, 1)
    return torch.where(x >= threshold, 255 - x, x)


def _autocontrast(x: Tensor, _strength: Tensor) -> Tensor:
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    stretched = (x - low) * (255 / (high - low).clamp_min(1e-6))
    return torch.where(high > low, stretched, x).clamp_(0, 255)


def _equalize(x: Tensor, _strength: Tensor) -> Tensor:
    """PIL's, a channel at a time: a table from the cumulative histogram, made so that the last level maps to 255."""
    values = x.round().long().flatten(2)
    counts = values.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, torch.ones_like(values))
    last = counts.gather(2, values.amax(dim=2, keepdim=True))
    step = (values.shape[2] - last) // 255
    before = counts.cumsum(dim=2) - counts
    table = ((before + step // 2) // step.clamp_min(1)).clamp_(max=255)
    mapped = table.gather(2, values).view_as(x).to(x.dtype)
    return torch.where(step.unsqueeze(-1) > 0, mapped, x)


OPERATIONS: dict[str, Operation] = {
    "identity": _identity,
    "shear x": _shear_x,
    "shear y": _shear_y,
    "translate x": _translate_x,
    "translate y": _translate_y,
    "rotate": _rotate,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
