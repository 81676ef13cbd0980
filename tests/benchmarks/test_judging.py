"""llama-perplexity as the benchmark calls it: its result, its best setting, the user's environment, its failures."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks import judging
from benchmarks.judging import llama_perplexity
from benchmarks.vs_llama_cpp import Setting, settings_to_try
from nkat.errors import NKATError
from tests.support.tiny_models import write_tiny_model

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script")
SAYS = "print('calculating perplexity over 2 chunks', flush=True); print('Final estimate: PPL = 9.4547 +/- 0.8')"


def stand_in(folder: Path, says: str) -> Path:
    program = folder / "llama-perplexity"
    seen = f"file=open({str(folder / 'seen')!r}, 'a')"
    keeps = f"import os, sys; print(sys.argv[1:], os.environ.get('OMP_WAIT_POLICY'), {seen})"
    program.write_text("\n".join([f"#!{sys.executable}", keeps, says]))
    program.chmod(0o700)
    return program


def test_the_peer_is_called_as_from_the_users_shell(tmp_path: Path) -> None:
    program = stand_in(tmp_path, SAYS)
    seconds, found = llama_perplexity(program, tmp_path / "m.gguf", tmp_path / "text", 2, Setting(2, True))
    assert found == 9.4547
    assert 0 < seconds < 60
    seen = (tmp_path / "seen").read_text()
    assert "'--chunks', '2', '-c', '512', '-t', '2', '-fa', 'on'" in seen
    assert seen.endswith("] None\n")


@pytest.mark.parametrize("says", ["sys.exit('failed to load model')", "print('Final estimate: PPL = 1.0 +/- 0')"])
def test_a_peer_without_a_result_is_an_error(tmp_path: Path, says: str) -> None:
    program = stand_in(tmp_path, says)
    with pytest.raises(NKATError, match=r"gave no perplexity: (failed to load|Final estimate)"):
        llama_perplexity(program, tmp_path / "m.gguf", tmp_path / "text", 2, Setting(1, False))
    with pytest.raises(NKATError, match="cannot be run"):
        llama_perplexity(tmp_path / "none", tmp_path / "m.gguf", tmp_path / "text", 2, Setting(1, False))


def test_the_benchmark_end_to_end(tmp_path: Path, monkeypatch, capsys) -> None:
    model, text = write_tiny_model(tmp_path / "m.gguf", "llama"), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    words = [str(model), "--llama-perplexity", str(stand_in(tmp_path, SAYS)), "--text", str(text)]
    monkeypatch.setattr(sys, "argv", ["judging", *words, "--chunks", "2", "--turns", "1", "--threads", "1"])
    judging.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])["judging"][0]
    assert record["llama_cpp_perplexity"] == 9.4547
    assert record["chunks"] == 2
    assert record["exact"]["perplexity"] > 1
    assert record["rounded"]["ratio"] > 0
    assert len((tmp_path / "seen").read_text().splitlines()) == len(settings_to_try(1)) + 1
