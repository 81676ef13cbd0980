"""The pictures of what speaks for a class, of `nkat_vit.interpret`: drawing only, all numbers come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from nkat.host.figures import BASE, BEST, PRUNED, TRIAL, new_figure, save_figure
from nkat_vit.deletion import RANDOM, Curves, with_error
from nkat_vit.maps import on_pixels
from nkat_vit.model import ViTConfig
from nkat_vit.pictures import DPI, as_picture, overlay

_COLOURS = {"relevance": BEST, "rollout": TRIAL, "attention": BASE, RANDOM: PRUNED}


def plot_maps(
    path: Path,
    images: Tensor,
    maps: Mapping[str, Tensor],
    captions: Sequence[Sequence[str]],
    config: ViTConfig,
    title: str,
) -> None:
    """A row a picture [b, c, h, w] from 0 to 1, with a column for each map [b, cells], scaled to its own largest.

    captions: for each picture, of itself and of the maps that follow it, as far as they have one
    """
    count, columns = len(images), 1 + len(maps)
    figure = new_figure(title, (1.7 * columns + 1.0, 1.85 * count + 0.7))
    panels = figure.subplots(count, columns, squeeze=False)
    for row, line in enumerate(panels):
        for axes in line:
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].imshow(as_picture(images[row]), cmap="gray", vmin=0, vmax=1)
        for axes, values in zip(line[1:], maps.values(), strict=True):
            scaled = values[row] / values[row].max().clamp_min(1e-30)
            shown = overlay(axes, images[row], on_pixels(scaled, config), 1.0)
        for axes, text in zip(line, captions[row], strict=False):
            axes.set_xlabel(text, fontsize=8)
    for axes, name in zip(panels[0], ("picture", *maps), strict=True):
        axes.set_title(name, fontsize=10)
    figure.colorbar(shown, ax=panels, shrink=0.4).set_label("share of the map's largest cell", fontsize=8)
    save_figure(figure, path, force=False, dpi=DPI)


def plot_curves(path: Path, curves: Curves, title: str) -> None:
    """Deletion and insertion, the mean over the pictures with its standard error, a line for each order of cells."""
    figure = new_figure(f"{title}: the probability of the model's answer", (11, 4.6))
    sides = {"deletion": "cells blackened, %", "insertion": "cells put into a blurred copy, %"}
    highest = 0.0
    for axes, (kind, text) in zip(figure.subplots(1, 2, sharey=True), sides.items(), strict=True):
        lines = getattr(curves, kind)
        for name in sorted(lines, key=lambda name: name != RANDOM):  # the control below the others
            values = lines[name]
            area = with_error(curves.areas(kind, name))
            mean, error = (100 * part for part in _mean_and_error(values))
            width = "" if area["standard_error"] is None else f" ± {area['standard_error']:.3f}"
            x, highest = 100 * curves.shares, max(highest, float((mean + error).max()))
            axes.plot(x, mean, ".-", color=_COLOURS[name], label=f"{name}: {area['mean']:.3f}{width}")
            axes.fill_between(x, mean - error, mean + error, color=_COLOURS[name], alpha=0.15, linewidth=0)
        better = "smaller" if kind == "deletion" else "larger"
        axes.set(title=kind, xlabel=text, xlim=(0, 100))
        place = "upper right" if kind == "deletion" else "lower right"  # where no curve ends
        axes.legend(title=f"area under the curve, {better} is better", fontsize=8, title_fontsize=8, loc=place)
    figure.axes[0].set(ylabel="probability, %", ylim=(0, min(102.0, 1.1 * highest)))
    save_figure(figure, path, force=False, dpi=DPI)


def _mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of curves [n, k]: [k] each; no error of a single one."""
    mean = values.mean(dim=0)
    return mean, values.std(dim=0) / len(values) ** 0.5 if len(values) > 1 else mean * 0
