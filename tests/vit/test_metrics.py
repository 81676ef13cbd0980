"""Scores against the plan's own figures, and corruptions against SciPy, colorsys and their own definitions."""

from __future__ import annotations

import colorsys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from nkat.errors import NKATError
from nkat_vit import corruptions
from nkat_vit.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    bilinear,
    clipped_zoom,
    corrupt,
    load_frost,
    plasma_fractal,
)
from nkat_vit.metrics import consistency, global_tpe, lambda_theory, measure_robustness, tpe
from nkat_vit.model import ViTConfig, count_parameters
from tests.conftest import SHARED_DATA

FROST = load_frost(None)


def pictures(count: int = 6) -> np.ndarray:
    """Smooth random ones, with black and white in them."""
    random = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(random.normal(size=(count, 32, 32, 3)), (0, 2, 2, 0))
    return (np.clip(smooth / smooth.std() * 0.3 + 0.5, 0, 1) * 255).astype(np.uint8)


def test_the_plans_pairs_of_accuracy_and_tpe() -> None:
    lam = lambda_theory(count_parameters(ViTConfig()))
    assert lam == 20.0
    assert tpe(0.91, lam) == pytest.approx(0.69, abs=0.005)  # MNIST's row
    assert tpe(0.60, lam) == pytest.approx(0.45, abs=0.005)  # CIFAR-10's
    assert global_tpe([0.926] * 4, lam) == pytest.approx(0.70, abs=5e-4)
    larger = count_parameters(replace(ViTConfig(), embed_dim=512))
    assert tpe(0.91, lambda_theory(larger)) < tpe(0.91, lam)
    with pytest.raises(NKATError):
        tpe(0.9, 0.0)


def test_consistency() -> None:
    assert consistency([0.5, 0.5, 0.5]) == 1.0
    assert consistency([0.6, 0.4]) == pytest.approx(1 - 0.1 / 0.5)
    assert consistency([0.7, 0.3]) < consistency([0.6, 0.4])


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_corruptions_are_seeded_and_grow_with_severity(name: str) -> None:
    images = pictures()
    before = images.copy()
    results = [corrupt(images, name, severity, 0, FROST) for severity in SEVERITIES]
    assert np.array_equal(images, before)
    assert all(r.dtype == np.uint8 and r.shape == images.shape for r in results)
    assert np.array_equal(results[2], corrupt(images, name, 3, 0, FROST))
    damage = [float(np.abs(r.astype(float) - images).mean()) for r in results]
    assert min(damage) > 0
    if name != "elastic":  # its published constants bend less and crumple more as severity grows
        assert damage[4] > 1.1 * damage[0]
    drawn = {"brightness", "contrast", "pixelate", "jpeg", "zoom blur", "defocus blur"}
    assert np.array_equal(results[0], corrupt(images, name, 1, 1, FROST)) == (name in drawn)


def test_noise_has_the_published_strength() -> None:
    grey = np.full((20, 32, 32, 3), 128, dtype=np.uint8)
    assert corrupt(grey, "gaussian noise", 5, 0, FROST).std() / 255 == pytest.approx(0.10, rel=0.02)
    assert corrupt(grey, "shot noise", 5, 0, FROST).std() / 255 == pytest.approx((128 / 255 / 50) ** 0.5, rel=0.03)
    impulses = corrupt(grey, "impulse noise", 5, 0, FROST)
    assert ((impulses == 0) | (impulses == 255)).mean() == pytest.approx(0.07, rel=0.05)
    assert (impulses == 0).sum() == pytest.approx((impulses == 255).sum(), rel=0.1)


