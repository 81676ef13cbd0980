"""A search whose Θ is learned from a text: the fit it keeps, what it chooses, and what it may cost elsewhere."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from nkat.measure.texts import default_text
from nkat.search import job, optimal
from nkat.search.learned import best_of
from nkat.search.objective import Setting, apply_setting
from nkat.sources.fit.descent import FitSettings
from nkat.theta.modelfile import open_model_file
from nkat.theta.set import CALIBRATION_KEY
from tests.conftest import Script
from tests.support.tiny_models import write_tiny_model

OPTIMIZER, CONVERTER = "nkat_auto_optimizer.py", "nkat_gguf_converter.py"
QUICK = ["--chunks", 2, "--fit-steps", 12, "--fit-batch", 2, "--fit-context", 48, "--fit-validate-every", 4]
QUICK += ["--fit-start", "zero", "--fit-learning-rate", 0.02, "--fit-precision", "float32", "--no-cuda"]
CUSTOM = ["--mode", "custom", "--trials"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return write_tiny_model(path, "llama", blocks=2, context=128, qtype=gguf.GGMLQuantizationType.Q8_0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(default_text().content[100000:120000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that is like no guard text: what is learned from it well is forgotten elsewhere."""
    path, draw = tmp_path_factory.mktemp("text") / "digits.txt", random.Random(0)
    path.write_text(" ".join(3 * str(draw.randrange(10)) for _ in range(9000)))
    return path


def history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "optimization_history.json").read_text(encoding="utf-8"))["trials"]


def command_words(command: str) -> list[list[str]]:
    """The two commands of a record, as `script` takes them."""
    found = []
    for line in command.split(" && "):
        _, script, *words = shlex.split(line)
        assert Path(script).name == CONVERTER
        found.append(words)
    return found


