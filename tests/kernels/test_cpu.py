"""The CPU kernels: every block format on every instruction set against float64, threads, Θ, and the code cache."""

import ctypes
import hashlib
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as QType

from nkat.gguf.formats import dequantise
from nkat.kernels import reference
from nkat.kernels.cpu import jit
from nkat.kernels.cpu import program as program_module
from nkat.kernels.cpu.batch import batch_kernel, batch_tokens, make_scratch
from nkat.kernels.cpu.formats import BLOCK_LAYOUTS, unit_bytes
from nkat.kernels.cpu.layout import ROWS
from nkat.kernels.cpu.linear import CpuLinear, Panels, token_state
from nkat.kernels.cpu.llvm import F16, F32, I64, Builder
from nkat.kernels.cpu.matmul import (
    EXACT,
    FLOAT_TYPES,
    Rounding,
    down_kernel,
    embedding_kernel,
    matmul_kernel,
    round_kernel,
    rounding_of,
    wide_rounding,
)
from nkat.kernels.cpu.program import Program, aligned, pool
from nkat.kernels.cpu.repack import repack
from nkat.lm.linear import StarLinear
from nkat.theta.algebra import Theta, low_rank_form, quantise_factors
from tests.gguf.test_formats import HALVES, finite, random_rows
from tests.support.isa import ISA_VARIABLE, NEEDS

pytestmark = pytest.mark.isa

M, N = 40, 512  # two and a half tiles; two blocks of 256
KAPPA = 0.0475

# Largest error in units of the largest |y|, by format. INT8 inputs: the byte products are exact, and what is left are
# the float32 roundings of one product and one addition a group; formats with an offset (all but a minimum of zero) sum
# two numbers of opposite sign. Exact inputs: N additions in float32. Twice the largest error in 50 seeds.
INT8_TOLERANCE = dict.fromkeys(BLOCK_LAYOUTS, 1e-6) | {
    QType.Q2_K: 2e-6,
    QType.Q3_K: 2e-6,
    QType.Q6_K: 2e-6,
    QType.IQ2_S: 2e-6,
}
EXACT_TOLERANCE = dict.fromkeys((*BLOCK_LAYOUTS, *FLOAT_TYPES), 3e-6)

# Bytes of tiles over the file's, where they are more: `docs/architectures.md` says why
WIDER = {
    QType.Q3_K: 1.04,
    QType.Q4_K: 1.03,
    QType.Q5_K: 1.02,
    QType.IQ4_XS: 1.01,
    QType.TQ1_0: 1.22,
    QType.IQ1_S: 1.40,
    QType.IQ1_M: 1.39,
    QType.IQ2_XXS: 1.55,
    QType.IQ2_XS: 1.43,
    QType.IQ2_S: 1.29,
    QType.IQ3_XXS: 1.37,
    QType.IQ3_S: 1.22,
}

ISAS = [
    pytest.param(
        isa,
        marks=pytest.mark.skipif(not needs <= jit.llvm_host_features(), reason=f"this processor does not have {isa}"),
    )
    for isa, needs in NEEDS.items()
    if os.environ.get(ISA_VARIABLE, isa) == isa  # each setting of make test-isa tests its own
]
every_format = pytest.mark.parametrize("qtype", BLOCK_LAYOUTS, ids=lambda qtype: qtype.name)


def packed_weight(qtype: QType, m: int = M, n: int = N, seed: int = 0) -> torch.Tensor:
    """Random quants with scales of either sign around 0.01, as a file has them."""
    rng = np.random.default_rng(seed)
    if qtype in FLOAT_TYPES:
        values = torch.from_numpy(rng.standard_normal((m, n)).astype(np.float32))
        kind = {QType.F32: torch.float32, QType.F16: torch.float16, QType.BF16: torch.bfloat16}[qtype]
        return values.to(kind).view(torch.uint8).view(-1)
    blocks = finite(random_rows(qtype, (m, n), seed), qtype).reshape(-1, GGML_QUANT_SIZES[qtype][1])
    for byte in HALVES[qtype]:
        scales = (0.01 * rng.standard_normal(len(blocks))).astype(np.float16)
        blocks[:, byte : byte + 2] = scales.view(np.uint8).reshape(-1, 2)
    if qtype == QType.MXFP4:
        blocks[:, 0] = rng.integers(119, 123, len(blocks))  # powers of two
    return torch.from_numpy(blocks).view(-1)


