"""The benchmark of repairs: its files, its arms, its table, with a stand-in for llama.cpp's programs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import gguf
import pytest

from benchmarks import quality, repair
from benchmarks.repair import RepairBench
from nkat.errors import NKATError
from nkat.measure.texts import default_text
from tests.support.tiny_models import write_tiny_model

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RepairBench:
    """llama-quantize copies a coarser tiny model to where its result belongs, or fails."""
    original = write_tiny_model(tmp_path / "original.gguf", "llama", blocks=1)
    coarse = write_tiny_model(tmp_path / "coarse.gguf", "llama", blocks=1, qtype=gguf.GGMLQuantizationType.Q4_0)
    for name, at in (("llama-imatrix", "sys.argv.index('-o') + 1"), ("llama-quantize", "-2")):
        program = tmp_path / name
        lines = [f"#!{sys.executable}", "import shutil, sys", "if 'Q2_K' in sys.argv: sys.exit('cannot make that')"]
        program.write_text("\n".join([*lines, f"shutil.copy({str(coarse)!r}, sys.argv[{at}])"]))
        program.chmod(0o700)
    monkeypatch.setattr(quality, "cached", lambda name: original)
    monkeypatch.setattr(quality, "JUDGED", dict.fromkeys(repair.TEXTS, 2))
    monkeypatch.setattr(repair, "KL_CHUNKS", 2)
    for name in (*repair.TEXTS, repair.CALIBRATION):
        (tmp_path / name).write_text(default_text().content[:8000])
    out = tmp_path / "out"
    out.mkdir()
    return RepairBench(tmp_path, out, 1, llama=tmp_path, repair_steps=2)


def test_arms_are_measured_and_kept(bench: RepairBench) -> None:
    results = repair.run(bench, [("Q3_K_M", "base"), ("Q3_K_M", "qera")], False)
    base, qera = results["Q3_K_M-base"], results["Q3_K_M-qera"]
    assert (bench.out / "imatrix.gguf").exists()
    assert base["kl"] > 10 * base["kl_stderr"] > 0
    assert base["theta_bytes"] == 0 < qera["theta_bytes"]
    wiki = repair.TEXTS[0]
    assert base["texts"][wiki]["perplexity"] != qera["texts"][wiki]["perplexity"]
    assert qera["kl"] < base["kl"]
    _, lines = repair.table(results).cells()
    assert lines[0][0] == "Q3_K_M, base"
    assert lines[1][-1] == f"{100 * (1 - qera['kl'] / base['kl']):.0f}"
    (bench.out / "Q3_K_M-base.json").write_text(json.dumps({**base, "kl": 0.0}))
    assert repair.run(bench, [("Q3_K_M", "base")], False)["Q3_K_M-base"]["kl"] == 0.0  # not made again


def test_the_original_has_no_divergence_from_itself(bench: RepairBench) -> None:
    assert abs(bench.divergence(bench.open(bench.path("smollm2")).model)["kl"]) < 1e-4


def test_a_program_that_fails_says_so(bench: RepairBench) -> None:
    with pytest.raises(NKATError, match="llama-quantize Q2_K: cannot make that"):
        bench.path("Q2_K")
    assert not (bench.out / "Q2_K.gguf").exists()


def test_an_interrupted_repair_goes_on(bench: RepairBench, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def converter(command, **_):
        commands.append(command)
        return type("Done", (), {"returncode": 130})

    bench.path("Q3_K_M")
    monkeypatch.setattr(repair.subprocess, "run", converter)
    (bench.out / "Q3_K_M-repaired.gguf").touch()
    assert bench.path("Q3_K_M-repaired").exists()
    assert not commands
    (bench.out / "Q3_K_M-repaired.gguf.fit").touch()
    with pytest.raises(NKATError, match="status 130"):
        bench.path("Q3_K_M-repaired")
    assert "--resume" in commands[0]
    assert commands[0][commands[0].index("--repair-steps") + 1] == "2"
