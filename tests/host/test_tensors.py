"""Files of tensors: what is wrong with one is said in the toolkit's words, and never in torch's."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nkat.errors import NKATError
from nkat.host.tensors import load_tensors, save_tensors


class _Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def archive(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def packed(data: bytes) -> bytes:
    """The same archive, its parts compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return buffer.getvalue()


def without(data: bytes, part: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            if not entry.filename.endswith(part):
                new.writestr(entry.filename, old.read(entry))
    return buffer.getvalue()


GOOD = {"weights": torch.arange(200.0), "name": "x", "steps": [1, 2]}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: b"", "it does not begin as"),
        (lambda data: b"some text", "it does not begin as"),
        (lambda data: pickle.dumps(_Evil()), "it does not begin as"),
        (lambda data: data[:-50], "is cut or damaged"),
        (lambda data: data[:300], "is cut or damaged"),
        (lambda data: archive({"a": _Evil()}), "could run code"),
        (lambda data: archive({"a": Path("x")}), "could run code"),
        (lambda data: without(data, "data.pkl"), "cannot be read"),
        (lambda data: without(data, "data/0"), "cannot be read"),
        (packed, "are compressed"),
        (lambda data: data.replace(torch.tensor(77.0).numpy().tobytes(), b"\1\2\3\4"), "the checksum of"),
    ],
)
def test_what_is_wrong_is_one_line_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path, data = tmp_path / "x.pt", archive(GOOD)
    path.write_bytes(damage(data))
    with pytest.raises(NKATError) as refused:
        load_tensors(path, "a checkpoint")
    message = str(refused.value)
    assert message.startswith(f"{path}: is ")
    assert said in message
    assert "\n" not in message
    for word in ("weights_only", "PyTorch", "torch.load", "trust", "miniz", "\x1b"):
        assert word not in message
    assert not (tmp_path / "ran").exists()


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save_tensors(path, GOOD)
    found = load_tensors(path, "a checkpoint")
    assert torch.equal(found.pop("weights"), GOOD["weights"])
    assert found == {"name": "x", "steps": [1, 2]}
    with pytest.raises(NKATError, match="there is no such file, where a checkpoint should be"):
        load_tensors(tmp_path / "no.pt", "a checkpoint")
    with pytest.raises(NKATError, match="is no file, and so not a checkpoint"):
        load_tensors(tmp_path, "a checkpoint")