def inputs(count: int, n: int = N, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, n, generator=torch.Generator().manual_seed(seed))


def multiply(
    qtype: QType,
    packed: torch.Tensor,
    x: torch.Tensor,
    exact: bool,
    isa: str,
    *,
    repacked: bool = True,
    shape: tuple[int, int] = (M, N),
    rounding: Rounding | None = None,
) -> torch.Tensor:
    """W x by the kernels of one instruction set, [count, m]: one token by one kernel, more by the other."""
    (m, n), tokens = shape, 1 if len(x) == 1 else batch_tokens(isa)
    weight = repack(packed, qtype, shape) if repacked else packed.numpy().reshape(m, -1)
    state, tiles = token_state(len(x)), -(-m // ROWS)
    panels = Panels(rounding or rounding_of(qtype, exact), n, len(x), tokens, state)
    y = aligned((-(-len(x) // tokens) * tokens, tiles * ROWS), np.float32)
    program = Program()
    rows = x.numpy()
    arguments = (rows, rows.strides[0], n, panels.q, panels.d, panels.sums, state)
    program.add(round_kernel(panels.rounding, tokens, isa), arguments)
    program.barrier()
    units = n // BLOCK_LAYOUTS[qtype].columns
    given, star = (panels.q, panels.d, panels.sums, y), (0, 0, 0, 0, 0)
    if tokens == 1:
        program.add(matmul_kernel(qtype, exact, isa), (weight, weight.shape[1], units, tiles, *given, *star))
    else:
        kernel, scratch = batch_kernel(qtype, tokens, panels.rounding, repacked, isa), make_scratch(1, tokens)
        end = (y.strides[0], *star, scratch, scratch.shape[1], state)
        program.add(kernel, (weight, weight.shape[1], units, tiles, m, *given, *end))
    program.run(pool(1))
    return torch.from_numpy(y[: len(x), :m].copy())


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected).abs().max() / expected.abs().max())


# --- one format, one instruction set


@every_format
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [1, 14])
def test_int8_products_equal_the_rounded_reference(qtype, isa, count):
    packed, x = packed_weight(qtype), inputs(count)
    weight = dequantise(packed, qtype, (M, N)).double()
    expected = reference.round_activations(x, qtype).double() @ weight.T
    assert error(multiply(qtype, packed, x, False, isa), expected) < INT8_TOLERANCE[qtype]
    assert error(x.double() @ weight.T, expected) > 1e-4  # without the rounding it would fail


@every_format
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [1, 14])
def test_exact_products_equal_the_reference(qtype, isa, count):
    packed, x = packed_weight(qtype), inputs(count)
    expected = x.double() @ dequantise(packed, qtype, (M, N)).double().T
    assert error(multiply(qtype, packed, x, True, isa), expected) < EXACT_TOLERANCE[qtype]


@every_format
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("exact", [True, False])
def test_a_weight_left_in_the_file_gives_the_same_bits(qtype, isa, exact):
    """Where rows are no whole number of tiles too, and columns more than are unpacked together."""
    shape = (M + 3, 2048 + 256)
    packed, x = packed_weight(qtype, *shape), inputs(batch_tokens(isa) + 1, shape[1])
    repacked, in_place = (multiply(qtype, packed, x, exact, isa, repacked=r, shape=shape) for r in (True, False))
    assert torch.equal(in_place, repacked)
    inputs_used = x if exact else reference.round_activations(x, qtype)
    expected = inputs_used.double() @ dequantise(packed, qtype, shape).double().T
    assert error(in_place, expected) < 2 * (EXACT_TOLERANCE if exact else INT8_TOLERANCE)[qtype]
    assert error(in_place.roll(1, dims=1), expected) > 0.1  # a row beside it would be noticed


def three_bytes(qtype: QType) -> Rounding:
    """What `wide_rounding` chooses where it is faster, on whatever processor this is."""
    return Rounding(32, BLOCK_LAYOUTS[qtype].group, digits=3)


