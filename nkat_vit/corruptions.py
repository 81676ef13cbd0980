"""The fifteen corruptions of CIFAR-10-C at five severities, for 32×32 colour pictures: "CIFAR-10-C style", seeded.

The constants are the published ones (Hendrycks and Dietterich, arXiv 1903.12261; make_cifar_c.py). The published files
are fixed draws made with other libraries, so that figures measured here are close to theirs and not equal. Known
differences: motion blur follows ImageMagick's kernel but samples the nearest pixel; frost needs the authors' six
textures (a folder with frost1.png … frost6.jpg; they draw from the first five) and is drawn procedurally without them.

Pictures are uint8 [n, 32, 32, 3] in and out; the work inside is float32 or float64 from 0 to 1.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from nkat.errors import NKATError

SIDE = 32
SEVERITIES = (1, 2, 3, 4, 5)
_FROST_FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
Random = np.random.Generator


@dataclass(frozen=True, slots=True)
class Frost:
    """Textures for the frost corruption, each uint8 [h, w, 3], and where they are from."""

    textures: tuple[np.ndarray, ...]
    source: str


def load_frost(folder: Path | None) -> Frost:
    """The authors' textures, a fifth of their size as they use them; None: procedural ones, which the source says."""
    if folder is None:
        random = np.random.default_rng(0)
        return Frost(tuple(_procedural_frost(random) for _ in _FROST_FILES), "procedural")
    textures = []
    for name in _FROST_FILES:
        if not (folder / name).is_file():
            raise NKATError(f"{folder / name} is not there; the frost textures are those of CIFAR-10-C")
        with Image.open(folder / name) as image:
            # Linear interpolation at a fifth samples the middle of each five pixels.
            textures.append(np.asarray(image.convert("RGB"))[2::5, 2::5])
    return Frost(tuple(textures), "CIFAR-10-C")


def corrupt(images: np.ndarray, name: str, severity: int, seed: int, frost: Frost) -> np.ndarray:
    """Pictures uint8 [n, 32, 32, 3] with one corruption; the same seed, name and severity give the same pictures."""
    if images.shape[1:] != (SIDE, SIDE, 3) or images.dtype != np.uint8:
        raise NKATError(f"corruptions are defined for 32x32 colour pictures, not for {images.dtype} {images.shape[1:]}")
    table = CORRUPTIONS | {"frost": partial(_frost, frost=frost)}
    random = np.random.default_rng([seed, zlib.crc32(name.encode()), severity])
    result = table[name](images / 255, severity, random)
    return (np.clip(result, 0, 1) * 255).astype(np.uint8)


def _gaussian_noise(x: np.ndarray, severity: int, random: Random) -> np.ndarray:
    return x + random.normal(scale=(0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1], size=x.shape)


