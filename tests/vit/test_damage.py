"""Damaged and hostile files of the image side: one line, no traceback, no more memory than the real file needs."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import math
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nkat.errors import NKATError
from nkat.host.distributed import World
from nkat_vit import checkpoint
from nkat_vit.data import _MOST_BYTES, ImageSet, load_images
from nkat_vit.loop import Trainer
from nkat_vit.model import NKATViT
from nkat_vit.recipe import make_recipe, read_config


class _Zeros(io.RawIOBase):
    """So many zeros, and how many of them were asked for."""

    def __init__(self, size: int) -> None:
        self.left = size

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.left)
        buffer[:count] = bytes(count)
        self.left -= count
        return count

    def readable(self) -> bool:
        return True


def idx_folder(root: Path, content: bytes) -> Path:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    return root


GOOD = gzip.compress(b"\0\0\x08\x03" + bytes(12), mtime=0)


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip",
        GOOD[:12],
        GOOD[:-4],
        GOOD[:10] + b"\xff" * 20,  # zlib.error, which is no OSError
        GOOD[:10] + bytes([GOOD[10] ^ 6]) + GOOD[11:],
        GOOD[:-8] + bytes(8),
    ],
)
def test_damaged_gzips(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(NKATError, match="damaged, delete it and fetch it again"):
        load_images("mnist", idx_folder(tmp_path, content), train=False)
    with pytest.raises(NKATError, match="MD5"):  # the control: what is whole is unpacked and compared
        load_images("mnist", idx_folder(tmp_path / "other", GOOD), train=False)


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_MOST_BYTES, "others", 1 << 16)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb") as file:
        file.write(bytes(1 << 24))
    with pytest.raises(NKATError, match="more than the 65,536 bytes"):
        load_images("mnist", idx_folder(tmp_path, packed.getvalue()), train=False)


def test_damaged_zips(tmp_path: Path) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("gzip/emnist-digits-test-images-idx3-ubyte.gz", GOOD * 50)
    good = whole.getvalue()
    at = good.index(b"ubyte.gz") + 10
    for content in (b"PK", good[:-30], good[:at] + b"\xff" * 12 + good[at + 12 :], b"", good[:6] + b"\1" + good[7:]):
        (raw / "gzip.zip").write_bytes(content)
        with pytest.raises(NKATError):
            load_images("emnist-digits", tmp_path, train=False)


def test_damaged_tars_and_tar_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        for name in ("padding", "test_batch.bin"):
            info = tarfile.TarInfo(f"cifar/{name}")
            info.size = 1 << 20
            archive.addfile(info, io.BufferedReader(_Zeros(1 << 20)))
    good = whole.getvalue()
    path = tmp_path / "cifar-10-binary.tar.gz"
    for content in (b"", good[:100], good[:20] + b"\xff" * 9 + good[29:], zlib.compress(b"x")):
        path.write_bytes(content)
        with pytest.raises(NKATError):
            load_images("cifar10", tmp_path, train=False)
    monkeypatch.setitem(_MOST_BYTES, "archive", 1 << 20)
    path.write_bytes(good)
    with pytest.raises(NKATError, match="more than the 1,048,576 bytes"):
        load_images("cifar10", tmp_path, train=False)


# --- settings


@pytest.mark.parametrize(
    "text", ['{"layers": 1e999}', '{"lr": 1e999}', '{"lr": NaN}', '{"lr": -1e999}', '{"depth": 1e99}']
)
def test_numbers_without_end(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text, encoding="utf-8")
    with pytest.raises(NKATError):
        make_recipe({"dataset": "mnist", **read_config(tmp_path / "c.json")})


@pytest.mark.parametrize(
    "values", [{"dataset": ["mnist"]}, {"dataset": {}}, {"randaugment": [1e999, 2]}, {"randaugment": 1}]
)
def test_settings_of_another_shape(values: dict) -> None:
    make_recipe({"dataset": "mnist"})
    with pytest.raises(NKATError):
        make_recipe({"dataset": "mnist", **values})


def test_json_without_end(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(NKATError, match="no JSON"):
        read_config(tmp_path / "c.json")


# --- checkpoints


def best(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    small = {"dataset": "mnist", "embed_dim": 16, "depth": 1, "heads": 2}
    recipe = make_recipe(small)
    content = {"kind": "weights", "recipe": recipe.values(), "weights": NKATViT(recipe.model).state_dict()}
    path = tmp_path / "best.pt"
    checkpoint.save(path, content)
    assert checkpoint.load_model(path).recipe == recipe
    return path, content


def test_damaged_checkpoints(tmp_path: Path) -> None:
    path, content = best(tmp_path)
    raw = path.read_bytes()
    weights = dict(content["weights"])
    name = next(iter(weights))
    for changed in (
        {"recipe": None},
        {"recipe": {}},
        {"recipe": {1: 2}},
        {"recipe": {**content["recipe"], "dataset": "none"}},
        {"weights": None},
        {"weights": [1]},
        {"weights": {**weights, name: 5}},
        {"weights": {**weights, name: torch.zeros(3)}},
        {"weights": {**weights, "more": torch.zeros(3)}},
        {"weights": {k: v for k, v in weights.items() if k != name}},
    ):
        checkpoint.save(path, content | changed)
        with pytest.raises(NKATError):
            checkpoint.load_model(path)
    for key in ("recipe", "weights", "kind"):
        checkpoint.save(path, {k: v for k, v in content.items() if k != key})
        with pytest.raises(NKATError):
            checkpoint.load_model(path)
    for at in range(0, len(raw), max(1, len(raw) // 15)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :])
        with contextlib.suppress(NKATError):  # some bytes are padding
            assert same_weights(checkpoint.load_model(path).model.state_dict(), content["weights"])
        path.write_bytes(raw[:at])
        with pytest.raises(NKATError, match=r"best\.pt: is (not a checkpoint|cut or damaged)"):
            checkpoint.load_model(path)


def _changed(content: Any, depth: int = 4) -> Iterator[Any]:
    """Of what a run keeps: each key or entry missing or one too many, each value of another kind, down to a depth."""
    odd: list[Any] = [None, True, -1, math.nan, "x", [1], torch.ones(2, 2, 2)]
    yield from odd
    if isinstance(content, torch.Tensor) and content.is_floating_point():
        yield torch.full_like(content, math.nan)
        yield content.double()
    if depth == 0:
        return
    if isinstance(content, dict) and content:
        yield {**content, "more": 1}
        for key in list(content)[:: 1 if len(content) < 10 else len(content) // 2]:
            yield {k: v for k, v in content.items() if k != key}
            yield from ({**content, key: value} for value in _changed(content[key], depth - 1))
    if isinstance(content, list) and content:
        yield from (content[:-1], content * 2)
        yield from ([value, *content[1:]] for value in _changed(content[0], depth - 1))


def test_damaged_runs(tmp_path: Path) -> None:
    settings = {"dataset": "mnist", "embed_dim": 16, "depth": 1, "heads": 2, "batch_size": 4, "epochs": 2}
    recipe = make_recipe({**settings, "opt": "muon", "ema": 0.9, "validation": 4, "amp": "off"})
    pictures = ImageSet("mnist", torch.zeros(12, 1, 28, 28, dtype=torch.uint8), torch.arange(12) % 10, "0" * 64)
    held = pictures.take(torch.arange(4))

    def trainer() -> Trainer:
        return Trainer(recipe, pictures, held, World(0, 1, torch.device("cpu")), tmp_path, judge_last=False)

    begun = trainer()
    next(begun.epochs())
    content = checkpoint.load(tmp_path / "last.pt", "run")
    again = trainer()
    again.restore(content)
    assert again.step == begun.step == 3
    part = {name: content[name] for name in ("model", "average", "losses", "step", "history", "best", "processes")}
    part["optimizers"] = [{"state": optimizer["state"]} for optimizer in content["optimizers"]]
    part["data_sha256"] = content["data_sha256"]
    tried = 0
    for record in itertools.islice(_changed(part), 0, None, 7):  # all of them take a minute
        if not isinstance(record, dict) or "more" in record:
            continue
        match record.get("optimizers"):
            case [{"more": _, "state": _}, *_]:  # not looked at, as the rates are not
                continue
        tried += 1
        with pytest.raises(NKATError, match=r"damaged|another"):
            again.restore(record)
    assert tried > 30
    for version in (torch.zeros(0), torch.zeros(2), "1", None, 2):
        torch.save({**content, "format": version}, tmp_path / "last.pt")
        with pytest.raises(NKATError, match="no checkpoint"):
            checkpoint.load(tmp_path / "last.pt", "run")


def test_a_flipped_bit_in_a_weight_is_no_weight(tmp_path: Path) -> None:
    path, content = best(tmp_path)
    raw = path.read_bytes()
    weight = content["weights"]["head.weight"]
    at = raw.index(weight.numpy().tobytes()) + weight.nbytes // 2
    flipped = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
    path.write_bytes(flipped)
    loaded = torch.load(path, weights_only=True)["weights"]["head.weight"]
    assert not torch.equal(loaded, weight)  # control: torch by itself takes it
    with pytest.raises(NKATError, match=r"best\.pt: is damaged: the checksum of .* is wrong"):
        checkpoint.load_model(path)


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def test_an_unreadable_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = best(tmp_path)

    def broken(_: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(NKATError, match=r"best\.pt: cannot be read: Input/output error"):
        checkpoint.load_model(path)
