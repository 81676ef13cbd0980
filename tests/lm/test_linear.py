"""StarLinear and the reference kernel against the dense float64 formula; Θ absent, zero, or γ = 1 changes no bit."""

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as QType

from nkat.kernels import reference
from nkat.lm.linear import StarLinear
from nkat.theta.algebra import Theta, ThetaError, coupling, low_rank_form, quantise_factors
from tests.support.oracle import star_product

pytestmark = pytest.mark.isa

M, N = 48, 64


def pack(weight: np.ndarray, qtype: QType) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed bytes, the values they stand for in float32), by gguf-py."""
    packed = gguf.quants.quantize(weight.astype(np.float32), qtype)
    values = gguf.quants.dequantize(packed, qtype).astype(np.float32)
    return torch.from_numpy(packed.view(np.uint8).reshape(-1).copy()), torch.from_numpy(values)


def make_weight(seed: int = 0, rows: int = M, columns: int = N) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def make_theta(size: int = max(M, N), rank: int = 3, seed: int = 0) -> Theta:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, size, rank, generator=generator)
    return quantise_factors(p, q)


def make_input(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, N, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def f32_layer(dtype: torch.dtype = torch.float32, **options) -> tuple[StarLinear, torch.Tensor]:
    packed, weight = pack(make_weight(), QType.F32)
    return StarLinear(packed, QType.F32, (M, N), dtype=dtype, **options), weight


@pytest.mark.parametrize("size", [64, 48, 10])
def test_star_product_equals_the_dense_formula(size):
    theta, x = make_theta(size), make_input(torch.float64)
    layer, weight = f32_layer(torch.float64, theta=theta)
    layer.set_gamma(0.9)
    p, q = theta.factors(torch.float64)
    dense = torch.zeros(N, N, dtype=torch.float64)
    dense[:size, :size] = p @ q.T - q @ p.T
    expected = x @ (weight.double() + 0.5 * 0.9 * 0.1 * dense[:M, :N]).T
    assert (layer(x) - expected).abs().max() < 1e-12 * expected.abs().max()
    assert (star_product(weight.double(), x, theta, 0.9) - expected).abs().max() < 1e-12 * expected.abs().max()
    plain = x @ weight.double().T
    assert (layer(x) - plain).abs().max() > 1e-3  # the check above would notice a missing term


@pytest.mark.parametrize("qtype", [QType.F32, QType.F16, QType.BF16, QType.Q4_0, QType.Q4_1, QType.Q5_0, QType.Q8_0])
def test_packed_weights_multiply_as_gguf_py_unpacks_them(qtype):
    packed, weight = pack(make_weight(), qtype)
    layer = StarLinear(packed, qtype, (M, N), dtype=torch.float64)
    x = make_input(torch.float64)
    assert (layer(x) - x @ weight.double().T).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_absent_and_zero_theta_and_gamma_one_change_no_bit(dtype):
    x = make_input()
    plain = f32_layer(dtype)[0](x)
    zero = Theta(torch.zeros(N, 3, dtype=torch.int8), torch.ones(N, 3, dtype=torch.int8), torch.ones(2, 3))
    with_zero, _ = f32_layer(dtype, theta=zero)
    with_zero.set_gamma(0.97)
    assert torch.equal(with_zero(x), plain)
    with_theta, _ = f32_layer(dtype, theta=make_theta())
    assert torch.equal(with_theta(x), plain)  # off until a strength is set
    for gamma in (1.0, None):
        with_theta.set_gamma(0.97)
        assert not torch.equal(with_theta(x), plain)
        with_theta.set_gamma(gamma)
        assert torch.equal(with_theta(x), plain)


def test_strength_is_linear_in_kappa():
    layer, _ = f32_layer(torch.float64, theta=make_theta())
    x = make_input(torch.float64)
    plain = layer(x)
    terms = []
    for gamma in (0.97, 0.9):
        layer.set_gamma(gamma)
        terms.append((layer(x) - plain) / coupling(gamma))
    assert torch.allclose(terms[0], terms[1], rtol=1e-9, atol=1e-9)


def test_theta_can_be_replaced_on_a_layer():
    x = make_input()
    layer, _ = f32_layer(theta=make_theta(seed=1))
    layer.set_gamma(0.9)
    first = layer(x)
    layer.set_theta(make_theta(seed=2))
    second = layer(x)
    assert not torch.equal(first, second)
    layer.set_theta(make_theta(seed=1))
    assert torch.equal(layer(x), first)
    layer.set_theta(None)
    assert torch.equal(layer(x), f32_layer()[0](x))


def test_bias_is_added_once_and_keeps_theta():
    bias = torch.randn(M, generator=torch.Generator().manual_seed(3))
    plain, _ = f32_layer(torch.float64, theta=make_theta())
    biased, _ = f32_layer(torch.float64, theta=make_theta(), bias=bias)
    x = make_input(torch.float64)
    for layer in (plain, biased):
        layer.set_gamma(0.9)
    assert torch.allclose(biased(x) - plain(x), bias.double().expand(2, 5, M), atol=1e-12)


@pytest.mark.parametrize("keep_dense", [False, True])
def test_rows_are_a_slice_of_the_whole(keep_dense):
    packed, _ = pack(make_weight(), QType.Q4_1)
    bias = torch.randn(M, generator=torch.Generator().manual_seed(3))
    layer = StarLinear(
        packed, QType.Q4_1, (M, N), dtype=torch.float64, theta=make_theta(), bias=bias, keep_dense=keep_dense
    )
    layer.set_gamma(0.9)
    x = make_input(torch.float64)
    assert torch.allclose(layer.rows(x, 16, 40), layer(x)[..., 16:40], rtol=0, atol=1e-12)
    assert not torch.allclose(layer.rows(x, 16, 40), layer(x)[..., 15:39], rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keep_dense_changes_no_bit(dtype):
    packed, _ = pack(make_weight(), QType.Q4_1)
    x = make_input()
    outputs = [StarLinear(packed, QType.Q4_1, (M, N), dtype=dtype, keep_dense=keep)(x) for keep in (False, True)]
    assert torch.equal(*outputs)
    assert outputs[0].dtype == dtype


@pytest.mark.parametrize("tile_rows", [1, 7, 48, 100])
def test_reference_kernel_gives_the_same_in_tiles(tile_rows):
    packed, weight = pack(make_weight(), QType.Q5_0)
    bias = torch.randn(M, generator=torch.Generator().manual_seed(3)).double()
    x = make_input(torch.float64)
    tiled = reference.linear(packed, QType.Q5_0, (M, N), x, bias, tile_rows=tile_rows)
    assert torch.allclose(tiled, x @ weight.double().T + bias, rtol=0, atol=1e-12)


def test_gradients_reach_the_input_and_the_factors():
    layer, weight = f32_layer(torch.float64, theta=make_theta())
    layer.set_gamma(0.9)
    x = make_input(torch.float64).requires_grad_()
    layer.down.requires_grad_()
    layer.up.requires_grad_()
    layer(x).sum().backward()
    effective = weight.double() + coupling(0.9) * (layer.up @ layer.down).detach()
    assert torch.allclose(x.grad, effective.sum(dim=0).expand_as(x))
    flat = x.detach().flatten(0, 1).sum(dim=0)
    assert torch.allclose(layer.down.grad, coupling(0.9) * layer.up.detach().sum(dim=0)[:, None] * flat)
    assert torch.allclose(layer.up.grad, coupling(0.9) * (layer.down.detach() @ flat).expand_as(layer.up))


def test_packed_bytes_are_shared_not_copied():
    packed, _ = pack(make_weight(), QType.Q4_1)
    layer = StarLinear(packed, QType.Q4_1, (M, N))
    assert layer.packed.data_ptr() == packed.data_ptr()
    assert layer.state_dict() == {}  # nothing of it belongs into a checkpoint


def test_errors():
    with pytest.raises(ThetaError, match="Θ of size 65 does not fit a 48x64 weight"):
        f32_layer(theta=make_theta(size=65))
    layer, _ = f32_layer()
    for gamma in (0.0, 1.01, -0.5):
        with pytest.raises(ThetaError, match="gamma"):
            layer.set_gamma(gamma)


def test_rounded_activations_are_gguf_pys_q8_0_and_q8_k() -> None:
    x = torch.randn(3, 512) * torch.logspace(-3, 3, 512)
    for qtype in (QType.Q4_1, QType.IQ4_NL, QType.NVFP4):
        packed = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0)
        oracle = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        found = reference.round_activations(x, qtype)
        # A half-way case may round either way: one step, of 1/127 of the block's largest value.
        step = x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
        difference = (found - torch.from_numpy(oracle)).unflatten(-1, (-1, 32)).abs()
        assert bool((difference <= 1.001 * step).all())
        assert float((difference > 1e-6 * step).float().mean()) < 0.001
    by_256 = reference.round_activations(x, gguf.GGMLQuantizationType.Q4_K)
    step = x.unflatten(-1, (-1, 256)).abs().amax(-1, keepdim=True) / 127
    assert bool(((by_256 - x).unflatten(-1, (-1, 256)).abs() <= 0.5001 * step).all())
    assert not torch.equal(by_256, found)
    assert torch.equal(reference.round_activations(x, gguf.GGMLQuantizationType.F16), x)


# --- a scale beside a weight


@pytest.mark.parametrize("keep_dense", [False, True])
def test_a_scale_multiplies_the_weight_and_neither_bias_nor_theta(keep_dense: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 64, generator=generator), torch.randn(5, 64, generator=generator)
    bias = torch.randn(32, generator=generator)
    theta = quantise_factors(*torch.randn(2, 64, 3, generator=generator))
    packed = weight.view(torch.uint8).flatten()
    layer = StarLinear(packed, QType.F32, (32, 64), bias=bias, theta=theta, keep_dense=keep_dense, scale=0.3)
    layer.set_gamma(0.9)
    down, up = low_rank_form(*theta.factors(), 32, 64)
    expected = 0.3 * (x @ weight.T) + coupling(0.9) * (x @ down.T @ up.T) + bias
    assert (layer(x) - expected).abs().max() < 1e-4
    assert torch.equal(layer.weight(), 0.3 * weight)
    layer.repack()
    assert layer.compiled is None
    assert (layer(x) - expected).abs().max() < 1e-4
