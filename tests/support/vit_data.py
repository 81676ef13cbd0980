"""Small image sets in the original formats, easy to learn: class c has a bright square at place c."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import struct
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from nkat.host import commandline
from nkat_vit.data import DATASETS

_run_process = subprocess.run  # tests replace it


def squares(count: int, size: int, channels: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [count, channels, size, size] and labels uint8 [count]."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count).astype(np.uint8)
    images = random.integers(0, 60, (count, channels, size, size)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 4)
        image[:, 2 + 8 * row : 8 + 8 * row, 2 + 6 * column : 8 + 6 * column] += 150
    return images, labels


def idx(array: np.ndarray) -> bytes:
    """An IDX file's bytes."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_digits(root: Path, train: int = 96, test: int = 40) -> Path:
    """EMNIST digits, transposed as NIST stores them; its contents have no published checksum to differ from."""
    folder = root / "EMNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for part, count, seed in (("train", train, 1), ("test", test, 2)):
        images, labels = squares(count, 28, 1, 10, seed)
        stored = np.ascontiguousarray(images[:, 0].transpose(0, 2, 1))
        (folder / f"emnist-digits-{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(stored)))
        (folder / f"emnist-digits-{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return root


def write_grey(root: Path, name: str, train: int, test: int) -> Path:
    """A set of DATASETS in IDX files, with contents that are not the published ones."""
    spec = DATASETS[name]
    folder = root / spec.folder / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count, seed in zip(spec.prefixes, (train, test), (1, 2), strict=True):
        images, labels = squares(count, 28, 1, 10, seed)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[:, 0])))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return root


def write_cifar(root: Path, per_batch: int = 24) -> Path:
    """CIFAR-10 in the binary version. Tests that read it have to empty nkat_vit.data's table of contents first."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate([*(f"data_batch_{b}" for b in range(1, 6)), "test_batch"]):
        images, labels = squares(per_batch, 32, 3, 10, 10 + i)
        (folder / f"{name}.bin").write_bytes(
            np.concatenate([labels[:, None], images.reshape(per_batch, -1)], 1).tobytes()
        )
    return root


def python2_pickle(images: np.ndarray, labels: np.ndarray) -> bytes:
    """What Python 2 wrote for a batch of the python version: see pickletools.dis of an original."""
    raw = images.tobytes()
    out = [b"\x80\x02}(U\x06labels]("]
    out += [b"K" + bytes([label]) for label in labels.tolist()]
    out += [b"eU\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"]
    out += [b"M" + struct.pack("<H", len(images)) + b"M" + struct.pack("<H", 3072) + b"\x86"]
    out += [b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"]
    out += [b"T" + struct.pack("<I", len(raw)) + raw + b"tbu."]
    return b"".join(out)


def run_module(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m name arguments…` in this process, which has torch imported already."""
    command = [name, *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    main = importlib.import_module(name).main
    with (
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        commandline.run(main)
    return subprocess.CompletedProcess(command, ended.value.code or 0, out.getvalue(), err.getvalue())


def run_in_process(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Stands in for `subprocess.run` of `python -m module …`: importing torch anew takes most of a short run."""
    if command[:2] != [sys.executable, "-m"]:
        return _run_process(command, **options)
    done = run_module(command[2], *command[3:])
    if options.get("stdout") != subprocess.DEVNULL:
        print(done.stdout)
    return done
