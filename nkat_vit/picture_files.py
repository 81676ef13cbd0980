"""A picture in a file → bytes as a model takes them: turned upright, cut to its central square, scaled, made grey.

Any mode that Pillow reads; transparent parts are white, as viewers show them, and of an animation the first picture is
taken. A picture that has the model's size and colours already is not changed by a bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nkat.errors import NKATError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {
    ".avif", ".bmp", ".gif", ".ico", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff",
    ".webp",
}  # fmt: skip
# Pillow reads others too, of which EPS starts another program.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "AVIF")
_BRIGHT = 0.6


@dataclass(frozen=True, slots=True)
class ReadPicture:
    """A picture as a model takes it, and what it was in its file.

    pixels: uint8 [channels, side, side]
    size: width and height in pixels, as the file has them;  mode: Pillow's word for its kind of pixels
    """

    path: Path
    pixels: Tensor
    size: tuple[int, int]
    mode: str


def find_pictures(paths: Iterable[Path]) -> tuple[list[Path], dict[Path, str]]:
    """Files as they are named, and of folders all pictures in them and below, in order; what is wrong with folders."""
    found: list[Path] = []
    wrong = {}
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.rglob("*") if _is_picture_file(file))
        found += inside
        if not inside:
            wrong[path] = f"{path}: there is no picture in this folder"
    return found, wrong


def read_picture(path: Path, channels: int, side: int, invert: bool = False) -> ReadPicture:
    """The picture for a model of so many channels and pixels on a side. Raises NKATError where there is none.

    invert: bright becomes dark
    """
    from PIL import Image, ImageOps

    if not path.exists():
        raise NKATError(f"{path}: there is no such file")
    if not path.is_file():  # a pipe would wait for ever
        raise NKATError(f"{path}: this is no file")
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's doubts about large files and odd metadata
            with Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN]) as opened:
                size, mode = opened.size, opened.mode
                upright = ImageOps.exif_transpose(opened)
                plain = _to_bytes(upright).convert("L" if channels == 1 else "RGB")
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise NKATError(f"{path}: this is no picture, or none of a kind that is read here") from None
    except Exception as error:  # whatever Pillow can raise for a damaged file
        text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise NKATError(f"{path}: cannot be read as a picture: {text}") from None
    array = np.asarray(_square(plain, side))
    pixels = torch.from_numpy((255 - array if invert else array).copy())
    return ReadPicture(path, pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous(), size, mode)


def has_bright_edge(pixels: Tensor) -> bool:
    """Whether a picture uint8 [c, side, side] is bright along its edge, as ink on paper is."""
    values = pixels.float().mean(dim=0) / 255
    edge = torch.cat([values[0], values[-1], values[:, 0], values[:, -1]])
    return float(edge.mean()) > _BRIGHT


def _is_picture_file(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _to_bytes(image: Image) -> Image:
    """The picture with 8 bits a value and nothing transparent, in a mode that Pillow converts from here on."""
    from PIL import Image as pillow

    if image.mode.startswith(("I", "F")):  # Pillow would cut at 255 instead of scaling
        values = np.asarray(image, dtype=np.float64)
        largest = values.max(initial=0)
        scale = (65535 if largest > 255 else 255) if image.mode.startswith("I") else (1 if largest <= 1 else 255)
        scale = 65535 if image.mode.startswith("I;16") else scale
        return pillow.fromarray((values / scale * 255).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        return pillow.alpha_composite(pillow.new("RGBA", over.size, "white"), over)
    return image


def _square(image: Image, side: int) -> Image:
    """The largest central square, scaled."""
    from PIL.Image import Resampling

    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2  # whole pixels: half of one would blur
    return image.resize((side, side), Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
