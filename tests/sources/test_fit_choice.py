"""A fit through the converter: what it keeps within its guard, what breaks it, and chats as what is learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import pytest

from nkat.measure.guard import Guard
from nkat.measure.texts import default_text
from nkat.sources.fit import job
from nkat.sources.fit.choice import GAMMAS
from nkat.theta.modelfile import open_model_file
from tests.conftest import Script
from tests.measure.test_chats import CHATML, TURNS, messages
from tests.sources.test_fit import QUICK
from tests.support.tiny_models import write_tiny_model

CONVERTER, ENGINE = "nkat_gguf_converter.py", "nkat_inference_engine.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    quantised = gguf.GGMLQuantizationType.Q8_0
    return write_tiny_model(path, "llama", blocks=1, qtype=quantised, context=128, chat_template=CHATML)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(default_text().content[:6000], encoding="utf-8")
    return path


@pytest.fixture
def hard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that nothing meets: on a random model every text teaches something for every other."""
    monkeypatch.setattr(job, "Guard", partial(Guard, limit=-0.9))


def fit(model: Path, text: Path, output: Path, *more: object) -> tuple[object, ...]:
    return (
        CONVERTER,
        "--input",
        model,
        "--output",
        output,
        "--theta-source",
        "fit",
        "--calibrate",
        text,
        *QUICK,
        *more,
    )


@pytest.fixture
def refused(script: Script) -> Callable[..., str]:
    """Runs what must fail and returns the error: of what may come behind a progress bar."""

    def run(*command: object) -> str:
        done = script(*command)
        assert done.returncode == 2, done
        assert "Traceback" not in done.stderr
        (said,) = [line.rpartition("error: ")[2] for line in done.stderr.splitlines() if "error: " in line]
        return said

    return run


def test_rank_gamma_and_step_are_chosen_within_the_guard(
    model: Path, text: Path, tmp_path: Path, script: Script
) -> None:
    output, record = tmp_path / "o.nkat", tmp_path / "r.json"
    done = script(*fit(model, text, output, "--json", record))
    assert done.returncode == 0, done.stderr
    found, theta = json.loads(record.read_text())["fit"], open_model_file(output).theta
    choice = found["choice"]
    kept = choice["judged"][choice["kept"]]
    assert (kept["rank"], kept["gamma"], kept["step"]) == (theta.rank, theta.gamma, theta.notes["nkat.fit.kept_step"])
    assert {row["rank"] for row in choice["looks"]} == {4, 2, 1}
    assert {row["step"] for row in choice["looks"]} >= {4, 8, 12}
    assert kept["guard"]["admitted"]
    assert len(kept["guard"]["prices"]) == 3
    assert kept["guard"]["prices"][0]["text"] == "the calibration text's first part"
    assert theta.notes["nkat.guard.text"] in [price["text"] for price in kept["guard"]["prices"]]
    assert kept["change_percent"] == pytest.approx(found["heldout_change_percent"], rel=1e-4)
    assert found["heldout_change_percent"] < 0
    assert "dearest guard text" in done.stdout
    assert not output.with_name("o.nkat.fit").exists()


def test_a_guard_that_admits_nothing_leaves_the_fit_to_go_on_without(
    model: Path, text: Path, hard: None, tmp_path: Path, script: Script, refused: Callable[..., str]
) -> None:
    output = tmp_path / "o.nkat"
    said = refused(*fit(model, text, output))
    assert f"gamma {GAMMAS[-1]:g} breaks the guard: " in said
    assert "--resume --no-guard" in said
    assert not output.exists()
    done = script(*fit(model, text, output, "--resume", "--no-guard", "--json", "-"))
    assert done.returncode == 0, done.stderr
    choice = json.loads(done.stdout.splitlines()[-1])["fit"]["choice"]
    assert all(row["guard"] is None for row in choice["looks"] + choice["judged"])
    assert open_model_file(output).theta.gamma in GAMMAS[:5]
    assert "nkat.guard.text" not in open_model_file(output).theta.notes


def test_what_a_user_fixes_is_kept_and_its_price_said(
    model: Path, text: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "o.nkat"
    fixed = ("--theta-gamma", 0.98, "--theta-rank", 3)
    done = script(*fit(model, text, output, *fixed))
    assert done.returncode == 0, done.stderr
    assert "breaks" not in done.stderr  # control: nothing is broken
    monkeypatch.setattr(job, "Guard", partial(Guard, limit=-0.9))
    done = script(*fit(model, text, output, "--force", *fixed))
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "breaks the guard" in line]
    assert "rank 3, gamma 0.98 breaks the guard: " in line
    assert "%" in line
    assert (open_model_file(output).theta.gamma, open_model_file(output).theta.rank) == (0.98, 3)


def test_flags_of_the_guard(model: Path, text: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    asked = fit(model, text, tmp_path / "o.nkat")
    assert "--guard has no meaning with it" in refused(*asked, "--no-guard", "--guard", text)
    assert "guard's text and the text to learn from are the same" in refused(*asked, "--guard", text)
    assert "needs lower ranks" in refused(*asked, "--optimize-rank", "--no-nested")
    assert "--guard is for --theta-source fit" in refused(*asked[:5], "--guard", text)
    assert "no such text file" in refused(*asked, "--guard", tmp_path / "none.txt")


def test_chats_are_learned_and_judged(model: Path, tmp_path: Path, script: Script, refused: Callable[..., str]) -> None:
    chats, held, output = tmp_path / "chats.jsonl", tmp_path / "held.jsonl", tmp_path / "o.nkat"
    row = json.dumps(messages(*TURNS))
    chats.write_text(f"{row}\n" * 30, encoding="utf-8")
    held.write_text(f"{json.dumps({'prompt': 'Well?', 'completion': TURNS[-1][1]})}\n" * 4, encoding="utf-8")
    done = script(*fit(model, chats, output, "--json", "-"))
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])["fit"]
    assert record["heldout_change_percent"] < -20
    done = script(ENGINE, "--model", output, "--perplexity", "--text", held, "--no-cuda", "--json", "-")
    assert done.returncode == 0, done.stderr
    judged = json.loads(done.stdout.splitlines()[-1])
    assert judged["perplexity_change_percent"] < -20
    assert judged["scored_tokens"] < 4 * 20  # the assistant's alone
    assert "made from that very text" in refused(
        ENGINE, "--model", output, "--perplexity", "--text", chats, "--no-cuda"
    )
    chats.write_text(f"{row}\n" * 30 + "{}\n", encoding="utf-8")
    assert "chats.jsonl, line 31: a row needs 'messages'" in refused(*fit(model, chats, output, "--force"))
    without = write_tiny_model(tmp_path / "without.gguf", "llama", blocks=1, context=128)
    assert "no chat template" in refused(*fit(without, held, output, "--force"))
    ignoring = fit(model, held, output, "--force", "--calibrate-ignore", "x")
    assert "--calibrate-ignore is for plain text" in refused(*ignoring)
