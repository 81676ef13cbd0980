"""How one command names another, as typed and as recorded."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import tomllib

from nkat.host.console import counted
from nkat.host.tools import TOOLS, suggest, tool_command, tool_words

ROOT = Path(__file__).parents[2]


def test_every_tool_is_there_under_both_names() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    for installed, script in TOOLS.values():
        assert installed in scripts
        assert (ROOT / (script if script.endswith(".py") else f"{script.replace('.', '/')}.py")).is_file()


def test_a_command_is_named_as_this_one_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["nkat_gguf_converter.py"])
    assert tool_words("engine") == ["python", "nkat_inference_engine.py"]
    assert tool_command("engine") == [sys.executable, str(ROOT / "nkat_inference_engine.py")]
    assert tool_words("vit train") == ["python", "-m", "nkat_vit.train"]
    monkeypatch.chdir(ROOT.parent)
    monkeypatch.setattr(sys, "argv", [f"{ROOT.name}/nkat_gguf_converter.py"])
    assert tool_words("engine") == ["python", f"{ROOT.name}/nkat_inference_engine.py"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "nkat_vit" / "train.py")])  # as python -m has it
    assert tool_words("engine") == ["python", "nkat_inference_engine.py"]
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bin" / "nkat-convert")])
    assert tool_words("engine") == ["nkat-engine"]
    assert tool_command("vit train") == [str(tmp_path / "bin" / "nkat-vit-train")]


def test_a_suggestion_can_be_pasted_and_leaves_stdout_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "nkat_gguf_converter.py")])
    suggest("engine", "--model", Path("my model.nkat"), "--compare", why="to see")
    said = capsys.readouterr()
    assert said.out == ""
    kind, line = said.err.strip().split(": ", 1)
    assert kind == "next, to see"
    assert shlex.split(line)[2:] == ["--model", "my model.nkat", "--compare"]


def test_one_is_one() -> None:
    assert (counted(0, "trial"), counted(1, "trial"), counted(1200, "trial")) == ("0 trials", "1 trial", "1,200 trials")
