"""The writer and atomic output: gguf-py reads what is written, the base's bytes stay, and failures leave nothing."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from nkat.errors import NKATError
from nkat.gguf.file import GGUFFile
from nkat.gguf.writer import BaseView, FileRange, NewTensor, gguf_parts, part_size, sha256_of_parts, write_gguf
from nkat.host import files
from nkat.host.files import atomic_output, check_output
from tests.gguf.test_file import ONE, build, entry
from tests.support.tiny_models import write_tiny_model

METADATA = {"n.int": 7, "n.big": 1 << 40, "n.float": 0.97, "n.half": np.float32(0.5), "n.flag": True, "n.text": "Θ"}
TENSORS = [
    NewTensor("extra.a", GGMLQuantizationType.I8, np.arange(-6, 6, dtype=np.int8).reshape(4, 3)),
    NewTensor("extra.b", GGMLQuantizationType.F32, np.ones((2, 3), dtype=np.float32)),
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base.gguf", "llama")


def test_gguf_py_reads_the_base_unchanged_and_the_additions(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out.gguf"
    write_gguf(out, gguf_parts(METADATA, TENSORS, BaseView.whole(GGUFFile.open(base))), force=False)
    old, new = gguf.GGUFReader(base), gguf.GGUFReader(out)
    old_keys = [k for k in old.fields if not k.startswith("GGUF.")]
    new_keys = [k for k in new.fields if not k.startswith("GGUF.")]
    assert new_keys == old_keys + list(METADATA)
    for key in old_keys:
        assert [p.tobytes() for p in new.fields[key].parts] == [p.tobytes() for p in old.fields[key].parts]
    for key, value in METADATA.items():
        assert new.fields[key].contents() == value
    names = [t.name for t in old.tensors]
    assert [t.name for t in new.tensors] == names + [t.name for t in TENSORS]
    for a, b in zip(old.tensors, new.tensors, strict=False):
        assert (a.name, a.tensor_type, a.shape.tolist()) == (b.name, b.tensor_type, b.shape.tolist())
        assert a.data.tobytes() == b.data.tobytes()
    assert np.array_equal(new.tensors[-2].data, TENSORS[0].data)
    assert all(t.data_offset % new.alignment == 0 for t in new.tensors)


def test_a_view_gives_the_base_back_from_the_extended_file(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out.gguf"
    view = BaseView.whole(GGUFFile.open(base))
    write_gguf(out, gguf_parts(METADATA, TENSORS, view), force=False)
    file = GGUFFile.open(out)
    first_new = file.metadata.spans["n.int"][0]
    data_bytes = sum(part_size(part) for part in view.data())
    inner = BaseView(file, 3, view.metadata_count, first_new, view.tensor_count, file.data_start + data_bytes)
    assert sha256_of_parts(inner.parts()) == hashlib.sha256(base.read_bytes()).hexdigest()
    shifted = BaseView(file, 3, view.metadata_count, first_new, view.tensor_count, file.data_start + data_bytes - 1)
    assert sha256_of_parts(shifted.parts()) != hashlib.sha256(base.read_bytes()).hexdigest()


@pytest.mark.parametrize("alignment", [8, 24, 4096])
def test_the_base_alignment_is_kept(tmp_path: Path, alignment: int) -> None:
    key = entry("general.alignment", 4, alignment.to_bytes(4, "little"))
    base = tmp_path / "base.gguf"
    base.write_bytes(build([key], ONE, bytes(32) + b"trailing", alignment=alignment))
    out = tmp_path / "out.gguf"
    write_gguf(out, gguf_parts({}, TENSORS, BaseView.whole(GGUFFile.open(base))), force=False)
    file = GGUFFile.open(out)
    assert file.alignment == alignment
    assert file.raw("extra.a").view(np.int8).tolist() == TENSORS[0].data.reshape(-1).tolist()
    trailing = file.read(file.tensors["t"].offset + 32, file.tensors["t"].offset + 40)
    assert trailing.tobytes() == b"trailing"


def test_a_header_with_unusual_padding_is_not_exact(tmp_path: Path) -> None:
    good = build([], ONE, bytes(32))
    path = tmp_path / "x.gguf"
    for raw, exact in ((good, True), (good[:60] + b"\1" + good[61:], False)):
        path.write_bytes(raw)
        assert BaseView.whole(GGUFFile.open(path)).is_exact() is exact


def test_output_is_atomic_and_never_replaces_without_force(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    with atomic_output(target, 3) as file:
        file.write(b"one")
        assert not target.exists()
    assert target.read_bytes() == b"one"
    with pytest.raises(NKATError, match="exists already; give --force"), atomic_output(target, 3):
        pass
    with pytest.raises(RuntimeError), atomic_output(target, 3, force=True) as file:
        file.write(b"two")
        raise RuntimeError("killed halfway")
    assert target.read_bytes() == b"one"
    with atomic_output(target, 100, force=True) as file:
        file.write(b"three")
    assert target.read_bytes() == b"three"  # what was reserved beyond it is gone
    assert list(tmp_path.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o666 & ~files._umask()


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    with pytest.raises(NKATError, match="exists already"), atomic_output(target, 1) as file:
        file.write(b"x")
        target.write_bytes(b"somebody else's")
    assert target.read_bytes() == b"somebody else's"
    assert list(tmp_path.iterdir()) == [target]


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    source = tmp_path / "in.gguf"
    source.write_bytes(b"x")
    link = tmp_path / "link.gguf"
    link.symlink_to(source)
    for path in (source, link):
        with pytest.raises(NKATError, match="same file as the input"):
            check_output(path, True, [source])
    with pytest.raises(NKATError, match="does not exist"):
        check_output(tmp_path / "no" / "out", False)
    with pytest.raises(NKATError, match="folder"):
        check_output(tmp_path, True)


def test_a_full_disk_is_known_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.bin"
    target.write_bytes(b"previous")
    with pytest.raises(NKATError, match="cannot be written"), atomic_output(target, 1 << 60, force=True):
        pytest.fail("the body must not run")
    assert target.read_bytes() == b"previous"

    monkeypatch.delattr(os, "posix_fallocate", raising=False)  # as on Windows
    with pytest.raises(NKATError, match="the disk has"), atomic_output(target, 1 << 60, force=True):
        pytest.fail("the body must not run")
    with pytest.raises(NKATError, match="No space left"), atomic_output(target, 1, force=True):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == [target]


def test_a_source_that_shrinks_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "in.bin"
    source.write_bytes(b"12345")
    with pytest.raises(NKATError, match="became shorter"):
        write_gguf(tmp_path / "out", [FileRange(source, 0, 9)], force=False)
    assert not (tmp_path / "out").exists()
