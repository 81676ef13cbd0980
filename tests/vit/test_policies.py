"""AutoAugment and TrivialAugment: a picture at a time as the oracle, ranges, tables, seeds, their place in a recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nkat.errors import NKATError
from nkat_vit import policies
from nkat_vit.augment import AugmentConfig, views
from nkat_vit.policies import AUTO_AUGMENT, auto_augment
from nkat_vit.randaugment import OPERATIONS
from nkat_vit.recipe import make_recipe, with_preset
from tests.support.vit_data import run_module, write_digits

POLICIES = [name for name in AUTO_AUGMENT if name != "off"]


def pictures(count: int, channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, channels, size, size))).float()


def one_by_one(images: torch.Tensor, table: str, seed: int) -> torch.Tensor:
    """AutoAugment from the text of a table, a picture at a time, with the numbers that the whole batch draws."""
    random = np.random.default_rng(seed)
    lines = [[step.split() for step in line.split(";")] for line in table.strip().splitlines()]
    lots = random.integers(0, len(lines), len(images))
    out = images.clone()
    for step in range(2):
        happens, signs = random.random(len(images)), random.choice([-1.0, 1.0], len(images))
        for i, lot in enumerate(lots):
            *name, probability, magnitude = lines[lot][step]
            if happens[i] < float(probability):
                operation = OPERATIONS.get(" ".join(name), lambda x, _: 255 - x)  # invert is RandAugment's no longer
                strength = torch.tensor([signs[i] * int(magnitude) / 9], dtype=torch.float32)
                out[i : i + 1] = operation(out[i : i + 1].clone(), strength)
    return out


@pytest.mark.parametrize(("name", "table"), [("autoaugment", "_CIFAR10"), ("autoaugment-imagenet", "_IMAGENET")])
def test_autoaugment_is_its_table_a_picture_at_a_time(name: str, table: str) -> None:
    images = pictures(64)
    got = auto_augment(images, name, np.random.default_rng(5))
    torch.testing.assert_close(got, one_by_one(images, getattr(policies, table), 5), atol=2e-3, rtol=0)
    assert (got - one_by_one(images, getattr(policies, table), 6)).abs().mean() > 5  # control: another seed
    steps = policies._POLICIES[name]
    assert steps.shape == (25, 2, 3)
    assert (steps[..., 1:] >= 0).all()
    assert (steps[..., 1:] <= 1).all()
    assert {policies._NAMES[int(number)] for number in steps[..., 0].flatten()} >= {"invert", "equalize", "solarize"}


def test_trivialaugment_has_the_papers_wide_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The greatest strengths of torchvision's TrivialAugmentWide, whose operations RandAugment's are."""
    seen: dict[str, list[float]] = {name: [] for name in OPERATIONS}

    def noted(images: torch.Tensor, table: object, choice: np.ndarray, strength: np.ndarray) -> torch.Tensor:
        for number, value in zip(choice, strength, strict=True):
            seen[list(OPERATIONS)[number]].append(value)
        return images

    monkeypatch.setattr(policies, "each_its_own", noted)
    auto_augment(torch.zeros(20000, 1, 1, 64), "trivialaugment", np.random.default_rng(0))
    units = {"shear x": 0.3, "rotate": 30, "color": 0.9, "posterize": 4, "solarize": 255, "translate y": 150 / 331 * 64}
    for name, most in (
        ("shear x", 0.99),
        ("rotate", 135),
        ("color", 0.99),
        ("posterize", 6),
        ("solarize", 255),
        ("translate y", 32),
    ):
        values = np.array(seen[name]) * units[name]
        assert values.max() == pytest.approx(most)
        assert values.min() == pytest.approx(-most)
        assert len(np.unique(np.abs(values).round(6))) == 31  # magnitudes from 0 to 30
    assert all(1200 < len(values) < 1660 for values in seen.values())  # one in fourteen
    monkeypatch.undo()
    images = pictures(1, size=64)
    moved = OPERATIONS["translate x"](images, torch.tensor([-32 / (150 / 331 * 64)]))
    torch.testing.assert_close(moved[..., 32:], images[..., :32], atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", POLICIES)
def test_a_seed_repeats_grey_works_and_pictures_differ(name: str) -> None:
    for channels in (1, 3):
        images = pictures(1, channels).expand(60, -1, -1, -1)  # one picture, sixty times
        first, again, other = (auto_augment(images, name, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert len({tuple(one.flatten().tolist()) for one in first}) > 10  # each picture its own
        assert 0 <= first.min() <= first.max() <= 255.001
        config = AugmentConfig(crop=0, flip=False, randaugment=(0, 0), cutout=0, auto_augment=name)
        byte = images.byte()
        seen = views(byte, config, (0.5,) * channels, np.random.default_rng(1))
        assert torch.equal(seen, first / 255)
    assert torch.equal(auto_augment(images, "off", np.random.default_rng(0)), images)


def test_a_policy_takes_randaugments_place() -> None:
    values = with_preset("stage2", {"dataset": "cifar10", "auto_augment": "trivialaugment"})
    assert make_recipe(values).augment.randaugment == (0, 0)
    assert make_recipe({"dataset": "cifar10", "auto_augment": "autoaugment"}).augment.randaugment == (0, 0)
    assert make_recipe({"dataset": "cifar10"}).augment.randaugment == (2, 9)  # control
    with pytest.raises(NKATError, match="two of a kind"):
        make_recipe({"dataset": "cifar10", "auto_augment": "autoaugment", "randaugment": [2, 9]})
    for bad in ("augmix", 3):
        with pytest.raises(NKATError, match="auto_augment must be"):
            make_recipe({"dataset": "cifar10", "auto_augment": bad})


def test_by_the_command_line(tmp_path: Path) -> None:
    common = ["--dataset", "emnist-digits", "--data-root", write_digits(tmp_path / "data"), "--aa", "trivialaugment"]
    small = ["--embed-dim", 16, "--depth", 1, "--heads", 4, "--validation", 24, "--batch-size", 24, "--epochs", 2]
    done = run_module("nkat_vit.train", *common, *small, "--threads", 1, "--no-test", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert '"auto_augment": "trivialaugment"' in (tmp_path / "run" / "config.json").read_text()
    shown = run_module("nkat_vit.augment", *common, "--output", tmp_path / "x.png")
    assert shown.returncode == 0, shown.stderr
