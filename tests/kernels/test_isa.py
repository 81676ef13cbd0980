"""The settings of `make test-isa` do what they say."""

from __future__ import annotations

import os

import pytest
import torch

from nkat.kernels.cpu import jit
from tests.support import isa

pytestmark = pytest.mark.isa


def test_what_the_setting_asks_for_is_what_runs() -> None:
    if wanted := os.environ.get("ATEN_CPU_CAPABILITY"):
        assert torch.backends.cpu.get_cpu_capability() == wanted.upper()
    if wanted := os.environ.get(isa.ISA_VARIABLE):
        assert jit.best_isa() == wanted
    if "answer_as_amd" in os.environ.get("LD_PRELOAD", ""):
        assert isa.HOST_NAME.startswith("znver")


def test_the_best_instruction_set_is_the_first_that_is_there() -> None:
    assert jit.best_isa() == next(name for name, needs in isa.NEEDS.items() if needs <= jit.llvm_host_features())


def test_what_cannot_run_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(isa.subprocess, "run", lambda *_, **__: pytest.fail("was run"))
    monkeypatch.setattr(isa.jit, "llvm_host_features", lambda: frozenset({"avx2", "fma"}))
    assert isa.main(["kernels avx512-vnni"]) == 0
    assert "skipped: the processor has no avx512bw, avx512vnni" in capsys.readouterr().out
    monkeypatch.setattr(isa, "is_x86", lambda: False)
    assert isa.main([]) == 0
    assert capsys.readouterr().out.count("skipped: not an x86 processor") == len(isa.SETTINGS)


def test_a_failure_is_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(isa, "run", lambda name, folder: (name != "default", name))
    assert isa.main(["avx2", "default"]) == 1
    assert capsys.readouterr().out.endswith("failed: default\n")
    assert isa.main(["avx2"]) == 0
