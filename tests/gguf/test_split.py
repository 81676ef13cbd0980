"""A model in several files as one: against llama-gguf-split's own merged file, and what is said of parts that miss."""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from nkat.errors import NKATError
from nkat.gguf import split
from nkat.gguf.file import GGUFError, GGUFFile
from nkat.gguf.split import is_later_part, open_gguf, without_number
from nkat.gguf.writer import range_parts, sha256_of_parts, write_gguf
from tests.support.golden import read_golden
from tests.support.split_models import I32, U16, entry, split_model
from tests.support.tiny_models import write_tiny_model

GOLDEN = read_golden("split")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("split") / "tiny.gguf"
    return write_tiny_model(path, "llama", qtype=gguf.GGMLQuantizationType.Q8_0, blocks=1)


@pytest.fixture
def parts(model: Path, tmp_path: Path) -> list[Path]:
    """Three of four tensors each, that a test may damage."""
    shutil.copy(model, tmp_path / "m.gguf")
    return split_model(tmp_path / "m.gguf", 4)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def merged(file: GGUFFile, target: Path) -> bytes:
    write_gguf(target, range_parts(file, 0, file.end), force=True)
    return target.read_bytes()


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["flags"])
def test_the_whole_is_what_llama_gguf_split_merges(case: dict, model: Path, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path / "m.gguf")
    assert sha256(model) == case["model"]
    parts = split_model(tmp_path / "m.gguf", case["tensors"], first_is_empty=case["first_is_empty"])
    assert [sha256(part) for part in parts] == case["parts"]  # what is cut here is what llama-gguf-split cuts
    for part in (parts[0], parts[-1]):  # any stands for all
        file = open_gguf(part)
        assert (file.path, file.files) == (parts[0], parts)
        assert sha256_of_parts(range_parts(file, 0, file.end)) == case["merged"]
    assert case["merged"] != case["model"]  # control: it has keys of its own


def test_it_reads_as_the_one_file(model: Path, parts: list[Path], tmp_path: Path) -> None:
    whole, file = GGUFFile.open(model), open_gguf(parts[1])
    raw = merged(file, tmp_path / "merged.gguf")
    assert list(file.tensors) == list(whole.tensors)
    for name, info in file.tensors.items():
        assert np.array_equal(file.raw(name), whole.raw(name))
        path, offset = file.place(name)
        assert path.read_bytes()[offset : offset + info.nbytes] == raw[info.offset : info.offset + info.nbytes]
        file.release(name)
    choose = random.Random(0)
    for _ in range(200):
        start = choose.randrange(len(raw))
        end = choose.randrange(start, len(raw) + 1)
        assert file.read(start, end).tobytes() == raw[start:end]
    assert {key: file.metadata[key] for key in ("general.architecture", "llama.block_count")} == {
        "general.architecture": "llama",
        "llama.block_count": 1,
    }
    assert file.metadata["split.count"] == 0
    reader = gguf.GGUFReader(tmp_path / "merged.gguf")
    assert [tensor.name for tensor in reader.tensors] == list(whole.tensors)
    assert open_gguf(tmp_path / "merged.gguf").files == [tmp_path / "merged.gguf"]
    with pytest.raises(GGUFError, match="no tensor named"):
        file.raw("nothing")


def test_one_byte_of_any_part_changes_the_hash(parts: list[Path]) -> None:
    def digest() -> str:
        file = open_gguf(parts[0])
        return sha256_of_parts(range_parts(file, 0, file.end))

    seen = {digest()}
    for part in parts:
        raw = bytearray(part.read_bytes())
        raw[-40] ^= 1
        part.write_bytes(raw)
        seen.add(digest())
    assert len(seen) == 4


def test_a_whole_file_with_a_parts_name_is_whole(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00002.gguf"
    shutil.copy(model, path)
    assert open_gguf(path).files == [path]
    assert [is_later_part(Path(f"m-0000{i}-of-00002.gguf")) for i in (1, 2)] == [False, True]
    assert [without_number(Path(name)).name for name in ("m-00002-of-00003.gguf", "m.gguf")] == ["m.gguf", "m.gguf"]


def replaced(path: Path, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    assert raw.count(old) == 1
    path.write_bytes(raw.replace(old, new))


def test_what_is_said_of_parts_that_do_not_fit(parts: list[Path], tmp_path: Path) -> None:
    def says(path: Path, *words: str) -> None:
        with pytest.raises(NKATError) as caught:
            open_gguf(path)
        said = str(caught.value)
        assert "\n" not in said
        assert all(word in said for word in words), said

    one, two, three = parts
    kept = {part: part.read_bytes() for part in parts}

    def restore() -> None:
        for part, raw in kept.items():
            part.write_bytes(raw)

    two.unlink()
    says(one, str(two), "part 2 of 3 of this model is missing")
    says(three, str(two), "part 2 of 3")
    says(two, str(two), "no such file")
    restore()
    shutil.copy(one, tmp_path / "other.gguf")
    says(tmp_path / "other.gguf", "a part of a model in 3 parts", "-00001-of-00003.gguf")
    shutil.copy(three, two)
    says(one, str(two), "is not part 2 of 3: split.no is 2, not 1")
    restore()
    replaced(two, entry("split.count", U16, 3), entry("split.count", U16, 4))
    says(one, str(two), "does not belong to m-00001-of-00003.gguf: split.count is 4, not 3")
    restore()
    replaced(one, entry("split.tensors.count", I32, 12), entry("split.tensors.count", I32, 13))
    says(three, str(one), "split.tensors.count is 13, but the 3 parts hold 12 tensors")
    restore()
    two.write_bytes(kept[two][:-100])
    says(one, str(two), "truncated")
    restore()
    theirs = GGUFFile.open(two, part=True).tensors, GGUFFile.open(three, part=True).tensors
    name, other = next((a, b) for a in theirs[0] for b in theirs[1] if len(a) == len(b))
    replaced(three, other.encode(), name.encode())
    says(one, str(three), name, "is in m-00002-of-00003.gguf as well")
    restore()
    with pytest.raises(GGUFError, match="one part of a split model"):
        GGUFFile.open(one)
    assert len(open_gguf(one).tensors) == 12  # control


def test_there_is_a_bound_to_the_parts(parts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "MAX_PARTS", 2)
    with pytest.raises(GGUFError, match="more than the allowed 2"):
        open_gguf(parts[0])
