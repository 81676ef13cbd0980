"""A gathered importance matrix: against llama-imatrix's on the same models and text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nkat.errors import NKATError
from nkat.gguf.file import GGUFFile
from nkat.gguf.imatrix import imatrix_parts, read_imatrix
from nkat.gguf.writer import write_gguf
from nkat.lm.load import load_model
from nkat.measure.texts import load_text
from nkat.sources.importance import gather_imatrix, moments_from_file
from tests.gguf.test_imatrix import EXCHANGE
from tests.support.tiny_models import write_tiny_model

pytestmark = pytest.mark.isa

VARIANTS: dict[str, dict[str, Any]] = {"llama": {}, "qwen3moe": {}, "phi3": {}, "gemma4": {}}
# Of each weight's largest mean. Sums of float32 in another order leave 2e-6; llama.cpp's table of half-precision GELU
# leaves 2e-4 in gemma4.
TOLERANCE = {"gemma4": 1e-3}
USUAL_TOLERANCE = 1e-4


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("arch", VARIANTS)
def test_equal_to_llama_imatrix(tmp_path: Path, arch: str) -> None:
    loaded = load_model(write_tiny_model(tmp_path / "m.gguf", arch, context=64, **VARIANTS[arch]))
    text = load_text(EXCHANGE / "text.txt")
    tolerance = TOLERANCE.get(arch, USUAL_TOLERANCE)
    found, expected = gather_imatrix(loaded, text, 4), read_imatrix(EXCHANGE / f"{arch}.imatrix.gguf")
    assert found.entries.keys() == expected.entries.keys()
    assert (found.chunks, found.chunk_size, found.datasets) == (4, 64, expected.datasets)
    for name, entry in expected.entries.items():
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts)
        assert worst(found.entries[name].squares, entry.squares) < tolerance, name
        assert entry.sums is not None
        assert worst(found.entries[name].sums, entry.sums) < tolerance, name
    fewer = gather_imatrix(loaded, text, 3).entries
    assert (
        min(worst(fewer[name].means, entry.means) for name, entry in expected.entries.items()) > 20 * tolerance
    )  # control


def test_the_same_text_gives_the_same_bytes_and_theta_is_left_out(tmp_path: Path) -> None:
    loaded = load_model(write_tiny_model(tmp_path / "m.gguf", "llama", context=64))
    text = load_text(EXCHANGE / "text.txt")
    first, again = (imatrix_parts(gather_imatrix(loaded, text, 2)) for _ in range(2))
    assert b"".join(map(bytes, first)) == b"".join(map(bytes, again))


def test_moments_of_a_file(tmp_path: Path) -> None:
    with GGUFFile.open(write_tiny_model(tmp_path / "m.gguf", "llama", context=64)) as file:
        for form in ("gguf", "dat"):
            path = EXCHANGE / f"llama.imatrix.{form}"
            names = ["blk.0.attn_q.weight", "blk.1.ffn_down.weight"]
            moments, _ = moments_from_file(path, file.tensors, names)
            assert [tuple(value.shape) for value in moments.values()] == [(64,), (96,)]
            truth = read_imatrix(EXCHANGE / "llama.imatrix.gguf").entries[names[1]]
            torch.testing.assert_close(moments[names[1]], torch.from_numpy(truth.squares[0] / 256))
        with pytest.raises(NKATError, match=r"no entry for output.weight"):
            moments_from_file(path, file.tensors, ["output.weight"])
    other = GGUFFile.open(write_tiny_model(tmp_path / "other.gguf", "llama", embedding=32))
    with pytest.raises(NKATError, match="64 inputs there and 32 in the model"):
        moments_from_file(path, other.tensors, names)


def test_a_cut_file_is_no_matrix(tmp_path: Path) -> None:
    shutil.copy(EXCHANGE / "llama.imatrix.dat", tmp_path / "x.dat")
    write_gguf(tmp_path / "y.dat", [(tmp_path / "x.dat").read_bytes()[:5000]], force=False)
    with pytest.raises(NKATError, match="does not fit into the file"):
        read_imatrix(tmp_path / "y.dat")
