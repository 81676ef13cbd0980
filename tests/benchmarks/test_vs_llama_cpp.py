"""The peer gets its best settings, and no share of the memory's speed is above 1."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.memory import Ceiling, share_of
from benchmarks.vs_llama_cpp import Setting, best_settings
from nkat.errors import NKATError


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script")
def test_the_peer_chooses_its_threads_and_flags(tmp_path: Path) -> None:
    records = [
        {"n_gen": n_gen, "n_threads": threads, "flash_attn": flash, "avg_ts": speed}
        for n_gen, threads, flash, speed in [
            (0, 1, False, 10.0),
            (0, 2, False, 19.0),
            (0, 2, True, 21.0),
            (32, 1, False, 8.0),
            (32, 2, False, 7.0),
            (32, 2, True, 7.5),
        ]
    ]
    program, seen = tmp_path / "llama-bench", tmp_path / "seen"
    lines = [f"#!{sys.executable}", "import sys", f"open({str(seen)!r}, 'w').write(' '.join(sys.argv[1:]))"]
    program.write_text("\n".join([*lines, f"print({json.dumps(json.dumps(records))})"]))
    program.chmod(0o700)
    assert best_settings(program, tmp_path / "m.gguf", 2) == (Setting(2, True), Setting(1, False))
    assert "-t 1,2 -fa 0,1" in seen.read_text()
    assert best_settings(program, tmp_path / "m.gguf", 2, ("-rtr 1 -mmp 0",))[1] == Setting(1, False, "-rtr 1 -mmp 0")
    assert seen.read_text().endswith("-rtr 1 -mmp 0 -r 1 -o json")


def test_a_share_above_one_is_an_error() -> None:
    ceiling = Ceiling(20.0, streams=1, ahead=0, level=1)
    assert share_of(15.0, ceiling) == 0.75
    with pytest.raises(NKATError, match="run it again on a quiet machine"):
        share_of(20.1, ceiling)