def test_brightness_is_v_of_hsv() -> None:
    images = pictures(1)
    images[0, 0, 0] = 0
    got = corrupt(images, "brightness", 4, 0, FROST)[0]
    for pixel, mine in zip(images[0].reshape(-1, 3)[:200], got.reshape(-1, 3)[:200], strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
        expected = np.array(colorsys.hsv_to_rgb(h, s, min(v + 0.2, 1))) * 255
        assert np.abs(mine - expected).max() <= 1


@pytest.mark.parametrize("factor", [1.0, 1.05, 1.25, 1.75, 2.25])
def test_zoom_is_scipys(factor: float) -> None:
    x = pictures(2) / 255
    side = int(np.ceil(32 / factor))
    top = (32 - side) // 2
    zoomed = ndimage.zoom(x[:, top : top + side, top : top + side], (1, factor, factor, 1), order=1)
    cut = (zoomed.shape[1] - 32) // 2
    np.testing.assert_allclose(clipped_zoom(x, factor), zoomed[:, cut : cut + 32, cut : cut + 32], atol=1e-9)


@pytest.mark.parametrize(("repeats", "mode"), [(True, "reflect"), (False, "mirror")])
def test_sampling_is_scipys(repeats: bool, mode: str) -> None:
    x = pictures(1) / 255
    random = np.random.default_rng(1)
    rows, columns = random.uniform(-20, 52, (2, 1, 32, 32))
    got = bilinear(x, rows, columns, edge_repeats=repeats)
    for channel in range(3):
        expected = ndimage.map_coordinates(x[0, :, :, channel], [rows[0], columns[0]], order=1, mode=mode)
        np.testing.assert_allclose(got[0, :, :, channel], expected, atol=1e-9)


def test_blurs_keep_brightness_and_take_detail() -> None:
    images = pictures()
    images[:, ::2] //= 2  # stripes
    for name in ("defocus blur", "motion blur", "zoom blur", "glass blur"):
        got = corrupt(images, name, 5, 0, FROST).astype(float)
        assert got.mean() == pytest.approx(images.mean(), rel=0.03), name
        assert np.abs(np.diff(got, axis=1)).mean() < 0.8 * np.abs(np.diff(images.astype(float), axis=1)).mean(), name


def test_fog_maps_fill_their_range_and_roughness_follows_decay() -> None:
    smooth, rough = (plasma_fractal(8, decay, np.random.default_rng(0)) for decay in (3, 1.75))
    assert smooth.min() == rough.min() == 0.0
    assert smooth.max() == rough.max() == 1.0
    assert np.abs(np.diff(rough, axis=1)).mean() > 1.25 * np.abs(np.diff(smooth, axis=1)).mean()


def test_frost_textures_and_their_absence(tmp_path: Path) -> None:
    assert FROST.source == "procedural"
    with pytest.raises(NKATError, match=r"frost1\.png"):
        load_frost(tmp_path)
    for name in ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg"):
        Image.new("RGB", (200, 180), (255, 255, 255)).save(tmp_path / name)
    white = load_frost(tmp_path)
    images = np.full((3, 32, 32, 3), 51, dtype=np.uint8)
    got = corrupt(images, "frost", 1, 0, white)
    assert got.min() == got.max() == int(0.2 * 255 + 51)
    real = SHARED_DATA / "images" / "cifar10c_frost"
    if real.is_dir():
        assert corrupt(images, "frost", 3, 0, load_frost(real)).std() > 5


def test_other_shapes_are_refused() -> None:
    with pytest.raises(NKATError, match="32x32 colour"):
        corrupt(np.zeros((2, 28, 28, 1), np.uint8), "fog", 1, 0, FROST)


def test_robustness_of_classifiers_that_are_known() -> None:
    images = np.ascontiguousarray(pictures(8).transpose(0, 3, 1, 2))
    labels = np.arange(8) % 2

    deaf = measure_robustness(lambda x: np.zeros(len(x)), images, labels, 0, FROST)
    assert (deaf.clean, deaf.robustness, deaf.flip_rate, deaf.mean_corruption_error) == (0.5, 1.0, 0.0, 0.5)
    known = {picture.tobytes(): label for picture, label in zip(images, labels, strict=True)}
    parrot = measure_robustness(
        lambda x: np.array([known.get(picture.tobytes(), -1) for picture in x]), images, labels, 0, FROST
    )
    assert parrot.clean == 1.0
    assert parrot.robustness < 0.1
    assert parrot.flip_rate == pytest.approx(parrot.mean_corruption_error)
    assert len(parrot.record()["accuracy"]) == 15
    assert all(len(row) == 5 for row in parrot.accuracies.values())


def test_another_corruption_in_the_table_does_not_change_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.full((2, 32, 32, 3), 128, np.uint8)
    before = corrupt(images, "shot noise", 2, 0, FROST)
    monkeypatch.setattr(corruptions, "CORRUPTIONS", {"new": CORRUPTIONS["contrast"]} | CORRUPTIONS)
    assert np.array_equal(before, corrupt(images, "shot noise", 2, 0, FROST))


def test_glass_blur_copies_pixels_as_the_published_code_does() -> None:
    """That code for one picture, its "exchange" of NumPy views written as it is there."""
    images = np.random.default_rng(3).random((1, 32, 32, 3))
    got = CORRUPTIONS["glass blur"](images, 1, np.random.default_rng(5))
    random = np.random.default_rng(5)
    x = np.floor(ndimage.gaussian_filter(images[0], (0.05, 0.05, 0)) * 255).astype(np.uint8)
    for h in range(31, 1, -1):
        for w in range(31, 1, -1):
            dy, dx = random.integers(-1, 1, (2, 1))[:, 0]
            x[h, w], x[h + dy, w + dx] = x[h + dy, w + dx], x[h, w]
    assert np.allclose(got[0], ndimage.gaussian_filter(x / 255, (0.05, 0.05, 0)))
