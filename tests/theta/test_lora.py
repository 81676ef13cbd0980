"""Θ as a LoRA adapter: the very term that the star product adds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from nkat.gguf.file import GGUFFile
from nkat.gguf.writer import BaseView, write_gguf
from nkat.theta.algebra import coupling
from nkat.theta.lora import lora_parts
from nkat.theta.set import truncate_rank
from tests.support.oracle import dense_theta
from tests.support.tiny_models import write_tiny_model
from tests.theta.test_modelfile import NAMES, make_set


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base.gguf", "llama")


def adapter_product(path: Path, name: str, x: np.ndarray) -> np.ndarray:
    """What llama.cpp adds for an adapter: alpha / rank · B (A x), read with gguf-py."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t.data.astype(np.float64) for t in reader.tensors}
    a, b = tensors[name + ".lora_a"], tensors[name + ".lora_b"]
    return reader.fields["adapter.lora.alpha"].contents() / b.shape[1] * (x @ a.T) @ b.T


@pytest.mark.parametrize("gamma", [None, 0.90])
def test_the_adapter_is_the_star_term(tmp_path: Path, base: Path, gamma: float | None) -> None:
    theta_set = make_set(base)
    low = truncate_rank(theta_set, 2).layers[NAMES[1]]
    theta_set = replace(theta_set, layers={**theta_set.layers, NAMES[1]: low})  # ranks may differ
    view = BaseView.whole(GGUFFile.open(base))
    write_gguf(tmp_path / "lora.gguf", lora_parts(theta_set, view, gamma), force=False)
    kappa = coupling(gamma or theta_set.gamma)
    rng = np.random.RandomState(0)
    for name, theta in theta_set.layers.items():
        m, n = view.tensors[name].shape
        x = rng.standard_normal((4, n))
        dense = dense_theta(*theta.factors(torch.float64)).numpy()[:m, :n]
        expected = kappa * x @ dense.T
        found = adapter_product(tmp_path / "lora.gguf", name, x)
        np.testing.assert_allclose(found, expected, atol=4e-3 * np.abs(expected).max())  # F16 factors
        assert np.abs(found + expected).max() > 0.5 * np.abs(expected).max()  # control: the sign matters
    fields = gguf.GGUFReader(tmp_path / "lora.gguf").fields
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.type"].contents() == "lora"
    assert fields["general.architecture"].contents() == "llama"
    assert fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
