"""Models of architectures that are not run here: Θ and adapters all the same, and who measures them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nkat.gguf.file import GGUFFile
from nkat.theta.lora import read_lora
from nkat.theta.modelfile import open_model_file
from tests.conftest import Script
from tests.support.other_models import BLOCK_TENSORS, write_other_model

Fails = Callable[..., str]
ADAPTED = {  # the weights of a block that Θ acts on, behind the first, dense one of deepseek2
    "starcoder2": {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"},
    "falcon": {"attn_qkv", "attn_output", "ffn_up", "ffn_down"},
    "command-r": {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"},
    "deepseek2": {"attn_output", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"},
    "bert": {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"},
}


def convert(script: Script, model: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    return script("nkat_gguf_converter.py", "--input", model, *flags)


@pytest.mark.parametrize("arch", ADAPTED)
def test_theta_and_adapter_of_any_architecture(script: Script, tmp_path: Path, arch: str) -> None:
    model = write_other_model(tmp_path / "m.gguf", arch)
    output, lora = tmp_path / "m.nkat", tmp_path / "lora.gguf"
    done = convert(script, model, "--output", output, "--export-lora", lora, "--theta-gamma", 0.5)
    assert done.returncode == 0, done.stderr
    theta = open_model_file(output).require_theta()
    assert {name.split(".")[2] for name in theta.layers if name.startswith("blk.1.")} == ADAPTED[arch]
    assert read_lora(lora, arch).keys() == theta.layers.keys()
    assert f"note: {arch} models are not run here" in done.stderr
    program = "llama-embedding" if arch == "bert" else "llama-perplexity"
    command = done.stderr.strip().splitlines()[-1]
    assert re.search(rf"without --lora: {program} -m \S+m\.gguf --lora \S+lora\.gguf ", command)
    check_command(command, program)


def check_command(said: str, program: str) -> None:
    """Runs it where llama.cpp is, and without the adapter."""
    path = os.environ.get("LLAMA_PERPLEXITY")
    if path is None or program != "llama-perplexity":
        return
    words = shlex.split(said.partition(" --lora: ")[2])[1:]
    found = []
    for command in ([path, *words], [path, *words[:2], *words[4:]]):
        for _ in range(5):  # b11434 now and then ends before its last lines are written
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            if values := re.findall(r"\[\d+\]([\d.]+),", done.stdout + done.stderr):
                break
        found.append(float(values[0]))
    assert abs(found[0] / found[1] - 1) > 1e-4  # the adapter acts


def test_a_theta_of_the_residual_needs_no_forward_pass(script: Script, tmp_path: Path) -> None:
    model, better = (write_other_model(tmp_path / f"{i}.gguf", "falcon", seed=i) for i in (0, 1))
    output = tmp_path / "m.nkat"
    done = convert(script, model, "--output", output, "--theta-source", "residual", "--reference", better)
    assert done.returncode == 0, done.stderr
    assert "next, an adapter for llama.cpp: python" in done.stderr
    words = shlex.split(done.stderr.rpartition("llama.cpp: ")[2])[1:]
    exported = script(*words)
    assert exported.returncode == 0, exported.stderr
    assert open_model_file(output).require_theta().source == "residual"
    assert GGUFFile.open(words[-1]).metadata["adapter.type"] == "lora"


def test_theta_alone_leads_to_an_adapter_too(script: Script, tmp_path: Path) -> None:
    model = write_other_model(tmp_path / "m.gguf", "starcoder2")
    done = convert(script, model, "--output", tmp_path / "theta.bin", "--theta-only")
    words = shlex.split(done.stderr.rpartition("llama.cpp: ")[2])[1:]
    exported = script(*words)
    assert exported.returncode == 0, exported.stderr
    assert "llama-perplexity -m" in exported.stderr


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        (("--theta-source", "fit", "--calibrate", "t.txt"), "--theta-source fit and --calibrate"),
        (("--strengths",), "--strengths"),
        (("--optimize-rank",), "--optimize-rank"),
        (("--merge", "merged.gguf"), "--merge"),
    ],
)
def test_what_needs_the_model_to_run_is_refused_before_time_is_spent(
    fails: Fails, tmp_path: Path, flags: tuple[str, ...], needed: str
) -> None:
    model = write_other_model(tmp_path / "m.gguf", "falcon")
    (tmp_path / "t.txt").write_text("a text " * 100)
    said = fails("nkat_gguf_converter.py", "--input", model, "--output", tmp_path / "m.nkat", *flags)
    assert f"m.gguf: falcon models are not run here, which {needed} would need; Θ can be made" in said
    assert not (tmp_path / "m.nkat").exists()


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("nkat_inference_engine.py", ("--perplexity",)),
        ("nkat_inference_engine.py", ("--benchmark",)),
        ("nkat_auto_optimizer.py", ("--mode", "quick", "--output-dir", "out")),
    ],
)
def test_who_would_run_it_says_the_way(fails: Fails, tmp_path: Path, program: str, flags: tuple[str, ...]) -> None:
    said = fails(program, "--model", write_other_model(tmp_path / "m.gguf", "mamba"), *flags)
    assert "m.gguf: architecture 'mamba' is not supported; nkat_gguf_converter.py makes a Θ" in said
    assert "llama-perplexity --lora" in said


def test_a_model_without_such_weights_has_nothing_to_adapt(fails: Fails, tmp_path: Path) -> None:
    assert {*BLOCK_TENSORS} == {*ADAPTED, "mamba"}
    model = write_other_model(tmp_path / "m.gguf", "mamba")
    said = fails("nkat_gguf_converter.py", "--input", model, "--output", tmp_path / "m.nkat")
    assert "has no 2-D attention or FFN weights inside blocks" in said