@every_format
@pytest.mark.parametrize("isa", ISAS)
def test_inputs_of_three_bytes_are_multiplied_as_exactly_as_they_are_kept(qtype, isa):
    """Whole numbers of sixteen bits come out as exactly as float32 allows; of one byte each they would not."""
    packed = packed_weight(qtype)
    x = torch.randint(-32639, 32640, (14, N), generator=torch.Generator().manual_seed(4)).float()
    x[:, ::32] = 32639.0
    weight = dequantise(packed, qtype, (M, N)).double()
    y = multiply(qtype, packed, x, True, isa, rounding=three_bytes(qtype))
    assert error(y, x.double() @ weight.T) < EXACT_TOLERANCE[qtype]
    for lost in (x // 256 * 256, x - 128):  # the lower byte; one step of the higher one
        assert error(y, lost.double() @ weight.T) > 1e-4


@every_format
@pytest.mark.parametrize("isa", ISAS)
def test_inputs_of_three_bytes_are_a_hundred_times_nearer_than_of_one(qtype, isa):
    packed, x = packed_weight(qtype), inputs(14)
    expected = x.double() @ dequantise(packed, qtype, (M, N)).double().T
    three = multiply(qtype, packed, x, True, isa, rounding=three_bytes(qtype))
    one = multiply(qtype, packed, x, False, isa)
    assert error(three, expected) < 4e-5
    assert error(one, expected) > 100 * error(three, expected)


@every_format
@pytest.mark.parametrize("isa", ISAS)
def test_an_outlier_does_not_blur_the_inputs_beside_it(qtype, isa):
    """What the others give, of the tokens that have an outlier and of those in the same panel that have none."""
    packed, x = packed_weight(qtype), inputs(14)
    x[3, 40] = x[7, 300] = 3000.0  # with sixteen bits, neighbours would be off by a thousandth
    weight = dequantise(packed, qtype, (M, N)).double()
    y = multiply(qtype, packed, x, True, isa, rounding=three_bytes(qtype)).double()
    outliers = x.double() * (x == 3000.0)
    expected = (x - outliers) @ weight.T
    assert error(y - outliers @ weight.T, expected) < 1e-4
    step = 3000 / 32639
    assert error(((x - outliers)[3] / step).round() * step @ weight.T, expected[3]) > 5e-4


def test_three_bytes_where_they_are_faster_only():
    chosen = {isa: wide_rounding(QType.Q6_K, isa) for isa in NEEDS}
    assert chosen == {isa: three_bytes(QType.Q6_K) if isa.endswith("vnni") else EXACT for isa in NEEDS}
    assert all(wide_rounding(qtype, isa) == EXACT for qtype in FLOAT_TYPES for isa in NEEDS)


@pytest.mark.parametrize("rounding", [Rounding(32, 32), Rounding(256, 16), Rounding(32, 32, digits=3)])
@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_a_damaged_input_is_seen(rounding, damage):
    x, state = inputs(2), token_state(2)
    x[1, 40] = damage
    panels, program = Panels(rounding, N, 2, 4, state), Program()
    panels.fill(program, x.numpy(), x.numpy().strides[0])
    program.run(pool(1))
    scales = panels.d.reshape(-1, 4)
    assert np.isfinite(scales[:, 0]).all()
    assert not np.isfinite(scales[1, 1])


@every_format
def test_every_weight_is_the_files(qtype):
    """Unit vectors pick the columns: bit-equal weights, so the repacked bytes hold all that the file's do."""
    packed = packed_weight(qtype, seed=3)
    linear = CpuLinear(packed, qtype, (M, N), exact=True)
    columns = linear.rows(torch.eye(N), 0, M, 0.0, 1)
    assert torch.equal(columns.T, dequantise(packed, qtype, (M, N)))
    packed[GGML_QUANT_SIZES[qtype][1] - 1 if qtype not in (QType.Q6_K, QType.Q2_K, QType.Q3_K) else 40] ^= 0x10
    assert not torch.equal(columns.T, dequantise(packed, qtype, (M, N)))


@pytest.mark.parametrize("qtype", [*BLOCK_LAYOUTS, *FLOAT_TYPES], ids=lambda qtype: qtype.name)
def test_embedding_rows_are_the_files(qtype):
    packed, ids = packed_weight(qtype), np.array([3, 39, 0, 17, 3], np.int64)
    out, factor, state = np.zeros((5, N), np.float32), np.array([1.0], np.float32), token_state(5)
    units, rows = N // GGML_QUANT_SIZES[qtype][0], packed.numpy()
    program = Program()
    arguments = (rows, rows.nbytes // M, units, ids, factor, out, out.strides[0], state)
    program.add(embedding_kernel(qtype, 4), arguments)
    program.run(pool(2))
    assert np.array_equal(out, dequantise(packed, qtype, (M, N)).numpy()[ids])


@every_format
def test_a_single_token_meets_every_column_once(qtype):
    layout = BLOCK_LAYOUTS[qtype]
    assert sorted(layout.order()) == list(range(layout.columns // 4))


@every_format
def test_a_repacked_weight_has_the_documented_size(qtype):
    size = unit_bytes(qtype) / ROWS / GGML_QUANT_SIZES[qtype][1]
    assert round(size, 2) == WIDER.get(qtype, 1.0)


@every_format
def test_swapped_columns_are_noticed(qtype):
    """The control of all comparisons here: two neighbouring columns of x exchanged."""
    packed, x = packed_weight(qtype), inputs(1)
    swapped = x.clone()
    swapped[:, [8, 9]] = x[:, [9, 8]]
    linear = CpuLinear(packed, qtype, (M, N))
    difference = linear.rows(swapped, 0, M, 0.0, 1) - linear.rows(x, 0, M, 0.0, 1)
    assert difference.abs().max() > 1e-3 * linear.rows(x, 0, M, 0.0, 1).abs().max()


@pytest.mark.parametrize("qtype", FLOAT_TYPES, ids=lambda qtype: qtype.name)
@pytest.mark.parametrize("shape", [(40, 512), (16, 24), (5, 7)])
@pytest.mark.parametrize("count", [1, 9])
def test_float_weights(qtype, shape, count):
    packed, x = packed_weight(qtype, *shape), inputs(count, shape[1])
    expected = x.double() @ dequantise(packed, qtype, shape).double().T
    results = [CpuLinear(packed, qtype, shape).rows(x, 0, shape[0], 0.0, 1)]
    if count > 1:
        results.append(CpuLinear(packed, qtype, shape, in_place=True).rows(x, 0, shape[0], 0.0, 1))
    assert error(results[0], expected) < EXACT_TOLERANCE[qtype]
    assert torch.equal(results[0], results[-1])


@pytest.mark.parametrize(
    "rounding", [Rounding(32, 32), Rounding(256, 32), Rounding(256, 16), Rounding(32, 32, 3), Rounding(32, 16, 3)]
)
@pytest.mark.parametrize("isa", ISAS)
def test_rounding(rounding, isa):
    """Numbers, scales and sums of all kinds; zeros stay zeros, and halves go to the even neighbour."""
    qtype = QType.Q4_0 if rounding.block == 32 else QType.Q6_K
    x = inputs(9)
    x[2, :256] = 0.0
    x[3] = torch.arange(N) % 100 - 49.5  # halves, under a scale of 1
    x[3, ::32] = 127.0
    x[4, 40] = -500.0  # an outlier of its block
    state = token_state(9)
    panels = Panels(rounding, N, 9, 4, state)
    rows = x.numpy()
    program = Program()
    arguments = (rows, rows.strides[0], N, panels.q, panels.d, panels.sums, state)
    program.add(round_kernel(rounding, 4, isa), arguments)
    program.run(pool(1))
    units = [1.0] if rounding.digits == 1 else [256.0, 1.0, 1 / 256]
    q = panels.q[:, :, : len(units) * 128].reshape(*panels.q.shape[:2], len(units), 4, 32)
    whole = sum(unit * q[:, :, i] for i, unit in enumerate(units))
    back = (whole * panels.d[..., None]).transpose(0, 2, 1, 3).reshape(-1, N)[:9]
    if rounding.digits == 1:
        expected = reference.round_activations(x, qtype).numpy()
        assert np.abs(back - expected).max() <= 1e-6 * np.abs(x.numpy()).max()
    else:
        step = x.view(9, -1, 32).abs().amax(-1) / 32639
        off = (torch.from_numpy(back).view(9, -1, 32) - x.view(9, -1, 32)).abs().amax(-1)
        assert (off <= 0.51 * step).all()
        assert (off[:4] > 0.3 * step[:4]).any()
        assert off[4, 1] < 0.003 * step[4, 1]
        blocks = x.view(9, -1, 32).abs()
        outlier = torch.nn.functional.pad(blocks.amax(-1) > 8 * blocks.mean(-1), (0, 0, 0, 3)).view(3, 4, -1).any(1)
        flags = np.ascontiguousarray(panels.q[:, :, 384:392]).view(np.int64)[..., 0]
        assert outlier[1].sum() == 1
        assert flags.tolist() == outlier.int().tolist()
    assert (back[2, :256] == 0).all()
    grouped = back.reshape(9, -1, rounding.group)
    sums = panels.sums.transpose(0, 2, 1).reshape(-1, N // rounding.group)[:9]
    assert (np.abs(sums - grouped.sum(-1)) <= 1e-6 * np.abs(grouped).sum(-1)).all()


# --- Θ


def make_theta(size: int, rank: int = 3, seed: int = 0) -> Theta:
    p, q = torch.randn(2, size, rank, generator=torch.Generator().manual_seed(seed))
    return quantise_factors(p, q)


@pytest.mark.parametrize("qtype", [QType.Q4_1, QType.Q6_K, QType.F16], ids=lambda qtype: qtype.name)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("rank", [1, 4, 5, 8])
@pytest.mark.parametrize("size", [N, 24])
@pytest.mark.parametrize("count", [1, 10])
def test_star_term_equals_the_reference(qtype, exact, rank, size, count):
    packed, x, theta = packed_weight(qtype), inputs(count), make_theta(size, rank)
    linear = CpuLinear(packed, qtype, (M, N), exact=exact)
    linear.set_theta(theta)
    rounded = x if rounding_of(qtype, exact) == EXACT else reference.round_activations(x, qtype)
    down, up = low_rank_form(*theta.factors(torch.float64), M, N)
    term = reference.star_term(rounded.double(), down, up, KAPPA)
    expected = rounded.double() @ dequantise(packed, qtype, (M, N)).double().T + term
    assert error(linear.rows(x, 0, M, KAPPA, 1), expected) < 3e-6
    assert error(expected - 2 * term, expected) > 1e-3  # a wrong sign would be noticed


@pytest.mark.parametrize("qtype", [QType.Q4_0, QType.Q6_K], ids=lambda qtype: qtype.name)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("count", [1, 10])
def test_theta_behind_the_tiles_gives_the_same_bits(qtype, rank, count):
    packed, x = packed_weight(qtype), inputs(count)
    apart, behind = (CpuLinear(packed, qtype, (M, N), room=room) for room in (0, rank))
    plain = apart.rows(x, 0, M, KAPPA, 1)
    assert torch.equal(behind.rows(x, 0, M, KAPPA, 1), plain)
    with_theta = []
    for theta in (make_theta(N, rank), make_theta(N, rank, seed=1)):
        for linear in (apart, behind):
            linear.set_theta(theta)
        with_theta.append(behind.rows(x, 0, M, KAPPA, 1))
        assert torch.equal(apart.rows(x, 0, M, KAPPA, 1), with_theta[-1])
    assert not torch.equal(with_theta[0], with_theta[1])
    assert np.shares_memory(behind.star.up, behind.tiles)
    assert apart.nbytes == behind.nbytes
    for linear in (apart, behind):
        linear.set_theta(make_theta(N, rank + 2))  # more than there is room for
    assert not np.shares_memory(behind.star.up, behind.tiles)
    assert torch.equal(behind.rows(x, 0, M, KAPPA, 1), apart.rows(x, 0, M, KAPPA, 1))
    assert torch.equal(behind.rows(x, 0, M, 0.0, 1), plain)


def test_no_strength_changes_no_bit():
    packed, x = packed_weight(QType.Q4_K), inputs(7)
    linear = CpuLinear(packed, QType.Q4_K, (M, N))
    plain = linear.rows(x, 0, M, 0.0, 1)
    linear.set_theta(make_theta(N))
    assert torch.equal(linear.rows(x, 0, M, 0.0, 1), plain)
    assert not torch.equal(linear.rows(x, 0, M, KAPPA, 1), plain)


def test_star_linear_uses_the_kernels_and_keeps_its_switches():
    packed, x = packed_weight(QType.Q5_1), inputs(2, N).view(1, 2, N)
    bias = torch.randn(M, generator=torch.Generator().manual_seed(5))
    layers = [StarLinear(packed, QType.Q5_1, (M, N), bias=bias, theta=make_theta(N)) for _ in range(2)]
    layers[1].repack()
    for gamma in (None, 0.9, 1.0):
        for layer in layers:
            layer.set_gamma(gamma)
        slow, fast = (layer(x) for layer in layers)
        assert slow.shape == fast.shape == (1, 2, M)
        assert error(fast, slow.double()) < 3e-6
    assert torch.equal(layers[1].rows(x, 16, 35), layers[1](x)[..., 16:35])
    with_theta = layers[1](x)
    layers[1].set_gamma(0.9)
    layers[1].set_theta(None)
    assert torch.equal(layers[1](x), with_theta)  # γ = 1 before, no Θ now


# --- properties


def test_exact_products_are_linear_and_int8_ones_are_not():
    packed = packed_weight(QType.Q8_0)
    a, b = inputs(3, seed=1), inputs(3, seed=2)

    def defect(exact: bool) -> float:
        linear = CpuLinear(packed, QType.Q8_0, (M, N), exact=exact)
        whole, parts = linear.rows(a + b, 0, M, 0.0, 1), [linear.rows(x, 0, M, 0.0, 1) for x in (a, b)]
        return error(parts[0] + parts[1], whole.double())

    assert defect(exact=True) < 3e-6
    assert defect(exact=False) > 1e-4


@pytest.mark.parametrize(
    ("qtype", "first", "last"), [(QType.IQ2_S, 34, 66), (QType.IQ3_S, 74, 106)], ids=lambda x: getattr(x, "name", None)
)
@pytest.mark.parametrize("count", [1, 14])
def test_other_signs_give_the_other_product(qtype, first, last, count):
    """Bit by bit where inputs are not rounded: W becomes -W, and rounding is symmetric."""
    packed, x = packed_weight(qtype), inputs(count)
    blocks = packed.clone().view(-1, GGML_QUANT_SIZES[qtype][1])
    blocks[:, first:last] ^= 0xFF
    plain, flipped = (CpuLinear(p, qtype, (M, N), exact=True).rows(x, 0, M, 0.0, 1) for p in (packed, blocks.view(-1)))
    assert torch.equal(flipped, -plain)
    blocks[0, first] ^= 0x01  # the control: one weight keeps its sign
    kept = CpuLinear(blocks.view(-1), qtype, (M, N), exact=True).rows(x, 0, M, 0.0, 1)
    assert (kept != -plain).nonzero()[:, 1].unique().tolist() == [0]


@pytest.mark.parametrize(
    "qtype", [QType.Q4_1, QType.Q4_K, QType.F32, QType.IQ2_XS, QType.IQ1_M], ids=lambda qtype: qtype.name
)
@pytest.mark.parametrize("count", [1, 37])
def test_threads_change_no_bit(qtype, count):
    packed, x = packed_weight(qtype), inputs(count)
    linear = CpuLinear(packed, qtype, (M, N))
    linear.set_theta(make_theta(N))
    results = [linear.rows(x, 0, M, KAPPA, threads) for threads in (1, 2, 3, 5) for _ in range(3)]
    assert all(torch.equal(result, results[0]) for result in results)


@every_format
@pytest.mark.parametrize("exact", [True, False])
def test_a_token_does_not_depend_on_its_panel(qtype, exact):
    """Bit by bit. A single token, as in decoding, is added up in another order."""
    packed, x = packed_weight(qtype), inputs(2 * batch_tokens() + 1)
    linear = CpuLinear(packed, qtype, (M, N), exact=exact)
    together = linear.rows(x, 0, M, 0.0, 2)
    for first in (1, 5, batch_tokens()):
        assert torch.equal(linear.rows(x[first:], 0, M, 0.0, 1), together[first:])
    tolerance = (EXACT_TOLERANCE if exact else INT8_TOLERANCE)[qtype]
    for i in range(len(x)):
        alone = linear.rows(x[i : i + 1], 0, M, 0.0, 1)[0]
        assert error(alone, together[i].double()) < 2 * tolerance
        assert error(alone, together[i - 1].double()) > 0.1


# --- programs, threads and the cache of machine code


def add_one(k: Builder) -> None:
    k.fetch_add(k.pointer(0), 1)


def test_large_arrays_are_private_zeros_on_large_pages():
    """Shared memory would be kept on small pages, and seen by forked processes."""
    large, small = aligned((3, 1 << 20), np.int16), aligned((3, 5), np.int16)
    assert large.ctypes.data % (1 << 21 if hasattr(mmap, "MADV_HUGEPAGE") else 64) == 0
    assert small.ctypes.data % 64 == 0
    assert not large.any()
    assert not small.any()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not show its mappings")
    for line in maps.read_text().splitlines():
        span, permissions = line.split()[:2]
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= large.ctypes.data < last:
            assert permissions == "rw-p"
            return
    raise AssertionError("the array is in no mapping")


def test_no_room_for_an_array_is_a_memory_error():
    with pytest.raises(MemoryError):
        aligned((1 << 50,), np.uint8)


def test_a_barrier_waits_for_all():
    """Each thread adds its share; whoever read the sum before the barrier was complete would find it too small."""

    def copy_sum(k: Builder) -> None:
        with k.loop(k.thread, k.threads, k.threads):
            k.store(k.load(I64(), k.pointer(0)), k.pointer(1) + k.thread * 64)

    count, seen = np.zeros(1, np.int64), np.zeros(8 * 5, np.int64)
    program = Program()
    for _ in range(50):
        program.add(jit.compile_kernel("add_one", add_one), (count,))
    program.barrier()
    program.add(jit.compile_kernel("copy_sum", copy_sum), (count, seen))
    for repeat in range(1, 20):
        program.run(pool(5))
        assert count[0] == 250 * repeat
        assert (seen.reshape(5, 8)[:, 0] == count[0]).all()


@pytest.mark.parametrize("sleeps", [True, False])
def test_a_barrier_waits_for_one_that_is_late(sleeps, monkeypatch):
    """So late that the others sleep, or let others run, until it comes; and then for the next one."""
    if not sleeps:
        monkeypatch.setitem(program_module.__dict__, "_FUTEX", {})
    elif program_module._pause()[1] == 0:
        pytest.skip("threads do not sleep at a barrier on this system")
    program_module._pause.cache_clear()
    usleep = ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p).value

    def late(k: Builder) -> None:
        with k.when(k.thread.equals(k.integer(1))):
            k.call_address(k.pointer(0), [k.value(20_000, I64())])
            k.store(k.load(I64(), k.pointer(2)) + 1, k.pointer(2))

    def copy(k: Builder) -> None:
        k.store(k.load(I64(), k.pointer(0)), k.pointer(1) + k.thread * 8)

    count, seen, program = np.zeros(1, np.int64), np.zeros((3, 4), np.int64), Program()
    for turn in range(3):
        program.add(jit.compile_kernel("late", late), (usleep, turn, count))
        program.barrier()
        program.add(jit.compile_kernel("copy", copy), (count, seen[turn]))
        program.barrier()
    program.run(pool(4))
    program_module._pause.cache_clear()
    assert (seen == [[1], [2], [3]]).all()
    asleep = program._meeting[17]
    assert asleep == 0


def test_exp():
    x = np.linspace(-120, 120, 16 * 500).astype(np.float32)
    x[:4] = 0.0, -0.0, 1.0, -87.0
    out = np.empty_like(x)

    def emit(k: Builder) -> None:
        with k.loop(0, k.integer(2), 64) as i:
            k.store(k.exp(k.load(F32(16), k.pointer(0) + i)), k.pointer(1) + i)

    program = Program()
    program.add(jit.compile_kernel("exp", emit), (x, out, x.nbytes))
    program.run(pool(1))
    expected = np.exp(np.clip(x.astype(np.float64), None, 88.0))
    inside = x > -87
    assert np.abs(out[inside] / expected[inside] - 1).max() < 2.5e-7
    assert (out[x < -87.5] == 0).all()
    assert out[0] == out[1] == 1.0
    x[:2] = np.nan, -np.nan
    program.run(pool(1))
    assert np.isnan(out[:2]).all()  # damaged weights must show


@pytest.mark.parametrize("isa", ISAS)
def test_float16_is_converted_as_numpy_does(isa):
    """Every float16; every float32 around each of them and around each tie between two; infinities and NaN."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite_halves = np.sort(halves[np.isfinite(halves)].astype(np.float32))
    ties = (finite_halves[1:] + finite_halves[:-1]) / 2
    near = [np.nextafter(x, np.float32(to)) for x in (ties, finite_halves) for to in (-np.inf, np.inf)]
    special = np.array([np.inf, -np.inf, np.nan, 65519.996, 65520.0, -1e9, 1e-40, -0.0], np.float32)
    floats = np.concatenate([ties, finite_halves, *near, special])
    floats = np.append(floats, np.zeros(-len(floats) % 16, np.float32))
    wide, narrow = np.empty(len(halves), np.float32), np.empty(len(floats), np.float16)

    def emit(k: Builder) -> None:
        with k.loop(0, k.integer(4), 32) as i:
            k.store(k.load(F16(16), k.pointer(0) + i).float32(), k.pointer(1) + i * 2)
        with k.loop(0, k.integer(5), 32) as i:
            k.store(k.load(F32(16), k.pointer(2) + i * 2).float16(), k.pointer(3) + i)

    program = Program()
    address = jit.compile_kernel("halves", emit, isa)
    program.add(address, (halves, wide, floats, narrow, halves.nbytes, narrow.nbytes))
    program.run(pool(1))
    with np.errstate(over="ignore"):
        expected = floats.astype(np.float16)
    for found, wanted in ((wide, halves.astype(np.float32)), (narrow, expected)):
        assert np.array_equal(found, wanted, equal_nan=True)
        assert np.array_equal(np.signbit(found), np.signbit(wanted))  # of zeros


def test_machine_code_is_kept_and_a_damaged_file_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("NKAT_CACHE", str(tmp_path))
    count = np.zeros(1, np.int64)

    def run() -> None:
        program = Program()
        program.add(jit.compile_kernel("add_one", add_one), (count,))
        program.run(pool(2))

    run()
    (kept,) = (path for path in (tmp_path / "compiled").glob("*.o") if b"add_one" in path.read_bytes())
    whole = kept.read_bytes()
    written = kept.stat().st_mtime_ns
    run()
    assert kept.stat().st_mtime_ns == written
    forged = hashlib.sha256(whole[32:]).digest() + whole[32:]  # a hash anybody can make is no seal
    for damaged in (b"", whole[:50], whole[:-1] + bytes([whole[-1] ^ 1]), forged):
        kept.write_bytes(damaged)
        run()
        assert kept.read_bytes() == whole
    assert count[0] == 2 * 6


def test_another_processor_gets_code_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("NKAT_CACHE", str(tmp_path))
    jit.compile_kernel("add_one", add_one)
    monkeypatch.setattr(jit, "llvm_host_features", lambda: frozenset({"sse2"}))
    jit.compile_kernel("add_one", add_one)
    assert len(list((tmp_path / "compiled").glob("*.o"))) == 2


def test_kernels_are_compiled_once():
    assert matmul_kernel(QType.Q4_0, False) == matmul_kernel(QType.Q4_0, False)
    assert down_kernel(Rounding(32, 32), 1) != down_kernel(Rounding(256, 32), 1)


def test_a_kernel_takes_little_of_a_threads_stack():
    from nkat.kernels.cpu.blocks import Heads, rope_kernel

    with pytest.raises(ValueError, match="stack"):
        rope_kernel(Heads(1, 1, 1 << 20, 2, False, False, True))
