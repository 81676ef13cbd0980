"""A model in several files wherever a model is taken, against the one file that is merged from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest

import nkat
from nkat.gguf.split import open_gguf
from nkat.gguf.writer import range_parts, write_gguf
from nkat.kobold.files import prepare_files
from nkat.kobold.menu import models_here
from nkat.measure.texts import default_text
from nkat.theta.modelfile import base_hash, open_model_file, theta_only_parts
from tests.conftest import Script
from tests.support.split_models import split_model
from tests.support.tiny_models import write_tiny_model

ENGINE, CONVERTER = "nkat_inference_engine.py", "nkat_gguf_converter.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The merged file, then its parts, which are in a folder of their own."""
    folder = tmp_path_factory.mktemp("split")
    whole = write_tiny_model(folder / "m.gguf", "llama", qtype=gguf.GGMLQuantizationType.Q8_0, blocks=1)
    parts = split_model(whole, 5)
    whole.unlink()
    (folder / "apart").mkdir()
    file = open_gguf(parts[0])
    write_gguf(folder / "merged.gguf", range_parts(file, 0, file.end), force=False)
    return [folder / "merged.gguf", *(Path(shutil.move(part, folder / "apart")) for part in parts)]


@pytest.fixture
def merged(made: list[Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(made[0], tmp_path))


@pytest.fixture
def parts(made: list[Path], tmp_path: Path) -> list[Path]:
    (tmp_path / "apart").mkdir()
    return [Path(shutil.copy(part, tmp_path / "apart")) for part in made[1:]]


def convert(script: Script, source: Path, *flags: object) -> dict:
    done = script(CONVERTER, "--input", source, *flags, "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def measure(script: Script, model: Path, *flags: object) -> dict:
    done = script(ENGINE, "--model", model, *flags, "--perplexity", "--chunks", 1, "--no-cuda", "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_one_file_is_what_is_made_of_the_merged_model(
    script: Script, merged: Path, parts: list[Path], tmp_path: Path
) -> None:
    out = [tmp_path / name for name in ("a.nkat", "b.nkat", "c.nkat", "d.gguf")]
    record = convert(script, parts[1], "--output", out[0])
    assert record["input"] == str(parts[0])
    assert record["base_bytes"] == merged.stat().st_size
    convert(script, merged, "--output", out[1])
    convert(script, merged, "--output", out[2], "--theta-rank", 3)
    assert out[0].read_bytes() == out[1].read_bytes() != out[2].read_bytes()
    convert(script, out[0], "--remove", "--output", out[3])
    assert out[3].read_bytes() == merged.read_bytes()


def test_theta_of_the_merged_file_fits_the_parts_and_the_other_way_round(
    script: Script, fails, merged: Path, parts: list[Path], tmp_path: Path
) -> None:
    one, two = tmp_path / "one.bin", tmp_path / "two.bin"
    convert(script, merged, "--output", one, "--theta-only")
    convert(script, parts[0], "--output", two, "--theta-only")
    assert one.read_bytes() == two.read_bytes()
    apart, whole = measure(script, parts[2], "--theta", one), measure(script, merged, "--theta", two)
    for key in ("nkat_perplexity", "baseline_perplexity", "byte_ratio", "model_sha256"):
        assert apart[key] == whole[key]
    raw = bytearray(parts[1].read_bytes())
    raw[-40] ^= 1
    parts[1].write_bytes(raw)
    assert "was made for another model" in fails(ENGINE, "--model", parts[0], "--theta", one, "--perplexity")


def test_appended_is_beside_the_parts(
    script: Script, fails, merged: Path, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = parts[0].with_name("m.nkat")
    before = [part.read_bytes() for part in parts]
    record = convert(script, parts[0], "--output", beside, "--layout", "appended")
    assert (record["layout"], record["output_bytes"]) == ("beside", beside.stat().st_size)
    assert record["bytes_added"] == beside.stat().st_size < 30_000
    assert [part.read_bytes() for part in parts] == before
    found = open_model_file(beside)
    assert (found.layout, found.files) == ("beside", [beside, *parts])
    assert base_hash(found) == found.require_theta().base_sha256
    one = tmp_path / "one.nkat"
    convert(script, merged, "--output", one)
    assert measure(script, beside)["nkat_perplexity"] == measure(script, one)["nkat_perplexity"]
    convert(script, beside, "--remove", "--output", tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == merged.read_bytes()
    assert "nkat.base.file" not in found.require_theta().notes
    monkeypatch.setenv("NKAT_CACHE", str(tmp_path / "cache"))
    files = prepare_files(beside, (), None)
    assert (files.model, files.how) == (parts[0], "the model beside it")
    assert "delete this file" in fails(CONVERTER, "--input", beside, "--remove", "--in-place")
    moved = Path(shutil.move(beside, tmp_path / "m.nkat"))
    assert "for the model m-00001-of-00003.gguf, which is not beside it" in fails(
        ENGINE, "--model", moved, "--perplexity"
    )


def test_what_a_model_in_parts_does_not_do(script: Script, fails, parts: list[Path], tmp_path: Path) -> None:
    assert "Θ goes beside them" in fails(CONVERTER, "--input", parts[0], "--in-place")
    elsewhere = fails(CONVERTER, "--input", parts[0], "--output", tmp_path / "m.nkat", "--layout", "appended")
    assert "puts Θ beside a model in several files" in elsewhere
    own = fails(CONVERTER, "--input", parts[0], "--output", parts[2], "--force")
    assert "the output is the same file as the input" in own
    parts[1].unlink()
    for program, *flags in (
        (ENGINE, "--model", parts[2], "--perplexity"),
        (CONVERTER, "--input", parts[2], "--in-place"),
    ):
        assert f"{parts[1]}: part 2 of 3 of this model is missing" in fails(program, *flags)


@pytest.mark.parametrize("name", ["../m.gguf", "", "a/b.gguf", ".hidden", "a\\b"])
def test_a_name_that_leads_elsewhere_is_refused(parts: list[Path], name: str) -> None:
    theta = nkat.make_theta(nkat.open_model(parts[0]), rank=1)
    beside = parts[0].with_name("m.nkat")
    write_gguf(beside, theta_only_parts(theta, parts[0].name), force=True)
    assert open_model_file(beside).layout == "beside"  # control
    write_gguf(beside, theta_only_parts(theta, name), force=True)
    with pytest.raises(nkat.NKATError, match="not the name of a file beside it"):
        open_model_file(beside)


def test_merged_weights_and_repaired_scales_come_out_the_same(
    script: Script, merged: Path, parts: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("libgguf")
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    for source, target in ((merged, one), (parts[0], two)):
        convert(script, source, "--merge", target, "--theta-gamma", 0.5, "--chunks", 1)
    assert one.read_bytes() == two.read_bytes() != merged.read_bytes()


def test_the_selector_loads_the_first_part_and_lists_no_other(
    script: Script, merged: Path, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NKAT_CACHE", str(tmp_path / "cache"))
    files = prepare_files(parts[1], (), None)
    assert files.model == parts[0]
    assert "first of 3" in files.how
    one = parts[0].with_name("one.nkat")
    convert(script, merged, "--output", one)
    found = prepare_files(one, (), None)
    assert found.model == parts[0]  # the base of the merged file's Θ, in parts
    assert "by its hash" in found.how
    monkeypatch.chdir(parts[0].parent)
    assert [path.name for path in models_here()] == ["one.nkat", parts[0].name]


def test_the_optimiser_and_speeds_take_any_part(
    script: Script, merged: Path, parts: list[Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(default_text().content * 3, encoding="utf-8")
    common = ["--mode", "custom", "--trials", 2, "--chunks", 2, "--text", text, "--threads", 1, "--json", "-"]
    found = []
    for model in (merged, parts[1]):
        done = script("nkat_auto_optimizer.py", "--model", model, *common, "--output-dir", tmp_path / model.stem)
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout.splitlines()[-1])
        found.append([record[key] for key in ("model_sha256", "held_out", "best_trial")])
    assert found[0] == found[1]
    quick = ["--benchmark", "--seq-len", 12, "--iterations", 4, "--repetitions", 1, "--no-cuda", "--json", "-"]
    done = script(ENGINE, "--model", parts[1], *quick)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["model_sha256"] == found[0][0]


def test_the_library_takes_any_part(merged: Path, parts: list[Path]) -> None:
    whole, apart = nkat.open_model(merged), nkat.open_model(parts[2])
    assert (apart.path, apart.sha256) == (parts[0], whole.sha256)
    texts = [nkat.generate(model, "the hen", max_tokens=8, temperature=0) for model in (whole, apart)]
    assert texts[0] == texts[1]
