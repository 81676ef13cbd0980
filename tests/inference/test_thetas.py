"""Several Θ with weights by the command line: the engine's measurements and the converter's file, on tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nkat.measure.provenance import conditions_of
from nkat.theta.modelfile import open_model_file
from tests.conftest import Script
from tests.support.tiny_models import write_tiny_model

ENGINE, CONVERTER = "nkat_inference_engine.py", "nkat_gguf_converter.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("thetas") / "base.gguf", "llama")


@pytest.fixture
def files(script: Script, base: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two Θ of other ranks and strengths; the second is of some layers."""
    made = (tmp_path / "style.bin", tmp_path / "facts.bin")
    flags = (["--theta-rank", 4, "--theta-gamma", 0.8], ["--theta-rank", 2, "--theta-gamma", 0.9, "--seed", 3])
    for path, own in zip(made, flags, strict=True):
        chosen = [] if path == made[0] else ["--selective-layers", "blk.*.ffn_down.weight"]
        assert script(CONVERTER, "--input", base, "--output", path, "--theta-only", *own, *chosen).returncode == 0
    return made


def measure(script: Script, model: Path, *flags: object) -> dict:
    done = script(ENGINE, "--model", model, *flags, "--perplexity", "--chunks", 2, "--no-cuda", "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_engine_uses_the_sum_and_the_converter_writes_it(
    script: Script, base: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    style, facts = files
    flags = ("--theta", style, "--theta-scaled", f"{facts}:-1.5")
    record = measure(script, base, *flags)
    assert [(one["file"], one["weight"]) for one in record["theta_files"]] == [(str(style), 1.0), (str(facts), -1.5)]
    assert record["theta_rank"] == 6
    both = tmp_path / "both.nkat"
    done = script(CONVERTER, "--input", base, "--output", both, *flags)
    assert done.returncode == 0, done.stderr
    assert measure(script, both)["nkat_perplexity"] == record["nkat_perplexity"]
    assert open_model_file(both).require_theta().notes["nkat.part.1.weight"] == -1.5
    alone = measure(script, base, "--theta", style)
    assert alone["nkat_perplexity"] != record["nkat_perplexity"]
    assert (
        measure(script, base, "--theta-scaled", f"{style}:1,{facts}:0")["nkat_perplexity"] == (alone["nkat_perplexity"])
    )
    other_order = measure(script, base, "--theta-scaled", f"{facts}:-1.5", "--theta", style)
    assert other_order["nkat_perplexity"] == pytest.approx(record["nkat_perplexity"], rel=1e-6)


def test_the_models_own_theta_is_combined_replaced_or_left_out(
    script: Script, base: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    style, facts = files
    own = tmp_path / "own.nkat"
    assert script(CONVERTER, "--input", base, "--output", own, "--theta", style).returncode == 0
    together = measure(script, base, "--theta", style, "--theta", facts)["nkat_perplexity"]
    assert measure(script, own, "--theta", own, "--theta", f"{facts}:1.0")["nkat_perplexity"] == together
    assert measure(script, own, "--theta", facts)["nkat_perplexity"] != together
    without = measure(script, own, "--theta", f"{own}:0")
    assert without["theta_enabled"] is False
    assert without["baseline_perplexity"] == measure(script, base)["baseline_perplexity"]


def test_every_command_takes_them(script: Script, base: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ["--model", base, "--theta", files[0], "--theta-scaled", f"{files[1]}:0.5", "--no-cuda", "--threads", 1]
    quick = ["--seq-len", 12, "--iterations", 5, "--repetitions", 2, "--json", "-"]
    for command in (
        ["--benchmark", *quick],
        ["--compare", *quick, "--chunks", 1, "--output-dir", tmp_path / "compared"],
        ["--generate", "the hen", "--max-tokens", 5, "--seed", 1, "--json", "-"],
        ["--gemm", "--repetitions", 1, "--json", "-"],
    ):
        done = script(ENGINE, *flags, *command)
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout.splitlines()[-1])
        assert (record["theta_rank"], len(record["theta_files"])) == (6, 2)
        assert conditions_of(record)["theta_file"] == f"{files[0]} + {files[1]}:0.5"
        assert re.search(r"Θ of rank 6: 1 · \S*style\.bin \+ 0\.5 · \S*facts\.bin", done.stderr)


def test_mistakes(script: Script, fails, base: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    style, facts = files
    assert "is not FILE:WEIGHT" in fails(ENGINE, "--model", base, "--theta-scaled", style, "--perplexity")
    assert "no such file" in fails(ENGINE, "--model", base, "--theta-scaled", f"{tmp_path / 'no'}:1", "--perplexity")
    assert "holds no Θ" in fails(ENGINE, "--model", base, "--theta", base, "--theta", style, "--perplexity")
    other = write_tiny_model(tmp_path / "other.gguf", "llama", seed=7)
    assert "another model" in fails(ENGINE, "--model", other, "--theta", style, "--theta", facts, "--perplexity")
    nothing = fails(CONVERTER, "--input", base, "--output", tmp_path / "x", "--theta-scaled", f"{style}:0")
    assert "no Θ to write" in nothing
    many = [word for _ in range(9) for word in ("--theta", style)]
    assert "must be from 1 to 32" in fails(CONVERTER, "--input", base, "--output", tmp_path / "x", *many)
    cut = ["--theta", style, "--theta", facts, "--truncate-rank", 2]
    assert "cut its parts instead" in fails(CONVERTER, "--input", base, "--output", tmp_path / "x", *cut)
    assert not (tmp_path / "x").exists()
