"""Pictures in folders, one a class, as uint8 arrays: what of a folder is training, validation and test, and decoding.

    PATH/train/CLASS/picture.jpg, PATH/val/…, PATH/test/…      torchvision's ImageFolder and timm have the same
    PATH/CLASS/picture.jpg                                     a fifth of each class is the test set

A class is a folder with pictures at any depth; its number is its place in the order of names. Where there are both,
val/ is what a run is validated on and test/ what it is judged on at its end; one of them alone is the test set. Without
either, a fifth of each class is set apart by a hash of the pictures' names: the same for every seed of a run, so that
runs are judged on the same pictures.

Pictures are read as `nkat_vit.predict` reads them (`nkat_vit.picture_files`), and kept in memory. One that cannot be
read stops everything: a set is what its owner believes it to be, or nothing.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import median_low
from typing import TypeVar

import numpy as np
import torch

from nkat.errors import NKATError
from nkat.host.console import bar, counted, format_bytes
from nkat.host.distributed import is_first
from nkat.host.hardware import total_and_free_memory
from nkat_vit.picture_files import SUFFIXES, is_picture_file, read_picture, read_size

LARGEST_DEFAULT = 64  # side that pictures are taken at unless one is given: larger ones take a processor hours
_PARTS = ("train", "val", "test")
_TEST_SHARE = 0.2
_NAMED = 3  # classes that a message lists one by one
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """Pictures, and the number of each one's class."""

    paths: tuple[Path, ...] = ()
    labels: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, slots=True)
class PictureFolder:
    """A folder's classes, in the order of their names, and its three parts.

    val: empty unless there are val/ and test/
    test_from: "test", "val", or "" where the test set is a share of all pictures
    """

    classes: tuple[str, ...]
    train: Part
    val: Part
    test: Part
    test_from: str


def open_folder(root: Path) -> PictureFolder:
    """What lies in a folder of pictures. Raises NKATError for one that is absent or does not hold at least two classes.

    No picture is opened.
    """
    if not root.is_dir():
        raise NKATError(f"{root}: {'this is no folder' if root.exists() else 'there is no such folder'}")
    with _unreadable():
        # Without folders in it, it is a class of that name: trains are things that one may want to tell from others.
        there = {name for name in _PARTS if (root / name).is_dir() and _folders(root / name)}
        if there and "train" not in there:
            raise NKATError(f"{root}: has {' and '.join(sorted(there))}, and no train, for pictures to learn from")
        classes = _folders(root / "train" if there else root)
        _check_classes(root / "train" if there else root, classes)
        if not there - {"train"}:
            return _set_apart(root, _part(root / "train" if there else root, classes), classes)
        train, val, test = (_part(root / name, classes) if name in there else Part() for name in _PARTS)
    if not test:
        val, test = Part(), val
    if not test:
        raise NKATError(f"{root}: there are no pictures in {' and '.join(sorted(there - {'train'}))}")
    return PictureFolder(classes, train, val, test, "test" if "test" in there else "val")


