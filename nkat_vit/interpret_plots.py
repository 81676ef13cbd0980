"""The pictures of `nkat_vit.interpret`: drawing only, all numbers come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nkat.host.figures import new_figure, save_figure
from nkat_vit.attention import COLOR_GROUPS
from nkat_vit.gauge import Gauge
from nkat_vit.model import ViTConfig
from nkat_vit.pictures import DPI, as_picture

_GROUPS = ("red", "green", "blue", "shared")


def plot_sample(
    path: Path, image: Tensor, flow: Tensor, attention: Sequence[Tensor], config: ViTConfig, title: str
) -> None:
    """One picture: itself, rollout over it, each layer's mean map, and each head of the last layer.

    image: [c, h, w] from 0 to 1; flow: [n]; attention: [heads, n, n] a layer
    """
    columns = max(config.depth, config.heads, 2)
    figure = new_figure(title, (1.35 * columns, 5), automatic=False)  # laying out two dozen panels takes a second
    panels = figure.subplots(3, columns, gridspec_kw={"left": 0.01, "right": 0.99, "bottom": 0.01, "top": 0.86})
    for axes in panels.flat:
        axes.axis("off")
    panels[0][0].imshow(as_picture(image), cmap="gray", vmin=0, vmax=1)
    panels[0][0].set_title("picture", fontsize=8)
    _overlay(panels[0][1], image, _map(flow, config), "rollout")
    for layer, weights in enumerate(attention):
        _overlay(panels[1][layer], image, _map(_received(weights.mean(0), config), config), f"layer {layer}")
    for head, weights in enumerate(attention[-1]):
        _overlay(panels[2][head], image, _map(_received(weights, config), config), _head_name(head, config))
    save_figure(figure, path, force=False, dpi=DPI)


def plot_gauges(path: Path, gauges: Sequence[Gauge]) -> None:
    """Strength and size of θ by layer and head, its spectrum, and one θ as a picture."""
    thetas = torch.stack([gauge.theta().detach().cpu() for gauge in gauges])  # [layers, heads, d, d]
    strengths = [gauge.strength().item() for gauge in gauges]
    figure = new_figure("gauge parameters", (12, 7))
    (strength, norms), (spectrum, example) = figure.subplots(2, 2)
    layers = np.arange(len(gauges))
    strength.plot(layers, strengths, "o-", label="s, learned")
    strength.plot(layers, [gauge.base_strength for gauge in gauges], "--", label="strength · decay^layer")
    strength.set(title="strength by layer", xlabel="layer")
    strength.legend()
    sizes = torch.linalg.matrix_norm(thetas, 2)
    shown = norms.imshow(sizes.numpy(), aspect="auto", cmap="viridis")
    norms.set(title="largest singular value of θ", xlabel="head", ylabel="layer")
    figure.colorbar(shown, ax=norms)
    for layer in layers:
        values = torch.linalg.svdvals(thetas[layer]).mean(0)
        spectrum.plot(values[: 4 * gauges[0].p.shape[2]].numpy(), ".-", label=f"layer {layer}")
    spectrum.set(title="singular values of θ (in pairs, as of every antisymmetric matrix)", xlabel="index")
    spectrum.legend(fontsize=7)
    limit = thetas[0, 0].abs().max().item()
    shown = example.imshow(thetas[0, 0].numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
    example.set(title="θ of layer 0, head 0")
    figure.colorbar(shown, ax=example)
    save_figure(figure, path, force=False, dpi=DPI)


def plot_summary(path: Path, record: Mapping[str, Any], title: str) -> None:
    """By layer: entropy, distance, keys left, and the share of the commutator; with accuracy without gauge terms."""
    layers = record["layers"]
    with_terms, without = (100 * record[name] for name in ("accuracy", "accuracy_without_gauge"))
    figure = new_figure(f"{title}; accuracy {with_terms:.2f} %, gauge terms taken out {without:.2f} %", (12, 7))
    for axes, name, text in zip(
        figure.subplots(2, 2).flat,
        ("entropy", "distance", "commutator", "keys"),
        ("entropy of attention, bits", "distance looked, cells", "½ s qᵀθk relative to qᵀk (rms)", "keys left a query"),
        strict=True,
    ):
        values = np.array([np.atleast_1d(layer[name]) for layer in layers])
        axes.plot(values, ".", color="#bbbbbb")
        axes.plot(values.mean(axis=1), "o-", color="#1f77b4", label="mean of heads")
        axes.set(title=text, xlabel="layer", ylim=(0, 1.05 * values.max() or 1))
    save_figure(figure, path, force=False, dpi=DPI)


def _head_name(head: int, config: ViTConfig) -> str:
    if not config.split_heads or config.color_layers < config.depth:  # heads shown are the last layer's
        return f"head {head}"
    return f"head {head}: {_GROUPS[head * COLOR_GROUPS // config.heads]}"


def _received(weights: Tensor, config: ViTConfig) -> Tensor:
    """[n]: what the CLS token looks at, or where there is none, what all tokens look at on average."""
    return weights[0] if config.pool == "cls" else weights.mean(0)


def _map(values: Tensor, config: ViTConfig) -> np.ndarray:
    """Tokens [n] → a picture [side, side] over the pixels, padding cut off."""
    cells = values[1:] if config.pool == "cls" else values
    pixels = cells.view(config.grid, config.grid).repeat_interleave(config.cell, 0).repeat_interleave(config.cell, 1)
    before = (config.grid * config.cell - config.image_size) // 2
    inside = slice(before, before + config.image_size)
    return pixels[inside, inside].cpu().float().numpy()


def _overlay(axes: Any, image: Tensor, values: np.ndarray, title: str) -> None:
    axes.imshow(as_picture(image.mean(0, keepdim=True)), cmap="gray", vmin=0, vmax=1)
    axes.imshow(values, cmap="inferno", alpha=0.6)
    axes.set_title(title, fontsize=8)
