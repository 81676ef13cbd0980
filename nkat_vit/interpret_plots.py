"""The pictures of `nkat_vit.interpret`: drawing only, all numbers come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nkat.host.figures import PRUNED, TRIAL, new_figure, save_figure, whole_ticks
from nkat_vit.attention import COLOR_GROUPS
from nkat_vit.gauge import Gauge
from nkat_vit.maps import cells, on_pixels
from nkat_vit.model import ViTConfig
from nkat_vit.pictures import DPI, as_picture, overlay

_GROUPS = ("red", "green", "blue", "shared")


def plot_sample(
    path: Path, image: Tensor, flow: Tensor, attention: Sequence[Tensor], config: ViTConfig, title: str
) -> None:
    """One picture: itself, rollout over it, each layer's mean map, and each head of the last layer that sees colours
    and of the last one. The panels of a row share one scale, from 0, which a colour bar beside them shows.

    image: [c, h, w] from 0 to 1; flow: [n]; attention: [heads, n, n] a layer
    """
    query = "what the CLS token looks at" if config.pool == "cls" else "what all tokens look at, the mean"
    rows: list[tuple[str, list[tuple[str, Tensor]]]] = [
        ("rollout: how much of each cell reaches the pooled vector", [("picture", flow), ("rollout", flow)]),
        (
            f"{query}: each layer, the mean of its heads",
            [(f"layer {layer}", _received(weights.mean(0), config)) for layer, weights in enumerate(attention)],
        ),
    ]
    for layer in _layers_by_head(config):
        heads = [(_head_name(layer, h, config), _received(w, config)) for h, w in enumerate(attention[layer])]
        rows.append((f"{query}: the heads of layer {layer}", heads))
    columns = max(config.depth, config.heads, 3)
    # Laid out by hand: it takes matplotlib a second for two dozen panels.
    height = 1.75 * len(rows) + 0.4
    figure = new_figure(title, (1.35 * columns + 0.8, height), automatic=False)
    place = {"left": 0.01, "right": 1 - 0.8 / (1.35 * columns + 0.8), "bottom": 0.02, "top": 1 - 0.85 / height}
    panels = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw=place | {"hspace": 0.45, "wspace": 0.06})
    for axes in panels.flat:
        axes.axis("off")
    for line, (text, maps) in zip(panels, rows, strict=True):
        largest = max(float(cells(values, config).max()) for _, values in maps)
        for axes, (name, values) in zip(line, maps, strict=False):
            axes.set_title(name, fontsize=8)
            if name == "picture":
                axes.imshow(as_picture(image), cmap="gray", vmin=0, vmax=1)
            else:
                shown = overlay(axes, image, on_pixels(cells(values, config), config), largest)
        box, end = line[0].get_position(), line[len(maps) - 1].get_position()
        figure.text(0.01, box.y1 + 0.26 / height, text, fontsize=9)
        bar = figure.add_axes((end.x1 + 0.008, end.y0, 0.1 / (1.35 * columns), end.height))
        figure.colorbar(shown, cax=bar).set_label("weight of a cell", fontsize=7)
        bar.tick_params(labelsize=7)
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
    strength.set(title="strength by layer", xlabel="layer", ylabel="s, the factor of θ")
    strength.set_ylim(0, 1.1 * max(*strengths, gauges[0].base_strength))  # a few per cent are no cliff
    strength.legend(loc="lower right")
    sizes = torch.linalg.matrix_norm(thetas, 2)
    shown = norms.imshow(sizes.numpy(), aspect="auto", cmap="viridis")
    norms.set(title="largest singular value of θ", xlabel="head", ylabel="layer")
    whole_ticks(strength.xaxis, norms.xaxis, norms.yaxis)
    figure.colorbar(shown, ax=norms, label="singular value")
    for layer in layers:
        values = torch.linalg.svdvals(thetas[layer]).mean(0)
        spectrum.plot(values[: 4 * gauges[0].p.shape[2]].numpy(), ".-", label=f"layer {layer}")
    spectrum.set(
        title="singular values of θ, mean of heads (in pairs: antisymmetric)",
        xlabel="which, the largest first",
        ylabel="singular value",
    )
    spectrum.set_ylim(bottom=0)
    whole_ticks(spectrum.xaxis)
    spectrum.legend(fontsize=7)
    limit = thetas[0, 0].abs().max().item()
    shown = example.imshow(thetas[0, 0].numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
    example.set(title="θ of layer 0, head 0", xlabel="dimension of the key", ylabel="dimension of the query")
    figure.colorbar(shown, ax=example, label="entry of θ")
    save_figure(figure, path, force=False, dpi=DPI)


def plot_summary(path: Path, record: Mapping[str, Any], title: str) -> None:
    """By layer: entropy, distance, keys left, and the share of the commutator; with accuracy without gauge terms."""
    layers = record["layers"]
    with_terms, without = (100 * record[name] for name in ("accuracy", "accuracy_without_gauge"))
    figure = new_figure(f"{title}; accuracy {with_terms:.2f} %, gauge terms taken out {without:.2f} %", (12, 7))
    panels = (
        ("entropy", "how spread attention is", "entropy, bits"),
        ("distance", "how far a query looks, weighted mean", "distance, cells"),
        ("commutator", "size of the gauge term", "what it adds to the scores, relative to them, rms"),
        ("keys", "keys that a query is left with", "keys"),
    )
    for axes, (name, text, unit) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        values = np.array([np.atleast_1d(layer[name]) for layer in layers])
        by_head = values.shape[1] > 1
        if by_head:
            axes.plot(values[:, 0], ".", color=PRUNED, label="a head")
            axes.plot(values[:, 1:], ".", color=PRUNED)
        axes.plot(values.mean(axis=1), "o-", color=TRIAL, label="mean of heads" if by_head else "mean of all")
        axes.set(title=text, xlabel="layer", ylabel=unit, ylim=(0, 1.25 * values.max() or 1))  # room for the legend
        axes.legend(loc="upper right", ncols=2)
        whole_ticks(axes.xaxis)
    save_figure(figure, path, force=False, dpi=DPI)


def _layers_by_head(config: ViTConfig) -> list[int]:
    """The layers whose heads are drawn one by one: the last that sees colours, and the last of all."""
    last_colour = min(config.color_layers, config.depth) - 1
    return sorted({config.depth - 1, last_colour if config.split_heads else config.depth - 1})


def _head_name(layer: int, head: int, config: ViTConfig) -> str:
    if not config.split_heads or layer >= config.color_layers:
        return f"head {head}"
    return f"head {head}: {_GROUPS[head * COLOR_GROUPS // config.heads]}"


def _received(weights: Tensor, config: ViTConfig) -> Tensor:
    """[n]: what the CLS token looks at, or where there is none, what all tokens look at on average."""
    return weights[0] if config.pool == "cls" else weights.mean(0)
