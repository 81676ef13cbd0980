"""The base model and the adapter that KoboldCpp runs: found, extracted, cached, and never the wrong ones."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from nkat.errors import NKATError
from nkat.kobold import files as kobold_files
from nkat.kobold.files import kobold_cache, model_key, prepare_files
from nkat.kobold.menu import models_here
from nkat.theta.combine import WeightedFile
from nkat.theta.lora import lora_parts
from nkat.theta.modelfile import open_model_file
from tests.support.tiny_models import write_tiny_model

CONVERTER = "nkat_gguf_converter.py"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in `models`, an empty cache, and a working folder elsewhere."""
    monkeypatch.setenv("NKAT_CACHE", str(tmp_path / "cache"))
    for name in ("models", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return write_tiny_model(tmp_path / "models" / "base.gguf", "llama", qtype=gguf.GGMLQuantizationType.Q8_0)


def convert(script, base: Path, output: Path, *more: object) -> Path:
    done = script(CONVERTER, "--input", base, "--output", output, *more)
    assert done.returncode == 0, done.stderr
    return output


def written() -> set[str]:
    return {path.name for path in kobold_cache().glob("*.gguf")}


def test_a_base_beside_it_is_found_by_its_hash(script, base: Path, tmp_path: Path) -> None:
    nkat = convert(script, base, base.parent / "m.nkat")
    other = write_tiny_model(base.parent / "a-other.gguf", "llama", seed=1, qtype=gguf.GGMLQuantizationType.Q8_0)
    assert other.stat().st_size == base.stat().st_size  # the size alone does not tell them apart
    (base.parent / "a-broken.gguf").write_bytes(b"GGUF")
    files = prepare_files(nkat, (), None)
    assert files.model == base
    assert "by its hash" in files.how
    assert (files.rank, files.gamma) == (4, 0.97)
    assert len(files.adapters) == 1
    assert written() == {files.adapters[0].path.name}
    base.unlink()
    assert prepare_files(nkat, (), None).how == "extracted"


def test_a_plain_base_goes_before_one_with_theta_behind_it(script, base: Path) -> None:
    nkat = convert(script, base, base.parent / "m.nkat")
    appended = convert(script, base, base.parent / "a.gguf", "--layout", "appended")  # the first by its name
    assert prepare_files(nkat, (), None).model == base
    farther = Path.cwd() / "models" / "base.gguf"
    farther.parent.mkdir()
    base.rename(farther)
    files = prepare_files(nkat, (), None)
    assert (files.model, files.how) == (farther, f"found in {farther.parent} by its hash")
    farther.unlink()
    assert prepare_files(nkat, (), None).model == appended  # the control


@pytest.mark.skipif(os.name == "nt", reason="POSIX's kinds of file")
def test_odd_neighbours_stop_nothing(script, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, a link to nowhere and a pipe by the names of models: in the search for a base, and in the menu."""
    nkat = convert(script, base, base.parent / "m.nkat")
    for suffix in ("gguf", "nkat"):
        (base.parent / f"a.{suffix}").mkdir()
        (base.parent / f"aa.{suffix}").symlink_to("nowhere")
        os.mkfifo(base.parent / f"aaa.{suffix}")
    assert prepare_files(nkat, (), None).model == base
    monkeypatch.chdir(base.parent)
    assert models_here() == [Path("m.nkat"), Path("base.gguf")]
    with pytest.raises(NKATError, match="this is a pipe"):
        open_model_file(base.parent / "aaa.gguf")


@pytest.mark.parametrize("value", [5, None, [], {}, "x", "0" * 63, "F" * 64, ["a" * 64]])
@pytest.mark.parametrize("shape", ["known", "list", "text"])
def test_remembered_hashes_of_another_shape_are_made_anew(
    script, base: Path, tmp_path: Path, value: object, shape: str
) -> None:
    nkat = convert(script, base, base.parent / "m.nkat")
    assert prepare_files(nkat, (), None).model == base
    memory = tmp_path / "cache" / "kobold" / "hashes.json"
    good = json.loads(memory.read_text())
    bad = {"known": dict.fromkeys(good, value), "list": [value], "text": str(value)}[shape]
    memory.write_text(json.dumps(bad))
    assert prepare_files(nkat, (), None).model == base
    assert good.items() <= json.loads(memory.read_text()).items()


def test_the_optimisers_record_says_where(script, base: Path, tmp_path: Path) -> None:
    nkat = convert(script, base, tmp_path / "best.nkat")
    record = tmp_path / "best.json"
    sha256 = open_model_file(nkat).theta.base_sha256
    record.write_text(json.dumps({"model": str(base), "model_sha256": sha256}))
    assert prepare_files(nkat, (), None).model == base
    nowhere = [json.dumps({"model": name, "model_sha256": sha256}) for name in ("x" * 5000 + "/y", "a\0/y", 7)]
    for text in (json.dumps({"model": str(base), "model_sha256": "other"}), "[1]", "no json", "[" * 10**5, *nowhere):
        record.write_text(text)
        assert prepare_files(nkat, (), None).how == "extracted"


def test_extraction_gives_the_base_back_and_happens_once(script, base: Path, tmp_path: Path) -> None:
    nkat = convert(script, base, tmp_path / "m.nkat")
    files = prepare_files(nkat, (), None)
    assert files.how == "extracted"
    assert files.model.parent == kobold_cache()
    assert files.model.read_bytes() == base.read_bytes()
    stamp = files.model.stat().st_mtime_ns
    assert prepare_files(nkat, (), None) == files
    assert files.model.stat().st_mtime_ns == stamp
    files.model.write_bytes(b"cut short")
    assert prepare_files(nkat, (), None).model.read_bytes() == base.read_bytes()


def test_appended_is_its_own_base(script, base: Path, tmp_path: Path) -> None:
    nkat = convert(script, base, tmp_path / "m.nkat", "--layout", "appended")
    files = prepare_files(nkat, (), None)
    assert files.model == nkat
    assert len(files.adapters) == 1
    # and a base for others: Θ behind a model does not change the model
    base.unlink()
    theta = convert(script, nkat, tmp_path / "theta.bin", "--theta-only")
    assert prepare_files(theta, (), None).model == nkat


def test_base_and_theta_file(script, base: Path, tmp_path: Path) -> None:
    theta = convert(script, base, tmp_path / "theta_rank4.bin", "--theta-only")
    files = prepare_files(base, [WeightedFile(theta)], None)
    assert (files.model, files.how) == (base, "the file itself")
    whole = prepare_files(convert(script, base, tmp_path / "m.nkat"), (), base)
    assert files.adapters == whole.adapters  # the same Θ, the same adapter
    with pytest.raises(NKATError, match="name it with --base"):
        prepare_files(theta, (), None)
    assert prepare_files(theta, (), base).model == base
    other = write_tiny_model(tmp_path / "other.gguf", "llama", seed=1)
    with pytest.raises(NKATError, match="was made for another model"):
        prepare_files(other, [WeightedFile(theta)], None)


def test_plain_model_has_no_adapter(base: Path) -> None:
    files = prepare_files(base, (), None)
    assert (files.model, files.adapters, files.lora_bytes) == (base, (), {})
    assert written() == set()


def test_the_wrong_base_is_refused(script, base: Path, tmp_path: Path) -> None:
    nkat = convert(script, base, tmp_path / "m.nkat")
    other = write_tiny_model(tmp_path / "other.gguf", "llama", seed=1, qtype=gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(NKATError, match="is not the model this Θ was made for"):
        prepare_files(nkat, (), other)
    with pytest.raises(NKATError, match="cannot be loaded"):
        prepare_files(nkat, (), nkat)


def test_adapter_is_written_once_and_depends_on_theta(script, base: Path, tmp_path: Path) -> None:
    first = prepare_files(convert(script, base, tmp_path / "a.nkat"), (), base)
    stamp = first.adapters[0].path.stat().st_mtime_ns
    assert prepare_files(convert(script, base, tmp_path / "again.nkat"), (), base).adapters == first.adapters
    assert first.adapters[0].path.stat().st_mtime_ns == stamp
    for number, change in enumerate((("--theta-gamma", 0.9), ("--theta-rank", 2), ("--target-size", 32))):
        other = prepare_files(convert(script, base, tmp_path / f"b{number}.nkat", *change), (), base)
        assert other.adapters != first.adapters
    assert len(written()) == 4
    model = open_model_file(tmp_path / "a.nkat")
    expected = b"".join(
        np.asarray(p).tobytes() if not isinstance(p, bytes) else p for p in lora_parts(model.theta, model.base)
    )
    assert first.adapters[0].path.read_bytes() == expected
    reader = gguf.GGUFReader(first.adapters[0].path)
    assert sum(first.lora_bytes.values()) == sum(int(t.n_bytes) for t in reader.tensors)
    assert set(first.lora_bytes) == set(model.theta.layers)


def test_results_belong_to_model_and_theta(script, base: Path, tmp_path: Path) -> None:
    plain = prepare_files(base, (), None)
    weak = prepare_files(convert(script, base, tmp_path / "a.nkat"), (), base)
    strong = prepare_files(convert(script, base, tmp_path / "b.nkat", "--theta-gamma", 0.9), (), base)
    moved = shutil.copy(tmp_path / "a.nkat", tmp_path / "c.nkat")
    keys = [model_key(files) for files in (plain, weak, strong, prepare_files(Path(moved), (), base))]
    assert len(set(keys)) == 3
    assert keys[1] == keys[3]


def test_a_forged_file_in_the_cache_is_written_anew(script, base: Path) -> None:
    nkat = convert(script, base, base.parent / "m.nkat")
    base.unlink()
    files = prepare_files(nkat, (), None)
    assert len(files.adapters) == 1
    for path in (files.adapters[0].path, files.model):
        good = path.read_bytes()
        assert path.parent == kobold_cache()
        for content in (bytes(len(good)), good[:-20] + bytes([good[-20] ^ 1]) + good[-19:], b""):
            path.write_bytes(content)
            assert prepare_files(nkat, (), None) == files
            assert path.read_bytes() == good
        before = path.stat().st_mtime_ns  # control: what is right is left alone
        assert prepare_files(nkat, (), None) == files
        assert path.stat().st_mtime_ns == before


@pytest.fixture
def two(script, base: Path, tmp_path: Path) -> list[WeightedFile]:
    """Two Θ for one model."""
    first = convert(script, base, tmp_path / "a.bin", "--theta-only")
    other = convert(script, base, tmp_path / "b.bin", "--theta-only", "--theta-rank", 2, "--theta-gamma", 0.5)
    return [WeightedFile(first), WeightedFile(other, 0.5)]


def test_several_thetas_beside_each_other_or_as_one(base: Path, two: list[WeightedFile]) -> None:
    apart = prepare_files(base, two, None, separate=True)
    assert [one.weight for one in apart.adapters] == [1.0, 0.5]
    assert [one.about for one in apart.adapters] == ["rank 4, gamma 0.97", "rank 2, gamma 0.5, weight 0.5"]
    assert apart.adapters[0] == prepare_files(base, two[:1], None).adapters[0]  # weights are the program's to apply
    merged = prepare_files(base, two, None)
    (one,) = merged.adapters
    assert (one.weight, one.about) == (1.0, "rank 4, gamma 0.97; rank 2, gamma 0.5, weight 0.5")
    assert (merged.rank, merged.gamma) == (None, None)
    assert {t.shape[-1] for t in gguf.GGUFReader(one.path).tensors if t.name.endswith(".lora_a")} == {12}
    assert sum(merged.lora_bytes.values()) == sum(apart.lora_bytes.values())
    assert prepare_files(base, two, None) == merged
    heavier = prepare_files(base, [two[0], replace(two[1], weight=2.0)], None)
    assert heavier.adapters[0].path != one.path
    assert len({model_key(files) for files in (apart, merged, heavier)}) == 3
    assert model_key(apart) != model_key(
        prepare_files(base, [two[0], replace(two[1], weight=2.0)], None, separate=True)
    )


def test_a_weight_goes_into_the_file_where_a_name_has_a_colon(
    base: Path, two: list[WeightedFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.name == "nt":
        pytest.skip("every name has one there")
    monkeypatch.setenv("NKAT_CACHE", str(tmp_path / "c:ache"))
    files = prepare_files(base, two, None, separate=True)
    assert [one.weight for one in files.adapters] == [1.0, 1.0]
    (alone,) = prepare_files(base, two[1:], None, separate=True).adapters
    assert (alone.path, alone.weight) == (files.adapters[1].path, 1.0)


def test_one_of_several_for_another_model_is_refused(
    base: Path, script, two: list[WeightedFile], tmp_path: Path
) -> None:
    other = write_tiny_model(tmp_path / "other.gguf", "llama", seed=1, qtype=gguf.GGMLQuantizationType.Q8_0)
    stray = WeightedFile(convert(script, other, tmp_path / "c.bin", "--theta-only"))
    with pytest.raises(NKATError, match="was made for another model"):
        prepare_files(base, [*two, stray], None)


@pytest.mark.skipif(os.name == "nt", reason="POSIX's kinds of file")
def test_what_cannot_be_read_is_skipped_with_a_word(
    script, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Whatever is wrong with a neighbour: its kind, its contents, the right to it, or the disk below it."""
    nkat = convert(script, base, base.parent / "m.nkat")
    for name in ("damaged", "forbidden", "failing", "hidden"):
        (base.parent / f"a-{name}.gguf").write_bytes(base.read_bytes())
    (base.parent / "a-damaged.gguf").write_bytes(b"GGUF and then something else")
    (base.parent / "a-lost.gguf").symlink_to("nowhere")
    (base.parent / "a-folder.gguf").mkdir()
    os.mkfifo(base.parent / "a-pipe.gguf")
    stat, opened, hashed = Path.stat, kobold_files.open_model_file, kobold_files._sha256

    def refuse(path: Path, *more: object, **others: object):
        if path.name == "a-hidden.gguf":  # in a folder that may be listed and not entered
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *more, **others)

    def refuse_to_open(path: Path):
        if path.name == "a-forbidden.gguf":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path)

    def fail_to_read(model):
        if model.path.name == "a-failing.gguf":
            raise OSError(errno.EIO, "Input/output error", str(model.path))
        return hashed(model)

    monkeypatch.setattr(Path, "stat", refuse)
    monkeypatch.setattr(kobold_files, "open_model_file", refuse_to_open)
    monkeypatch.setattr(kobold_files, "_sha256", fail_to_read)
    assert prepare_files(nkat, (), None).model == base
    said = capsys.readouterr().err
    for name, why in {
        "damaged": "version",
        "lost": "No such file",
        "pipe": "it is no file",
        "hidden": "Permission denied",
        "forbidden": "Permission denied",
        "failing": "Input/output error",
    }.items():
        (line,) = [line for line in said.splitlines() if f"a-{name}.gguf was skipped: " in line]
        assert why in line
    assert "a-folder" not in said