def _shot_noise(x: np.ndarray, severity: int, random: Random) -> np.ndarray:
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return random.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, severity: int, random: Random) -> np.ndarray:
    hit = random.random(x.shape) < (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    return np.where(hit, random.random(x.shape) < 0.5, x)


def _defocus_blur(x: np.ndarray, severity: int, random: Random) -> np.ndarray:
    radius, sigma = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    place = np.arange(-3, 4)
    disk = (place[:, None] ** 2 + place**2 <= radius**2).astype(float)
    taps = np.exp(-(np.arange(-1, 2) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    kernel = ndimage.convolve(disk / disk.sum(), np.outer(taps, taps), mode="constant")
    return ndimage.correlate(x, kernel[None, :, :, None], mode="mirror")


def _glass_blur(x: np.ndarray, severity: int, random: Random) -> np.ndarray:
    sigma, delta, rounds = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))[severity - 1]
    x = np.floor(_blur(x, sigma) * 255) / 255
    picture = np.arange(len(x))
    for _ in range(rounds):
        for row in range(SIDE - delta, delta, -1):
            for column in range(SIDE - delta, delta, -1):
                shift = random.integers(-delta, delta, (2, len(x)))
                there = picture, row + shift[0], column + shift[1]
                # The published code says exchange, but its NumPy views alias: the pixel there stays as it is.
                x[:, row, column] = x[there]
    return _blur(x, sigma)


def _motion_blur(x: np.ndarray, severity: int, random: Random) -> np.ndarray:
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    return _streak(x, radius, sigma, random.uniform(-45, 45, len(x)))


def _zoom_blur(x: np.ndarray, severity: int, random: Random) -> np.ndarray:
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)
    return (x + sum(clipped_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def _snow(x: np.ndarray, severity: int, random: Random) -> np.ndarray:
    mean, spread, zoom, least, radius, sigma, keep = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    layer = clipped_zoom(random.normal(mean, spread, (*x.shape[:3], 1)), zoom)
    layer = np.floor(np.clip(np.where(layer < least, 0, layer), 0, 1) * 255) / 255
    layer = _streak(layer, radius, sigma, random.uniform(-135, -45, len(x)))
    pale = np.maximum(x, _luma(x) * 1.5 + 0.5)
    return keep * x + (1 - keep) * pale + layer + layer[:, ::-1, ::-1]


def _frost(x: np.ndarray, severity: int, random: Random, frost: Frost | None = None) -> np.ndarray:
    """frost: None for procedural textures."""
    textures = load_frost(None).textures if frost is None else frost.textures
    share, ice = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    layers = np.empty_like(x)
    for layer, which in zip(layers, random.integers(len(textures), size=len(x)), strict=True):
        texture = textures[which]
        row, column = (random.integers(0, length - SIDE) for length in texture.shape[:2])
        layer[:] = texture[row : row + SIDE, column : column + SIDE] / 255
    return share * x + ice * layers


def _fog(x: np.ndarray, severity: int, random: Random) -> np.ndarray:
    amount, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    highest = x.max(axis=(1, 2, 3), keepdims=True)
    foggy = x + amount * plasma_fractal(len(x), decay, random)[..., None]
    return foggy * highest / (highest + amount)


def _brightness(x: np.ndarray, severity: int, random: Random) -> np.ndarray:
    """The V of HSV raised; with H and S kept that is a common factor, and white for black."""
    value = x.max(axis=3, keepdims=True)
    raised = np.clip(value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1], 0, 1)
    return np.where(value > 0, x * raised / np.where(value > 0, value, 1), raised)


def _contrast(x: np.ndarray, severity: int, random: Random) -> np.ndarray:
    means = x.mean(axis=(1, 2), keepdims=True)
    return (x - means) * (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1] + means


def _elastic(x: np.ndarray, severity: int, random: Random) -> np.ndarray:
    size, smooth, corner = (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[severity - 1]
    n, middle, third = len(x), SIDE // 2, SIDE // 3
    corners = np.array([[middle + third] * 2, [middle + third, middle - third], [middle - third] * 2], dtype=float)
    moved = corners + random.uniform(-corner * SIDE, corner * SIDE, (n, 3, 2))
    # The map back, from a place in the result to one in the picture: three points (x, y, 1) determine it.
    back = np.linalg.solve(np.concatenate([moved, np.ones((n, 3, 1))], axis=2), np.broadcast_to(corners, (n, 3, 2)))
    rows, columns = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    places = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ back[:, None]
    x = bilinear(x, places[..., 1], places[..., 0], edge_repeats=False)
    if size == 0:
        return x
    shifts = random.uniform(-1, 1, (2, n, SIDE, SIDE))
    shifts = (
        ndimage.gaussian_filter(shifts, (0, 0, smooth * SIDE, smooth * SIDE), mode="reflect", truncate=3) * size * SIDE
    )
    return bilinear(x, rows + shifts[1], columns + shifts[0], edge_repeats=True)


def _pixelate(x: np.ndarray, severity: int, random: Random) -> np.ndarray:
    small = int(SIDE * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1])
    box = Image.Resampling.BOX
    return _each(x, lambda image: image.resize((small, small), box).resize((SIDE, SIDE), box))


def _jpeg(x: np.ndarray, severity: int, random: Random) -> np.ndarray:
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def through(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return _each(x, through)


Corruption = Callable[[np.ndarray, int, Random], np.ndarray]
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian noise": _gaussian_noise,
    "shot noise": _shot_noise,
    "impulse noise": _impulse_noise,
    "defocus blur": _defocus_blur,
    "glass blur": _glass_blur,
    "motion blur": _motion_blur,
    "zoom blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic": _elastic,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}


def clipped_zoom(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of pictures [n, 32, 32, c] enlarged to their size: scipy.ndimage.zoom of order 1, cut at the edges."""
    side = int(np.ceil(SIDE / factor))
    top = (SIDE - side) // 2
    large = round(side * factor)
    cut = (large - SIDE) // 2
    place = np.arange(cut, cut + SIDE) * (side - 1) / max(large - 1, 1)
    low = np.minimum(place.astype(int), max(side - 2, 0))
    part = place - low
    rows = np.zeros((SIDE, side))
    rows[np.arange(SIDE), low] = 1 - part
    rows[np.arange(SIDE), np.minimum(low + 1, side - 1)] += part
    inner = x[:, top : top + side, top : top + side]
    return np.einsum("ij,njkc,lk->nilc", rows, inner, rows, optimize=True)


def plasma_fractal(count: int, decay: float, random: Random) -> np.ndarray:
    """Height maps [count, 32, 32] from 0 to 1 by the diamond-square algorithm, wrapping around at the edges."""
    heights = np.zeros((count, SIDE, SIDE))
    step, wobble = SIDE, 100.0

    def around(total: np.ndarray) -> np.ndarray:
        return total / 4 + wobble * random.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=1)
        heights[:, half::step, half::step] = around(pairs + np.roll(pairs, -1, axis=2))
        middles, corners = heights[:, half::step, half::step], heights[:, ::step, ::step]
        vertical = middles + np.roll(middles, 1, axis=1) + corners + np.roll(corners, -1, axis=2)
        heights[:, ::step, half::step] = around(vertical)
        horizontal = middles + np.roll(middles, 1, axis=2) + corners + np.roll(corners, -1, axis=1)
        heights[:, half::step, ::step] = around(horizontal)
        step, wobble = half, wobble / decay
    heights -= heights.min(axis=(1, 2), keepdims=True)
    return heights / heights.max(axis=(1, 2), keepdims=True)


def bilinear(x: np.ndarray, rows: np.ndarray, columns: np.ndarray, edge_repeats: bool) -> np.ndarray:
    """Pictures [n, h, w, c] sampled at rows, columns [n, h, w]; mirrored beyond the edge."""

    def inside(index: np.ndarray) -> np.ndarray:
        period = 2 * SIDE if edge_repeats else 2 * (SIDE - 1)
        index = index % period
        return np.where(index < SIDE, index, period - 1 - index if edge_repeats else period - index)

    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    picture = np.arange(len(x))[:, None, None]

    def at(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        return x[picture, inside(row), inside(column)]

    upper = at(top, left) * (1 - right) + at(top, left + 1) * right
    lower = at(top + 1, left) * (1 - right) + at(top + 1, left + 1) * right
    return upper * (1 - down) + lower * down


def _streak(x: np.ndarray, radius: float, sigma: float, degrees: np.ndarray) -> np.ndarray:
    """ImageMagick's motion blur: one side of a Gaussian along each picture's own direction, edges repeated."""
    width = 2 * int(np.ceil(radius)) + 1
    taps = np.exp(-(np.arange(width) ** 2) / (2 * sigma**2))
    angle = np.radians(degrees)
    picture, place, out = np.arange(len(x))[:, None, None], np.arange(SIDE), np.zeros_like(x)
    for distance, tap in enumerate(taps / taps.sum()):
        down, right = (np.ceil(distance * v - 0.5).astype(int)[:, None] for v in (np.sin(angle), np.cos(angle)))
        rows, columns = np.clip(place + down, 0, SIDE - 1), np.clip(place + right, 0, SIDE - 1)
        out += tap * x[picture, rows[:, :, None], columns[:, None, :]]
    return out


def _blur(x: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")


def _luma(x: np.ndarray) -> np.ndarray:
    return (x @ np.array([0.299, 0.587, 0.114]))[..., None]


def _each(x: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    pictures = np.rint(x * 255).astype(np.uint8)
    return np.stack([np.asarray(change(Image.fromarray(picture))) for picture in pictures]) / 255


def _procedural_frost(random: Random) -> np.ndarray:
    """A bluish white web [128, 128, 3]: the ridges of smooth noise at three scales."""
    ridges = np.zeros((128, 128))
    for sigma in (2, 4, 8):
        noise = ndimage.gaussian_filter(random.normal(size=ridges.shape), sigma, mode="wrap")
        ridges += np.exp(-np.abs(noise / noise.std()) * 3)
    ridges /= ridges.max()
    colour = np.stack([ridges * 0.85 + 0.1, ridges * 0.9 + 0.12, ridges * 0.9 + 0.2], axis=-1)
    return (np.clip(colour, 0, 1) * 255).astype(np.uint8)
