"""Importance matrices in both forms: against files of llama-imatrix's, and against damage."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from nkat.errors import NKATError
from nkat.gguf.imatrix import Imatrix, Importance, imatrix_parts, read_imatrix
from nkat.gguf.writer import gguf_parts, write_gguf
from tests.support.golden import GOLDEN_FOLDER

EXCHANGE = GOLDEN_FOLDER / "exchange"
BOTH = pytest.mark.parametrize("form", ["gguf", "dat"])


def made_up(experts: int = 1) -> Imatrix:
    random = np.random.RandomState(0)
    counts = np.array([128] * experts)
    counts[1:2] = 0  # a second expert that no row went to
    squares = (random.random_sample((experts, 6)) * (counts > 0)[:, None]).astype(np.float32)
    entry = Importance(squares, counts, squares - np.float32(0.5) * (squares > 0))
    return Imatrix({"blk.0.ffn_down.weight": entry, "blk.0.attn_q.weight": entry}, ("a text",), 2, 64)


def written(path: Path, matrix: Imatrix) -> Path:
    write_gguf(path, imatrix_parts(matrix, old=path.suffix == ".dat"), force=True)
    return path


@BOTH
@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_files_of_llama_imatrix_are_read_as_gguf_py_reads_them(arch: str, form: str) -> None:
    found = read_imatrix(EXCHANGE / f"{arch}.imatrix.{form}")
    truth = {t.name: t.data for t in gguf.GGUFReader(EXCHANGE / f"{arch}.imatrix.gguf").tensors}
    names = [name.removesuffix(".in_sum2") for name in truth if name.endswith(".in_sum2")]
    assert sorted(found.entries) == sorted(names)
    assert (found.chunks, found.datasets) == (4, ("text.txt",))
    assert found.chunk_size == (64 if form == "gguf" else 0)
    for name in names:
        counts = truth[f"{name}.counts"].reshape(-1, 1)
        squares = truth[f"{name}.in_sum2"].reshape(len(counts), -1)  # ggml drops lengths of 1
        means = np.where(counts > 0, squares / np.maximum(counts, 1), 1.0).reshape(-1)
        np.testing.assert_allclose(found.entries[name].means.reshape(-1), means, rtol=1e-6)
        if form == "gguf":
            np.testing.assert_array_equal(found.entries[name].squares, squares)


@BOTH
@pytest.mark.parametrize("experts", [1, 3])
def test_what_is_written_is_read_again(tmp_path: Path, form: str, experts: int) -> None:
    matrix = made_up(experts)
    again = read_imatrix(written(tmp_path / f"x.{form}", matrix))
    assert (again.chunks, again.datasets) == (2, ("a text",))
    for name, entry in matrix.entries.items():
        found = again.entries[name]
        np.testing.assert_allclose(found.means.reshape(-1), entry.means.reshape(-1), rtol=1e-6)
        assert (found.means != entry.means[:, ::-1].reshape(found.means.shape)).any()  # control: the order matters
        if form == "gguf":
            np.testing.assert_array_equal(found.counts, entry.counts)
            np.testing.assert_array_equal(found.sums, entry.sums)


def test_the_same_matrix_gives_the_same_bytes(tmp_path: Path) -> None:
    backwards = Imatrix(dict(reversed(made_up().entries.items())), ("a text",), 2, 64)
    for form in ("gguf", "dat"):
        one, other = written(tmp_path / f"a.{form}", made_up()), written(tmp_path / f"b.{form}", backwards)
        assert one.read_bytes() == other.read_bytes()


@BOTH
def test_a_file_that_is_cut_short_is_one_line(tmp_path: Path, form: str) -> None:
    whole = written(tmp_path / f"x.{form}", made_up(2)).read_bytes()
    cut = tmp_path / "cut"
    ended = 0  # where the old form may end: its last two fields may be missing
    for length in range(1, len(whole)):
        cut.write_bytes(whole[:length])
        try:
            read_imatrix(cut)
        except NKATError:
            continue
        ended += 1
    assert ended <= (1 if form == "gguf" else 2)
    assert read_imatrix(tmp_path / f"x.{form}")  # control


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (struct.pack("<i", 1 << 30), "neither a GGUF nor"),
        (struct.pack("<ii", 1, -5), "name does not fit"),
        (struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, 1 << 29), "does not fit"),
        (struct.pack("<ii", 1, 1) + b"x" + struct.pack("<iif", 1, 1, float("nan")), "NaN"),
        (struct.pack("<ii", 1, 1) + b"x" + struct.pack("<iif", -1, 1, 1.0), "damaged"),
    ],
)
def test_hostile_old_files(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "x.dat").write_bytes(raw)
    with pytest.raises(NKATError, match=message):
        read_imatrix(tmp_path / "x.dat")


def test_other_ggufs_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", gguf_parts({"general.type": "model"}, []), force=False)
    with pytest.raises(NKATError, match=r"general.type 'model'"):
        read_imatrix(tmp_path / "x.gguf")
    entry = made_up().entries["blk.0.attn_q.weight"]
    for wrong in (np.array([np.nan]), np.array([-1.0])):
        bad = Imatrix({"blk.0.attn_q.weight": Importance(entry.squares, wrong)}, (), 1, 64)
        with pytest.raises(NKATError, match="count"):
            read_imatrix(written(tmp_path / "bad.gguf", bad))
    bad = Imatrix({"blk.0.attn_q.weight": Importance(-entry.squares, entry.counts)}, (), 1, 64)
    with pytest.raises(NKATError, match="negative"):
        read_imatrix(written(tmp_path / "bad.gguf", bad))
