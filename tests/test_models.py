"""Fetched models are what they should be before they are used."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from nkat import models
from nkat.errors import NKATError

CONTENT = b"a model" * 1000


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NKAT_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(CONTENT).hexdigest()
    small = replace(models.MODELS["smollm2"], file_name="m.gguf", size=len(CONTENT), sha256=digest)
    monkeypatch.setitem(models.MODELS, "smollm2", small)
    (tmp_path / "cache").mkdir(mode=0o700)
    return tmp_path / "cache" / "m.gguf"


def test_a_file_of_the_right_size_is_not_enough(model: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert models.cached("smollm2") is None
    model.write_bytes(CONTENT)
    assert models.cached("smollm2") == model == models.fetch("smollm2")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(models, "_download", lambda *_: pytest.fail("it is there"))
    for content in (bytes(len(CONTENT)), CONTENT[:-1] + b"x"):
        model.write_bytes(content)
        assert models.cached("smollm2") is None
        assert "damaged or another file" in capsys.readouterr().err
    model.write_bytes(CONTENT)
    assert models.cached("smollm2") == model


def test_it_is_hashed_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.write_bytes(CONTENT)
    assert models.cached("smollm2") == model
    real, hashed = hashlib.sha256, []
    monkeypatch.setattr(models.hashlib, "sha256", lambda *data: (hashed.append(1), real(*data))[1])
    assert models.cached("smollm2") == model
    assert not hashed
    os.utime(model, (1, 1))
    assert models.cached("smollm2") == model
    assert hashed


@pytest.mark.parametrize("value", [5, None, [], "x", "0" * 63])
def test_a_remembered_hash_that_is_none_is_made_anew(model: Path, tmp_path: Path, value: object) -> None:
    model.write_bytes(CONTENT)
    assert models.cached("smollm2") == model
    (memory,) = tmp_path.rglob("models.json")
    memory.write_text(json.dumps(dict.fromkeys(json.loads(memory.read_text()), value)))
    assert models.cached("smollm2") == model


def test_without_a_cache_nothing_is_fetched(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NKAT_CACHE", "relative")
    assert models.cached("smollm2") is None
    with pytest.raises(NKATError, match="set NKAT_CACHE"):
        models.fetch("smollm2")
