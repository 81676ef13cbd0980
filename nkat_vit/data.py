"""The image sets: MNIST, Fashion-MNIST, EMNIST and CIFAR-10 from their original archives, or folders of pictures.

    DATA_ROOT/MNIST/raw, FashionMNIST/raw, EMNIST/raw      the IDX files, gzipped or not
    DATA_ROOT/EMNIST/raw/gzip.zip                          EMNIST's own archive, read as it is
    DATA_ROOT/cifar-10-batches-bin or -py                  CIFAR-10 unpacked,
    DATA_ROOT/cifar-10-binary.tar.gz or -python.tar.gz     or its archive, read as it is
    folder:PATH                                            pictures in folders, one a class (`nkat_vit.folders`)

All of them become uint8 tensors, and stay in memory. What is known of a named set stands here; what is of a folder is
measured once, before a run, and kept in its recipe.

Contents are compared with the published ones wherever those are known (EMNIST's are not: its SHA-256 goes into the
record instead). Training and test pictures are loaded by separate calls, so that a run cannot look at the test set
before its end. `python -m nkat_vit.download` fetches what is missing; nothing here opens a connection.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from nkat.errors import NKATError
from nkat.host.console import counted
from nkat_vit.folders import (
    PictureFolder,
    choose_side,
    decode,
    describe_sides,
    is_grey,
    mean_and_std,
    open_folder,
    picture_sides,
    to_grey,
)
from nkat_vit.readers import read_cifar_binary, read_cifar_pickle, read_idx

FOLDER = "folder:"  # before the path of a set that has no name of its own
_DIGITS = tuple("0123456789")
_UPPER = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_LOWER = tuple("abcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """One image set.

    folder, prefixes: where its IDX files lie, and how their names begin for training and test; CIFAR-10 has none
    first_label: what the file calls the first class (EMNIST's letters start at 1)
    transposed: stored column by column, as NIST does
    mirrored: a mirrored picture is as good as the original (true of things, not of letters)
    mean, std: of each channel over the training pictures, for pixels from 0 to 1
    """

    title: str
    classes: tuple[str, ...]
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    folder: str = ""
    prefixes: tuple[str, str] = ("", "")
    first_label: int = 0
    transposed: bool = False
    mirrored: bool = False


def _emnist(split: str, classes: tuple[str, ...], first_label: int = 0) -> DatasetSpec:
    prefixes = (f"emnist-{split}-train", f"emnist-{split}-test")
    grey = ((0.1751,), (0.3332,))
    return DatasetSpec(f"EMNIST {split}", classes, 1, 28, *grey, "EMNIST", prefixes, first_label, transposed=True)


# EMNIST's merged classes: capitals, and those small letters that differ from them.
_MERGED = (*_DIGITS, *_UPPER, *tuple("abdefghnqrt"))
DATASETS = {
    "mnist": DatasetSpec("MNIST", _DIGITS, 1, 28, (0.1307,), (0.3081,), "MNIST", ("train", "t10k")),
    "fashion": DatasetSpec(
        "Fashion-MNIST",
        ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
        1,
        28,
        (0.2860,),
        (0.3530,),
        "FashionMNIST",
        ("train", "t10k"),
        mirrored=True,
    ),
    "emnist": _emnist("balanced", _MERGED),
    "emnist-bymerge": _emnist("bymerge", _MERGED),
    "emnist-byclass": _emnist("byclass", (*_DIGITS, *_UPPER, *_LOWER)),
    "emnist-letters": _emnist("letters", _LOWER, first_label=1),
    "emnist-digits": _emnist("digits", _DIGITS),
    "emnist-mnist": _emnist("mnist", _DIGITS),
    "cifar10": DatasetSpec(
        "CIFAR-10",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        3,
        32,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        mirrored=True,
    ),
}

DATASETS_HELP = f"{', '.join(DATASETS)}, or folder:PATH, where PATH/train/CLASS and PATH/test/CLASS hold pictures"

# MD5 of the uncompressed contents, from files whose archives' published MD5s were right.
_CONTENTS = {
    ("MNIST", "train-images-idx3-ubyte"): "6bbc9ace898e44ae57da46a324031adb",
    ("MNIST", "train-labels-idx1-ubyte"): "a25bea736e30d166cdddb491f175f624",
    ("MNIST", "t10k-images-idx3-ubyte"): "2646ac647ad5339dbf082846283269ea",
    ("MNIST", "t10k-labels-idx1-ubyte"): "27ae3e4e09519cfbb04c329615203637",
    ("FashionMNIST", "train-images-idx3-ubyte"): "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    ("FashionMNIST", "train-labels-idx1-ubyte"): "9018921c3c673c538a1fc5bad174d6f9",
    ("FashionMNIST", "t10k-images-idx3-ubyte"): "8181f5470baa50b63fa0f6fddb340f0a",
    ("FashionMNIST", "t10k-labels-idx1-ubyte"): "15d484375f8d13e6eb1aabb0c3f46965",
    ("CIFAR-10", "data_batch_1"): "5dd7e06a14cb22eb9f671a540d1b7c25",  # as in the binary version, either way
    ("CIFAR-10", "data_batch_2"): "5ea93a67294ea407fff1d09f752e9692",
    ("CIFAR-10", "data_batch_3"): "942cd6a4bcdd0dd3c604fbe906cb4421",
    ("CIFAR-10", "data_batch_4"): "ae636b3ba5c66a11e91e8cb52e771fcb",
    ("CIFAR-10", "data_batch_5"): "53f37980c15c3d472c316c40844f3f0d",
    ("CIFAR-10", "test_batch"): "803d5f7f4d78ea53de84dbe85f74fb6d",
}
# Contents are unpacked before their hash is known; the largest published ones are EMNIST's 697,932 pictures (byclass),
# the others' 60,000 of 28 × 28 bytes, and CIFAR-10's archive of 184 MB.
_MOST_BYTES = {"EMNIST": 600 << 20, "others": 64 << 20, "archive": 256 << 20}
# What the standard library raises for damaged archives, whatever the place of the damage.
_DAMAGE = (
    OSError, EOFError, LookupError, ValueError, OverflowError, RuntimeError, NotImplementedError, zlib.error,
    struct.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile,
)  # fmt: skip
_CIFAR_BATCHES = {True: [f"data_batch_{i}" for i in range(1, 6)], False: ["test_batch"]}


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Pictures uint8 [n, channels, size, size] and labels int64 [n] from 0, on one device; sha256 of both as loaded.

    held: how many of a training set's last pictures are a validation part that it came with
    """

    name: str
    images: Tensor
    labels: Tensor
    sha256: str
    held: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> ImageSet:
        """The pictures of an index [k], with the whole set's name and hash."""
        index = index.to(self.labels.device)
        return ImageSet(self.name, self.images[index], self.labels[index], self.sha256)

    def to(self, device: torch.device) -> ImageSet:
        """The same on another device."""
        return ImageSet(self.name, self.images.to(device), self.labels.to(device), self.sha256)


def is_folder(name: str) -> bool:
    """Whether a data set's name is that of a folder of pictures."""
    return name.startswith(FOLDER)


def title_of(name: str) -> str:
    """What people call a data set: of a folder its own name, without the path to it."""
    return _own_name(name) if is_folder(name) else find_dataset(name).title


def file_name_of(name: str) -> str:
    """What a run's folder is called after."""
    return _own_name(name) if is_folder(name) else name


def _own_name(name: str) -> str:
    path = Path(name.removeprefix(FOLDER))
    return path.name or path.resolve().name


def dataset_name(text: str) -> str:
    """For argparse: one of DATASETS, or folder:PATH."""
    if is_folder(text) and text != FOLDER:
        return FOLDER + str(Path(text.removeprefix(FOLDER)))
    if text in DATASETS:
        return text
    raise argparse.ArgumentTypeError(f"there is no data set {text!r}; there are {', '.join(DATASETS)}, and folder:PATH")


def find_dataset(name: str) -> DatasetSpec:
    """The named set's description; raises NKATError for a name there is not."""
    if name not in DATASETS:
        raise NKATError(f"there is no data set {name!r}; there are {', '.join(DATASETS)}, and folder:PATH")
    return DATASETS[name]


def describe_dataset(name: str, root: Path) -> DatasetSpec:
    """The description of any set, of a folder by looking at its training pictures."""
    return describe_folder(name, root)[0] if is_folder(name) else find_dataset(name)


def describe_folder(name: str, root: Path, size: int | None = None) -> tuple[DatasetSpec, str]:
    """The description of a folder of pictures, and a line about them for people; size: the side they are taken at."""
    folder = _open(name, root)
    sides = picture_sides(folder.train)
    side = size or choose_side(sides)
    pictures = decode(folder.train, side)
    grey = is_grey(pictures)
    mean, std = mean_and_std(pictures[:, :1] if grey else pictures)
    spec = DatasetSpec(title_of(name), folder.classes, 1 if grey else 3, side, mean, std, mirrored=True)
    test = f"the {folder.test_from} folder" if folder.test_from else "a fifth of each class, which no run learns from"
    return spec, (
        f"{spec.title}: {len(spec.classes)} classes, {len(sides):,} {'grey' if grey else 'colour'} pictures to learn "
        f"from, {describe_sides(sides)}, taken at {side} x {side} (--image-size changes it); the test set is "
        f"{test} ({counted(len(folder.test), 'picture')})"
    )


def usual_validation(name: str, root: Path) -> int:
    """How many pictures of a folder are held out unless a number is given: its own val, or a tenth, at most 5,000."""
    folder = _open(name, root)
    return len(folder.val) or min(max(len(folder.train) // 10, 1), 5000)


def has_own_test(name: str, root: Path) -> bool:
    """Whether the test set stays what it is when training pictures come or go: not where it is a share of a folder."""
    return not is_folder(name) or bool(_open(name, root).test_from)


def load_images(name: str, root: Path, train: bool, spec: DatasetSpec | None = None) -> ImageSet:
    """The whole training or test set; raises NKATError when it is absent, damaged or not the published one.

    spec: a folder's description, as the recipe has it; without it, it is measured
    """
    if is_folder(name):
        return _folder_set(name, root, train, spec or describe_dataset(name, root))
    spec = find_dataset(name)
    images, labels = _cifar(root, train) if name == "cifar10" else _idx_set(name, root, train)
    if images.shape[1:] != (spec.channels, spec.size, spec.size) or len(images) != len(labels) or not len(labels):
        raise NKATError(f"{name}: pictures of shape {images.shape} and {len(labels)} labels do not fit {spec.title}")
    labels = labels.astype(np.int64) - spec.first_label
    if labels.min() < 0 or labels.max() >= len(spec.classes):
        raise NKATError(f"{name}: labels from {labels.min()} to {labels.max()} for {len(spec.classes)} classes")
    digest = hashlib.sha256(np.ascontiguousarray(images).tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
    return ImageSet(name, torch.from_numpy(np.ascontiguousarray(images).copy()), torch.from_numpy(labels), digest)


def check_files(name: str, root: Path) -> None:
    """Raises NKATError where a file of the set, training or test, is absent, damaged or not the published one.

    Before hours of training: a bad test set would else be found after them. Its pictures are used for nothing.
    """
    spec = describe_dataset(name, root)
    for train in (True, False):
        load_images(name, root, train, spec)


def split(whole: ImageSet, validation: int, seed: int, limit: int | None = None) -> tuple[ImageSet, ImageSet]:
    """Training and validation parts, by seed; `limit` keeps so many training pictures (the validation set stays).

    A set that came with a validation part has that one for every seed.
    """
    if not 0 < validation < len(whole):
        raise NKATError(f"a validation set of {validation} does not fit {counted(len(whole), 'picture')}")
    if whole.held and validation != whole.held:
        raise NKATError(
            f"{whole.name}: val has {counted(whole.held, 'picture')}, which --validation {validation} is not"
        )
    order = torch.randperm(len(whole) - whole.held, generator=torch.Generator().manual_seed(seed))
    order = torch.cat([torch.arange(len(order), len(whole)), order])
    chosen = order[validation:]
    if limit is not None:
        if limit > len(chosen):
            raise NKATError(f"--limit-train {limit} is more than the {counted(len(chosen), 'picture')} there are")
        chosen = chosen[:limit]
    return whole.take(chosen), whole.take(order[:validation])


def _open(name: str, root: Path) -> PictureFolder:
    """A folder's set by its name: at its path, or where that does not exist, below the data root by its own name."""
    path = Path(name.removeprefix(FOLDER)).expanduser()
    beside = root / _own_name(name)
    return open_folder(beside if not path.exists() and beside.is_dir() else path)


def _folder_set(name: str, root: Path, train: bool, spec: DatasetSpec) -> ImageSet:
    folder = _open(name, root)
    if folder.classes != spec.classes:
        raise NKATError(f"{name}: its classes are no longer {', '.join(spec.classes)}, but {', '.join(folder.classes)}")
    parts = [part for part in ((folder.train, folder.val) if train else (folder.test,)) if part]
    pictures = [decode(part, spec.size) for part in parts]
    pictures = [to_grey(part) for part in pictures] if spec.channels == 1 else pictures
    images = pictures[0] if len(pictures) == 1 else np.concatenate(pictures)
    labels = np.array([label for part in parts for label in part.labels], np.int64)
    digest = hashlib.sha256(images.reshape(-1).data)
    digest.update(labels.data)
    held = len(folder.val) if train else 0
    return ImageSet(name, torch.from_numpy(images), torch.from_numpy(labels), digest.hexdigest(), held)


def _idx_set(name: str, root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    spec = DATASETS[name]
    prefix = spec.prefixes[0 if train else 1]
    images, labels = (_idx(root, name, f"{prefix}-{part}-ubyte") for part in ("images-idx3", "labels-idx1"))
    if images.ndim != 3 or labels.ndim != 1:
        raise NKATError(f"{name}: pictures and labels are mixed up in {root / spec.folder}")
    if spec.transposed:
        images = images.transpose(0, 2, 1)
    return images[:, None], labels


def _idx(root: Path, name: str, file: str) -> np.ndarray:
    folder = DATASETS[name].folder
    raw = root / folder / "raw"
    archive = raw / "gzip.zip"
    most = _MOST_BYTES["EMNIST" if folder == "EMNIST" else "others"]
    if (raw / f"{file}.gz").is_file():
        with _damage(raw / f"{file}.gz"), (raw / f"{file}.gz").open("rb") as packed:
            return _checked_idx(folder, file, _gunzip(packed, most))
    if (raw / file).is_file():
        with _damage(raw / file), (raw / file).open("rb") as plain:
            return _checked_idx(folder, file, _at_most(plain, most))
    if folder == "EMNIST" and archive.is_file():
        with _damage(archive), zipfile.ZipFile(archive) as opened, opened.open(f"gzip/{file}.gz") as packed:
            return _checked_idx(folder, file, _gunzip(packed, most))
    raise _absent(root, name, f"{raw / file}.gz")


def _checked_idx(folder: str, file: str, data: bytes) -> np.ndarray:
    array = read_idx(data, file)
    _check_content(folder, file, data)
    return array


def _gunzip(packed: IO[bytes], most: int) -> bytes:
    with gzip.GzipFile(fileobj=packed) as unpacked:
        return _at_most(unpacked, most)


def _at_most(file: IO[bytes] | gzip.GzipFile, most: int) -> bytes:
    """All of a file, which may not be longer than the longest published one: a small archive can hold terabytes."""
    data = file.read(most + 1)
    if len(data) > most:
        raise OSError(f"more than the {most:,} bytes of any published file")
    return data


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """While a file is read and checked: whatever is wrong with it is one line with its place and what to do."""
    try:
        yield
    except (NKATError, *_DAMAGE) as error:
        raise NKATError(f"{path}: damaged, delete it and fetch it again: {error}") from None


def _cifar(root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    parts = []
    for path, batch, data, is_pickle in _cifar_batches(root, train):
        with _damage(path):
            images, labels = (read_cifar_pickle if is_pickle else read_cifar_binary)(data, batch)
            records = np.concatenate([labels[:, None], images.reshape(len(images), -1)], axis=1)
            _check_content("CIFAR-10", batch, records.tobytes())
        parts.append((images, labels))
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def _cifar_batches(root: Path, train: bool) -> list[tuple[Path, str, bytes, bool]]:
    """(file it is in, name, bytes, whether they are a pickle) of each batch, from the first form that is there."""
    for kind, suffix in (("bin", ".bin"), ("py", "")):
        folder = root / f"cifar-10-batches-{kind}"
        if folder.is_dir():
            paths = {batch: folder / f"{batch}{suffix}" for batch in _CIFAR_BATCHES[train]}
            for path in paths.values():
                if not path.is_file():
                    raise _absent(root, "cifar10", path)
            return [(path, batch, _read(path), kind == "py") for batch, path in paths.items()]
    for kind, suffix in (("binary", ".bin"), ("python", "")):
        archive = root / f"cifar-10-{kind}.tar.gz"
        if archive.is_file():
            found = _from_tar(archive, {f"{batch}{suffix}" for batch in _CIFAR_BATCHES[train]})
            return [(archive, batch, found[f"{batch}{suffix}"], kind == "python") for batch in _CIFAR_BATCHES[train]]
    raise _absent(root, "cifar10", root / "cifar-10-binary.tar.gz")


def _read(path: Path) -> bytes:
    with _damage(path), path.open("rb") as file:
        return _at_most(file, _MOST_BYTES["others"])


def _from_tar(archive: Path, wanted: set[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    passed = 0
    with _damage(archive), tarfile.open(archive) as opened:
        while len(found) < len(wanted) and (member := opened.next()) is not None:
            passed += member.size
            if passed > _MOST_BYTES["archive"]:
                raise tarfile.ReadError(f"more than the {_MOST_BYTES['archive']:,} bytes of the published archive")
            name = Path(member.name).name
            content = opened.extractfile(member) if member.isfile() and name in wanted else None
            if content is not None:
                found[name] = _at_most(content, _MOST_BYTES["others"])
        if set(found) != wanted:
            raise NKATError(f"{', '.join(sorted(wanted - set(found)))} is not in it")
    return found


def _check_content(folder: str, file: str, data: bytes) -> None:
    known = _CONTENTS.get((folder, file))
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if known is not None and found != known:
        raise NKATError(f"{folder} {file}: the content has MD5 {found}, the published one {known}")


def _absent(root: Path, name: str, path: Path | str) -> NKATError:
    command = f"python -m nkat_vit.download {name} --data-root {root}"
    return NKATError(f"{name}: {path} is not there; fetch it with: {command} (or copy the original file to that place)")
