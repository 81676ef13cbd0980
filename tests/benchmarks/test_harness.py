"""The benchmark beside lm-eval's `hf`: its task, and both sides told apart."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import harness
from nkat.errors import NKATError
from tests.support.tiny_models import write_tiny_model

TEXT = "\n".join(" ".join(f"{word}{line}" for word in ["the", "hen", "in", "an", "inn"] * 14) for line in range(6))


def test_a_task_of_a_text(tmp_path: Path) -> None:
    harness.write_task(tmp_path, TEXT, 5)
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(items) == 5
    for line, item in zip(TEXT.split("\n"), items, strict=False):
        assert len(set(item["choices"])) == 4
        assert f"{item['question']} {item['choices'][item['label']]}" in line
        others = [choice for i, choice in enumerate(item["choices"]) if i != item["label"]]
        assert not any(choice in line for choice in others)
    with pytest.raises(NKATError, match="has 6 paragraphs of 60 words, and 7 are needed"):
        harness.write_task(tmp_path, TEXT, 7)


def test_rows_say_how_far_apart_they_are() -> None:
    ours = {"logp": [-1.0, -2.0], "seconds": 0.5, "peak_bytes": 1, "accuracy": 1.0}
    theirs = {"logp": [-1.0, -2.5], "seconds": 1.0, "peak_bytes": 1, "accuracy": 1.0}
    first, last = harness.rows({"nkat": ours, "hf": theirs})
    assert (first["apart"], first["over_peer"], first["requests_per_second"]) == (0.5, 2.0, 4.0)
    assert (last["apart"], last["over_peer"]) == (0.0, 1.0)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (the extra `eval`)")
def test_this_side_and_a_side_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", "llama")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    words = ["harness", str(model), "--text", str(tmp_path / "text.txt"), "--items", "4", "--shots", "1"]
    monkeypatch.setattr(sys, "argv", words)
    harness.main()
    ways = json.loads(capsys.readouterr().out.splitlines()[-1])["ways"]
    assert [way["way"] for way in ways] == ["nkat", "nkat, int8"]
    assert all(len(way["logp"]) == 16 and way["seconds"] > 0 for way in ways)
    with pytest.raises(NKATError, match="nowhere"):
        harness.run(
            sys.executable, {"way": "nkat", "threads": 1, "folder": "nowhere", "file": "x", "activations": "float"}
        )
