"""Divergences, base files and tasks by the command line, on tiny models."""

from __future__ import annotations

import csv
import io
import json
from hashlib import sha256
from pathlib import Path

import pytest

from nkat.measure.base_file import open_base_file
from nkat.measure.provenance import conditions_of
from nkat.measure.texts import default_text
from tests.support.task_files import write_hellaswag, write_multiple_choice, write_winogrande
from tests.support.tiny_models import write_tiny_model

ENGINE, CONVERTER = "nkat_inference_engine.py", "nkat_gguf_converter.py"
SIZE = ("--chunks", 3, "--context", 64, "--no-cuda", "--threads", 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("judging") / "tiny.gguf", "llama", add_bos=True)


@pytest.fixture
def tiny(script, tmp_path: Path, base: Path) -> Path:
    """The same with Θ."""
    path = tmp_path / "tiny.nkat"
    assert script(CONVERTER, "--input", base, "--output", path, "--theta-gamma", 0.8).returncode == 0
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(default_text().content[:3000], encoding="utf-8")
    return path


def run(script, *arguments: object) -> tuple[dict, str]:
    """The record, and what was said."""
    done = script(ENGINE, *arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_what_theta_moves_and_the_base_it_left(script, tiny: Path, base: Path, text: Path, tmp_path: Path) -> None:
    """Against the model without Θ, against its base file, and against the model itself as the reference: one answer."""
    kept = tmp_path / "base.kld"
    measure = ("--perplexity", "--text", text, *SIZE)
    record, said = run(script, "--model", tiny, *measure, "--save-kl-base", kept)
    divergence = record["divergence"]
    assert divergence["tokens"] == record["scored_tokens"] == 3 * 31
    assert divergence["kl"]["mean"] > 1e-4
    assert divergence["kl"]["quantiles"]["90"] <= divergence["kl"]["quantiles"]["99"] <= divergence["kl"]["max"]
    for words in ("from the model without Θ", f"{divergence['kl']['mean']:.6f} ± ", "same top token, %", "Δp, %"):
        assert words in said
    assert open_base_file(kept).tokens.shape == (3, 64)

    read, said = run(script, "--model", tiny, "--perplexity", "--kl-base", kept, "--no-cuda", "--threads", 1)
    assert "text" not in read
    assert read["kl_base"] == str(kept)
    for arm in ("baseline", "nkat"):
        assert read[f"{arm}_perplexity"] == record[f"{arm}_perplexity"]  # the same chunks
    assert read["baseline_beside_reference"]["divergence"]["kl"]["mean"] == pytest.approx(0.0, abs=1e-5)
    found = read["nkat_beside_reference"]["divergence"]
    assert found["kl"]["mean"] == pytest.approx(divergence["kl"]["mean"], rel=0.01)
    assert found["same_top_percent"] == pytest.approx(divergence["same_top_percent"], abs=2.0)
    assert f"from {kept}" in said
    few, _ = run(script, "--model", tiny, "--perplexity", "--kl-base", kept, "--chunks", 1, "--no-cuda")
    assert few["chunks"] == 1

    beside, _ = run(script, "--model", tiny, *measure, "--reference", base)
    form = ("--reference", base, "--output-format", "csv")
    reference, without, with_theta, *_ = csv.DictReader(
        io.StringIO(script(ENGINE, "--model", tiny, *measure, *form).stdout)
    )
    assert reference["change_percent"] == without["change_percent"] == reference["from_reference_percent"] == ""
    assert float(without["from_reference_percent"]) == pytest.approx(0.0, abs=1e-6)
    for key in ("change_percent", "from_reference_percent"):
        assert float(with_theta[key]) == pytest.approx(record["perplexity_change_percent"])
    assert beside["reference"]["perplexity"] == beside["baseline_perplexity"] == record["baseline_perplexity"]
    assert beside["baseline_beside_reference"]["divergence"]["kl"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert beside["nkat_beside_reference"]["divergence"]["kl"]["mean"] == pytest.approx(
        divergence["kl"]["mean"], abs=1e-5
    )
    assert beside["perplexity_change_percent"] == pytest.approx(record["perplexity_change_percent"])


def test_a_model_beside_another(script, base: Path, text: Path, tmp_path: Path) -> None:
    """Without any Θ; what is written is the reference's base file, Θ of the reference's own is left out."""
    other = write_tiny_model(tmp_path / "other.gguf", "llama", 3, add_bos=True)
    with_theta, kept, plain = tmp_path / "other.nkat", tmp_path / "a.kld", tmp_path / "b.kld"
    script(CONVERTER, "--input", other, "--output", with_theta)
    measure = ("--perplexity", "--text", text, *SIZE)
    record, said = run(script, "--model", base, *measure, "--reference", with_theta, "--save-kl-base", kept)
    assert "nkat_perplexity" not in record
    assert record["baseline_beside_reference"]["divergence"]["kl"]["mean"] > 0.1
    assert "from the reference" in said
    alone, _ = run(script, "--model", other, *measure, "--save-kl-base", plain)
    assert "divergence" not in alone
    assert alone["baseline_perplexity"] == record["reference"]["perplexity"]
    assert kept.read_bytes() == plain.read_bytes()


def test_a_comparison_says_how_far(script, tiny: Path, text: Path, tmp_path: Path) -> None:
    quick = ("--seq-len", 12, "--iterations", 5, "--repetitions", 2, "--chunks", 1, "--no-cuda", "--threads", 1)
    long = tmp_path / "long.txt"
    long.write_text(default_text().content[:9000], encoding="utf-8")
    record, said = run(script, "--model", tiny, "--compare", *quick, "--text", long, "--output-dir", tmp_path / "out")
    assert record["divergence"]["kl"]["mean"] > 0
    assert f"{record['divergence']['kl']['mean']:.6f} ± " in said
    assert "same top" in said


@pytest.mark.parametrize("kind", ["hellaswag", "winogrande", "multiple-choice"])
def test_tasks(script, tiny: Path, base: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tasks"
    writers = {"hellaswag": write_hellaswag, "winogrande": write_winogrande, "multiple-choice": write_multiple_choice}
    writers[kind](path)
    record, said = run(script, "--model", tiny, f"--{kind}", path, "--no-cuda")
    count = 20 if kind == "winogrande" else 24
    assert record["tasks"] == count
    assert record["task_sha256"] == conditions_of(record)["task_sha256"] == sha256(path.read_bytes()).hexdigest()
    for arm in ("baseline", "nkat"):
        assert record[arm]["score_percent"] == pytest.approx(100 * record[arm]["solved"] / count)
        assert f"{record[arm]['score_percent']:.4f} ± " in said
    assert record["nkat"]["solved"] - record["baseline"]["solved"] == record["gained"] - record["lost"]
    alone, _ = run(script, "--model", base, f"--{kind}", path, "--no-cuda", "--tasks", 7)
    assert alone["tasks"] == 7
    assert "nkat" not in alone
    whole, _ = run(script, "--model", base, f"--{kind}", path, "--no-cuda", "--batch", 1)
    assert whole["baseline"] == record["baseline"]


def test_mistakes(fails, script, tiny: Path, base: Path, text: Path, tmp_path: Path) -> None:
    kept = tmp_path / "base.kld"
    run(script, "--model", base, "--perplexity", "--text", text, *SIZE, "--save-kl-base", kept)
    ask = ("--model", tiny, "--perplexity")
    assert "exists already" in fails(ENGINE, *ask, "--save-kl-base", kept)
    assert "--json and --save-kl-base are the same file" in fails(
        ENGINE, *ask, "--save-kl-base", tmp_path / "x", "--json", tmp_path / "x"
    )
    assert "give one" in fails(ENGINE, *ask, "--kl-base", kept, "--reference", base)
    assert "give one" in fails(ENGINE, *ask, "--kl-base", kept, "--save-kl-base", tmp_path / "y")
    assert "--kl-base has its own text" in fails(ENGINE, *ask, "--kl-base", kept, "--text", text)
    assert "--kl-base has no meaning with --compare" in fails(ENGINE, "--model", tiny, "--compare", "--kl-base", kept)
    assert "--tasks has no meaning with --perplexity" in fails(ENGINE, *ask, "--tasks", 3)
    kept.write_bytes(kept.read_bytes()[:-1])
    assert "was writing it interrupted?" in fails(ENGINE, *ask, "--kl-base", kept)
    assert "no such file" in fails(ENGINE, *ask, "--kl-base", tmp_path / "none")
    other = write_tiny_model(tmp_path / "other.gguf", "gemma2")
    assert "cannot be compared" in fails(ENGINE, *ask, "--reference", other, "--text", text, *SIZE)
    assert "no such file" in fails(ENGINE, *ask, "--reference", tmp_path / "none")
    assert "a HellaSwag task has 6" in fails(ENGINE, "--model", tiny, "--hellaswag", text)
    assert "no such file" in fails(ENGINE, "--model", tiny, "--winogrande", tmp_path / "none")
    assert "--multiple-choice" in fails(ENGINE, "--model", tiny)
    assert not (tmp_path / "y").exists()
