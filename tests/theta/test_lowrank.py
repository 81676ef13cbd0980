"""A plain low-rank term: its INT8 form, sums, and llama.cpp's adapters read."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from nkat.errors import NKATError
from nkat.gguf.file import GGUFFile
from nkat.lm.linear import StarLinear
from nkat.theta.algebra import ThetaError
from nkat.theta.lora import check_lora, read_lora
from nkat.theta.lowrank import LowRank, sum_of
from nkat.theta.set import LoraSet
from tests.support.tiny_models import write_tiny_model


def term(m: int, n: int, k: int) -> LowRank:
    return LowRank(torch.randn(m, k) * torch.logspace(0, -2, k), torch.randn(k, n))


@pytest.mark.parametrize(("m", "n", "k"), [(16, 24, 1), (24, 16, 5), (32, 32, 8)])
def test_the_int8_form_is_the_term(m: int, n: int, k: int) -> None:
    one = term(m, n, k)
    (down, up), between = one.int8_form(m, n), one.int8_scales()
    assert (down.dtype, up.dtype, len(between)) == (torch.int8, torch.int8, 3 * k)
    exact = one.up.double() @ one.down.double()
    found = (up.double() * between.double()) @ down.double()
    assert float((found - exact).norm() / exact.norm()) < 2e-4
    coarse = (up[:, :k].double() * between[:k].double()) @ down[:k].double()
    assert float((coarse - exact).norm() / exact.norm()) > 2e-3  # control: one INT8 a factor is not enough


def test_sums_add_up_and_full_strength_is_exact() -> None:
    first, second = term(12, 8, 2), term(12, 8, 3)
    torch.testing.assert_close(sum_of([first, second]).product(), first.product() + second.product())
    layer = StarLinear(torch.zeros(12, 8).view(torch.uint8).flatten(), gguf.GGMLQuantizationType.F32, (12, 8))
    terms = LoraSet.of({"x": first})
    layer.set_theta(terms.layers["x"])
    layer.set_gamma(terms.gamma)
    x = torch.randn(5, 8)
    torch.testing.assert_close(layer(x), x @ first.product().T)
    layer.set_gamma(1.0)
    assert not bool(layer(x).any())  # control


def test_terms_that_cannot_be() -> None:
    with pytest.raises(ThetaError, match="do not fit together"):
        LowRank(torch.ones(4, 2), torch.ones(3, 4))
    with pytest.raises(ThetaError, match="NaN"):
        LowRank(torch.full((4, 2), float("nan")), torch.ones(2, 4))
    layer = StarLinear(torch.zeros(12, 8).view(torch.uint8).flatten(), gguf.GGMLQuantizationType.F32, (12, 8))
    with pytest.raises(ThetaError, match="12x9 does not fit a 12x8"):
        layer.set_theta(term(12, 9, 1))


def write_adapter(path: Path, alpha: float | None = 6.0, arch: str = "llama", **tensors: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


Q = "blk.0.attn_q.weight"


def factors(name: str = Q, m: int = 64, n: int = 64, k: int = 3) -> dict[str, np.ndarray]:
    random = np.random.RandomState(1)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((k, n), (m, k)))
    return {f"{name}.lora_a": a, f"{name}.lora_b": b.astype(np.float16)}


@pytest.mark.parametrize(("alpha", "scale"), [(6.0, 2.0), (0.0, 1.0), (None, 1.0)])
def test_an_adapter_of_llama_cpp_is_read(tmp_path: Path, alpha: float | None, scale: float) -> None:
    pair = factors()
    found = read_lora(write_adapter(tmp_path / "a.gguf", alpha, **pair), "llama")[Q]
    a, b = (value.astype(np.float64) for value in pair.values())
    np.testing.assert_allclose(found.product().numpy(), scale * b @ a, rtol=1e-4, atol=1e-5)


def test_adapters_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    a, b = factors()
    for tensors, message in (
        ({a: factors()[a]}, "lora_b' is missing"),
        ({b: factors()[b]}, "no pairs"),
        ({**factors(), "blk.0.attn_norm.weight": np.ones(64, np.float32)}, "would be left out"),
        ({**factors("blk.0.ffn_up_exps.weight")}, "mixture's experts"),
    ):
        with pytest.raises(NKATError, match=message):
            read_lora(write_adapter(path, **tensors), "llama")
    with pytest.raises(NKATError, match=r"general.architecture is 'qwen2'"):
        read_lora(write_adapter(path, arch="qwen2", **factors()), "llama")
    with pytest.raises(NKATError, match=r"general.type is None"):
        read_lora(write_tiny_model(path, "llama"), "llama")
    with GGUFFile.open(write_tiny_model(path, "llama", tied=True)) as file:
        for name, shape, message in (
            (Q, (64, 32), "made for another model"),
            ("output.weight", (64, 64), "tied to the embedding"),
            ("token_embd.weight", (64, 64), "no input is multiplied by"),
            ("blk.9.attn_q.weight", (64, 64), "does not have"),
            ("blk.0.attn_norm.weight", (64, 64), "no matrix"),
        ):
            with pytest.raises(NKATError, match=message):
                check_lora({name: term(*shape, 1)}, file.tensors, path)
        check_lora({Q: term(64, 64, 1)}, file.tensors, path)  # control
