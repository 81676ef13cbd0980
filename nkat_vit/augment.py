"""Augmentation of whole batches on the device: crop, flip, RandAugment or a policy, channel shuffle, Cutout, Mixup,
CutMix.

    python -m nkat_vit.augment --dataset cifar10 --data-root data --output examples.png      a picture of examples

Every random number comes from the NumPy generator that is passed in, so that a seed gives the same batch on every
device. Mixup's and CutMix's numbers are the α of the Beta distribution that their weight is drawn from, as timm's are;
where both are given, each picture draws one of the two.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("nkat_vit.augment")

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nkat.errors import NKATError
from nkat.host.commandline import parser, positive_int, seed
from nkat.host.files import check_output
from nkat.host.tools import suggest
from nkat_vit.data import DATASETS_HELP, DatasetSpec, ImageSet, dataset_name, describe_dataset, load_images
from nkat_vit.pictures import save_grid
from nkat_vit.policies import AUTO_AUGMENT, auto_augment
from nkat_vit.randaugment import GREATEST_MAGNITUDE, randaugment

_VIEWS, _MIXED = 6, 3  # columns of the picture of examples
_MIXED_FROM = 64  # pictures that its mixed ones find their others among


@dataclass(frozen=True, slots=True)
class AugmentConfig:
    """What is done to a training picture; zeros and (0, 0) are off.

    crop: pixels that a picture is shifted by at most (mirrored edges for colour, black for grey)
    flip: mirrored half the time
    randaugment: N operations at magnitude M of 30
    auto_augment: a policy in its place, of AUTO_AUGMENT
    cutout: side of a square that takes the mean colour
    channel_shuffle: probability that the colours change places
    """

    crop: int = 4
    flip: bool = True
    randaugment: tuple[int, int] = (2, 9)
    cutout: int = 8
    mixup: float = 0.1
    cutmix: float = 0.2
    channel_shuffle: float = 0.0
    auto_augment: str = "off"

    def __post_init__(self) -> None:
        operations, magnitude = self.randaugment
        if operations < 0 or not 0 <= magnitude <= GREATEST_MAGNITUDE:
            raise NKATError(f"randaugment {operations} {magnitude}: N must be at least 0 and M from 0 to 30")
        if self.auto_augment not in AUTO_AUGMENT:
            raise NKATError(f"auto_augment must be one of {', '.join(AUTO_AUGMENT)}, got {self.auto_augment!r:.80}")
        if operations and self.auto_augment != "off":
            raise NKATError(
                f"randaugment {operations} {magnitude} and auto_augment {self.auto_augment} are two of a kind: give one"
            )
        if min(self.crop, self.cutout, self.mixup, self.cutmix) < 0:
            raise NKATError("crop, cutout, mixup and cutmix must be at least 0")
        if not 0 <= self.channel_shuffle <= 1:
            raise NKATError(f"channel_shuffle must lie in 0 <= p <= 1, got {self.channel_shuffle}")


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures float32 [b, c, h, w] from 0 to 1 whose label is `labels` with `weight` and `others` with 1 − weight."""

    images: Tensor
    labels: Tensor
    others: Tensor
    weight: Tensor

    def parts(self, count: int) -> list[Batch]:
        """The batch in so many parts of equal size."""
        rows = (x.chunk(count) for x in (self.images, self.labels, self.others, self.weight))
        return [Batch(*part) for part in zip(*rows, strict=True)]


def augment(
    images: Tensor, labels: Tensor, config: AugmentConfig, mean: tuple[float, ...], random: np.random.Generator
) -> Batch:
    """One batch: uint8 pictures [b, c, h, w] and labels [b], on any device; `mean` is the colour that Cutout leaves."""
    return mix(views(images, config, mean, random), labels, config, random)


