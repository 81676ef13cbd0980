"""Deletion and insertion (Petsiuk, Das and Saenko, RISE, arXiv 1806.07421): does a map show what an answer rests on?

Deletion blackens the picture cell by cell, the map's largest first, and follows the probability of the class: the
better the map, the sooner it falls, the smaller the area under the curve. Insertion puts the cells in the same order
into a blurred copy: the better, the larger. A cell is what one token covers, the finest that a map tells apart, and so
the control is a random order of cells. Pictures are answered as they are, without test-time augmentation. Blackening
makes pictures such as no model was trained on: it is the differences between orders that mean something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nkat.host.console import bar
from nkat_vit.maps import answer_maps, on_pixels
from nkat_vit.model import NKATViT

STEPS = 16  # of a curve, or as many as there are cells
RANDOM = "random"
_BATCH = 100


@dataclass(frozen=True, slots=True)
class Curves:
    """Probabilities of the pictures' classes by the order in which cells were replaced.

    shares: [k + 1], of the cells, from 0 to 1;  deletion, insertion: [n, k + 1] by the name of the order
    """

    shares: Tensor
    deletion: Mapping[str, Tensor]
    insertion: Mapping[str, Tensor]

    def areas(self, kind: str, name: str) -> Tensor:
        """Under the curves of a kind ("deletion" or "insertion") for an order: [n], 0 to 1."""
        return torch.trapezoid(getattr(self, kind)[name].double(), self.shares.double(), dim=1)

    def record(self) -> dict[str, Any]:
        """For JSON: mean areas with their standard errors, each order's difference from random pair by pair, curves."""
        orders: dict[str, Any] = {}
        for name in self.deletion:
            orders[name] = {}
            for kind in ("deletion", "insertion"):
                areas, chance = self.areas(kind, name), self.areas(kind, RANDOM)
                orders[name][kind] = with_error(areas)
                if name != RANDOM:
                    orders[name][f"{kind}_from_random"] = with_error(areas - chance)
                orders[name][f"{kind}_curve"] = getattr(self, kind)[name].double().mean(dim=0).tolist()
        return {"shares": self.shares.tolist(), "orders": orders}


def with_error(values: Tensor) -> dict[str, Any]:
    """Mean of values [n] and its standard error (None of a single one)."""
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(values.mean()), "standard_error": error}


def order_by(values: Tensor, generator: torch.Generator) -> Tensor:
    """Indices [b, m] of values [b, m] from the largest down; equal ones in random order, not in that of reading."""
    shuffled = torch.argsort(torch.rand(values.shape, generator=generator), dim=1).to(values.device)
    return shuffled.gather(1, values.gather(1, shuffled).argsort(dim=1, descending=True, stable=True))


def follow(
    model: NKATViT, start: Tensor, goal: Tensor, order: Tensor, targets: Tensor, counts: Tensor, step: Callable[[], Any]
) -> Tensor:
    """The probability of targets [b] while cells of `start` become those of `goal`, the first of `order` first.

    start, goal: pictures [b, c, h, w]; order: [b, cells]; counts: [k + 1], how many cells are replaced at each point;
    step: called after each. Returns [b, k + 1].
    """
    place = order.argsort(dim=1)
    points = []
    with torch.no_grad():
        for count in counts.tolist():
            replaced = on_pixels(place < count, model.config)[:, None]
            shares = model(torch.where(replaced, goal, start))[0].softmax(dim=1)
            points.append(shares.gather(1, targets[:, None]).squeeze(1).cpu())
            step()
    return torch.stack(points, dim=1)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Pictures [b, c, side, side] under a Gaussian of so many pixels, mirrored at the edges."""
    channels, side = images.shape[1], images.shape[-1]
    radius = min(math.ceil(3 * sigma), side - 1)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=images.device) / sigma) ** 2)
    kernel = (weights / weights.sum()).to(images.dtype).expand(channels, 1, -1)
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    across = F.conv2d(padded, kernel[:, :, None], groups=channels)
    return F.conv2d(across, kernel[:, :, :, None], groups=channels)


def blur_sigma(model: NKATViT) -> float:
    """Of the copies that insertion starts from, in pixels: an eighth of the side, which leaves where it is bright."""
    return model.config.image_size / 8


def measure_curves(model: NKATViT, images: Tensor, seed: int = 0) -> Curves:
    """The curves of each map, and of a random order, for the model's own answers.

    images: [n, c, h, w] from 0 to 1; seed: of the random order and of ties
    """
    generator = torch.Generator().manual_seed(seed)
    number = model.config.grid**2
    counts = torch.linspace(0, number, min(STEPS, number) + 1).round().long()
    deletion: dict[str, list[Tensor]] = {}
    insertion: dict[str, list[Tensor]] = {}
    batches = images.split(_BATCH)
    with bar(len(batches) * 8 * len(counts), "deletion and insertion", "step") as progress:
        for batch in batches:
            with torch.no_grad():
                targets = model(batch)[0].argmax(dim=1)
            found = answer_maps(model, batch, targets)
            found[RANDOM] = torch.zeros_like(found["rollout"])  # all equal: in random order
            black, faint = torch.zeros_like(batch), blurred(batch, blur_sigma(model))
            for name, values in found.items():
                order = order_by(values, generator)
                for curves, start, goal in ((deletion, batch, black), (insertion, faint, batch)):
                    line = follow(model, start, goal, order, targets, counts, progress.update)
                    curves.setdefault(name, []).append(line)
    joined = ({name: torch.cat(parts) for name, parts in curves.items()} for curves in (deletion, insertion))
    return Curves(counts / number, *joined)
