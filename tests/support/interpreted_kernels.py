"""The Triton kernels' arithmetic, run on the CPU by Triton's interpreter. `tests/kernels/test_cuda.py` starts it:

    TRITON_INTERPRET=1 python -m pytest tests/support/interpreted_kernels.py

Tolerances are shares of Σ|w||x|. The interpreter multiplies bfloat16 matrices as the integers that it stores them in,
so tensor-core kernels are run in float16 here.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from gguf.constants import GGMLQuantizationType as QType
from torch import Tensor

from nkat.engine.plan import TorchOps, decode_step, make_plan
from nkat.engine.step_check import check_step
from nkat.kernels.cuda import linear as cuda
from nkat.kernels.cuda import packing, planes, step_kernels
from nkat.kernels.cuda.planes import FORMATS, PackedWeight
from nkat.kernels.cuda.step import Attention, Group, Input, Siblings, TritonOps
from tests.kernels.test_cuda import FAMILIES, IDS, packed_weight, row_length, tiny, whole

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
__all__ = ["tiny"]  # a fixture

# Sums of 160 or 256 products in float32, 2^-24 = 6e-8 a rounding. Where q counts from a `zero`, Σq·x and zero·Σx are
# both several times larger than their difference. Measured: 6.3e-8 at most in those formats, 3.9e-8 in the others.
TOLERANCE = {
    QType.Q4_0: 2.5e-7,
    QType.Q4_1: 1.5e-7,
    QType.Q5_0: 2.5e-7,
    QType.Q5_1: 1.5e-7,
    QType.Q8_0: 2.5e-7,
    QType.Q2_K: 1.5e-7,
    QType.Q3_K: 2.5e-7,
    QType.Q4_K: 1.5e-7,
    QType.Q5_K: 1.5e-7,
    QType.Q6_K: 2.5e-7,
    QType.IQ4_NL: 1.5e-7,  # no offset
    QType.IQ4_XS: 1.5e-7,
}
FLOAT16_TOLERANCE = 2**-11 + 2**-12  # w rounded to 11 bits, and little besides: x is exact, sums are float32

every_format = pytest.mark.parametrize("qtype", FORMATS, ids=lambda qtype: qtype.name)


def error(found: Tensor, x: Tensor, values: Tensor, expected: Tensor | None = None) -> float:
    """Largest |found − expected| as a share of Σ|w||x|; expected is x Wᵀ when not given."""
    expected = x.double() @ values.T if expected is None else expected
    return float(((found.double() - expected).abs() / (x.double().abs() @ values.abs().T)).max())


def make(qtype: QType, m: int = 9, chunks: int = 5, seed: int = 0) -> tuple[PackedWeight, Tensor]:
    packed, values = packed_weight(qtype, m, row_length(qtype, chunks), seed)
    return planes.pack(packed, qtype, tuple(values.shape)), values


@every_format
def test_vector_kernel_against_float64(qtype):
    weight, values = make(qtype)  # 9 rows and 5 chunks fill no block
    for batch in (1, 3):
        x = torch.randn(batch, values.shape[1])
        assert error(cuda.linear(weight, x), x, values) < TOLERANCE[qtype]


@every_format
def test_matrix_kernel_against_float64(qtype):
    weight, values = make(qtype)
    x = torch.randn(37, values.shape[1]).half()
    found = cuda.matrix(weight, x)
    assert found.dtype == torch.float16
    rounding = 2**-11 * (x.double() @ values.T).abs() / (x.double().abs() @ values.abs().T)
    assert error(found, x, values) < FLOAT16_TOLERANCE + float(rounding.max())


@every_format
def test_rows_kernel_unpacks_exactly(qtype):
    weight, values = make(qtype, m=9, chunks=40)
    ids = torch.tensor([8, 0, 3, 3])
    assert torch.equal(cuda.rows(weight, ids).double(), values[ids])
    assert torch.equal(cuda.rows(weight.rows(2, 6), ids[2:]).double(), values[ids[2:] + 2])


@pytest.mark.parametrize("qtype", [QType.Q4_0, QType.Q4_K, QType.Q6_K])
def test_the_comparison_notices_a_wrong_layout(qtype):
    weight, values = make(qtype)
    x = torch.randn(2, values.shape[1])
    packed = weight.low.view(torch.uint8)
    right = packed.clone()
    packed.copy_(right >> 4 | right << 4)
    assert error(cuda.linear(weight, x), x, values) > 1e-2
    packed.copy_(right)
    assert error(cuda.linear(weight, x), x, values) < TOLERANCE[qtype]
    assert error(cuda.vector(weight, x), x, values) > 1e-2  # x not permuted
    assert error(cuda.linear(weight.rows(1, 9), x), x, values[:8]) > 1e-2


@pytest.mark.parametrize("batch", [1, 2, 8, 20])
def test_star_term_and_bias(batch):
    weight, values = make(QType.Q4_K)
    m, n = values.shape
    x, bias, down, up = torch.randn(batch, n).half(), torch.randn(m), torch.randn(6, n), torch.randn(m, 6)
    x = x if batch > cuda.VECTOR_BATCH else x.float()
    plain = cuda.linear(weight, x, bias)
    term = (x.double() @ down.double().T) @ up.double().T
    expected = x.double() @ values.T + bias.double()
    tolerance = 2e-3 if batch > cuda.VECTOR_BATCH else 1e-6
    assert error(plain, x, values, expected) < tolerance
    for kappa in (0.125, torch.tensor([0.125])):
        found = cuda.linear(weight, x, bias, down, up, kappa)
        assert error(found, x, values, expected + 0.125 * term) < tolerance
        assert error(found, x, values, expected) > 10 * tolerance  # a lost term would be noticed
    for kappa in (0.0, torch.zeros(1)):
        assert torch.equal(cuda.linear(weight, x, bias, down, up, kappa), plain)


def test_results_are_the_same_every_time():
    weight, values = make(QType.Q6_K)
    x = torch.randn(2, values.shape[1])
    assert torch.equal(cuda.linear(weight, x), cuda.linear(weight, x))


@pytest.mark.parametrize("qtype", [QType.Q5_K, QType.IQ4_XS])
def test_the_product_is_linear_in_x(qtype):
    weight, values = make(qtype, m=8)
    x = torch.randn(2, values.shape[1])
    mixed = 3 * x[:1] - 0.5 * x[1:]
    one, two, both = (cuda.linear(weight, v).double() for v in (x[:1], x[1:], mixed))
    scale = (3 * x[:1].abs() + 0.5 * x[1:].abs()).double() @ values.abs().T
    assert float(((both - (3 * one - 0.5 * two)).abs() / scale).max()) < 2 * TOLERANCE[qtype]
    assert float(((both - (3 * one + 0.5 * two)).abs() / scale).max()) > 1e-2


def test_large_and_small_inputs_keep_their_precision():
    """x is multiplied by up to 2^80 on the way."""
    weight, values = make(QType.Q8_0)
    for power in (-40, -20, 20, 40):
        x = torch.randn(1, values.shape[1]) * 2.0**power
        assert error(cuda.linear(weight, x), x, values) < TOLERANCE[QType.Q8_0]


def test_segments_have_their_own_strength_and_parts_add_up():
    weight, values = make(QType.Q4_0, m=32)
    x, up = torch.randn(1, values.shape[1]), torch.randn(32, 3)
    inner, kappas = torch.randn(3, 1, 5, 3), torch.tensor([0.5, 0.0, -2.0])
    found = cuda.vector(weight, cuda.permute(x), None, cuda.Star(up, inner, kappas), segments=(8, 24))
    plain = cuda.vector(weight, cuda.permute(x))
    whole_inner = inner.sum(dim=2)[:, 0]
    for segment, rows in enumerate((slice(0, 8), slice(8, 24), slice(24, 32))):
        term = kappas[segment] * (up[rows] @ whole_inner[segment])
        assert torch.allclose(found[0, rows] - plain[0, rows], term, atol=1e-4)
    assert torch.equal(found[:, 8:24], plain[:, 8:24])


# --- the other kernels of a step, against plain torch


def siblings(n: int, rank: int = 3, layers: int = 2) -> Siblings:
    return Siblings((), n, 0, rank, torch.randn(layers * rank, n), torch.ones(layers))


def same_input(found: Input, expected: Input, tolerance: float = 1e-5) -> None:
    scale = expected.natural.abs().max()
    assert float((found.natural - expected.natural).abs().max() / scale) < tolerance
    assert torch.equal(found.permuted, cuda.permute(found.natural[None]))
    inner = found.inner.sum(dim=2, keepdim=True)
    assert float((inner - expected.inner).abs().max() / expected.inner.abs().max()) < tolerance


@pytest.mark.parametrize("branch", ["none", "added", "normalised"])
@pytest.mark.parametrize("norm", [True, False])
def test_norm_kernel(branch, norm):
    n = 672  # three slices, the last not full
    x, weight, branch_weight = torch.randn(n), torch.rand(n), torch.rand(n)
    arguments = (
        x,
        None if branch == "none" else torch.randn(n),
        branch_weight if branch == "normalised" else None,
        weight if norm else None,
        1e-5,
        siblings(n),
    )
    total, found = TritonOps(star=True).norm(*arguments)
    expected_total, expected = TorchOps(star=True).norm(*arguments)
    assert torch.allclose(total, expected_total, atol=1e-6)
    assert found.inner.shape == (2, 1, 3, 3)
    same_input(found, expected)


@pytest.mark.parametrize("gelu", [False, True])
def test_activation_kernel(gelu):
    gate_up = 3 * torch.randn(2 * 416)
    gate_up[0], gate_up[1] = -200.0, 200.0  # where exp overflows
    readers = siblings(416, layers=1)
    found, expected = (ops(star=True).activate(gate_up, gelu, readers) for ops in (TritonOps, TorchOps))
    assert bool(found.natural.isfinite().all())
    same_input(found, expected)


@pytest.mark.parametrize("position", [0, 64, 255])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotated", "interleaved", "window", "norm", "cap"),
    [(6, 2, 16, 16, True, 0, False, 0.0), (4, 1, 24, 16, False, 70, True, 1.5), (2, 2, 32, 32, False, 0, True, 0.0)],
)
def test_attention_kernels(position, heads, kv_heads, head_dim, rotated, interleaved, window, norm, cap):
    capacity = 256
    angles = torch.rand(capacity, rotated // 2)
    keys, values = torch.randn(2, kv_heads, capacity, head_dim)
    keys[:, position:], values[:, position:] = float("nan"), float("nan")  # must not be read
    norms = torch.rand(2, head_dim) if norm else (None, None)
    warmth = 1.0 + torch.rand(capacity) if cap else None
    qkv, readers = torch.randn((heads + 2 * kv_heads) * head_dim), siblings(heads * head_dim, layers=1)

    def attend(ops, fill):
        k, v = keys.clone(), values.clone()
        k[k.isnan()], v[v.isnan()] = fill, fill
        attention = Attention(
            heads, head_dim**-0.5, window, interleaved, 1e-6, *norms, angles.cos(), angles.sin(), k, v, cap, warmth
        )
        return ops(star=True).attend(qkv, attention, torch.tensor([position]), readers), k, v

    found, k, v = attend(TritonOps, float("nan"))
    expected, expected_k, expected_v = attend(TorchOps, 0.0)
    assert bool(found.natural.isfinite().all())
    same_input(found, expected)
    assert torch.allclose(k[:, : position + 1], expected_k[:, : position + 1], atol=1e-6)
    assert torch.allclose(v[:, : position + 1], expected_v[:, : position + 1], atol=1e-6)
    assert bool(k[:, position + 1 :].isnan().all())


def test_a_cache_of_more_elements_than_32_bits_count(tmp_path):
    """The second head's keys begin behind 2³¹ elements. They lie in a file with holes: hardly any of it is there."""
    heads, head_dim, capacity = 2, 16, 2**27 + 64
    keys, values = (
        torch.from_file(str(tmp_path / name), shared=True, size=heads * capacity * head_dim, dtype=torch.float16).view(
            heads, capacity, head_dim
        )
        for name in ("keys", "values")
    )
    near = torch.randn(2, heads, 6, head_dim).half()
    keys[:, :6], values[:, :6] = near
    qkv, readers = torch.randn(3 * heads * head_dim), siblings(heads * head_dim, layers=1)
    angles = torch.rand(6, head_dim // 2)
    attention = Attention(heads, 0.25, 0, True, 1e-6, None, None, angles.cos(), angles.sin(), keys, values)
    found = TritonOps(star=True).attend(qkv, attention, torch.tensor([5]), readers)
    small = replace(attention, keys=near[0].clone(), values=near[1].clone())
    same_input(found, TorchOps(star=True).attend(qkv, small, torch.tensor([5]), readers), 2e-3)
    assert torch.equal(keys[:, 5], small.keys[:, 5])


def test_linear_without_a_kernel_takes_part_in_a_step():
    values, bias, x = torch.randn(6, 64), torch.randn(6), torch.randn(64)
    weight = planes.pack(values.view(torch.uint8).view(-1), QType.F32, (6, 64))
    layers = Siblings(
        (Group(weight, bias, torch.randn(6, 3), 0, ()),), 64, 6, 3, torch.randn(3, 64), torch.tensor([0.5])
    )
    inner = (layers.down @ x).view(1, 1, 1, 3)
    inputs = Input(x, x[None], inner)
    found = TritonOps(star=True).linear(layers, inputs)
    assert torch.allclose(found, TorchOps(star=True).linear(layers, inputs), atol=1e-5)
    assert torch.allclose(TritonOps(star=False).linear(layers, inputs), values @ x + bias, atol=1e-5)
    assert not torch.allclose(found, values @ x + bias, atol=1e-2)


@pytest.mark.parametrize(("arch", "options"), [family for family in FAMILIES if family[0] != "qwen3"])
def test_a_whole_step(tiny, monkeypatch, arch, options):
    monkeypatch.setattr(cuda, "_block_rows", lambda m, batch: 32)  # the interpreter's time goes by programs
    monkeypatch.setattr(cuda, "MAX_BLOCK_ROWS", 32)
    model = tiny(arch, dtype=torch.float32, **{**options, "blocks": 2 if options else 1}).model
    ids = IDS[:6]
    with torch.inference_mode():
        cache = model.new_cache(1, len(ids))
        model(torch.tensor([ids[:5]]), cache)
        plan = make_plan(model, cache)
        found = decode_step(plan, TritonOps(star=True), torch.tensor(ids[5:]), torch.tensor([5]))
        without = decode_step(plan, TritonOps(star=False), torch.tensor(ids[5:]), torch.tensor([5]))
    assert float((found - whole(model, ids)[-1]).abs().max()) < 1e-4  # logits have a standard deviation of 3
    model.set_gamma(None)
    assert float((without - found).abs().max()) > 0.1


# --- the check at the first use


@pytest.mark.parametrize("qtype", [QType.Q4_0, QType.Q6_K])
def test_the_first_check_takes_the_kernels_and_notices_a_wrong_one(monkeypatch, qtype):
    monkeypatch.setattr(packing, "_TOKENS", 20)
    shape, cpu = (20, 256), torch.device("cpu")
    assert packing.check_products(qtype, shape, cpu, True, torch.float16) is None
    said = packing.check_products(qtype, shape, cpu, True, torch.bfloat16)  # which the interpreter cannot multiply
    assert said.startswith("a product with many inputs differs")


def test_the_first_check_of_a_step_takes_the_kernels_and_notices_a_wrong_one(tiny, monkeypatch):
    model = tiny("gemma3", blocks=7, sliding_window=4).model
    assert check_step(model, 20, 3) is None
    kernel = step_kernels.combine_kernel

    class Wrong:
        def __getitem__(self, grid):
            def launch(mixed, peak, mass, natural, *others, **constants):
                kernel[grid](mixed, peak, mass, natural, *others, **constants)
                natural[0] += 1.0

            return launch

    monkeypatch.setattr(step_kernels, "combine_kernel", Wrong())
    assert check_step(model, 20, 3).startswith("attend differs")