def views(images: Tensor, config: AugmentConfig, mean: tuple[float, ...], random: np.random.Generator) -> Tensor:
    """What each picture is turned into by itself: uint8 [b, c, h, w] → float32 from 0 to 1."""
    x = _crop_and_flip(images, config, random).float()
    if config.randaugment[0]:
        x = randaugment(x, *config.randaugment, random)
    x = auto_augment(x, config.auto_augment, random)
    x = x / 255
    if config.channel_shuffle and x.shape[1] == 3:
        x = _shuffle_channels(x, config.channel_shuffle, random)
    if config.cutout:
        inside = _boxes(x, np.full(len(x), config.cutout), random)
        x = torch.where(inside, x.new_tensor(mean).view(-1, 1, 1), x)
    return x


def _crop_and_flip(images: Tensor, config: AugmentConfig, random: np.random.Generator) -> Tensor:
    """Both by one gather: a row's and a column's source for each picture."""
    b, channels, height, width = images.shape
    pad = config.crop
    if not (pad or config.flip):
        return images
    y, x = (torch.arange(n) + torch.from_numpy(random.integers(0, 2 * pad + 1, (b, 1))) for n in (height, width))
    if config.flip:
        x = torch.where(torch.from_numpy(random.random((b, 1)) < 0.5), x.flip(1), x)
    if pad and channels == 1:
        images = F.pad(images, (pad, pad, pad, pad))
    elif pad:  # mirrored edges by indices: torch does not pad bytes this way
        y, x = (_mirror(v - pad, n) for v, n in ((y, height), (x, width)))
    source = (y[:, :, None] * images.shape[3] + x[:, None, :]).to(images.device)  # [b, h, w], into flat pictures
    source = source.view(b, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, source).view(b, channels, height, width)


