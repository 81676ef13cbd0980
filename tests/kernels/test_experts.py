"""The kernels of a mixture of experts: routing, grouping and products against plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as QType

from nkat.gguf.formats import dequantise
from nkat.kernels.cpu.batch import batch_tokens, make_scratch
from nkat.kernels.cpu.experts import CpuExperts, combine_kernel, gather_kernel, group_kernel, route_kernel
from nkat.kernels.cpu.formats import padded_rows
from nkat.kernels.cpu.linear import Panels, token_state
from nkat.kernels.cpu.matmul import EXACT
from nkat.kernels.cpu.program import Program, aligned, pool
from tests.kernels.test_cpu import packed_weight

pytestmark = pytest.mark.isa

EXPERTS, USED, INPUTS, OUTPUTS = 6, 2, 256, 41  # the last tile of an expert has 9 rows
SCALES = np.linspace(0.5, 1.5, EXPERTS, dtype=np.float32)


def mixture(
    experts: CpuExperts, logits: torch.Tensor, x: torch.Tensor, threads: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Σ weight · scale · (W x + bias) over each token's experts, and which they are."""
    count = len(x)
    tokens = 1 if count == 1 else batch_tokens()
    capacity = -(-count // tokens) * tokens
    rows = USED if count == 1 else (capacity * USED // tokens + EXPERTS) * tokens
    scores, inputs = aligned((capacity, 16), np.float32), aligned((capacity, INPUTS), np.float32)
    scores[:count, :EXPERTS], inputs[:count] = logits, x
    chosen, row_of = np.zeros((2, capacity, USED), np.int64)
    weights, token_of = np.zeros((capacity, USED), np.float32), np.zeros(rows, np.int64)
    first, state, row_state = np.zeros(EXPERTS + 1, np.int64), token_state(count), token_state(0)
    program = Program()
    program.add(route_kernel(EXPERTS, USED, tokens), (scores, scores.strides[0], SCALES, chosen, weights, state))
    program.barrier()
    program.add(group_kernel(EXPERTS, USED, tokens), (chosen, row_of, token_of, first, state, row_state))
    program.barrier()
    gathered = inputs
    if count > 1:
        gathered = aligned((rows, INPUTS), np.float32)
        program.add(gather_kernel(INPUTS, tokens), (inputs, gathered, token_of, row_state))
    panels = Panels(experts.rounding, INPUTS, len(gathered), tokens, row_state if count > 1 else state)
    panels.fill(program, gathered, gathered.strides[0])
    program.barrier()
    y = aligned((rows, padded_rows(OUTPUTS)), np.float32)
    experts.multiply(program, panels, first, y, make_scratch(threads, tokens), row_state, common=count == 1)
    program.barrier()
    out = aligned((capacity, OUTPUTS), np.float32)
    combine = combine_kernel(OUTPUTS, USED, tokens)
    program.add(combine, (y, y.strides[0], row_of, weights, out, out.strides[0], state))
    program.run(pool(threads))
    return out[:count], chosen[:count]


def make(qtype: QType, **options: bool) -> tuple[CpuExperts, torch.Tensor, torch.Tensor]:
    """The experts, their weights [experts, m, n] and biases."""
    packed = torch.cat([packed_weight(qtype, OUTPUTS, INPUTS, seed) for seed in range(EXPERTS)])
    bias = torch.randn(EXPERTS, OUTPUTS, generator=torch.Generator().manual_seed(2))
    shape = (EXPERTS, OUTPUTS, INPUTS)
    return CpuExperts(packed, qtype, shape, bias, exact=True, **options), dequantise(packed, qtype, shape), bias


def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, EXPERTS, generator=generator), torch.randn(count, INPUTS, generator=generator)


@pytest.mark.parametrize(
    "qtype", [QType.F32, QType.BF16, QType.MXFP4, QType.Q4_K, QType.IQ2_XS, QType.IQ3_S], ids=lambda qtype: qtype.name
)
@pytest.mark.parametrize(("count", "in_place"), [(1, False), (37, False), (37, True)])
def test_products_equal_the_reference(qtype, count, in_place):
    experts, weights, bias = make(qtype, in_place=in_place)
    logits, x = drawn(count)
    best, chosen = logits.topk(USED)
    shares = best.softmax(dim=-1) * torch.from_numpy(SCALES)[chosen]
    products = [torch.einsum("tmn,tn->tm", weights[e], x) + bias[e] for e in chosen.T]
    expected = sum(share[:, None] * product for share, product in zip(shares.T, products, strict=True))
    tolerance = 1e-5 if experts.rounding == EXACT else 4e-5  # inputs of two bytes
    for _ in range(2):  # the second time the tiles are there
        found, which = mixture(experts, logits, x)
        assert np.array_equal(which, chosen.numpy())
        assert np.abs(found - expected.numpy()).max() < tolerance * float(expected.abs().max())
    assert np.abs(found - expected.numpy()[:, ::-1]).max() > 0.1


def test_only_the_experts_of_a_token_are_touched():
    experts, *_ = make(QType.Q4_K)
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0, 0.5]])
    mixture(experts, logits, drawn(1)[1])
    assert experts.there.any(axis=1).tolist() == [False, True, False, True, False, False]
    assert [bool(tiles.any()) for tiles in experts.tiles] == [False, True, False, True, False, False]
    assert experts.nbytes == experts.tiles[:2].nbytes


def test_threads_change_no_bit():
    logits, x = drawn(30)
    results = [mixture(make(QType.Q8_0)[0], logits, x, threads)[0] for threads in (1, 2, 3)]
    assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize("count", [1, 14])
def test_a_logit_that_is_no_number_stays_one(count):
    logits, x = drawn(count)
    logits[0] = torch.nan
    found, chosen = mixture(make(QType.Q8_0)[0], logits, x)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1:]).all()
    assert chosen.min() >= 0
    assert chosen.max() < EXPERTS
