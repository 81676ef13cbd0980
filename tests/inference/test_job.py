"""`nkat_inference_engine.py` as a user runs it, on tiny models."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from nkat.engine.eager import EagerDecoder
from nkat.errors import NKATError
from nkat.gguf.writer import gguf_parts, write_gguf
from nkat.host.record import git_commit
from nkat.host.streams import shown
from nkat.lm.load import load_model
from nkat.measure import startup
from nkat.measure.startup import measure_startup
from nkat.measure.texts import default_text, load_text
from nkat.theta.modelfile import open_model_file
from tests.conftest import ROOT
from tests.support.endless import without_an_end
from tests.support.perplexity import measure
from tests.support.tiny_models import write_tiny_model

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
    assert (record["chunks"], record["context"], record["scored_tokens"]) == (2, 128, 2 * 63)  # what it was made for
    plain = load_model(stories)
    expected = measure(plain.model, plain.tokenizer, text.read_bytes().decode(), chunks=2, context=128)
    assert record["baseline_perplexity"] == pytest.approx(expected.ppl, rel=1e-9)
    assert record["nkat_perplexity"] != record["baseline_perplexity"]
    assert record["nkat_tpe"] < 1 / record["nkat_perplexity"]
    assert record["baseline_tpe"] == pytest.approx(1 / record["baseline_perplexity"])


@pytest.mark.isa
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


@pytest.mark.isa
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
    assert "holds only Θ" in fails(ENGINE, "--model", theta, "--perplexity")


def test_damaged_theta_is_said(script, nkat: Path, tmp_path: Path, stories: Path, shared_text) -> None:
    target = tmp_path / "t.gguf"
    target.write_bytes(stories.read_bytes())
    script(CONVERTER, "--input", target, "--in-place")
    target.write_bytes(target.read_bytes()[:-1])
    done = script(ENGINE, "--model", target, "--perplexity", "--chunks", 1, "--text", shared_text("alice29.txt"))
    assert done.returncode == 0
    assert "incomplete or damaged; using the base model alone" in done.stderr


def test_mistakes(fails, tmp_path: Path, nkat: Path, stories: Path) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("too short")
    assert "the text is empty" in fails(ENGINE, "--model", nkat, "--perplexity", "--text", empty)
    assert "one chunk needs 128" in fails(ENGINE, "--model", nkat, "--perplexity", "--text", short)
    assert "no such text file" in fails(ENGINE, "--model", nkat, "--perplexity", "--text", tmp_path / "no")
    assert "no such file" in fails(ENGINE, "--model", tmp_path / "no", "--perplexity")
    assert "say what to do" in fails(ENGINE, "--model", nkat)
    assert "at least one chunk" in fails(ENGINE, "--model", nkat, "--perplexity", "--chunks", 0)
    assert "has no Θ" in fails(ENGINE, "--model", stories, "--perplexity", "--theta-gamma", 0.9)
    assert "gamma" in fails(ENGINE, "--model", nkat, "--perplexity", "--theta-gamma", 1.5)
    existing = tmp_path / "r.json"
    existing.write_text("{}")
    assert "exists already" in fails(ENGINE, "--model", nkat, "--perplexity", "--json", existing)


# --- speed, comparison, text: a random model, so that nothing has to be fetched

QUICK = ("--seq-len", 12, "--iterations", 5, "--repetitions", 2, "--no-cuda", "--threads", 1)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny random model with a chat template."""
    folder = tmp_path_factory.mktemp("engine")
    plain = write_tiny_model(folder / "plain.gguf", "llama")
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
    path = folder / "base.gguf"
    write_gguf(path, gguf_parts({"tokenizer.chat_template": template}, [], open_model_file(plain).base), force=False)
    return path


@pytest.fixture
def tiny(script, tmp_path: Path, base: Path) -> Path:
    """The same with Θ."""
    path = tmp_path / "tiny.nkat"
    assert script(CONVERTER, "--input", base, "--output", path).returncode == 0
    return path


@pytest.fixture
def one_process(monkeypatch) -> None:
    """Starts are measured in this process: importing torch anew for each would take most of the suite's time."""
    monkeypatch.setattr(startup, "fresh_startup", lambda request, prompt, threads: measure_startup(request, prompt))


