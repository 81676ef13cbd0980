"""TPE against the guide's own figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from nkat.gguf.file import GGUFFile
from nkat.measure.tpe import byte_ratio, bytes_per_token, tpe
from tests.support.tiny_models import write_tiny_model


def test_the_guides_figures() -> None:
    assert tpe(6.85) == pytest.approx(0.146, abs=5e-4)  # no Θ: 1 / ppl
    assert tpe(6.41, 1.06) == pytest.approx(0.152, abs=5e-4)
    assert tpe(6.41, 1.0) > tpe(6.41, 1.06) > tpe(6.85, 1.06)


def test_bytes_per_token_counts_an_untied_embedding_as_one_row(tmp_path: Path) -> None:
    for tied in (True, False):
        tensors = GGUFFile.open(write_tiny_model(tmp_path / "t.gguf", "llama", tied=tied)).tensors
        every = sum(t.nbytes for t in tensors.values())
        table = tensors["token_embd.weight"]
        unread = 0 if tied else table.nbytes - table.nbytes // table.shape[0]
        assert bytes_per_token(tensors) == every - unread
        assert byte_ratio(tensors, 0) == 1.0
        assert byte_ratio(tensors, bytes_per_token(tensors)) == 2.0
