"""`--repair` from the command line: the file, what it gained, Θ on top, going on, and what is refused."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from nkat.gguf.file import GGUFFile
from nkat.gguf.scales import differ_in_scales_only, has_scales
from nkat.gguf.weights import read_weight
from nkat.gguf.writer import BaseView
from nkat.lm.load import load_model
from nkat.lm.transformer import Transformer
from nkat.measure.judge import Judge
from nkat.measure.texts import default_text
from nkat.sources.fit.data import fit_text, split_validation
from nkat.sources.fit.state import FitState
from nkat.sources.repair.descent import Validation
from nkat.sources.repair.layers import no_change
from nkat.theta.modelfile import base_hash, open_model_file
from tests.conftest import ROOT, Script
from tests.support.tiny_models import write_tiny_model

CONVERTER = "nkat_gguf_converter.py"
QUICK = ["--repair-steps", "8", "--repair-learning-rate", "0.01", "--fit-batch", "4", "--fit-context", "64"]
QUICK += ["--fit-validate-every", "4", "--fit-precision", "float32", "--no-cuda", "--threads", "1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    types = {"better": "F32", "coarse": "Q4_1"}
    return {
        name: write_tiny_model(
            folder / f"{name}.gguf", "llama", blocks=2, qtype=gguf.GGMLQuantizationType[qtype], context=128
        )
        for name, qtype in types.items()
    }


@pytest.fixture(scope="module")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(default_text().content[:5000])
    return path


@pytest.fixture
def command(models: dict[str, Path], text_path: Path) -> list[object]:
    inputs = ["--input", models["coarse"], "--reference", models["better"], "--calibrate", text_path]
    return [CONVERTER, *inputs, *QUICK]


@pytest.mark.filterwarnings("ignore:the model was made for 128 tokens")
def test_the_repaired_file_differs_in_scales_and_has_what_was_gained(
    command: list[object], models: dict[str, Path], text_path: Path, tmp_path: Path, script: Script
) -> None:
    output, record = tmp_path / "repaired.gguf", tmp_path / "record.json"
    done = script(*command, "--repair", output, "--json", record)
    assert done.returncode == 0, done.stderr
    assert "of the perplexity that the input has above the reference's" in done.stdout
    assert "as many as the input" in done.stdout
    result = json.loads(record.read_text())["repair"]
    assert result["bytes"] == output.stat().st_size == models["coarse"].stat().st_size
    assert result["types"] == "14 Q4_1"
    assert result["after"]["validation_kl"] < 0.9 * result["before"]["validation_kl"]
    excess = result["base"]["perplexity"] - result["reference"]["perplexity"]
    gained = result["base"]["perplexity"] - result["repaired"]["perplexity"]
    assert result["won_back_percent"] == pytest.approx(100 * gained / excess)
    assert not output.with_name("repaired.gguf.fit").exists()
    with GGUFFile.open(models["coarse"]) as before, GGUFFile.open(output) as after:
        assert differ_in_scales_only(BaseView.whole(before), after)
        changed = {name for name in before.tensors if not np.array_equal(before.raw(name), after.raw(name))}
        assert changed == {name for name in before.tensors if name.startswith("blk.") and "norm" not in name}
        for tensor in gguf.GGUFReader(output).tensors:  # gguf-py reads the same weights in it
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1)
            np.testing.assert_array_equal(read_weight(after, tensor.name).numpy().reshape(-1), expected)
    loaded = load_model(output)
    text = type(default_text())(text_path.name, text_path.read_text(), "")
    _, validation = split_validation(fit_text(loaded.tokenizer, text), "text", 64, 128)
    measured = Judge(loaded, validation).without(None)
    assert measured.ppl == pytest.approx(result["repaired"]["perplexity"], rel=1e-6)
    assert abs(measured.ppl / result["base"]["perplexity"] - 1) > 1e-5  # control


@pytest.mark.filterwarnings("ignore:the model was made for 128 tokens")
def test_theta_is_made_for_the_repaired_model(
    command: list[object], models: dict[str, Path], tmp_path: Path, script: Script
) -> None:
    repaired, output, record = tmp_path / "repaired.gguf", tmp_path / "both.nkat", tmp_path / "record.json"
    theta = ["--theta-source", "residual", "--theta-rank", 2, "--output", output]
    done = script(*command, "--repair", repaired, *theta, "--json", record)
    assert done.returncode == 0, done.stderr
    result = json.loads(record.read_text())
    assert result["repair"]["output"] == str(repaired)
    assert result["input"] == str(repaired)
    model = open_model_file(output)
    sha256 = hashlib.sha256(repaired.read_bytes()).hexdigest()
    assert sha256 == base_hash(model) == model.require_theta().base_sha256
    assert sha256 != hashlib.sha256(models["coarse"].read_bytes()).hexdigest()
    left = result["residual"]["all"]["theta_left"]
    assert 0 < left < 1  # of what the scales left


@pytest.mark.filterwarnings("ignore:the model was made for 128 tokens")
def test_an_interrupted_repair_goes_on_to_the_same_bytes(command: list[object], tmp_path: Path, script: Script) -> None:
    """Ctrl-C writes the best scales so far; --resume goes on to what an uninterrupted repair would have made."""
    arguments = [*command[1:], "--repair-steps", 100, "--fit-validate-every", 50]
    output, whole = tmp_path / "a.gguf", tmp_path / "b.gguf"
    process = subprocess.Popen(
        [str(part) for part in (sys.executable, ROOT / CONVERTER, *arguments, "--repair", output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in iter(process.stderr.readline, ""):
        if "validation" in line:  # of the progress bar: some steps were made, and one was kept
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    state = output.with_name("a.gguf.fit")
    assert state.exists()
    early = output.read_bytes()
    refused = script(CONVERTER, *arguments, "--repair", output)
    assert refused.returncode == 2
    assert "is an interrupted repair; --resume goes on with it" in refused.stderr
    for target, more in ((output, ["--resume"]), (whole, [])):
        done = script(CONVERTER, *arguments, "--repair", target, *more)
        assert done.returncode == 0, done.stderr
    assert not state.exists()
    assert output.read_bytes() == whole.read_bytes() != early
    both = [*arguments, "--repair", output, "--output", tmp_path / "c.nkat", "--theta-rank", 2]
    assert "exists already" in script(CONVERTER, *both).stderr
    done = script(CONVERTER, *both, "--resume")  # as after a Ctrl-C that came when the scales were done
    assert done.returncode == 0, done.stderr
    assert "is a finished repair of the input" in done.stderr
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repair", "r"], "--repair needs --calibrate"),
        (["--repair", "r", "--calibrate", "c", "--in-place"], "--in-place, --remove and --truncate-rank do not go"),
        (["--repair", "r", "--calibrate", "c", "--theta-rank", "2"], "--repair alone makes no Θ"),
        (["--repair", "r", "--calibrate", "c", "--export-lora", "l"], "--repair alone makes no Θ"),
        (["--repair", "r", "--calibrate", "c", "--output", "o", "--dry-run"], "--dry-run writes no repaired model"),
        (["--repair", "r", "--calibrate", "c", "--fit-steps", "3"], "--fit-steps is for --theta-source fit"),
        (["--repair", "r", "--calibrate", "c", "--fit-reference-share", "1"], "needs --reference"),
        (["--output", "o", "--repair-steps", "3"], "are for --repair"),
        (["--repair", "r", "--calibrate", "c", "--output", "r"], "r"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: list[str], message: str, models: dict[str, Path], tmp_path: Path, fails: Callable[..., str], monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(CONVERTER, "--input", models["coarse"], *flags)
    assert not list(tmp_path.iterdir())


def test_bad_input_leaves_nothing(models: dict[str, Path], text_path: Path, tmp_path: Path, script: Script) -> None:
    def fails(*arguments: object) -> str:
        done = script(*arguments, "--repair", tmp_path / "r.gguf")
        assert done.returncode == 2, done
        assert not list(tmp_path.iterdir())
        return done.stderr.rpartition("error: ")[2]

    plain = [CONVERTER, "--input", models["better"], "--calibrate", text_path, *QUICK]
    assert "has no scales to learn: its weights are F32" in fails(*plain)
    coarse = [CONVERTER, "--input", models["coarse"], "--calibrate", text_path, *QUICK]
    assert "has the same weights as the input" in fails(*coarse, "--reference", models["coarse"])
    assert "must be above 0" in fails(*coarse, "--repair-learning-rate", "0")
    assert "there is no interrupted repair to resume" in fails(*coarse, "--resume")


@pytest.mark.filterwarnings("ignore:the model was made for 128 tokens")
def test_a_repair_without_gain_writes_nothing(
    command: list[object], tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gain(model: Transformer, names: list[str], *_: object, **__: object) -> tuple[Validation, FitState]:
        before, start = Validation(1.0, 0.5), no_change(model.star_linears(), names)
        history = [{"step": 0, "loss": 0.5, **before.row()}]
        return before, FitState("file", 8, start, best_step=0, best_nll=1.0, best_factors=start, history=history)

    monkeypatch.setattr("nkat.sources.repair.job.repair", no_gain)
    done = script(*command, "--repair", tmp_path / "r.gguf")
    assert done.returncode == 2
    assert "no step of the repair beats the file as it is" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:the model was made for 128 tokens")
def test_no_scale_is_touched_in_weights_that_were_not_named(
    command: list[object], models: dict[str, Path], tmp_path: Path, script: Script
) -> None:
    output = tmp_path / "some.gguf"
    done = script(*command, "--repair", output, "--selective-layers", "blk.1.ffn_*.weight")
    assert done.returncode == 0, done.stderr
    with GGUFFile.open(models["coarse"]) as before, GGUFFile.open(output) as after:
        changed = {name for name in before.tensors if not np.array_equal(before.raw(name), after.raw(name))}
        assert changed == {f"blk.1.ffn_{kind}.weight" for kind in ("gate", "up", "down")}
        assert all(has_scales(before.tensors[name].type) for name in changed)
    assert torch.isfinite(load_model(output).model(torch.tensor([[1, 2, 3]]))).all()
