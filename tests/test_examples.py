"""The examples of the library do what they say, on a model of a few thousand weights."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import gguf
import pytest

import nkat
from examples import walk
from nkat.measure.texts import default_text
from tests.conftest import ROOT
from tests.support.tiny_models import write_tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny.gguf", "llama", qtype=gguf.GGMLQuantizationType.Q8_0)


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *arguments: object
) -> list[str]:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert not ended.value.code
    return capsys.readouterr().out.splitlines()


def test_a_walk_takes_every_command_of_a_page_and_shows_no_path(tmp_path: Path) -> None:
    page = "```bash\n# 1\npy -3 a.py \\\n  --x 1 # one\n```\n```console\n$ make demo\nsaid\n```\n```json\n{}\n```\n"
    assert walk.commands(page) == ["python a.py --x 1", "make demo"]
    (tmp_path / "models").mkdir()
    ran = walk.run("python nkat_gguf_converter.py --input no.gguf --output x.nkat", tmp_path, 60)
    assert ran["status"] == 2
    assert ran["lines"] == ["error: no.gguf: no such file"]
    ran = walk.run("python setup_nkat_kobold_integration.py", tmp_path, 60)
    assert not [line for line in ran["lines"] if str(tmp_path) in line or str(ROOT) in line]
    rows = [
        {"page": "a", "command": "b", "status": status, "seconds": 1.0, "lines": ["c"]} for status in (2, 0, 0, None)
    ]
    described = walk.describe(rows, walk.place())
    assert "exit status 2" in described
    assert "4 commands: 1 not run or stopped, 2 status 0, 1 status 2." in described
    assert str(Path.home()) not in described


def test_measure_theta(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    text = tmp_path / "a.txt"
    text.write_text(default_text().content[:5000], encoding="utf-8")
    lines = run(monkeypatch, capsys, "measure_theta", model, text, "--chunks", 1)
    assert [line.partition(":")[0] for line in lines] == ["gamma 0.99", "gamma 0.97", "gamma 0.95"]
    assert all(" % ± " in line for line in lines)


def test_fit_save_export_and_write(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    learn, judge = tmp_path / "learn.txt", tmp_path / "judge.txt"
    learn.write_text(default_text().content[:9000], encoding="utf-8")
    judge.write_text(default_text().content[20000:26000], encoding="utf-8")
    made, theta, lora = (tmp_path / name for name in ("tiny.nkat", "theta.bin", "lora.gguf"))
    run(monkeypatch, capsys, "fit_and_save", model, learn, judge, made, "--steps", 40, "--rank", 2)
    assert nkat.open_model(made).theta.source == "fit"
    lines = run(monkeypatch, capsys, "export_adapter", made, theta, lora)
    assert lines == [f"Θ of rank 2 at gamma 0.97 in {theta} and {lora}"]
    text = "\n".join(run(monkeypatch, capsys, "write_text", made, "the hen", "--max-tokens", 8))
    without, _, with_theta = text.partition("--- with Θ")
    assert without.startswith("--- without Θ\n")
    assert with_theta.strip()
