"""Image sets: formats read back exactly, damaged and foreign files refused, splits, and downloads that go on."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from nkat.errors import NKATError
from nkat_vit import data, download
from nkat_vit.data import DATASETS, ImageSet, load_images, split
from nkat_vit.readers import read_cifar_binary, read_cifar_pickle, read_idx
from tests.conftest import SHARED_DATA
from tests.support.vit_data import idx, python2_pickle, squares, write_cifar, write_digits


def test_idx_reads_back_and_refuses_damage() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert np.array_equal(read_idx(idx(array), "x"), array)
    assert np.array_equal(read_idx(idx(array.reshape(-1)), "x"), array.reshape(-1))
    good = idx(array)
    for bad in (b"", good[:3], b"\0\0\x0d\3" + good[4:], good[:-1], good + b"\0", good[:9], b"\x1f\x8b" + good):
        with pytest.raises(NKATError, match="x: "):
            read_idx(bad, "x")
    with pytest.raises(NKATError, match="promises"):  # a size that would overflow or fill the memory
        read_idx(b"\0\0\x08\x03" + b"\xff" * 12, "x")


def test_the_two_versions_of_cifar_agree() -> None:
    images, labels = squares(7, 32, 3, 10, seed=0)
    binary = np.concatenate([labels[:, None], images.reshape(7, -1)], axis=1).tobytes()
    for got in (read_cifar_binary(binary, "b"), read_cifar_pickle(python2_pickle(images, labels), "p")):
        assert np.array_equal(got[0], images)
        assert np.array_equal(got[1], labels)
    with pytest.raises(NKATError, match="no whole number"):
        read_cifar_binary(binary[:-1], "b")


def test_the_unpickler_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "touched",))

    harmful = pickle.dumps({"data": Evil(), "labels": [1]}, protocol=2)
    pickle.loads(harmful)
    assert (tmp_path / "touched").exists()  # control: an ordinary unpickler does run it
    (tmp_path / "touched").unlink()
    with pytest.raises(NKATError, match="which no such file does"):
        read_cifar_pickle(harmful, "p")
    assert not (tmp_path / "touched").exists()
    images, labels = squares(3, 32, 3, 10, seed=0)
    good = python2_pickle(images, labels)
    objects = good.replace(b"U\x02u1", b"U\x02O8")
    for bad in (
        b"",
        good[:-1],
        good[: len(good) // 2],
        objects,
        pickle.dumps([1, 2]),
        good.replace(b"labels", b"lapels"),
    ):
        with pytest.raises(NKATError, match="p: this is no CIFAR-10 batch"):
            read_cifar_pickle(bad, "p")


def test_emnist_is_turned_upright_and_letters_count_from_zero(tmp_path: Path) -> None:
    expected, labels = squares(96, 28, 1, 10, seed=1)
    loaded = load_images("emnist-digits", write_digits(tmp_path), train=True)
    assert np.array_equal(loaded.images.numpy(), expected)
    assert not np.array_equal(loaded.images.numpy(), expected.transpose(0, 1, 3, 2))
    assert loaded.labels.tolist() == labels.tolist()
    raw = tmp_path / "EMNIST" / "raw"
    for part in ("images-idx3", "labels-idx1"):
        content = gzip.decompress((raw / f"emnist-digits-train-{part}-ubyte.gz").read_bytes())
        if part == "labels-idx1":
            content = idx(labels + 1)
        (raw / f"emnist-letters-train-{part}-ubyte").write_bytes(content)  # not gzipped: read as well
    assert load_images("emnist-letters", tmp_path, train=True).labels.tolist() == labels.tolist()
    (raw / "emnist-letters-train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(NKATError, match="labels from -1"):
        load_images("emnist-letters", tmp_path, train=True)


def test_emnist_from_its_own_archive(tmp_path: Path) -> None:
    whole = load_images("emnist-digits", write_digits(tmp_path / "a"), train=False)
    raw = tmp_path / "b" / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    with zipfile.ZipFile(raw / "gzip.zip", "w") as archive:
        for path in (tmp_path / "a" / "EMNIST" / "raw").iterdir():
            archive.write(path, f"gzip/{path.name}")
    again = load_images("emnist-digits", tmp_path / "b", train=False)
    assert torch.equal(again.images, whole.images)
    assert again.sha256 == whole.sha256
    (raw / "gzip.zip").write_bytes((raw / "gzip.zip").read_bytes()[:-40])
    with pytest.raises(NKATError, match="damaged"):
        load_images("emnist-digits", tmp_path / "b", train=False)


def test_cifar_from_folder_and_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path / "a")
    with pytest.raises(NKATError, match="the published one"):
        load_images("cifar10", tmp_path / "a", train=True)
    monkeypatch.setattr(data, "_CONTENTS", {})
    train, test = (load_images("cifar10", tmp_path / "a", train=part) for part in (True, False))
    assert (len(train), len(test)) == (120, 24)
    assert train.images.shape == (120, 3, 32, 32)
    (tmp_path / "b").mkdir()
    for kind in ("python", "binary"):  # either; the binary version is preferred
        with tarfile.open(tmp_path / "b" / f"cifar-10-{kind}.tar.gz", "w:gz") as archive:
            for path in sorted((tmp_path / "a" / "cifar-10-batches-bin").iterdir()):
                content = path.read_bytes()
                if kind == "python":
                    content = python2_pickle(*read_cifar_binary(content, "x"))
                info = tarfile.TarInfo(f"folder/{path.stem if kind == 'python' else path.name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        again = load_images("cifar10", tmp_path / "b", train=True)
        assert again.sha256 == train.sha256
    (tmp_path / "a" / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    with pytest.raises(NKATError, match=r"data_batch_3\.bin is not there"):
        load_images("cifar10", tmp_path / "a", train=True)


def test_damage_of_any_form_names_the_file_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bins = write_cifar(tmp_path / "bin") / "cifar-10-batches-bin" / "test_batch.bin"
    content = bins.read_bytes()
    pickled = tmp_path / "py" / "cifar-10-batches-py" / "test_batch"
    packed = tmp_path / "tar" / "cifar-10-binary.tar.gz"
    for path in (pickled, packed):
        path.parent.mkdir(parents=True)

    def advice(root: str, path: Path, reason: str) -> None:
        with pytest.raises(NKATError) as raised:
            load_images("cifar10", tmp_path / root, train=False)
        assert str(raised.value).startswith(f"{path}: damaged, delete it and fetch it again: ")
        assert reason in str(raised.value)

    for change, reason in ((content[:-1], "no whole number"), (content, "the published one")):
        bins.write_bytes(change)
        advice("bin", bins, reason)
        with tarfile.open(packed, "w:gz") as archive:
            info = tarfile.TarInfo("folder/test_batch.bin")
            info.size = len(change)
            archive.addfile(info, io.BytesIO(change))
        advice("tar", packed, reason)
    with tarfile.open(packed, "w:gz"):
        pass
    advice("tar", packed, "test_batch.bin is not in it")
    pickled.write_bytes(python2_pickle(*read_cifar_binary(content, "x"))[:-9])
    advice("py", pickled, "no CIFAR-10 batch")
    monkeypatch.setattr(data, "_CONTENTS", {})
    bins.write_bytes(content)
    assert len(load_images("cifar10", tmp_path / "bin", train=False)) == 24
    raw = write_digits(tmp_path) / "EMNIST" / "raw" / "emnist-digits-test-labels-idx1-ubyte.gz"
    raw.write_bytes(gzip.compress(gzip.decompress(raw.read_bytes())[:-1]))
    with pytest.raises(NKATError, match=f"{raw}: damaged, delete it and fetch it again: .*promises"):
        load_images("emnist-digits", tmp_path, train=False)


@pytest.mark.parametrize("name", ["mnist", "emnist", "cifar10"])
def test_absent_data_names_the_command(tmp_path: Path, name: str) -> None:
    with pytest.raises(NKATError, match=f"python -m nkat_vit.download {name} --data-root"):
        load_images(name, tmp_path, train=True)


def test_real_mnist_is_the_published_one(tmp_path: Path) -> None:
    source = SHARED_DATA / "images" / "mnist"
    if not source.is_dir():
        pytest.skip("the shared data folder has no images/mnist")
    (tmp_path / "MNIST").mkdir()
    (tmp_path / "MNIST" / "raw").symlink_to(source)
    test = load_images("mnist", tmp_path, train=False)
    assert test.labels[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
    assert test.images.float().mean().item() == pytest.approx(33.79, abs=0.01)  # published: 0.1325 of 255


def make_set(count: int) -> ImageSet:
    return ImageSet("mnist", torch.arange(count).view(-1, 1, 1, 1), torch.arange(count), "")


def test_split_is_disjoint_seeded_and_limited() -> None:
    whole = make_set(50)
    train, held = split(whole, 10, seed=3)
    assert sorted(train.labels.tolist() + held.labels.tolist()) == list(range(50))
    again, _ = split(whole, 10, seed=3)
    assert torch.equal(again.labels, train.labels)
    assert not torch.equal(split(whole, 10, seed=4)[0].labels, train.labels)
    few, same = split(whole, 10, seed=3, limit=5)
    assert few.labels.tolist() == train.labels[:5].tolist()
    assert torch.equal(same.labels, held.labels)
    for validation, limit in ((0, None), (50, None), (10, 41)):
        with pytest.raises(NKATError):
            split(whole, validation, seed=3, limit=limit)


def test_every_set_says_what_it_needs() -> None:
    for name, spec in DATASETS.items():
        assert len(spec.mean) == len(spec.std) == spec.channels
        assert download.archives(name)
    assert [len(DATASETS[n].classes) for n in ("emnist", "emnist-byclass", "emnist-letters")] == [47, 62, 26]


class Server:
    """A mirror on this machine: ranges, a connection that breaks, wrong bytes."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.break_after: dict[str, int] = {}
        self.ranges: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                outer.ranges.append(self.headers.get("Range"))
                if name not in outer.files:
                    self.send_error(404)
                    return
                content = outer.files[name]
                asked = self.headers.get("Range")
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206 if asked else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                stop = outer.break_after.pop(name, len(content))
                self.wfile.write(content[start:stop])

            def log_message(self, *arguments: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def mirror() -> Iterator[Server]:
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_download_resumes_tries_mirrors_and_checks(tmp_path: Path, mirror: Server) -> None:
    content = np.random.default_rng(0).bytes(300_000)
    md5 = hashlib.md5(content).hexdigest()
    mirror.files["good/f.gz"] = content
    mirror.files["bad/f.gz"] = content[:-1] + b"?"
    good, bad, gone = (mirror.url + folder for folder in ("good/", "bad/", "gone/"))
    mirror.break_after["good/f.gz"] = 200_000
    with pytest.raises(NKATError, match="the connection ended after"):
        download.fetch(download.Archive("x/f.gz", md5, (good,)), tmp_path)
    assert (tmp_path / "x" / "f.gz.part").stat().st_size == 200_000
    path = download.fetch(download.Archive("x/f.gz", md5, (gone, good)), tmp_path)
    assert mirror.ranges[-1] == "bytes=200000-"
    assert path.read_bytes() == content
    count = len(mirror.ranges)
    download.fetch(download.Archive("x/f.gz", md5, (good,)), tmp_path)
    assert len(mirror.ranges) == count  # there already
    with pytest.raises(NKATError, match="MD5"):
        download.fetch(download.Archive("y/f.gz", md5, (bad,)), tmp_path)
    assert not (tmp_path / "y" / "f.gz").exists()
    assert download.fetch(download.Archive("y/f.gz", md5, (bad, good)), tmp_path).read_bytes() == content
    path.write_bytes(b"something else")
    with pytest.raises(NKATError, match="delete it"):
        download.fetch(download.Archive("x/f.gz", md5, (good,)), tmp_path)
