"""What a fit keeps in memory: counted right, decided by the room there is, and said in the record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from nkat.lm.load import load_model
from nkat.measure.texts import default_text
from nkat.sources.fit import room
from nkat.sources.fit.descent import zero_start
from nkat.sources.fit.layers import fitted_layers
from nkat.sources.fit.room import Kept, activation_bytes, keep, weight_bytes
from tests.conftest import Script
from tests.support.tiny_models import write_tiny_model

TOKENS = torch.arange(1, 33)[None]


class Fitted:
    """A tiny model with layers that are being fitted, and those layers as they were."""

    def __init__(self, path: Path, arch: str) -> None:
        loaded = load_model(write_tiny_model(path, arch))
        layers = loaded.model.star_linears()
        names = [name for name in layers if name.startswith("blk.")]
        self.path, self.model, self.layers = path, loaded.model, [*loaded.model.multipliers().values()]
        start = zero_start([layers[name].shape for name in names], 2, 0)
        self.fitted = fitted_layers(loaded.model, dict(zip(names, start, strict=True)))

    def keep(self, asked: bool | None, left: int) -> Kept:
        with self.fitted:
            return keep(self.model, self.layers, TOKENS, 4, asked, room=left)


@pytest.fixture
def fitted(tmp_path: Path) -> Fitted:
    return Fitted(tmp_path / "tiny.gguf", "qwen3moe")


def test_bytes_are_those_of_what_the_backward_pass_needs() -> None:
    """exp keeps its result, which the product keeps too; the product's other side; the sine's argument is the same."""
    start = torch.ones(1, 8, requires_grad=True)

    def hidden(tokens: torch.Tensor, learning: bool) -> torch.Tensor:
        assert learning  # what is measured is what a fit does
        x = (start * 2.0).exp()
        return x * x.sin()

    model = cast(Any, SimpleNamespace(hidden=hidden))
    assert activation_bytes(model, TOKENS, 1000) == 2 * 8 * 4
    assert activation_bytes(model, TOKENS, 63) is None
    with torch.no_grad():
        assert activation_bytes(model, TOKENS, 64) == 64
    start.requires_grad_(False)
    assert activation_bytes(model, TOKENS, 1000) == 0


def test_longer_sequences_keep_more(tmp_path: Path) -> None:
    fitted = Fitted(tmp_path / "tiny.gguf", "llama")
    with fitted.fitted:
        short, long = (activation_bytes(fitted.model, TOKENS[:, :n], 1 << 40) for n in (8, 32))
    assert short is not None
    assert long is not None
    assert 2 * short < long < 16 * short


def test_weights_are_counted_dequantised(fitted: Fitted) -> None:
    block = fitted.model.blocks[0]
    assert block.experts is not None
    stack, linear = block.experts.stack("ffn_up_exps"), block.linear("attn_q")
    assert weight_bytes([stack, linear]) == 4 * (math.prod(stack.shape) + math.prod(linear.shape))


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (500, Kept(True, True)),
        (499, Kept(True, False)),
        (400, Kept(True, False)),
        (399, Kept(False, True)),
        (100, Kept(False, True)),
        (99, Kept(False, False)),
        (0, Kept(False, False)),
    ],
)
def test_what_fits_is_kept(fitted: Fitted, monkeypatch: pytest.MonkeyPatch, left: int, expected: Kept) -> None:
    """Weights of 100 bytes, and 4 sequences of 100 bytes each."""
    monkeypatch.setattr(room, "weight_bytes", lambda layers: 100)
    monkeypatch.setattr(room, "activation_bytes", lambda model, tokens, most: 100 if most >= 100 else None)
    assert fitted.keep(None, left) == expected
    assert (fitted.layers[0].dense is not None) == expected.weights  # type: ignore[union-attr]


def test_half_of_what_is_free_may_be_taken(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda device: 2000)
    monkeypatch.setattr(room, "weight_bytes", lambda layers: 200)
    monkeypatch.setattr(room, "activation_bytes", lambda model, tokens, most: most)
    asked = (fitted.model, fitted.layers, TOKENS, 4, None)
    assert keep(*asked) == Kept(True, False)
    monkeypatch.setattr(room, "activation_bytes", lambda model, tokens, most: 50 if most == 83 else None)
    assert keep(*asked, processes=3) == Kept(True, False)  # 333 bytes are one process's part


def test_what_is_asked_for_is_not_measured(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "activation_bytes", None)
    assert fitted.keep(True, 0) == Kept(True, True)
    assert Fitted(fitted.path, "qwen3moe").keep(False, 1 << 40) == Kept(False, False)


def test_kept_weights_change_no_bit_and_are_kept(fitted: Fitted) -> None:
    block = fitted.model.blocks[0]
    assert block.experts is not None
    with torch.inference_mode():
        before = fitted.model(TOKENS)
        assert block.linear("attn_q").dense is None
        fitted.keep(True, 0)
        assert torch.equal(fitted.model(TOKENS), before)
    assert block.linear("attn_q").dense is not None
    assert block.experts.stack("ffn_up_exps").expert(0).dense is not None


@pytest.mark.parametrize(("flags", "expected"), [([], True), (["--no-fit-fast"], False), (["--fit-fast"], True)])
def test_the_record_says_what_was_kept(tmp_path: Path, script: Script, flags: list[str], expected: bool) -> None:
    """Nothing is short of room for a model of some thousand weights."""
    model, text = write_tiny_model(tmp_path / "m.gguf", "llama"), tmp_path / "text.txt"
    text.write_text(default_text().content[:6000])
    fit = ["--fit-steps", "4", "--fit-batch", "2", "--fit-context", "48", "--fit-learning-rate", "0.02", "--no-guard"]
    command = ["--input", model, "--output", tmp_path / "out.nkat", "--theta-source", "fit", "--calibrate", text, *fit]
    done = script("nkat_gguf_converter.py", *command, "--no-cuda", "--json", tmp_path / "record.json", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "record.json").read_text())["fit"]["kept_in_memory"]
    assert found == {"activations": expected, "weights": expected}
