"""A plain convolutional network of airbench94's kind (Jordan, 2024, arXiv 2404.00498), a peer of the image model.

Whitening of 2 x 2 patches, then three groups of two 3 x 3 convolutions with pooling, batch norms without scales, GELU,
and a linear layer whose logits are divided by 9: 2 M parameters, SGD with Nesterov's momentum on a triangle, batches of
1024, label smoothing 0.2, large steps for biases, and an average of weights that looks ahead.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nkat_vit.augment import AugmentConfig
from nkat_vit.data import ImageSet, find_dataset
from nkat_vit.stem import whitening_filters

WIDTHS = (64, 256, 256)
_PATCH = 2
_EPSILON = 5e-4  # of the whitening
_PATCHES_FROM = 5000  # pictures
_BATCH = 1024
_MOMENTUM = 0.85
_RATE, _DECAY, _BIASES = 11.5, 0.0153, 64.0  # a thousand pictures
_PER_PICTURE = 1 / (1024 * (1 + 1 / (1 - _MOMENTUM)))
_LOOK_EVERY = 5


class Group(nn.Module):
    """Two convolutions, the first with pooling behind it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding="same", bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding="same", bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs, eps=1e-12, momentum=0.4) for _ in range(2))
        for convolution in (self.first, self.second):
            with torch.no_grad():  # the inputs pass through, as far as there are outputs for them
                nn.init.dirac_(convolution.weight[: convolution.weight.shape[1]])
        for norm in self.norms:
            norm.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.norms[0](F.max_pool2d(self.first(x), 2)))
        return F.gelu(self.norms[1](self.second(x)))


class PlainCNN(nn.Module):
    """Pictures [b, 3, 32, 32], normalised, → logits [b, 10]."""

    def __init__(self, filters: torch.Tensor) -> None:
        """filters: of the whitening, [24, 3, 2, 2]"""
        super().__init__()
        self.white = nn.Conv2d(3, len(filters), _PATCH)
        self.white.weight.data.copy_(filters)
        self.white.weight.requires_grad_(False)
        nn.init.zeros_(self.white.bias)
        widths = (len(filters), *WIDTHS)
        self.groups = nn.Sequential(*(Group(*pair) for pair in itertools.pairwise(widths)))
        self.head = nn.Linear(WIDTHS[-1], 10, bias=False)
        self.ahead: dict[str, torch.Tensor] = {}

    @classmethod
    def for_pictures(cls, train: ImageSet) -> PlainCNN:
        """With the whitening that suits these training pictures."""
        return cls(whitening(train.images[:_PATCHES_FROM].float() / 255))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.groups(F.gelu(self.white(x)))
        return self.head(F.max_pool2d(x, 3).flatten(1)) / 9


def whitening(pictures: torch.Tensor) -> torch.Tensor:
    """Filters [24, 3, 2, 2] that make patches of normalised pictures [n, 3, h, w] uncorrelated, and their negatives."""
    facts = find_dataset("cifar10")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (facts.mean, facts.std))
    return whitening_filters((pictures - mean) / std, _EPSILON)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    rate, decay = _RATE * _PER_PICTURE, _DECAY * _BATCH * _PER_PICTURE
    learned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    biases = [p for name, p in learned if "norms" in name]
    others = [p for name, p in learned if "norms" not in name]
    groups = [
        {"params": biases, "lr": rate * _BIASES, "weight_decay": decay / (rate * _BIASES)},
        {"params": others, "lr": rate, "weight_decay": decay / rate},
    ]
    return torch.optim.SGD(groups, momentum=_MOMENTUM, nesterov=True)


def _triangle(step: int, steps: int) -> float:
    """From 0.2 up to 1 at 23 % of the steps, and down to 0.07."""
    peak = 0.23 * steps
    if step < peak:
        return 0.2 + 0.8 * step / peak
    return 1.0 + (0.07 - 1.0) * (step - peak) / max(1.0, steps - peak)


@torch.no_grad()
def _look_ahead(model: nn.Module, step: int, steps: int) -> None:
    """Every few steps the weights become a slow average of them, which follows ever more slowly; in the end too."""
    assert isinstance(model, PlainCNN)
    if steps == 0 or (step % _LOOK_EVERY and step != steps):
        return
    decay = 1.0 if step == steps else 0.95**_LOOK_EVERY * (step / steps) ** 3
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        slow = model.ahead.setdefault(name, value.clone())
        slow.lerp_(value, 1.0 - decay)
        value.copy_(slow)


CNN_RECIPE: dict[str, Any] = {
    "batch": _BATCH,
    "smoothing": 0.2,
    "augment": AugmentConfig(crop=2, flip=True, cutout=0, mixup=0.0, cutmix=0.0, randaugment=(0, 0)),
    "optimizer": _optimizer,
    "factor": _triangle,
    "settle": _look_ahead,
    "sums": True,
}


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nIt is a part of another command: python -m benchmarks.vit_peers --help")
