"""AutoAugment and TrivialAugment on whole batches, of RandAugment's operations, as torchvision has them.

AutoAugment (Cubuk et al., arXiv 1805.09501): each picture draws one of 25 sub-policies, two operations in turn, each
with its own probability and magnitude. TrivialAugment (Müller and Hutter, arXiv 2103.10158, its "wide" space): each
picture draws one operation and a magnitude. All numbers come from the NumPy generator that is passed in.

Written out although kornia (0.9.0) has both. There, a whole batch draws one sub-policy, and is all rotated or all
solarised; TrivialAugment lacks colour and has narrower ranges than the paper's; AutoAugment refuses grey pictures; and
the import takes three seconds. Called once for each sub-policy that a batch of 128 CIFAR-10 pictures drew, so that each
picture has its own, kornia's AutoAugment took 41 ms of processor time on one thread and TrivialAugment 11 (the least of
12 tries). These take 5 and 4, RandAugment(2, 9) 7. torchvision's take a picture at a time, and its build on PyPI does
not go with torch's CPU build.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from nkat_vit.randaugment import GREATEST_MAGNITUDE, OPERATIONS, Operation, each_its_own

_MAGNITUDES = 10  # of AutoAugment's, from 0; the last is an operation's greatest in RandAugment's space

# operation, probability, magnitude; twice a line. The paper's policies for CIFAR-10 and ImageNet, as kornia has them.
_CIFAR10 = """
    invert 0.1 0; contrast 0.2 6
    rotate 0.7 2; translate x 0.3 9
    sharpness 0.8 1; sharpness 0.9 3
    shear y 0.5 8; translate y 0.7 9
    autocontrast 0.5 0; equalize 0.9 0
    shear y 0.2 7; posterize 0.3 7
    color 0.4 3; brightness 0.6 7
    sharpness 0.3 9; brightness 0.7 9
    equalize 0.6 0; equalize 0.5 0
    contrast 0.6 7; sharpness 0.6 5
    color 0.7 7; translate x 0.5 8
    equalize 0.3 0; autocontrast 0.4 0
    translate y 0.4 3; sharpness 0.2 6
    brightness 0.9 6; color 0.2 8
    solarize 0.5 2; invert 0 0
    equalize 0.2 0; autocontrast 0.6 0
    equalize 0.2 0; equalize 0.6 0
    color 0.9 9; equalize 0.6 0
    autocontrast 0.8 0; solarize 0.2 8
    brightness 0.1 3; color 0.7 0
    solarize 0.4 5; autocontrast 0.9 0
    translate y 0.9 9; translate y 0.7 9
    autocontrast 0.9 0; solarize 0.8 3
    equalize 0.8 0; invert 0.1 0
    translate y 0.7 9; autocontrast 0.9 0
"""
_IMAGENET = """
    posterize 0.4 8; rotate 0.6 9
    solarize 0.6 5; autocontrast 0.6 0
    equalize 0.8 0; equalize 0.6 0
    posterize 0.6 7; posterize 0.6 6
    equalize 0.4 0; solarize 0.2 4
    equalize 0.4 0; rotate 0.8 8
    solarize 0.6 3; equalize 0.6 0
    posterize 0.8 5; equalize 1 0
    rotate 0.2 3; solarize 0.6 8
    equalize 0.6 0; posterize 0.4 6
    rotate 0.8 8; color 0.4 0
    rotate 0.4 9; equalize 0.6 0
    equalize 0 0; equalize 0.8 0
    invert 0.6 0; equalize 1 0
    color 0.6 4; contrast 1 8
    rotate 0.8 8; color 1 2
    color 0.8 8; solarize 0.8 7
    sharpness 0.4 7; invert 0.6 0
    shear x 0.6 5; equalize 1 0
    color 0.4 0; equalize 0.6 0
    equalize 0.4 0; solarize 0.2 4
    solarize 0.6 5; autocontrast 0.6 0
    invert 0.6 0; equalize 1 0
    color 0.6 4; contrast 1 8
    equalize 0.8 0; equalize 0.6 0
"""
# TrivialAugment's greatest strengths over RandAugment's: slopes of 0.99, 135 degrees, factors of 1.99, two bits left.
# Its translations go up to 32 pixels, whatever the side.
_WIDE = {
    "shear x": 0.99 / 0.3,
    "shear y": 0.99 / 0.3,
    "rotate": 135 / 30,
    "brightness": 0.99 / 0.9,
    "color": 0.99 / 0.9,
    "contrast": 0.99 / 0.9,
    "sharpness": 0.99 / 0.9,
    "posterize": 6 / 4,
}
_WIDE_PIXELS, _RANDAUGMENT_SHARE = 32, 150 / 331  # translations: in pixels, and as a share of the side


def _invert(x: Tensor, _strength: Tensor) -> Tensor:
    return 255 - x


_TABLE: dict[str, Operation] = OPERATIONS | {"invert": _invert}  # RandAugment does not draw the last
_NAMES = list(_TABLE)


def _parse(policy: str) -> np.ndarray:
    """[sub-policies, 2, 3]: number in the table, probability, strength."""
    steps = [[step.rsplit(" ", 2) for step in line.split(";")] for line in policy.strip().splitlines()]
    return np.array(
        [[(_NAMES.index(name.strip()), float(p), int(m) / (_MAGNITUDES - 1)) for name, p, m in line] for line in steps]
    )


_POLICIES = {"autoaugment": _parse(_CIFAR10), "autoaugment-imagenet": _parse(_IMAGENET)}
AUTO_AUGMENT = ("off", *_POLICIES, "trivialaugment")


def auto_augment(images: Tensor, policy: str, random: np.random.Generator) -> Tensor:
    """Pictures [b, c, h, w], floats from 0 to 255, by a policy of AUTO_AUGMENT."""
    if policy == "off":
        return images
    if policy == "trivialaugment":
        return _trivial(images, random)
    table, steps = list(_TABLE.values()), _POLICIES[policy]
    drawn = steps[random.integers(0, len(steps), len(images))]  # [b, 2, 3]
    for step in range(drawn.shape[1]):
        number, probability, strength = drawn[:, step].T
        happens = random.random(len(images)) < probability
        sign = random.choice([-1.0, 1.0], len(images))
        choice = np.where(happens, number, _NAMES.index("identity")).astype(np.int64)
        images = each_its_own(images, table, choice, sign * strength)
    return images


def _trivial(images: Tensor, random: np.random.Generator) -> Tensor:
    choice = random.integers(0, len(OPERATIONS), len(images))
    magnitude = random.integers(0, GREATEST_MAGNITUDE + 1, len(images)) / GREATEST_MAGNITUDE
    sign = random.choice([-1.0, 1.0], len(images))
    beyond = np.array([_beyond(name, images.shape[-1]) for name in OPERATIONS])
    return each_its_own(images, list(OPERATIONS.values()), choice, sign * magnitude * beyond[choice])


def _beyond(name: str, side: int) -> float:
    """TrivialAugment's greatest strength of an operation over RandAugment's."""
    if name.startswith("translate"):
        return _WIDE_PIXELS / (_RANDAUGMENT_SHARE * side)
    return _WIDE.get(name, 1.0)
