"""Models with gated delta nets through the command line: perplexities by llama-perplexity, text, Θ and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nkat.theta.modelfile import open_model_file
from tests.measure.test_judging_goldens import CONTENT
from tests.support.golden import read_golden
from tests.support.tiny_models import write_tiny_model

pytestmark = pytest.mark.isa

ENGINE, CONVERTER = "nkat_inference_engine.py", "nkat_gguf_converter.py"
GOLDEN = read_golden("recurrent")


def record(script: Any, *arguments: object) -> dict[str, Any]:
    done = script(ENGINE, *arguments, "--no-cuda", "--json", "-")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("arch", GOLDEN)
def test_perplexities_are_llama_cpps(script: Any, tmp_path: Path, arch: str) -> None:
    """Of the model, and with Θ, which llama.cpp had as an adapter; chunks of more tokens than the delta rule's."""
    golden = GOLDEN[arch]
    text, model, star = tmp_path / "text.txt", write_tiny_model(tmp_path / "m.gguf", arch), tmp_path / "m.nkat"
    text.write_text(CONTENT, encoding="utf-8")
    made = script(CONVERTER, "--input", model, "--output", star, "--theta-rank", 4, "--theta-gamma", 0.5)
    assert made.returncode == 0, made.stderr
    measured = ("--perplexity", "--text", text, "--chunks", golden["chunks"], "--context", golden["context"])
    found = record(script, "--model", star, *measured)
    assert found["baseline_perplexity"] == pytest.approx(golden["plain"], rel=1e-4)
    assert found["nkat_perplexity"] == pytest.approx(golden["theta"], rel=2e-3)  # its adapter is of float16
    assert abs(golden["theta"] / golden["plain"] - 1) > 4e-3


def test_text_speed_and_an_adapter(script: Any, tmp_path: Path) -> None:
    """The same text with Θ as with its adapter, whole and after another prompt in the same session."""
    model, star, peft = write_tiny_model(tmp_path / "m.gguf", "qwen35"), tmp_path / "m.nkat", tmp_path / "peft"
    made = script(CONVERTER, "--input", model, "--output", star, "--theta-gamma", 0.5, "--export-peft", peft)
    assert made.returncode == 0, made.stderr
    layers = set(open_model_file(star).theta.layers)  # type: ignore[union-attr]
    assert {"blk.0.attn_qkv.weight", "blk.0.attn_gate.weight", "blk.0.ssm_out.weight", "blk.3.attn_q.weight"} <= layers
    assert not any("ssm_alpha" in name or "ssm_beta" in name for name in layers)
    asked = ("--generate", "the rain in", "--max-tokens", 12, "--temperature", 0)
    texts = [
        record(script, "--model", path, *flags, *asked)["text"]
        for path, flags in ((star, ()), (model, ("--lora", peft)), (model, ()))
    ]
    assert texts[0] == texts[1] != texts[2]
    speed = record(script, "--model", star, "--benchmark", "--seq-len", 24, "--iterations", 13, "--repetitions", 2)
    assert "compiled" in speed["decoder"]
    assert speed["tokens_per_second"] > 0