@pytest.mark.isa
def test_a_search_learns_and_its_commands_make_the_same_files(
    model: Path, text: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, given = tmp_path / "out", []
    real = job.write_optimal

    def noting(*arguments: Any) -> dict[str, Any]:
        given.append(arguments)
        return real(*arguments)

    monkeypatch.setattr("nkat.search.job.write_optimal", noting)
    done = script(OPTIMIZER, "--model", model, "--calibrate", text, *QUICK, *CUSTOM, 4, "--output-dir", out)
    assert done.returncode == 0, done.stderr
    assert not set("\r\x1b") & set(done.stdout + done.stderr)  # nothing moves and nothing is coloured in a pipe
    kept = open_model_file(out / "fit_rank8.bin").theta
    assert (kept.rank, kept.source) == (8, "fit")
    assert not list(out.glob("fit_rank8.bin.*"))
    assert [row["parameters"].get("gamma") for row in history(out)] == [None, 0.97, 0.98, 0.99]
    record = json.loads((out / "optimal.json").read_text(encoding="utf-8"))
    path = Path(record["file"])
    assert (out / "optimal.nkat").samefile(path)
    assert record["fit"]["calibration_sha256"] == kept.notes[CALIBRATION_KEY]
    assert record["held_out"]["change_percent"] < -5
    assert record["text"] == "the calibration text's validation slice"
    prices = record["held_out"]["guard"]["prices"]
    assert prices[0]["text"] == "the calibration text's first part"
    assert len(prices) == 3
    assert all(f"({letter}) {price['text']}" in done.stdout for letter, price in zip("abc", prices, strict=True))

    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"{text.name}, sha256 `{record['fit']['calibration_sha256']}`" in card
    assert all(f"{row['change_percent']:+.3f} ± {row['change_percent_stderr']:.3f}" in card for row in prices)
    assert "Not measured" not in card

    whole, fit = path.read_bytes(), (out / "fit_rank8.bin").read_bytes()
    (out / "fit_rank8.bin").unlink()
    path.write_bytes(b"")
    for words in command_words(record["command"]):
        made = script(CONVERTER, *words)
        assert made.returncode == 0, made.stderr
    assert (out / "fit_rank8.bin").read_bytes() == fit
    assert path.read_bytes() == whole

    options, prepared, _, row, won = given[0]
    for setting in (
        Setting(2, 0.985, "attention", False),
        Setting(6, 0.96, "ffn", True),
        Setting(8, 0.97, "both", False),
    ):
        chosen = apply_setting(prepared.theta_set, setting)
        record = real(options, prepared, chosen, {**row, "setting": setting.parameters()}, won)
        path = Path(record["file"])
        expected = path.read_bytes()
        assert open_model_file(path).theta.layers.keys() == chosen.layers.keys()
        path.write_bytes(b"")
        assert script(CONVERTER, *command_words(record["command"])[1]).returncode == 0
        assert path.read_bytes() == expected != whole


def test_a_search_that_was_killed_goes_on_to_the_same_end(
    model: Path, text: Path, tmp_path: Path, script: Script, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the fit, and behind it, where it is not made again."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    common = [OPTIMIZER, "--model", model, "--calibrate", text, *QUICK]
    assert script(*common, *CUSTOM, 4, "--output-dir", whole).returncode == 0
    assert "there is no study" in fails(*common, *CUSTOM, 4, "--output-dir", out, "--resume")
    with monkeypatch.context() as patch:
        saved: list[int] = []

        def killed(path: Path, state: Any, identity: str) -> None:
            save_state(path, state, identity)
            saved.append(state.step)
            if len(saved) == 5:
                raise SystemExit(137)

        from nkat.sources.fit.state import save_state

        patch.setattr("nkat.sources.fit.job.save_state", killed)
        patch.setattr("nkat.sources.fit.job._SAVE_SECONDS", 0.0)
        assert script(*common, *CUSTOM, 2, "--output-dir", out).returncode == 137
    assert saved == [1, 2, 3, 4, 5]
    assert (out / "fit_rank8.bin.fit").exists()
    assert not (out / "study.journal").exists()
    done = script(*common, *CUSTOM, 2, "--output-dir", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "at step 5 of 12" in done.stderr
    assert (out / "fit_rank8.bin").read_bytes() == (whole / "fit_rank8.bin").read_bytes()

    def never(*_: object) -> None:
        raise AssertionError("the fit is there")

    monkeypatch.setattr("nkat.search.learned.run_fit", never)
    done = script(*common, *CUSTOM, 4, "--output-dir", out, "--resume", "--workers", 2)
    assert done.returncode == 0, done.stderr
    found, expected = (
        [(row["parameters"], row["value"]) for row in sorted(history(folder), key=lambda row: str(row["parameters"]))]
        for folder in (out, whole)
    )
    assert found == expected
    refused = script(*common, "--fit-batch", 3, *CUSTOM, 5, "--output-dir", out, "--resume")
    assert refused.returncode == 2
    assert f"{out / 'fit_rank8.bin'}: was learned with another batch: 2 there, 3 here" in refused.stderr


def test_a_theta_that_is_better_at_home_and_worse_elsewhere_is_turned_away(
    model: Path, digits: Path, tmp_path: Path, script: Script, fails: Callable[..., str]
) -> None:
    common = [OPTIMIZER, "--model", model, "--calibrate", digits, *QUICK, "--fit-steps", 20, *CUSTOM, 3]
    common += ["--fit-learning-rate", 0.05, "--target-rank", 4]
    free, guarded = tmp_path / "free", tmp_path / "guarded"
    done = script(*common, "--output-dir", free, "--no-guard")
    assert done.returncode == 0, done.stderr
    assert json.loads((free / "optimal.json").read_text())["held_out"]["change_percent"] < -90
    assert not any("guard" in row for row in history(free))
    done = script(*common, "--output-dir", guarded)
    assert done.returncode == 0, done.stderr
    rows = [row for row in history(guarded) if row["parameters"]]
    assert all(row["change_percent"] < -90 and not row["guard"]["admitted"] and not row["feasible"] for row in rows)
    worst = max(price["change_percent"] for row in rows for price in row["guard"]["prices"])
    assert worst > 5
    why = "no Θ that the guard admits beats the model without it (2 trials were better at home; --no-guard takes those)"
    assert f"{why}: none was written" in done.stdout
    assert not list(guarded.glob("optimal*.nkat"))
    assert why in fails("nkat_inference_engine.py", "--model", guarded / "optimal.nkat", "--compare")


def test_full_tries_short_fits_first_and_does_them_once(
    model: Path, text: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(job.TRIALS, "full", 2)
    words = [word for word in QUICK if word not in ("--fit-learning-rate", 0.02)]
    common = [OPTIMIZER, "--model", model, "--calibrate", text, *words, "--mode", "full", "--target-rank", 2]
    done = script(*common, "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("short fit ") == 3  # the steps are the user's, so the learning rate alone is tried
    fit = json.loads((tmp_path / "out" / "fit_rank2.json").read_text())
    best = min(fit["short_fits"], key=lambda row: row["change_percent"])
    assert fit["settings"]["learning_rate"] == best["learning_rate"]
    assert f"--fit-learning-rate {best['learning_rate']}" in fit["command"]
    assert fit["settings"]["scaled"] is False
    assert fit["steps"] == 12
    again = script(*common, "--output-dir", tmp_path / "out", "--resume")
    assert again.returncode == 0
    assert "short fit " not in again.stderr


def test_what_short_fits_choose() -> None:
    settings = FitSettings(4, 0.97)

    def row(rate: float, steps: int, change: float, error: float = 0.5) -> dict[str, Any]:
        return {"learning_rate": rate, "steps": steps, "change_percent": change, "change_percent_stderr": error}

    failed = {"learning_rate": 2.0, "steps": 30, "failed": "the loss is not a finite number"}
    gained = [row(1.0, 15, -10), row(1.0, 30, -12), failed]
    assert best_of(gained, settings) == {"learning_rate": 1.0, "steps": 120}
    assert best_of(gained, settings, (True, False)) == {"learning_rate": 1.0}
    assert best_of([row(1.0, 15, -10), row(1.0, 30, -10.2)], settings) == {"learning_rate": 1.0}  # within the error
    assert best_of([row(1.0, 15, -10), row(3.0, 15, -11), row(3.0, 30, -9)], settings) == {"learning_rate": 3.0}
    assert best_of([], settings) == {}


def test_where_there_are_no_links_the_best_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, same = tmp_path / "a.nkat", tmp_path / "optimal.nkat"
    path.write_bytes(b"first")
    optimal.write_same(path, same, [])
    assert same.samefile(path)
    optimal.write_same(path, same, [])
    assert same.samefile(path)

    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    other = tmp_path / "b.nkat"
    other.write_bytes(b"second")
    optimal.write_same(other, same, [])
    assert same.read_bytes() == b"second"
    assert not same.samefile(other)
    assert path.read_bytes() == b"first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nkat", "b.nkat", "optimal.nkat"]
