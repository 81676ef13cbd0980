"""The picture of a confusion matrix: drawing only, all numbers come in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from nkat.host.figures import new_figure, save_figure
from nkat_vit.pictures import DPI

_MOST_NUMBERS = 20  # classes, up to which each cell has its number


def plot_confusion(path: Path, confusion: Tensor, names: Sequence[str], title: str, force: bool) -> None:
    """A row for each true class, a column for each answer, the cells in shares of the row.

    confusion: counts [classes, classes]
    """
    counts = confusion.numpy().astype(float)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    from matplotlib.colors import PowerNorm

    size, short = len(names), max(map(len, names)) < 3
    small = size > _MOST_NUMBERS
    inches = max(5.0, (0.2 if small else 0.55) * size)
    figure = new_figure(title, (inches + 2.2, inches + 1.3))
    axes = figure.subplots()
    # By the root of the share: otherwise a mistake in five of a hundred is as white as none.
    shown = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100))
    axes.set_xticks(range(size), names)
    if not short:
        axes.tick_params(axis="x", rotation=45)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), names)
    axes.tick_params(labelsize=7 if small else 9)
    axes.set(xlabel="taken for", ylabel="true class")
    if not small:
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column]:
                text = f"{share:.0f}" if share >= 1 else "<1"
                axes.text(
                    column, row, text, ha="center", va="center", fontsize=8, color="white" if share > 40 else "black"
                )
    bar = figure.colorbar(shown, ax=axes, ticks=[0, 1, 5, 10, 25, 50, 100], shrink=0.8)
    bar.set_label("share of the true class's pictures, %")
    save_figure(figure, path, force, dpi=DPI)