def _folders(place: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _check_classes(place: Path, classes: Sequence[str]) -> None:
    if not classes:
        raise NKATError(f"{place}: holds no folders; the pictures of each class belong in one, whose name is its name")
    empty = [name for name in classes if not _pictures(place / name)]
    if empty:
        kinds = ", ".join(sorted(SUFFIXES))
        raise NKATError(f"{place}: there are no pictures in {_some(empty)} (pictures end in {kinds})")
    if len(classes) < 2:
        raise NKATError(f"{place}: holds one class only, {classes[0]}; there is nothing to tell it from")


def _part(place: Path, classes: Sequence[str]) -> Part:
    foreign = [name for name in _folders(place) if name not in classes and _pictures(place / name)]
    if foreign:
        raise NKATError(f"{place}: there is no class {_some(foreign)} among the training pictures")
    found = [(path, label) for label, name in enumerate(classes) for path in _pictures(place / name)]
    return Part(tuple(path for path, _ in found), tuple(label for _, label in found))


def _pictures(place: Path) -> list[Path]:
    """All pictures below a class's folder, in the order of their names; hidden files are none."""
    return sorted(
        Path(folder, name)
        for folder, _, names in os.walk(place)
        for name in names
        if is_picture_file(Path(folder, name))
    )


def _set_apart(root: Path, whole: Part, classes: tuple[str, ...]) -> PictureFolder:
    """A share of each class as the test set, those whose names' hashes come first; one picture of each stays."""
    chosen: set[Path] = set()
    by_class: list[list[Path]] = [[] for _ in classes]
    for path, label in zip(whole.paths, whole.labels, strict=True):
        by_class[label].append(path)
    for paths in by_class:
        count = min(max(round(_TEST_SHARE * len(paths)), 1), len(paths) - 1)
        chosen.update(sorted(paths, key=lambda path: _name_hash(path.relative_to(root)))[:count])
    if not chosen:
        raise NKATError(f"{root}: has one picture of each class; there is none to test on")
    parts = []
    for test in (False, True):
        kept = [i for i, path in enumerate(whole.paths) if (path in chosen) == test]
        parts.append(Part(tuple(whole.paths[i] for i in kept), tuple(whole.labels[i] for i in kept)))
    return PictureFolder(classes, parts[0], Part(), parts[1], "")


def _name_hash(path: Path) -> bytes:
    return hashlib.sha256(path.as_posix().encode(errors="surrogateescape")).digest()


def picture_sides(part: Part) -> list[tuple[int, int]]:
    """Width and height of each picture, upright, from its first bytes. Raises NKATError for what is no picture."""
    return list(_each(part.paths, "looking at pictures", read_size))


def choose_side(sides: Sequence[tuple[int, int]]) -> int:
    """The side that pictures are taken at where none is given: the median of their shorter sides, at most 64."""
    return min(median_low([min(both) for both in sides]), LARGEST_DEFAULT)


def describe_sides(sides: Sequence[tuple[int, int]]) -> str:
    """Of pictures, for people: 48 x 32 pixels, or from where to where they go."""
    low, high = (tuple(pick(both) for both in zip(*sides, strict=True)) for pick in (min, max))
    if low == high:
        return f"{low[0]} x {low[1]} pixels"
    return f"{low[0]} to {high[0]} pixels wide and {low[1]} to {high[1]} high"


def decode(part: Part, side: int) -> np.ndarray:
    """Pictures uint8 [n, 3, side, side], not to be written to; decoded once while their files stay as they are.

    Raises NKATError for a picture that cannot be read, and for more pictures than memory holds.
    """
    with _unreadable():
        states = [path.stat() for path in part.paths]
    return _decoded(part.paths, side, tuple((state.st_size, state.st_mtime_ns) for state in states))


@lru_cache(maxsize=len(_PARTS))
def _decoded(paths: tuple[Path, ...], side: int, _states: tuple[tuple[int, int], ...]) -> np.ndarray:
    wanted, (_, free) = 2 * len(paths) * 3 * side**2, total_and_free_memory()  # a run takes its part out of them
    if wanted > free:
        raise NKATError(
            f"{counted(len(paths), 'picture')} of {side} x {side} take {format_bytes(wanted)} of memory, where all of "
            f"them are kept, and {format_bytes(free)} are free: give a smaller --image-size, or fewer pictures"
        )
    pictures = np.empty((len(paths), 3, side, side), np.uint8)
    for index, picture in enumerate(_each(paths, "reading pictures", partial(read_picture, channels=3, side=side))):
        pictures[index] = picture.pixels.numpy()
    return pictures


def is_grey(pictures: np.ndarray) -> bool:
    """Whether red, green and blue [n, 3, h, w] are the same at every point."""
    red = pictures[:, 0]
    return all(np.array_equal(red, pictures[:, other]) for other in (1, 2))


def to_grey(pictures: np.ndarray) -> np.ndarray:
    """uint8 [n, 3, h, w] → [n, 1, h, w]: ITU-R 601's luma, as Pillow rounds it; of grey ones the grey."""
    out = np.empty((len(pictures), 1, *pictures.shape[2:]), np.uint8)
    for picture, grey in zip(pictures.astype(np.uint8, copy=False), out, strict=True):
        red, green, blue = picture.astype(np.uint32)
        grey[0] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return out


def mean_and_std(pictures: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of each channel of uint8 [n, c, h, w], for pixels from 0 to 1, rounded to four digits; a std is never 0."""
    levels = np.arange(256) / 255
    means, stds = [], []
    for channel in range(pictures.shape[1]):
        counts = sum(np.bincount(picture[channel].ravel(), minlength=256) for picture in pictures)
        mean = float(np.average(levels, weights=counts))
        means.append(round(mean, 4))
        stds.append(max(round(float(np.average((levels - mean) ** 2, weights=counts)) ** 0.5, 4), 1e-3))
    return tuple(means), tuple(stds)


def _each(paths: Sequence[Path], what: str, work: Callable[[Path], T]) -> Iterator[T]:
    """What the function makes of each picture, in their order, by torch's number of threads, with progress.

    Raises NKATError for those it cannot be made of, all of which are counted first.
    """

    def tried(path: Path) -> T | NKATError:
        try:
            return work(path)
        except NKATError as error:
            return error

    errors = []
    pool = ThreadPoolExecutor(torch.get_num_threads())
    try:
        with warnings.catch_warnings(), bar(len(paths), what, "picture", enabled=is_first()) as progress:
            warnings.simplefilter("ignore")  # Pillow's, of oddities in files that it reads all the same
            for result in pool.map(tried, paths):
                progress.update()
                if isinstance(result, NKATError):
                    errors.append(result)
                elif not errors:
                    yield result
    finally:
        pool.shutdown(cancel_futures=True)
    if errors:
        others = f" (and {len(errors) - 1} more like it)" if len(errors) > 1 else ""
        raise NKATError(f"{errors[0]}{others}")


@contextmanager
def _unreadable() -> Iterator[None]:
    """While folders are looked through: what the system refuses is one line."""
    try:
        yield
    except OSError as error:
        raise NKATError(f"{error.filename}: cannot be read: {error.strerror}") from None


def _some(names: Sequence[str]) -> str:
    """The first of several names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
