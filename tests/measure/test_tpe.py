"""TPE against the guide's own figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from nkat.gguf.file import GGUFFile
from nkat.lm.config import ModelConfig
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


def test_of_a_mixture_only_the_experts_of_a_token_count(tmp_path: Path) -> None:
    """2 of 6: a third of the experts' weights and biases, and all of the router."""
    file = GGUFFile.open(write_tiny_model(tmp_path / "t.gguf", "gpt-oss"))
    active = ModelConfig.from_gguf(file.metadata, file.tensors).active_experts
    experts = sum(t.nbytes for name, t in file.tensors.items() if "exps" in name)
    assert experts == 3 * 6 * 4 * (3 * 48 * 64 + 2 * 48 + 64)
    all_read = bytes_per_token(file.tensors)
    assert bytes_per_token(file.tensors, active) == all_read - experts + experts // 3
    assert byte_ratio(file.tensors, 1000, active) > byte_ratio(file.tensors, 1000)


def test_blocks_that_foretell_later_tokens_are_not_read(tmp_path: Path) -> None:
    with_draft, without = (
        GGUFFile.open(write_tiny_model(tmp_path / f"{n}.gguf", "glm4", draft=n)).tensors for n in (1, 0)
    )
    assert with_draft.keys() > without.keys()
    assert bytes_per_token(with_draft) == bytes_per_token(without)
