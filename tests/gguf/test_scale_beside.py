"""Numbers beside weights (`blk.0.attn_q.scale`), as NVFP4 files have them: whoever reads such a weight knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nkat.gguf.file import GGUFFile
from nkat.gguf.weights import read_scaled_weight, read_weight, scale_beside
from nkat.lm.keys import ConfigError
from nkat.lm.load import load_model
from nkat.sources.make import make_thetas
from nkat.sources.options import ThetaOptions
from tests.conftest import Script
from tests.support.tiny_models import write_tiny_model

NAME = "blk.1.attn_q.weight"
SCALED = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture
def scaled(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "scaled.gguf", "llama", scaled=SCALED)


def test_a_weight_is_read_with_what_lies_beside_it(scaled: Path, tmp_path: Path) -> None:
    file, plain = GGUFFile.open(scaled), GGUFFile.open(write_tiny_model(tmp_path / "plain.gguf", "llama"))
    scale = scale_beside(file, NAME)
    assert 0.2 < scale < 1.4
    assert scale != 1.0
    assert torch.equal(read_scaled_weight(file, NAME), scale * read_weight(file, NAME))
    assert scale_beside(plain, NAME) == 1.0
    options = ThetaOptions(rank=4, gamma=0.9)
    theirs, ours = (make_thetas(one, [NAME], options)[NAME] for one in (plain, file))
    assert not torch.equal(theirs.scale, ours.scale)
    assert torch.allclose(theirs.scale * scale**0.5, ours.scale, rtol=1e-4)  # of each of P and Q


def test_what_is_won_back_is_what_the_model_multiplies_by(scaled: Path, tmp_path: Path) -> None:
    """A reference whose weights have the scale in them leaves nothing to win back; the plain one would leave much."""
    file = GGUFFile.open(scaled)
    made = {name: (read_scaled_weight(file, name).numpy(), file.tensors[name].type) for name in (NAME,)}
    reference = write_tiny_model(tmp_path / "r.gguf", "llama", make=lambda name, _: made.get(name))
    options = ThetaOptions(rank=4, gamma=0.9, source="residual", reference=GGUFFile.open(reference))
    theta = make_thetas(file, [NAME], options)[NAME]
    assert max(float(factor.abs().max()) for factor in theta.factors()) < 1e-3


def test_a_merged_weight_computes_what_theta_did(script: Script, scaled: Path, tmp_path: Path) -> None:
    pytest.importorskip("nkat.gguf.quantise")
    output, merged, record = (tmp_path / name for name in ("m.nkat", "merged.gguf", "r.json"))
    flags = ("--theta-gamma", 0.5, "--merge", merged, "--text", __file__, "--chunks", 1, "--json", record)
    done = script("nkat_gguf_converter.py", "--input", scaled, "--output", output, *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads(record.read_text())["merge"] is not None
    ids = torch.tensor([[3, 50, 7, 120]])
    with torch.inference_mode():
        expected, plain, found = (load_model(path, **g).model(ids) for path, g in (
            (output, {}), (output, {"gamma": 1.0}), (merged, {})
        ))  # fmt: skip
    assert (expected - plain).abs().max() > 0.05
    assert (found - expected).abs().max() < 1e-3


def test_a_scale_that_llama_cpp_does_not_apply_is_refused(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", "qwen2", scaled=("ffn_up",))
    with pytest.raises(ConfigError, match=r"tensor blk\.0\.ffn_up\.scale is unknown in a qwen2 model"):
        load_model(path)


def test_scales_inside_experts_leave_the_compiled_program(tmp_path: Path) -> None:
    from nkat.engine.decoder import make_decoder

    for stack, compiled in (("ffn_up_exps", False), ("ffn_down_exps", True)):
        path = write_tiny_model(tmp_path / f"{stack}.gguf", "qwen3moe", scaled=(stack,))
        decoder = make_decoder(load_model(path, repack=True).model, 8)
        assert ("compiled" in decoder.name) == compiled
        with torch.inference_mode():
            expected = load_model(path).model(torch.tensor([[1, 5, 9]]))[0, -1]
        assert (decoder.prefill([1, 5, 9]) - expected).abs().max() < 1e-4