def _mirror(index: Tensor, size: int) -> Tensor:
    """−1 → 1 and size → size − 2: the edge itself is not repeated."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def _shuffle_channels(x: Tensor, probability: float, random: np.random.Generator) -> Tensor:
    orders = random.permuted(np.tile(np.arange(3), (len(x), 1)), axis=1)
    orders[random.random(len(x)) >= probability] = np.arange(3)
    index = torch.from_numpy(orders).to(x.device)
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def _boxes(x: Tensor, sides: np.ndarray, random: np.random.Generator) -> Tensor:
    """Masks [b, 1, h, w] of squares of `sides` [b] pixels around random centres; they may reach over the edge."""
    masks = []
    for length in x.shape[2:]:
        start = random.integers(0, length, len(x)) - sides // 2
        low, high = (torch.from_numpy(v).to(x.device)[:, None] for v in (start, start + sides))
        place = torch.arange(length, device=x.device)
        masks.append((place >= low) & (place < high))
    return (masks[0][:, :, None] & masks[1][:, None, :])[:, None]


def mix(x: Tensor, labels: Tensor, config: AugmentConfig, random: np.random.Generator) -> Batch:
    """Mixup and CutMix of views [b, c, h, w], each with another one of the batch."""
    if not (config.mixup or config.cutmix):
        return Batch(x, labels, labels, x.new_ones(len(x)))
    order = torch.from_numpy(random.permutation(len(x))).to(x.device)
    others, other_labels = x[order], labels[order]
    cuts = random.random(len(x)) < (0.5 if config.mixup and config.cutmix else float(config.cutmix > 0))
    shares = np.where(
        cuts, *(random.beta(a, a, len(x)) if a else np.ones(len(x)) for a in (config.cutmix, config.mixup))
    )
    # The larger part is the picture's own. Small α makes λ near 0 as often as near 1, and then batches would show some
    # pictures twice and others not at all.
    shares = np.maximum(shares, 1 - shares)
    # CutMix: the box has the share 1 − λ of the area; what the edge cuts off changes λ.
    sides = np.where(cuts, np.rint(x.shape[-1] * np.sqrt(1 - shares)), 0).astype(np.int64)
    inside = _boxes(x, sides, random)
    blend = torch.from_numpy(np.where(cuts, 1.0, shares)).to(x)
    weight = blend * (1 - inside.float().mean(dim=(1, 2, 3)))
    mixed = torch.where(inside, others, torch.lerp(others, x, blend.view(-1, 1, 1, 1)))
    return Batch(mixed, labels, other_labels, weight)


def draw_examples(
    path: Path,
    images: ImageSet,
    spec: DatasetSpec,
    config: AugmentConfig,
    random: np.random.Generator,
    rows: int,
    force: bool,
) -> None:
    """A row a picture: itself, views of it, and views mixed with those of others, whose labels and shares are said."""
    batch = images.take(torch.arange(min(max(rows, _MIXED_FROM), len(images))))
    rows = min(rows, len(batch))
    names = [spec.classes[label] for label in batch.labels.tolist()]
    columns = [batch.images[:rows].float() / 255]
    columns += [views(batch.images[:rows], config, spec.mean, random) for _ in range(_VIEWS)]
    captions = [names[:rows], *[[""] * rows] * _VIEWS]
    for _ in range(_MIXED if config.mixup or config.cutmix else 0):
        mixed = augment(batch.images, batch.labels, config, spec.mean, random)
        columns.append(mixed.images[:rows])
        shares = zip(names[:rows], mixed.weight.tolist(), mixed.others.tolist(), strict=False)
        captions.append([_shares(name, weight, spec.classes[other]) for name, weight, other in shares])
    mixing = f", {len(columns) - 1 - _VIEWS} mixed (Mixup {config.mixup:g}, CutMix {config.cutmix:g})"
    title = f"{spec.title}: original, {_VIEWS} views of it{mixing if len(columns) > 1 + _VIEWS else ''}"
    save_grid(path, torch.stack(columns, dim=1), title, force, [list(row) for row in zip(*captions, strict=True)])


def _shares(name: str, weight: float, other: str) -> str:
    own, rest = (round(100 * share) for share in (weight, 1 - weight))
    return f"{own} % {name}\n" + (f"{rest} % {other}" if rest else "")


def main() -> None:
    arguments = parser(
        "A picture of what augmentation does: each row one picture as it is, views of it, and views mixed with others.",
        "  python -m nkat_vit.augment --dataset cifar10 --data-root data --output examples.png\n"
        "  python -m nkat_vit.augment --dataset cifar10 --mixup 1 --cutmix 1 --output strong.png\n"
        "  python -m nkat_vit.augment --dataset folder:my-pictures --aa trivialaugment --output mine.png",
    )
    arguments.add_argument("--dataset", type=dataset_name, default="cifar10", metavar="SET", help=DATASETS_HELP)
    arguments.add_argument("--data-root", type=Path, default=Path("data"), help="folder with the archives (data)")
    arguments.add_argument("--output", type=Path, required=True, help="the PNG")
    arguments.add_argument("--seed", type=seed, default=0)
    arguments.add_argument("--rows", type=positive_int, default=6, help="pictures (6)")
    usual = AugmentConfig()
    arguments.add_argument("--randaugment", type=int, nargs=2, metavar=("N", "M"), help="(2 9, or off for a policy)")
    arguments.add_argument(
        *("--auto_augment", "--auto-augment", "--aa"), choices=AUTO_AUGMENT, default="off", help="a policy (off)"
    )
    for name, text in (("mixup", "α of Mixup"), ("cutmix", "α of CutMix")):
        value = getattr(usual, name)
        arguments.add_argument(f"--{name}", type=float, default=value, metavar="X", help=f"{text}, 0: off ({value:g})")
    arguments.add_argument("--force", action="store_true", help="replace an existing file")
    options = arguments.parse_args()
    check_output(options.output, options.force)
    spec = describe_dataset(options.dataset, options.data_root)
    config = AugmentConfig(
        flip=spec.mirrored,
        randaugment=tuple(options.randaugment or ((0, 0) if options.auto_augment != "off" else usual.randaugment)),
        auto_augment=options.auto_augment,
        mixup=options.mixup,
        cutmix=options.cutmix,
    )
    images = load_images(options.dataset, options.data_root, True, spec)
    random = np.random.default_rng(options.seed)
    draw_examples(options.output, images, spec, config, random, options.rows, options.force)
    print(options.output)
    suggest("vit train", "--dataset", options.dataset, "--data-root", options.data_root)
