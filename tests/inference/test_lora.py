"""`--lora` of the engine, as a user gives it: PEFT's folders and llama.cpp's files, alone and together."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from nkat.gguf.writer import write_gguf
from nkat.measure.provenance import conditions_of
from nkat.theta.lora import lora_parts
from nkat.theta.modelfile import open_model_file
from tests.gguf.test_imatrix import EXCHANGE
from tests.support.tiny_models import write_tiny_model

ENGINE, CONVERTER = "nkat_inference_engine.py", "nkat_gguf_converter.py"
ADAPTER, TEXT = EXCHANGE / "peft_llama", EXCHANGE / "text.txt"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "m.gguf", "llama", blocks=2, qtype=gguf.GGMLQuantizationType.Q8_0)


def perplexity(script, model: Path, *flags: object) -> dict:
    command = ("--perplexity", "--text", TEXT, "--chunks", 1, "--context", 64, "--no-cuda", "--json", "-")
    done = script(ENGINE, "--model", model, *flags, *command)
    assert done.returncode == 0, done.stderr
    record: dict = json.loads(done.stdout.splitlines()[-1])
    record["table"] = done.stdout
    return record


@pytest.mark.isa
def test_a_lora_is_measured_and_recorded(script, model: Path) -> None:
    found = perplexity(script, model, "--lora", ADAPTER)
    assert "with the LoRA (rank 3)" in found["table"]
    assert found["nkat_perplexity"] != pytest.approx(found["baseline_perplexity"], rel=0.01)
    assert (found["theta_source"], found["theta_file"]) == ("lora", None)
    row = conditions_of(found)
    assert (row["lora"], row["theta_file"], row["theta_gamma"]) == (str(ADAPTER), None, None)
    (adapter,) = found["lora"]
    assert (adapter["kind"], adapter["scale"], adapter["rank"], adapter["layers"]) == ("peft", 1.0, 3, 14)
    half = perplexity(script, model, "--lora-scaled", f"{ADAPTER}:0.5")
    halves = perplexity(script, model, "--lora-scaled", f"{ADAPTER}:0.25", "--lora-scaled", f"{ADAPTER}:0.25")
    assert half["nkat_perplexity"] == pytest.approx(halves["nkat_perplexity"], rel=1e-4)
    assert half["nkat_perplexity"] != pytest.approx(found["nkat_perplexity"], rel=1e-3)  # control


@pytest.mark.isa
def test_theta_as_an_adapter_does_what_theta_does(script, tmp_path: Path, model: Path) -> None:
    theta, peft, lora = tmp_path / "m.nkat", tmp_path / "peft", tmp_path / "lora.gguf"
    assert (
        script(CONVERTER, "--input", model, "--output", theta, "--theta-gamma", 0.5, "--export-peft", peft).returncode
        == 0
    )
    found = open_model_file(theta)
    write_gguf(lora, lora_parts(found.theta, found.base), force=False)
    expected = perplexity(script, theta)
    for adapter in (peft, peft / "adapter_model.safetensors", lora):
        got = perplexity(script, model, "--lora", adapter)
        assert got["nkat_perplexity"] == pytest.approx(expected["nkat_perplexity"], rel=1e-3)
    assert expected["nkat_perplexity"] != pytest.approx(expected["baseline_perplexity"], rel=0.01)  # control
    done = script(
        ENGINE, "--model", theta, "--lora", peft, "--perplexity", "--text", TEXT, "--chunks", 1, "--context", 64
    )
    assert "is left out: --lora runs in its place" in done.stderr


def test_a_comparison_with_a_lora_has_its_report(script, model: Path, tmp_path: Path) -> None:
    quick = ("--seq-len", 12, "--iterations", 5, "--repetitions", 2, "--chunks", 0, "--no-cuda", "--threads", 1)
    command = ("--compare", *quick, "--output-dir", tmp_path / "out")
    done = script(ENGINE, "--model", model, "--lora-scaled", f"{ADAPTER}:0.5", *command)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "without and with LoRA" in page
    assert done.stdout.split("without ")[1].startswith("LoRA  with LoRA")
    assert f"{ADAPTER}, scale 0.5, sha256 " in page
    assert "in the model file" not in page


def test_text_is_generated_with_a_lora(script, model: Path) -> None:
    def text(*flags: object) -> str:
        command = ("--generate", "The sea", "--max-tokens", 12, "--temperature", 0, "--no-cuda", "--json", "-")
        done = script(ENGINE, "--model", model, *flags, *command)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout.splitlines()[-1])["text"])

    assert text("--lora", ADAPTER) == text("--lora", ADAPTER) != text()


def test_mistakes_are_one_line(fails, tmp_path: Path, model: Path) -> None:
    command = ("--perplexity", "--chunks", 1)
    for flags, message in (
        (("--lora", tmp_path / "none"), "none"),
        (("--lora", ADAPTER, "--theta-gamma", 0.9), "--lora runs in place of a Θ"),
        (("--lora-scaled", ADAPTER), "--lora-scaled"),
        (("--lora", EXCHANGE / "peft_phi3"), "made for another model"),
        (("--lora", model), "is no LoRA adapter"),
    ):
        assert message in fails(ENGINE, "--model", model, *flags, *command)
