"""A few kills and full disks for every command that writes; `python -m benchmarks.attack --writers` tries many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attack.writers import WRITERS, wrong
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks, kills and limits files as POSIX does")
QUICK = ["convert", "in place", "remove", "adapter", "settings", "record"]


@pytest.mark.slow
@pytest.mark.parametrize(("names", "kills", "full"), [(QUICK, 3, 2), (["fit", "search", "image training"], 2, 1)])
def test_what_is_left_is_whole_and_cleared_away(names: list[str], kills: int, full: int) -> None:
    command = [sys.executable, "-m", "tests.attack.writers", str(kills), str(full), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *faults, last = done.stdout.splitlines()
    assert not faults
    record = json.loads(last)
    assert record.keys() == set(names)
    for counts in record.values():
        assert counts["faults"] == 0
        assert counts["killed"] == kills  # or nothing was tried
        assert counts["refused"] + counts["enough"] == full


@pytest.mark.parametrize("name", WRITERS)
def test_half_a_file_would_be_seen(name: str, tmp_path: Path) -> None:
    writer = WRITERS[name]
    for base in ("base.gguf", writer.target):
        (tmp_path / base).parent.mkdir(exist_ok=True)
        (tmp_path / base).write_bytes(b"GGUF{half")
    if name == "search":  # the journal may be torn; its records may not
        (tmp_path / "search" / "optuna_study.json").write_text('{"half', encoding="utf-8")
    assert wrong(writer, tmp_path, b"old") is not None
