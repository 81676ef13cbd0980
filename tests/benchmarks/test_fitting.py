"""The fit beside PEFT's: both sides in turns on the same batches, in the user's environment, and PEFT's failures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import fitting
from nkat.errors import NKATError
from tests.support.tiny_models import write_tiny_model

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from Linux's /proc")
GIVES = "print(json.dumps({'seconds': [9, 9, 0.5, 0.25, 0.5, 0.5], 'losses': [3.0] * 6, 'peak_bytes': 10}))"


def stand_in(folder: Path, then: str) -> Path:
    """A Python that says it has PEFT, and keeps what it was asked to fit."""
    program = folder / "python"
    lines = [
        f"#!{sys.executable}",
        "import json, os, sys",
        "if sys.argv[1] == '-c': sys.exit(0)",
        "job = json.loads(sys.argv[2])",
        "shape = [len(json.load(open(job['batches']))), len(json.load(open(job['batches']))[0])]",
        f"print(json.dumps([job, shape, os.environ.get('OMP_WAIT_POLICY')]), file=open({str(folder / 'seen')!r}, 'a'))",
        then,
    ]
    program.write_text("\n".join(lines))
    program.chmod(0o700)
    return program


def test_both_sides_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", "llama")
    words = [str(model), "--steps", "3", "--turns", "1", "--threads", "1", "--rank", "2"]
    monkeypatch.setattr(sys, "argv", ["fitting", *words, "--peft-python", str(stand_in(tmp_path, GIVES))])
    fitting.main()
    ways = json.loads(capsys.readouterr().out.splitlines()[-1])["ways"]
    assert list(ways) == list(fitting.WAYS)
    assert ways["PEFT"]["tokens_per_second"] == 1024 / 0.5  # without the two steps to warm up
    assert ways["nkat"]["tokens_per_second"] > 0
    assert ways["nkat"]["peak_bytes"] > 1e7
    assert ways["nkat"]["first_loss"] == pytest.approx(ways["nkat, --no-fit-fast"]["first_loss"], rel=0.02)
    for line, checkpointing in zip((tmp_path / "seen").read_text().splitlines(), (False, True), strict=True):
        job, shape, inherited = json.loads(line)
        assert (job["rank"], job["threads"], job["checkpointing"]) == (4, 1, checkpointing)  # a Θ of rank r has rank 2r
        assert shape == [fitting.WARM_UP + 3 + 1, 4]
        assert inherited is None


def test_a_side_that_fails_is_an_error(tmp_path: Path) -> None:
    program, batches = stand_in(tmp_path, "sys.exit('no memory')"), tmp_path / "b.json"
    batches.write_text("[[]]")
    assert fitting.has_peft(str(program))
    with pytest.raises(NKATError, match="no memory"):
        fitting._child([str(program), "x", json.dumps({"batches": str(batches)})])
