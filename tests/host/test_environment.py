"""Programs that are not ours get the environment of the user's shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import vs_llama_cpp
from nkat.kobold.koboldcpp import WATCH
from nkat.kobold.process import running
from tests.conftest import ROOT

POLICY = "OMP_WAIT_POLICY"
SHOW = "import os; print('policy', os.environ.get('OMP_WAIT_POLICY'), sorted(k for k in os.environ if 'NKAT_SET' in k))"


def in_a_shell(program: str, **variables: str) -> str:
    """What a Python program prints that a user starts whose shell has these variables."""
    shell = {name: value for name, value in os.environ.items() if name != POLICY and not name.startswith("NKAT_SET")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=shell | variables)
    return done.stdout.strip()


START = "import subprocess, sys, nkat; from nkat.host.environment import users_environment\n"


@pytest.mark.parametrize(("variables", "theirs"), [({}, "policy None []"), ({POLICY: "ACTIVE"}, "policy ACTIVE []")])
def test_another_program_has_what_the_shell_has(variables: dict[str, str], theirs: str) -> None:
    own = f"import nkat; {SHOW}"
    assert ("PASSIVE" in in_a_shell(own, **variables)) == (
        not variables
    )  # the control: ours is set where theirs is not
    peer = f"{START}subprocess.run([sys.executable, '-c', {SHOW!r}], env=users_environment())"
    assert in_a_shell(peer, **variables) == theirs
    child = f"{START}subprocess.run([sys.executable, '-c', {peer!r}])"  # of a process of ours that one of ours started
    assert in_a_shell(child, **variables) == theirs


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process had set it."""
    monkeypatch.setenv(POLICY, "PASSIVE")
    monkeypatch.setenv("NKAT_SET_OMP_WAIT_POLICY", "1")


def test_koboldcpp_does_not_inherit_it(ours: None) -> None:
    with running([sys.executable, "-c", SHOW], WATCH) as process:
        process.wait()
    assert "policy None []" in process.lines


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script")
def test_llama_bench_does_not_inherit_it(ours: None, tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    record = [{"n_prompt": 512, "n_gen": 0, "avg_ts": 1.0}]
    lines = [f"#!{sys.executable}", "import os, json", f"open({str(tmp_path / 'seen')!r}, 'w').write(str(os.environ))"]
    program.write_text("\n".join([*lines, f"print({json.dumps(json.dumps(record))})"]))
    program.chmod(0o700)
    setting = vs_llama_cpp.Setting(threads=1, flash_attention=False)
    assert vs_llama_cpp.llama_bench(program, tmp_path / "m.gguf", (setting, setting)) == (1.0, 1.0)
    assert POLICY not in (tmp_path / "seen").read_text()
