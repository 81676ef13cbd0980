"""`nkat_inference_engine.py --perplexity` as a user runs it, on a real tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nkat.load import load_model
from nkat.perplexity import measure

ENGINE, CONVERTER = "nkat_inference_engine.py", "nkat_gguf_converter.py"


@pytest.fixture
def nkat(script, tmp_path: Path, stories: Path) -> Path:
    path = tmp_path / "stories.nkat"
    assert script(CONVERTER, "--input", stories, "--output", path).returncode == 0
    return path


def run(script, *arguments: object) -> dict:
    done = script(ENGINE, *arguments, "--perplexity", "--chunks", 2, "--no-cuda", "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_measures_both_arms_on_the_same_chunks(script, nkat: Path, stories: Path, shared_text) -> None:
    text = shared_text("alice29.txt")
    record = run(script, "--model", nkat, "--text", text)
    assert record["theta_enabled"] is True
    assert (record["chunks"], record["scored_tokens"]) == (2, 510)
    plain = load_model(stories)
    expected = measure(plain.model, plain.tokenizer, text.read_bytes().decode(), chunks=2)
    assert record["baseline_perplexity"] == pytest.approx(expected.ppl, rel=1e-9)
    assert record["nkat_perplexity"] != record["baseline_perplexity"]
    assert record["nkat_tpe"] < 1 / record["nkat_perplexity"]
    assert record["baseline_tpe"] == pytest.approx(1 / record["baseline_perplexity"])


def test_gamma_at_run_time(script, nkat: Path, shared_text) -> None:
    text = shared_text("alice29.txt")
    off = run(script, "--model", nkat, "--text", text, "--theta-gamma", 1)
    assert off["nkat_perplexity"] == off["baseline_perplexity"]
    assert off["perplexity_change_percent"] == 0
    recorded, same = (
        run(script, "--model", nkat, "--text", text),
        run(script, "--model", nkat, "--text", text, "--theta-gamma", 0.97),
    )
    assert recorded["nkat_perplexity"] == same["nkat_perplexity"]
    stronger = run(script, "--model", nkat, "--text", text, "--theta-gamma", 0.5)
    assert abs(stronger["perplexity_change_percent"]) > abs(same["perplexity_change_percent"]) > 0


def test_theta_file_with_its_base_is_the_same_model(
    script, fails, tmp_path: Path, nkat: Path, stories: Path, shared_text
) -> None:
    theta = tmp_path / "theta_rank4.bin"
    script(CONVERTER, "--input", stories, "--output", theta, "--theta-only")
    text = shared_text("alice29.txt")
    apart, whole = (
        run(script, "--model", stories, "--theta", theta, "--text", text),
        run(script, "--model", nkat, "--text", text),
    )
    assert apart["nkat_perplexity"] == whole["nkat_perplexity"]
    alone = run(script, "--model", stories, "--text", text)
    assert alone["theta_enabled"] is False
    assert "nkat_perplexity" not in alone
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(stories.read_bytes() + b"\0")
    assert "was made for another model" in fails(ENGINE, "--model", changed, "--theta", theta, "--perplexity")
    assert "holds only theta" in fails(ENGINE, "--model", theta, "--perplexity")


def test_damaged_theta_is_said(script, nkat: Path, tmp_path: Path, stories: Path, shared_text) -> None:
    target = tmp_path / "t.gguf"
    target.write_bytes(stories.read_bytes())
    script(CONVERTER, "--input", target, "--in-place")
    target.write_bytes(target.read_bytes()[:-1])
    done = script(ENGINE, "--model", target, "--perplexity", "--chunks", 1, "--text", shared_text("alice29.txt"))
    assert done.returncode == 0
    assert "incomplete or damaged; measuring the base model alone" in done.stderr


def test_mistakes(fails, tmp_path: Path, nkat: Path, stories: Path) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("too short")
    assert "the text is empty" in fails(ENGINE, "--model", nkat, "--perplexity", "--text", empty)
    assert "one chunk needs 512" in fails(ENGINE, "--model", nkat, "--perplexity", "--text", short)
    assert "no such text file" in fails(ENGINE, "--model", nkat, "--perplexity", "--text", tmp_path / "no")
    assert "no such file" in fails(ENGINE, "--model", tmp_path / "no", "--perplexity")
    assert "say what to do" in fails(ENGINE, "--model", nkat)
    assert "has no Θ" in fails(ENGINE, "--model", stories, "--perplexity", "--theta-gamma", 0.9)
    assert "gamma" in fails(ENGINE, "--model", nkat, "--perplexity", "--theta-gamma", 1.5)
    existing = tmp_path / "r.json"
    existing.write_text("{}")
    assert "exists already" in fails(ENGINE, "--model", nkat, "--perplexity", "--json", existing)
