"""Augmentation: single operations against Pillow, determinism, labels that stay with their pixels, and the example."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from nkat.errors import NKATError
from nkat_vit import augment as augmentation
from nkat_vit.augment import AugmentConfig, augment
from nkat_vit.data import DATASETS, ImageSet
from nkat_vit.randaugment import GREATEST_MAGNITUDE, OPERATIONS, randaugment
from tests.support.vit_data import run_module, write_digits

OFF = AugmentConfig(crop=0, flip=False, randaugment=(0, 0), cutout=0, mixup=0, cutmix=0)
GREY_MEAN = (0.5,)
MEAN = (0.4, 0.5, 0.6)


def pictures(count: int = 5, channels: int = 3, size: int = 32) -> torch.Tensor:
    """Smooth ones, so that interpolation does not matter much, with some noise."""
    random = np.random.default_rng(3)
    coarse = torch.from_numpy(random.integers(0, 256, (count, channels, 5, 5))).float()
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 250)
    return (smooth + torch.from_numpy(random.integers(0, 6, smooth.shape))).to(torch.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pillow(name: str, image: Image.Image, strength: float) -> Image.Image:
    factor, sine = 1 + 0.9 * strength, np.sin(np.radians(30 * strength))
    cosine = np.cos(np.radians(30 * strength))
    side, half = image.width, image.width / 2
    affine = {
        "shear x": (1, 0.3 * strength, 0, 0, 1, 0),  # about the corner, as torchvision's
        "shear y": (1, 0, 0, 0.3 * strength, 1, 0),
        "translate x": (1, 0, 150 / 331 * side * strength, 0, 1, 0),
        "translate y": (1, 0, 0, 0, 1, 150 / 331 * side * strength),
        "rotate": (cosine, -sine, half * (1 - cosine + sine), sine, cosine, half * (1 - cosine - sine)),
    }
    if name in affine:
        return image.transform(image.size, Image.Transform.AFFINE, affine[name], Image.Resampling.BILINEAR)
    return {
        "identity": lambda: image,
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
        "solarize": lambda: ImageOps.solarize(image, 255 * (1 - abs(strength))),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }[name]()


@pytest.mark.parametrize("strength", [0.3, -0.3, 0.9])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_operations_do_what_pillow_does(name: str, strength: float) -> None:
    images = pictures()
    got = OPERATIONS[name](images.float().clone(), torch.full((len(images),), strength))
    for image, mine in zip(images, got, strict=True):
        theirs = np.asarray(pillow(name, Image.fromarray(image.permute(1, 2, 0).numpy()), strength)).astype(float)
        difference = np.abs(mine.permute(1, 2, 0).numpy() - theirs)
        inner = (
            difference[2:-2, 2:-2]
            if name in ("shear x", "shear y", "translate x", "translate y", "rotate")
            else difference
        )
        # Pillow rounds at each step; at the border of what geometry leaves black, half a pixel decides.
        assert np.quantile(inner, 0.95) <= 2.0, name
        if name in ("posterize", "equalize", "identity", "solarize"):
            assert inner.max() <= 1.0
    if name not in ("identity", "autocontrast", "equalize", "posterize", "solarize"):
        other = OPERATIONS[name](images.float().clone(), torch.full((len(images),), -strength))
        assert (other - got).abs().mean() > 0.5  # control: the sign matters


def test_operations_take_grey_pictures_and_flat_ones() -> None:
    for images in (pictures(channels=1, size=28), torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)):
        for name, operation in OPERATIONS.items():
            got = operation(images.float(), torch.full((len(images),), 0.5))
            assert got.shape == images.shape
            assert bool(torch.isfinite(got).all()), name
            assert 0 <= got.min() <= got.max() <= 255.001, name


def test_randaugment_draws_every_operation_and_magnitude_counts() -> None:
    images = pictures(300).float()
    once = randaugment(images, 1, 9, rng())
    changed = (once - images).abs().flatten(1).amax(1) > 0
    assert 0.7 < changed.float().mean() < 0.97  # identity, and autocontrast of a full range, leave some alone
    gentle, strong = (randaugment(images, 2, m, rng()) for m in (1, GREATEST_MAGNITUDE))
    assert (strong - images).abs().mean() > 1.5 * (gentle - images).abs().mean()
    assert torch.equal(randaugment(images, 0, 9, rng()), images)


def test_a_seed_gives_the_same_batch_and_another_seed_another() -> None:
    images, labels = pictures(8), torch.arange(8)
    config = AugmentConfig(channel_shuffle=0.5)
    first, again, other = (augment(images, labels, config, MEAN, rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.images, other.images)
    assert first.images.dtype == torch.float32
    assert 0 <= first.images.min() <= first.images.max() <= 1.0001


def test_all_off_is_the_picture_itself() -> None:
    images, labels = pictures(4), torch.arange(4)
    batch = augment(images, labels, OFF, MEAN, rng())
    assert torch.equal(batch.images, images.float() / 255)
    assert batch.weight.tolist() == [1, 1, 1, 1]


def test_crop_shifts_by_at_most_its_size_and_mirrors_or_blackens_the_edge() -> None:
    for channels in (3, 1):
        images = pictures(40, channels, 28 if channels == 1 else 32)
        config = AugmentConfig(crop=3, flip=False, randaugment=(0, 0), cutout=0, mixup=0, cutmix=0)
        got = augment(images, torch.arange(40), config, MEAN[:channels], rng()).images * 255
        mode = "reflect" if channels == 3 else "constant"
        padded = torch.nn.functional.pad(images.float(), (3, 3, 3, 3), mode)
        size = images.shape[-1]
        shifts = set()
        for source, one in zip(padded, got.round(), strict=True):
            fits = [
                (r, c) for r in range(7) for c in range(7) if torch.equal(source[:, r : r + size, c : c + size], one)
            ]
            assert len(fits) == 1
            shifts |= set(fits)
        assert len(shifts) > 15


def test_flip_mirrors_half() -> None:
    images = pictures(200, size=8)
    config = AugmentConfig(crop=0, flip=True, randaugment=(0, 0), cutout=0, mixup=0, cutmix=0)
    got = augment(images, torch.arange(200), config, MEAN, rng()).images * 255
    flipped = [torch.equal(a, b.float().flip(-1)) for a, b in zip(got.round(), images, strict=True)]
    same = [torch.equal(a, b.float()) for a, b in zip(got.round(), images, strict=True)]
    assert all(f != s for f, s in zip(flipped, same, strict=True))
    assert 70 < sum(flipped) < 130


def test_cutout_leaves_a_square_of_the_mean() -> None:
    images = pictures(64)
    config = AugmentConfig(crop=0, flip=False, randaugment=(0, 0), cutout=8, mixup=0, cutmix=0)
    got = augment(images, torch.arange(64), config, MEAN, rng()).images
    changed = (got != images.float() / 255).any(1)
    assert (changed.flatten(1).sum(1) <= 64).all()
    assert (changed.flatten(1).sum(1) >= 64).sum() > 20  # whole inside
    place = changed.nonzero()[0]
    torch.testing.assert_close(got[place[0], :, place[1], place[2]], torch.tensor(MEAN))


def test_channel_shuffle_keeps_the_channels_but_not_their_order() -> None:
    images = pictures(50)
    config = AugmentConfig(crop=0, flip=False, randaugment=(0, 0), cutout=0, mixup=0, cutmix=0, channel_shuffle=1.0)
    got = augment(images, torch.arange(50), config, MEAN, rng()).images * 255
    torch.testing.assert_close(got.sort(1).values, images.float().sort(1).values)
    assert 0.6 < (got.round() != images).flatten(1).any(1).float().mean() < 1  # five of six orders


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 0.8), (0.8, 0.8), (0.1, 0.2)])
def test_labels_stay_with_their_share_of_the_picture(mixup: float, cutmix: float) -> None:
    """A picture of label k is flat with value k, so that the mean of a mixed one tells the shares of its labels."""
    labels = torch.arange(1, 65)
    images = (labels * 3).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28).contiguous()
    config = AugmentConfig(crop=0, flip=False, randaugment=(0, 0), cutout=0, mixup=mixup, cutmix=cutmix)
    batch = augment(images, labels, config, GREY_MEAN, rng())
    share = batch.weight * batch.labels + (1 - batch.weight) * batch.others
    torch.testing.assert_close(batch.images.mean(dim=(1, 2, 3)) * 255 / 3, share, atol=1e-3, rtol=1e-4)
    levels = torch.tensor([len(image.unique()) for image in batch.images])
    assert bool((levels == 1).all()) == (cutmix == 0)  # mixup leaves a flat picture flat, cutmix does not
    assert sorted(batch.others.tolist()) == labels.tolist()
    assert ((batch.weight > 0.01) & (batch.weight < 0.99)).float().mean() > 0.05
    assert batch.weight.min() >= 0.49  # no picture gives way to another: the sides of a box are whole pixels


def test_impossible_settings_are_refused() -> None:
    for change in ({"randaugment": (2, 31)}, {"randaugment": (-1, 9)}, {"crop": -1}, {"channel_shuffle": 1.1}):
        with pytest.raises(NKATError):
            AugmentConfig(**change)


def test_the_picture_shows_views_of_the_picture_alone_and_what_the_others_are_mixed_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of label k is flat with value 20 k, so that the mean of a mixed one tells the shares of its labels."""
    drawn: dict = {}
    monkeypatch.setattr(
        augmentation, "save_grid", lambda *arguments: drawn.update(zip("pitfc", arguments, strict=True))
    )
    labels = torch.arange(80) % 10
    flat = (20 * labels).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28).contiguous()
    config = AugmentConfig(crop=0, flip=False, randaugment=(0, 0), cutout=0, mixup=1.0, cutmix=1.0)
    augmentation.draw_examples(
        tmp_path / "x", ImageSet("mnist", flat, labels, ""), DATASETS["mnist"], config, rng(), 5, False
    )
    images, captions = 255 * drawn["i"] / 20, drawn["c"]
    assert images.shape == (5, 10, 1, 28, 28)
    assert "6 views of it, 3 mixed (Mixup 1, CutMix 1)" in drawn["t"]
    for row in range(5):
        assert torch.allclose(images[row, :7], torch.full_like(images[row, :7], row))  # nobody else's
        assert captions[row][:7] == [str(row), *[""] * 6]
        for image, caption in zip(images[row, 7:], captions[row][7:], strict=True):
            parts = [part.split(" % ") for part in caption.strip().splitlines()]
            assert parts[0][1] == str(row)
            assert image.mean().item() == pytest.approx(sum(int(s) * int(k) for s, k in parts) / 100, abs=0.11)
    others = [caption for row in captions for caption in row[7:] if "\n0" not in caption and len(caption.split()) > 3]
    assert others  # some are mixed
    augmentation.draw_examples(
        tmp_path / "x", ImageSet("mnist", flat, labels, ""), DATASETS["mnist"], OFF, rng(), 2, False
    )
    assert drawn["i"].shape[1] == 7
    assert drawn["t"].endswith("6 views of it")


def test_the_picture_of_examples(tmp_path: Path) -> None:
    write_digits(tmp_path)
    arguments = ["--dataset", "emnist-digits", "--data-root", tmp_path, "--rows", 2, "--output", tmp_path / "e.png"]
    done = run_module("nkat_vit.augment", *arguments)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "e.png").size[0] > 500
    again = run_module("nkat_vit.augment", *arguments)
    assert again.returncode == 2
    assert "--force" in again.stderr
