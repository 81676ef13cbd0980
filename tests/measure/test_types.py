"""The types of few bits: what a model in them computes is what its weights in F32 compute, in every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType as QType

from nkat.engine.compiled import CompiledDecoder
from nkat.engine.decoder import Decoder, make_decoder
from nkat.engine.eager import EagerDecoder
from nkat.engine.scoring import EagerScorer, MakeScorer, make_scorer
from nkat.gguf import grid_formats
from nkat.gguf.quantise import requantise
from nkat.kernels import registry
from nkat.lm.load import load_model
from nkat.measure.perplexity import score_chunks, text_chunks
from nkat.measure.texts import default_text
from nkat.theta.modelfile import open_model_file
from tests.support.tiny_models import write_tiny_model

pytestmark = pytest.mark.isa

ENGINE, CONVERTER = "nkat_inference_engine.py", "nkat_gguf_converter.py"
TYPES = [*(block.qtype for block in grid_formats.FORMATS), QType.TQ1_0, QType.TQ2_0, QType.NVFP4]
every_type = pytest.mark.parametrize("qtype", TYPES, ids=lambda qtype: qtype.name)
# one with float16 scales, one without; a grid and a table of levels
some_types = pytest.mark.parametrize("qtype", [QType.IQ2_XS, QType.NVFP4], ids=lambda qtype: qtype.name)
INPUTS_KEPT = 6e-3  # nats: what inputs of a few bytes change in the likelihood of a token here, three times the largest
IDS = [(29 * i + 5) % 200 for i in range(24)]


def tiny(folder: Path, qtype: QType) -> Path:
    options = {"blocks": 2, "embedding": 256, "feed_forward": 256, "qtype": qtype}
    return write_tiny_model(folder / f"{qtype.name}.gguf", "llama", **options)


def widened(path: Path) -> Path:
    """A copy with its weights in F32."""
    out = path.with_suffix(".f32.gguf")
    requantise(path, out, lambda info: QType.F32)
    return out


def nll(path: Path, make: MakeScorer = lambda model, batch, context: EagerScorer(model)) -> torch.Tensor:
    """Of each scored token; by default on the reference."""
    loaded = load_model(path)
    chunks = text_chunks(loaded.tokenizer, default_text().content[:2000], 2, 64)
    return score_chunks(loaded.model, chunks, make=make)


@every_type
def test_a_model_has_the_perplexity_of_its_weights_in_f32(tmp_path: Path, qtype: QType) -> None:
    path = tiny(tmp_path, qtype)
    found = nll(path)
    wide = widened(path)
    assert torch.equal(found, nll(wide))
    assert torch.allclose(found, nll(wide, make_scorer), atol=1e-3)  # by the CPU's kernels
    assert torch.allclose(found, nll(path, make_scorer), atol=INPUTS_KEPT)
    assert 3.0 < float(found.mean()) < 30.0  # the control: weights of a usual size, of which each counts
    other = tiny(tmp_path, QType.Q8_0)
    assert not torch.allclose(found, nll(other), rtol=0.01)


def last_logits(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    """Behind a prompt and some tokens one by one."""
    logits = decoder.prefill(ids[:20])
    for token in ids[20:]:
        logits = decoder.step(token)
    return logits


@every_type
def test_the_compiled_decoder_computes_what_the_reference_does(tmp_path: Path, qtype: QType) -> None:
    """Products of rounded inputs, which a sum of another order may round the other way, are in tests/kernels."""
    path = tiny(tmp_path, qtype)
    expected = last_logits(EagerDecoder(load_model(path).model, len(IDS)), IDS)
    made = make_decoder(load_model(path, repack=True).model, len(IDS))
    assert isinstance(made, CompiledDecoder)
    result = last_logits(made, IDS)
    assert float((result - expected).abs().max()) < 3e-4
    made.length = 0
    assert torch.equal(last_logits(made, IDS), result)
    made.length = 0
    assert float((last_logits(made, IDS[::-1]) - expected).abs().max()) > 0.1


def test_experts_of_such_a_type(tmp_path: Path) -> None:
    """Whose tiles are made when a token first goes to one."""
    options = {"embedding": 256, "feed_forward": 256, "expert_length": 256, "experts": 6, "qtype": QType.IQ2_XS}
    path = write_tiny_model(tmp_path / "experts.gguf", "llama", **options)
    expected = last_logits(EagerDecoder(load_model(path).model, len(IDS)), IDS)
    made = make_decoder(load_model(path, repack=True).model, len(IDS))
    assert isinstance(made, CompiledDecoder)
    assert float((last_logits(made, IDS) - expected).abs().max()) < 3e-4
    assert torch.allclose(nll(path), nll(path, make_scorer), atol=INPUTS_KEPT)
    made.length = 0
    assert float((last_logits(made, IDS[::-1]) - expected).abs().max()) > 0.1


@every_type
def test_the_engine_runs_it_on_the_kernels(script, tmp_path: Path, qtype: QType) -> None:
    path, text = tiny(tmp_path, qtype), tmp_path / "text.txt"
    text.write_text(default_text().content[:3000], encoding="utf-8")
    registry._say.cache_clear()
    figures = []
    for model in (path, widened(path)):
        flags = ("--perplexity", "--text", text, "--context", 64, "--chunks", 2, "--activations", "float", "--no-cuda")
        done = script(ENGINE, "--model", model, *flags, "--json", "-")
        assert done.returncode == 0, done.stderr
        assert "the reference" not in done.stderr
        figures.append(json.loads(done.stdout.splitlines()[-1])["baseline_perplexity"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)


@some_types
def test_theta_is_made_learned_and_exported(script, fails, tmp_path: Path, qtype: QType) -> None:
    path, text, out = tiny(tmp_path, qtype), tmp_path / "text.txt", tmp_path / "out.nkat"
    text.write_text(default_text().content[:6000], encoding="utf-8")
    reference = write_tiny_model(tmp_path / "reference.gguf", "llama", blocks=2, embedding=256, feed_forward=256)
    # so many steps that the gain is beyond what sums of another order move
    fit = ("--fit-steps", 12, "--fit-batch", 2, "--fit-context", 48, "--fit-start", "zero", "--no-guard", "--no-cuda")
    fit += ("--fit-learning-rate", 0.02, "--fit-precision", "float32", "--theta-rank", 2, "--theta-gamma", 0.9)
    sources = {
        "weight": (),
        "residual": ("--reference", reference),
        "fit": ("--calibrate", text, *fit),
    }
    for source, flags in sources.items():
        done = script(CONVERTER, "--input", path, "--output", out, "--theta-source", source, *flags, "--force")
        assert done.returncode == 0, done.stderr
        with_theta = open_model_file(out).theta
        assert with_theta is not None
        assert len(with_theta.layers) == 14
        adapter = tmp_path / f"{source}.lora.gguf"
        done = script(CONVERTER, "--input", out, "--export-lora", adapter)
        assert done.returncode == 0, done.stderr
        loaded = load_model(out, gamma=0.5)
        tokens = torch.tensor([loaded.tokenizer.encode("the rain in a tin")])
        moved = loaded.model(tokens) - load_model(path).model(tokens)
        assert 0.0 < float(moved.abs().max()) < float("inf")