def record_of(script, *arguments: object) -> dict:
    done = script(ENGINE, *arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_benchmark_has_the_guides_keys_and_what_repeats_them(script, tiny: Path) -> None:
    record = record_of(script, "--model", tiny, "--benchmark", *QUICK)
    assert record["tokens_per_second"] == pytest.approx(1e3 / record["median_latency_ms"])
    assert record["p10_latency_ms"] <= record["median_latency_ms"] <= record["p90_latency_ms"]
    assert (record["device"], record["theta_enabled"]) == ("cpu", True)
    assert (record["runs"], record["overhead"]["pairs"], record["prefill_overhead"]["pairs"]) == (10, 2, 2)
    low, high = record["overhead"]["interval"]
    assert low <= record["overhead_percentage"] <= high
    assert record["overhead_percentage"] == record["overhead"]["percentage"]
    assert record["nkat"]["decode"]["tokens_per_second"] == record["tokens_per_second"]
    assert record["model_sha256"] == sha256(tiny)
    assert re.fullmatch("[0-9a-f]{64}", record["text_sha256"])
    assert (record["threads"], record["dtype"], record["activations"]) == (1, "float32", "int8")
    assert record["git_commit"] == git_commit()
    assert record["versions"]["torch"]
    assert (record["seq_len"], record["iterations"], record["repetitions"]) == (12, 5, 2)
    assert record["kv_cache_bytes"] > 0
    assert record["decoder"]
    assert record["first_token_cold_seconds"] > 0
    assert record["prefill_tokens_per_second"] > 0
    if sys.platform == "linux":
        assert record["peak_memory_bytes"] >= record["memory"]["resident"]
        assert record["memory_after_first_token"]["model_file"] > record["memory_before_model"]["model_file"] == 0


@pytest.mark.usefixtures("one_process")
def test_benchmark_without_theta_has_one_arm(script, tiny: Path, base: Path, tmp_path: Path) -> None:
    record = record_of(script, "--model", base, "--benchmark", *QUICK)
    assert record["theta_enabled"] is False
    assert record["overhead_percentage"] is record["prefill_overhead_percentage"] is record["nkat"] is None
    assert record["tokens_per_second"] == record["baseline"]["decode"]["tokens_per_second"]
    where = ("--output-dir", tmp_path / "b", "--force")
    table = script(ENGINE, "--model", base, "--benchmark", *QUICK, *where).stdout
    assert "with Θ" not in table
    assert "with Θ" in script(ENGINE, "--model", tiny, "--benchmark", *QUICK, *where).stdout


@pytest.mark.usefixtures("one_process")
def test_benchmark_leaves_a_record_unless_it_is_wanted_elsewhere(
    script, fails, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = script(ENGINE, "--model", tiny, "--benchmark", *QUICK)
    (left,) = tmp_path.glob("output/benchmark/*/benchmark.json")
    assert f"files are in {left.parent.relative_to(tmp_path)}" in done.stderr
    record = json.loads(left.read_text(encoding="utf-8"))
    assert record["theta_enabled"] is True
    assert record["model_sha256"] == sha256(tiny)
    assert record["tokens_per_second"] > 0
    assert "exists already" in fails(ENGINE, "--model", tiny, "--benchmark", *QUICK, "--output-dir", left.parent)
    shutil.rmtree(tmp_path / "output")
    record_of(script, "--model", tiny, "--benchmark", *QUICK)  # the control: --json says where
    assert not (tmp_path / "output").exists()


@pytest.mark.usefixtures("one_process")
def test_what_comes_next_follows_from_what_was_found(script, tiny: Path, base: Path, tmp_path: Path) -> None:
    def step(*arguments: object) -> list[str]:
        line = script(ENGINE, *arguments, "--no-cuda", "--threads", 1, "--json", "-").stderr.strip().splitlines()[-1]
        assert line.startswith("next: "), line
        return shlex.split(line.removeprefix("next: "))[1:]

    quick = ("--perplexity", "--chunks", 1)
    converter, *arguments = step("--model", base, *quick)
    assert arguments == ["--input", str(base), "--output", str(base.with_suffix(".nkat"))]
    assert script(Path(converter).name, *arguments[:3], tmp_path / "made.nkat").returncode == 0
    _, *arguments = step("--model", tmp_path / "made.nkat", *quick)
    assert arguments == ["--model", str(tmp_path / "made.nkat"), "--compare"]
    *_, selector = step(*arguments, *QUICK[:-3], "--chunks", 0, "--output-dir", tmp_path / "c")[:1]
    assert selector.endswith("backend_selector.py")
    assert "next:" not in script(ENGINE, "--model", tiny, "--generate", "the", "--max-tokens", 1).stderr


@pytest.mark.isa
def test_cpu_kernels_run_unless_the_dtype_is_not_theirs(script, tiny: Path) -> None:
    """And the record says what ran."""
    usual = generate(script, "--model", tiny, "--generate", "the", "--temperature", 0)
    other = generate(script, "--model", tiny, "--generate", "the", "--temperature", 0, "--dtype", "float64")
    assert usual["decoder"].startswith("compiled CPU program")
    assert other["decoder"] == EagerDecoder.name
    assert (usual["dtype"], other["dtype"]) == ("float32", "float64")
    assert usual["tokens"] == other["tokens"]  # an F32 model whose best tokens lead by 0.09 or more; rounding is 1e-4


@pytest.mark.usefixtures("one_process")
def test_benchmark_writes_json_where_asked(script, fails, tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "b.json"
    done = script(ENGINE, "--model", tiny, "--benchmark", *QUICK, "--json", target)
    assert done.returncode == 0
    record = json.loads(target.read_text())
    assert record["theta_file"] == str(tiny)
    assert record["command"].startswith("python ")
    assert f"--model {tiny} --benchmark --seq-len 12" in record["command"]
    target.unlink()
    words = [word for word in shlex.split(record["command"])[1:] if word != str(ROOT / ENGINE)]
    assert script(ENGINE, *words).returncode == 0  # it runs as recorded
    assert "exists already" in fails(ENGINE, "--model", tiny, "--benchmark", *QUICK, "--json", target)


@pytest.mark.usefixtures("one_process")
def test_no_more_tokens_than_the_model_was_made_for(script, fails, tmp_path: Path) -> None:
    """Unless asked for twice. Where the user names no number, it follows the model, with a warning."""
    short, text = write_tiny_model(tmp_path / "short.gguf", "llama", context=64), tmp_path / "text.txt"
    text.write_text(default_text().content[:3000], encoding="utf-8")
    common = ("--model", short, "--text", text, "--no-cuda", "--threads", 1)

    def record(*more: object) -> tuple[dict, str]:
        done = script(ENGINE, *common, *more, "--json", "-")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    found, said = record("--perplexity", "--chunks", 3)
    assert (found["chunks"], found["context"]) == (3, 64)
    assert "warning: the model was made for 64 tokens: chunks have as many, where others have 512" in said
    assert record("--perplexity", "--context", 32, "--chunks", 2)[0]["context"] == 32
    refused = fails(ENGINE, *common, "--perplexity", "--context", 65)
    assert "--context: 65 tokens are more than the 64 that the model was made for; --beyond-context" in refused
    assert record("--perplexity", "--context", 65, "--chunks", 2, "--beyond-context")[0]["context"] == 65
    found, said = record("--perplexity", "--chunks", 10**6)
    assert f"note: text.txt has {found['chunks']} chunks of 64 tokens, and not the 1000000 that were asked for" in said
    found, said = record("--benchmark", "--repetitions", 1)
    assert (found["seq_len"], found["iterations"]) == (32, 32)
    assert "warning: the model was made for 64 tokens: 32 are run, and 32 behind them" in said
    refused = fails(ENGINE, *common, "--benchmark", "--seq-len", 100000)
    assert "--seq-len and --iterations: 100032 tokens are more than the 64" in refused
    assert record("--benchmark", "--seq-len", 70, "--repetitions", 1, "--beyond-context")[0]["seq_len"] == 70
    generate = ("--model", short, "--no-cuda", "--temperature", 0, "--generate")
    done = script(ENGINE, *generate, "the", "--json", "-")
    record_of_text = json.loads(done.stdout.splitlines()[-1])
    assert record_of_text["prompt_tokens"] + record_of_text["generated_tokens"] <= 64
    assert "the context of 64 tokens is full" in done.stderr or record_of_text["stopped"] == "end of generation"
    assert "the prompt: " in fails(ENGINE, *generate, "the " * 80)


def test_a_record_never_replaces_what_is_read(fails, tiny: Path, tmp_path: Path) -> None:
    before = tiny.read_bytes()
    same = "the output is the same file as the input"
    assert same in fails(ENGINE, "--model", tiny, "--perplexity", "--force", "--json", tiny)
    assert same in fails(CONVERTER, "--input", tiny, "--output", tmp_path / "x", "--force", "--json", tiny)
    out = tmp_path / "out"
    out.mkdir()
    taken = fails(ENGINE, "--model", tiny, "--compare", "--output-dir", out, "--json", out / "comparison.json")
    assert "--json and comparison.json are the same file" in taken
    both = fails(CONVERTER, "--input", tiny, "--output", tmp_path / "x", "--json", tmp_path / "x")
    assert "--output and --json are the same file" in both
    assert tiny.read_bytes() == before


def test_what_is_measured_is_recorded_before_it_is_printed(script, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    text, record = tmp_path / "text.txt", tmp_path / "record.json"
    text.write_text(default_text().content[:3000], encoding="utf-8")

    def fail(*_: object) -> str:
        raise NKATError("the table cannot be made")

    monkeypatch.setattr("nkat.inference.job.show", fail)
    done = script(ENGINE, "--model", tiny, "--perplexity", "--text", text, "--chunks", 1, "--json", record)
    assert (done.returncode, done.stdout) == (2, "")
    assert json.loads(record.read_text())["nkat_perplexity"] > 0


@pytest.fixture
def short(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(default_text().content[:3000], encoding="utf-8")
    return path


def test_tables_are_for_programs_where_they_are_wanted(script, fails, tiny: Path, short: Path, tmp_path: Path) -> None:
    command = ("--model", tiny, "--perplexity", "--text", short, "--chunks", 1, "--no-cuda")
    record = tmp_path / "r.json"
    done = script(ENGINE, *command, "--json", record, "--output-format", "csv")
    without, with_theta, divergence = csv.DictReader(io.StringIO(done.stdout))
    assert [row["table"] for row in (without, with_theta, divergence)] == ["perplexity", "perplexity", "divergence"]
    found = json.loads(record.read_text())
    assert float(without["perplexity"]) == found["baseline_perplexity"]
    assert float(with_theta["perplexity"]) == found["nkat_perplexity"]
    assert float(with_theta["change_percent_stderr"]) == found["perplexity_change_stderr"]
    assert without["text_sha256"] == with_theta["text_sha256"] == found["text_sha256"]
    assert float(divergence["kl_p99"]) == found["divergence"]["kl"]["quantiles"]["99"]
    assert "1 chunk" in done.stderr
    lines = script(ENGINE, *command, "--output-format", "jsonl", "--quiet")
    records = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [record["perplexity"] for record in records[:2]] == [found["baseline_perplexity"], found["nkat_perplexity"]]
    assert records[2]["kl_mean"] == found["divergence"]["kl"]["mean"]
    assert lines.stderr == ""
    page = script(ENGINE, *command, "--output-format", "md").stdout
    assert f"| {found['baseline_perplexity']:.4f} ± " in " ".join(page.split())
    usual = script(ENGINE, *command, "--quiet")
    assert f"{found['nkat_perplexity']:.4f} ± " in usual.stdout
    assert usual.stderr == ""
    assert "csv alone" in fails(ENGINE, *command, "--json", "-", "--output-format", "csv")
    said = fails(ENGINE, "--model", tiny, "--generate", "x", "--output-format", "csv")
    assert "--output-format has no meaning with --generate" in said


def test_an_interrupted_comparison_leaves_no_folder(script, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nkat.inference.job.fresh_startup", interrupt)
    done = script(ENGINE, "--model", tiny, "--compare", *QUICK, "--output-dir", tmp_path / "out" / "compare")
    assert (done.returncode, done.stderr) == (130, "interrupted; nothing was written\n")
    assert not (tmp_path / "out").exists()


def test_compare_measures_both_arms(script, fails, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "compare"
    command = ("--model", tiny, "--compare", *QUICK, "--chunks", 1, "--output-dir", folder)
    record = record_of(script, *command)
    assert json.loads((folder / "comparison.json").read_text()) == record
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert base64.b64encode((folder / "comparison.png").read_bytes()).decode() in page
    hashes = (record["model_sha256"], record["base_sha256"], record["text_sha256"])
    assert all(sha256 in page for sha256 in hashes)
    assert record["command"] in html.unescape(page)
    assert f"{record['baseline']['perplexity']:.4f} ± " in page
    quantiles = record["divergence"]["kl"]["quantiles"]
    assert all(f"{quantiles[name]:.6f}" in page for name in ("90", "95", "99"))
    guide = ("nkat_tokens_per_second", "baseline_tokens_per_second", "overhead_percentage")
    assert all(math.isfinite(record[key]) for key in guide)
    assert record["nkat_tokens_per_second"] == record["nkat"]["decode"]["tokens_per_second"]
    change = 100 * (record["nkat"]["perplexity"] / record["baseline"]["perplexity"] - 1)
    assert record["estimated_perplexity_improvement"] == pytest.approx(change)
    assert record["perplexity_change_stderr"] > 0
    assert record["chunks"] == 1
    assert record["baseline"]["tpe"] == pytest.approx(1 / record["baseline"]["perplexity"])
    assert record["nkat"]["tpe"] < 1 / record["nkat"]["perplexity"]
    assert record["rounding_perplexity_change"] == 0  # an F32 file: nothing is rounded
    assert "exists already" in fails(ENGINE, *command)


@pytest.mark.usefixtures("one_process")
def test_compare_agrees_with_perplexity(script, tiny: Path, tmp_path: Path) -> None:
    """The same chunks, exact activations: the same figures as --perplexity gives; another γ gives others."""
    exact = ("--activations", "float", "--chunks", 1)
    expected = run(script, "--model", tiny, "--activations", "float")
    record = record_of(script, "--model", tiny, "--compare", *QUICK, *exact, "--output-dir", tmp_path / "a")
    one = record_of(script, "--model", tiny, "--perplexity", *exact, "--no-cuda")
    # --compare scores with the compiled kernels, --perplexity with torch: sums in another order
    assert record["estimated_perplexity_improvement"] == pytest.approx(one["perplexity_change_percent"], abs=1e-3)
    assert record["perplexity_change_stderr"] == pytest.approx(one["perplexity_change_stderr"], rel=1e-2)
    assert record["rounding_perplexity_change"] is None
    assert expected["chunks"] == 2
    assert abs(expected["perplexity_change_percent"] - one["perplexity_change_percent"]) > 1e-2


@pytest.mark.usefixtures("one_process")
def test_compare_without_chunks_says_nothing_of_perplexity(script, tiny: Path, tmp_path: Path) -> None:
    command = ("--model", tiny, "--compare", *QUICK, "--chunks", 0, "--output-dir", tmp_path / "c")
    record = record_of(script, *command)
    assert record["estimated_perplexity_improvement"] is record["perplexity_change_stderr"] is None
    assert record["baseline"]["perplexity"] is record["nkat"]["tpe"] is None
    assert record["chunks"] == 0
    assert "perplexity" not in script(ENGINE, *command, "--force").stdout


@pytest.mark.usefixtures("one_process")
def test_compare_makes_a_new_folder_when_none_is_given(script, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert script(ENGINE, "--model", tiny, "--compare", *QUICK, "--chunks", 0).returncode == 0
    (folder,) = (tmp_path / "output" / "compare").iterdir()
    assert re.fullmatch(r"tiny_\d{8}-\d{6}", folder.name)
    assert {path.name for path in folder.iterdir()} == {"comparison.json", "comparison.png", "report.html"}


@pytest.mark.usefixtures("one_process")
def test_rounded_activations_are_measured_and_said(script, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "q.gguf", "llama", qtype=GGMLQuantizationType.Q8_0)
    path = tmp_path / "q.nkat"
    script(CONVERTER, "--input", base, "--output", path)
    done = script(
        ENGINE, "--model", path, "--compare", *QUICK, "--chunks", 1, "--output-dir", tmp_path / "o", "--json", "-"
    )
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["rounding_perplexity_change"] != 0
    assert done.stdout.count("rounded to 8 bits") == 1
    exact = measure(*_parts(path, False), chunks=1).ppl
    rounded = measure(*_parts(path, True), chunks=1).ppl
    assert record["rounding_perplexity_change"] == pytest.approx(100 * (rounded / exact - 1), abs=1e-4)
    assert record["baseline"]["perplexity"] == rounded


def _parts(path: Path, rounded: bool) -> tuple:
    loaded = load_model(path, int8_activations=rounded, repack=rounded)
    loaded.model.set_gamma(None)
    return loaded.model, loaded.tokenizer, load_text(None).content


@pytest.mark.usefixtures("one_process")
def test_the_text_that_made_a_theta_does_not_judge_it(script, fails, base: Path, tmp_path: Path) -> None:
    text, path = tmp_path / "t.txt", tmp_path / "c.nkat"
    text.write_text("the rain in a tin and the other one. " * 200)
    source = ("--theta-source", "residual", "--reference", base, "--calibrate", text)
    coarse = write_tiny_model(tmp_path / "coarse.gguf", "llama", qtype=GGMLQuantizationType.Q4_0)
    assert script(CONVERTER, "--input", coarse, "--output", path, *source).returncode == 0
    command = ("--model", path, "--compare", *QUICK, "--text", text, "--output-dir", tmp_path / "o")
    assert "made from that very text" in fails(ENGINE, *command)
    assert script(ENGINE, *command, "--chunks", 0).returncode == 0  # speed is no judgement


def generate(script, *arguments: object) -> dict:
    return record_of(script, *arguments, "--no-cuda", "--threads", 1, "--max-tokens", 12)


def test_generate_streams_and_reports(script, tiny: Path) -> None:
    done = script(
        ENGINE, "--model", tiny, "--generate", "the rain", "--max-tokens", 12, "--seed", 1, "--no-cuda", "--json", "-"
    )
    text, record = done.stdout.rsplit("\n", 2)[0], json.loads(done.stdout.splitlines()[-1])
    assert shown(record["text"]) == text
    assert load_model(tiny).tokenizer.decode_bytes(record["tokens"]).decode(errors="replace") == record["text"]
    assert record["generated_tokens"] == len(record["tokens"]) <= 12
    assert record["stopped"] in ("length", "end of generation")
    assert re.search(r"prompt \d+ tokens, [\d.]+ tok/s; generated \d+ tokens, [\d.]+ tok/s", done.stderr)


def test_a_seed_gives_the_same_text(script, tiny: Path) -> None:
    def text(seed: int, *more: object) -> str:
        return generate(script, "--model", tiny, "--generate", "the", "--seed", seed, "--top-k", 0, *more)["text"]

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(1, "--temperature", 0) == text(2, "--temperature", 0)  # nothing is drawn


@pytest.mark.isa
def test_theta_and_gamma_reach_generation(script, tiny: Path, base: Path) -> None:
    def tokens(model: Path, *more: object) -> list[int]:
        prompt = ("--generate", "the rain in a tin", "--temperature", 0)
        return generate(script, "--model", model, *prompt, *more)["tokens"]

    assert tokens(tiny, "--theta-gamma", 1) == tokens(base)
    assert tokens(tiny, "--theta-gamma", 0.5) != tokens(base)


def test_what_has_no_effect_is_said(script, tiny: Path) -> None:
    def said(*more: object) -> str:
        return script(ENGINE, "--model", tiny, "--generate", "the", "--max-tokens", 2, *more).stderr

    assert "--theta-gamma 1 couples Θ with strength 0: it has no effect" in said("--theta-gamma", 1)
    assert "seed" not in said("--temperature", 0)
    control = said()
    assert "no effect" not in control
    assert "; seed " in control
    assert generate(script, "--model", tiny, "--generate", "the", "--temperature", 0, "--seed", 5)["seed"] is None
    assert generate(script, "--model", tiny, "--generate", "the", "--seed", 5)["seed"] == 5


def test_chat_wraps_the_prompt_in_the_models_template(script, tiny: Path) -> None:
    def tokens(*more: object) -> tuple:
        record = generate(script, "--model", tiny, "--temperature", 0, *more)
        return record["prompt_tokens"], record["tokens"]

    wrapped = tokens("--generate", "the", "--chat")
    assert wrapped == tokens("--generate", "<|im_start|>the<|im_end|><|im_start|>")
    assert wrapped != tokens("--generate", "the")
    with_system = tokens("--generate", "the", "--chat", "--system", "rain")
    assert with_system == tokens("--generate", "<|im_start|>rain<|im_end|><|im_start|>the<|im_end|><|im_start|>")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_generation_and_keeps_the_text(base: Path, tmp_path: Path) -> None:
    record, endless = tmp_path / "r.json", without_an_end(base, tmp_path / "endless.gguf")
    command = [sys.executable, ROOT / ENGINE, "--model", endless, "--generate", "the", "--max-tokens", "100000"]
    command += ["--temperature", "0", "--no-cuda", "--threads", "1", "--json", record]
    # without a buffer, which `communicate` would pass by
    running = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    try:
        first = running.stdout.read(5)
        running.send_signal(signal.SIGINT)
        rest, notes = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, notes
    assert b"stopped by interrupted" in notes
    saved = json.loads(record.read_text())
    assert (saved["stopped"], shown(saved["text"])) == ("interrupted", (first + rest).decode().removesuffix("\n"))


def test_mistakes_of_the_other_commands(fails, tiny: Path, base: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    engine = (ENGINE, "--model", tiny)
    assert "nothing to compare" in fails(ENGINE, "--model", base, "--compare")
    assert "one thing at a time" in fails(*engine, "--compare", "--benchmark")
    assert "--top-k has no meaning with --benchmark" in fails(*engine, "--benchmark", "--top-k", 3)
    assert "--output-dir has no meaning with --gemm" in fails(*engine, "--gemm", "--output-dir", tmp_path)
    assert "--system goes with --chat" in fails(*engine, "--generate", "a", "--system", "b")
    assert "517 are to be run" in fails(*engine, "--benchmark", "--iterations", 5, "--text", short)
    assert "temperature" in fails(*engine, "--generate", "a", "--temperature", -1)
    assert "the prompt is empty" in fails(*engine, "--generate", "")
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot be made a folder" in fails(*engine, "--compare", "--output-dir", file)


def test_help_has_the_guides_lines(script) -> None:
    text = script(ENGINE, "--help").stdout
    assert "--model models/llama-7b-q4_k_m.nkat --benchmark --seq-len 512 --iterations 100" in text
    assert "--model models/llama-7b-q4_k_m.nkat --compare --seq-len 512" in text
    assert "--benchmark --theta-gamma 0.95" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("command", ["benchmark", "gemm"])
def test_on_cuda(script, tiny: Path, command: str) -> None:
    limits = QUICK[:6] if command == "benchmark" else ("--repetitions", 2)
    record = record_of(script, "--model", tiny, f"--{command}", *limits)
    assert record["device"] == "cuda:0"
    assert (record["dtype"], record["activations"]) == ("bfloat16", "float")
    if command == "benchmark":
        assert record["memory"]["gpu_peak"] > 0
        assert record["memory_after_first_token"]["gpu_peak"] > 0


def test_too_little_gpu_memory_is_one_line(fails, tiny: Path, monkeypatch) -> None:
    def full(model, capacity):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr("nkat.engine.session.make_decoder", full)
    assert "--no-cuda runs it on the processor" in fails(ENGINE, "--model", tiny, "--generate", "a")
