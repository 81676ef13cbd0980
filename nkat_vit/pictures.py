"""PNG output shared by the package's pictures. matplotlib is imported when one is drawn, without a display."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nkat.host.figures import new_figure, save_figure

DPI = 120  # of what is drawn of a run or a model


def as_picture(image: Tensor) -> np.ndarray:
    """[c, h, w], floats from 0 to 1 → what matplotlib's imshow takes for grey or colour."""
    array = image.detach().cpu().float().clamp(0, 1).numpy()
    return array[0] if len(array) == 1 else array.transpose(1, 2, 0)


def overlay(axes: Any, image: Tensor, values: Tensor, largest: float) -> Any:
    """Draws a map [side, side] over the picture [c, side, side] in grey; returns what a colour bar can be made of."""
    axes.imshow(as_picture(image.mean(0, keepdim=True)), cmap="gray", vmin=0, vmax=1)
    return axes.imshow(values.cpu().float().numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=largest)


def save_grid(path: Path, images: Tensor, title: str, force: bool, captions: Sequence[Sequence[str]]) -> None:
    """Pictures [rows, columns, c, h, w], floats from 0 to 1, in a grid, each with its caption above it."""
    rows, columns = images.shape[:2]
    figure = new_figure(title, (columns * 1.2, rows * 1.4 + 0.4))
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, image, text in zip(panels, images.flatten(0, 1), itertools.chain(*captions), strict=True):
        axes.imshow(as_picture(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(text, fontsize=7)
        axes.axis("off")
    save_figure(figure, path, force, dpi=DPI)
