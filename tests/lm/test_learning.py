"""What lies between linear layers of a model that learns on a CPU: values and gradients against float64, by torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nkat.kernels.cpu import beside_torch
from nkat.lm import learning
from nkat.lm.architectures import ARCHITECTURES
from nkat.lm.attention import View, make_view
from nkat.lm.learning import LearningOperations, operations_for
from nkat.lm.load import load_model
from nkat.lm.operations import Operations
from nkat.sources.fit.descent import zero_start
from nkat.sources.fit.layers import fitted_layers
from tests.support.tiny_models import ARCHITECTURES as TINY
from tests.support.tiny_models import FURTHER_FAMILIES, MIXTURE_FAMILIES, write_tiny_model

pytestmark = pytest.mark.isa

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of a result's norm: bfloat16 rounds by 2⁻⁹ at most
Call = Callable[[Operations, Sequence[torch.Tensor]], Sequence[torch.Tensor]]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def judge(call: Call, inputs: Sequence[torch.Tensor], tolerance: float) -> None:
    """Results and gradients of the kernels against those of torch in float64, for the same numbers."""
    sides = []
    for by, given in ((LearningOperations(), inputs), (Operations(), [x.double() for x in inputs])):
        leaves = [x.clone().requires_grad_() for x in given]
        results = call(by, leaves)
        generator = torch.Generator().manual_seed(7)
        loss = sum((r.double() * torch.randn(r.shape, generator=generator)).sum() for r in results)
        sides.append([*results, *torch.autograd.grad(loss, leaves)])
    for place, (found, wanted) in enumerate(zip(*sides, strict=True)):
        assert error(found, wanted) < tolerance, place
        assert error(found.roll(1, 0), wanted) > 0.1, place  # control


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize("columns", [64, 36, 5])
@pytest.mark.parametrize(("given", "readers"), [(torch.float32, 1), (torch.float32, 3), (torch.bfloat16, 2)])
def test_a_norm_is_torchs(dtype: torch.dtype, columns: int, given: torch.dtype, readers: int) -> None:
    weight = 1.0 + 0.3 * numbers(columns, seed=1)

    def call(by: Operations, x: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return by.normed(
            x[0], weight.to(torch.float64 if type(by) is Operations else torch.float32), 1e-3, dtype, readers
        )

    coarse = torch.bfloat16 in (dtype, given)
    judge(call, [numbers(3, 7, columns, dtype=given)], TOLERANCE[torch.bfloat16 if coarse else dtype])


@DTYPES
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss"])  # SiLU, GELU, and the clamped one
@pytest.mark.parametrize(("columns", "fused"), [(48, False), (20, True)])
def test_a_gate_is_torchs(dtype: torch.dtype, name: str, columns: int, fused: bool) -> None:
    def call(by: Operations, x: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        gate, up = x[0].chunk(2, dim=-1) if fused else x
        return [by.gated(ARCHITECTURES[name], gate, up)]

    both = [4.0 * numbers(2, 5, columns, dtype=dtype, seed=seed) for seed in (0, 1)]
    judge(call, [torch.cat(both, dim=-1)] if fused else both, TOLERANCE[dtype])


def view_of(count: int, half: int, dtype: torch.dtype, start: int = 0, window: int = 0) -> View:
    frequencies = torch.linspace(1.0, 0.1, half, dtype=torch.float64)
    return make_view(frequencies, 1.2, start, count, window, torch.zeros(1, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("size", "half"), [(64, 32), (12, 6), (20, 5), (8, 4)])
def test_turned_heads_are_torchs(dtype: torch.dtype, interleaved: bool, size: int, half: int) -> None:
    count = 9
    factor = 1.0 + torch.arange(count) / count

    def call(by: Operations, x: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        precise = torch.float64 if type(by) is Operations else torch.float32
        result = dtype if precise == torch.float32 else precise
        view = view_of(count, half, precise)
        return [
            by.turned(x[0], view, interleaved, result, factor.to(precise)),
            by.turned(x[0], view, interleaved, result, None),
        ]

    judge(call, [numbers(2, count, 3, size, dtype=dtype)], TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize(("queries", "kv", "count", "size"), [(6, 2, 40, 16), (3, 3, 16, 20), (4, 1, 7, 8)])
def test_attention_is_torchs(
    dtype: torch.dtype, queries: int, kv: int, count: int, size: int, in_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = view_of(count, 1, torch.float32)
    if in_parts:  # one KV head of one sequence at a time
        monkeypatch.setattr(learning, "_SCORES", queries // kv * count**2)

    def call(by: Operations, x: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return [by.attended(*x, view, 0.9 * size**-0.5, 0.0, None)]

    heads = (queries, kv, kv)
    inputs = [2.0 * numbers(2, h, count, size, dtype=dtype, seed=seed) for seed, h in enumerate(heads)]
    judge(call, inputs, 1.5 * TOLERANCE[dtype])


def test_attention_of_other_kinds_is_torchs_own() -> None:
    """Those that see by a mask, and those whose scores would take too much memory."""
    q = numbers(1, 2, 12, 8).requires_grad_()
    by = LearningOperations()

    def made_by(view: View, cap: float = 0.0) -> str:
        function = by.attended(q, q, q, view, 1.0, cap, None).grad_fn
        assert function is not None
        return function.name()

    assert made_by(view_of(12, 1, torch.float32)) == "_AttentionBackward"  # control
    assert made_by(view_of(12, 1, torch.float32, window=5)) != "_AttentionBackward"
    assert made_by(view_of(12, 1, torch.float32), cap=5.0) != "_AttentionBackward"


def test_what_has_no_kernel_is_left_to_torch() -> None:
    kinds = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float64, torch.float64)]
    found = [type(operations_for(torch.zeros(1, dtype=x), dtype)) for x, dtype in kinds]
    assert found == [LearningOperations, Operations, Operations]
    assert type(operations_for(torch.zeros(1, device="meta"), torch.float32)) is Operations


def test_numbers_are_rounded_as_torch_rounds_them() -> None:
    """Ties, the largest, infinity, NaN and what is smaller than any other, by a norm of rows of one."""
    x = torch.tensor([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 3.3e38, float("inf"), float("nan"), -1.0, 1e-40])[:, None]
    by = LearningOperations()
    precise, rounded = (by.normed(x, torch.ones(1), 1e30, dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    torch.testing.assert_close(rounded, precise.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    assert precise.isnan().sum() == 2  # an infinite root mean square leaves no number either


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_results_do_not_depend_on_the_threads(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = numbers(7, 32), numbers(32, seed=1)
    (expected,) = LearningOperations().normed(x, weight, 1e-5, torch.float32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: parts)
    for openmp in (beside_torch._openmp(), None):  # None: on the kernels' own threads
        monkeypatch.setattr(beside_torch, "_openmp", lambda openmp=openmp: openmp)
        assert torch.equal(LearningOperations().normed(x, weight, 1e-5, torch.float32)[0], expected)


FAMILIES = [*((name, {}) for name in sorted(TINY)), *FURTHER_FAMILIES, *MIXTURE_FAMILIES]


@pytest.mark.parametrize(("arch", "options"), FAMILIES)
def test_a_model_that_learns_has_torchs_values_and_gradients(
    arch: str, options: dict[str, Any], tmp_path: Path
) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", arch, **options)
    tokens = torch.randint(1, 40, (2, 11), generator=torch.Generator().manual_seed(1))
    found = []
    for dtype, learns in ((torch.float64, False), (torch.float32, True), (torch.float32, False)):
        model = load_model(path, dtype=dtype).model
        shapes = {name: layer.shape for name, layer in model.star_linears().items() if name.startswith("blk.")}
        start = dict(zip(shapes, zero_start([*shapes.values()], 2, 0), strict=True))
        with fitted_layers(model, start) as (layers, _):
            hidden = model.hidden(tokens, learning=learns, recompute=arch == "llama")
            direction = numbers(*hidden.shape, seed=3)
            (hidden * direction).sum().backward()
            found.append([hidden.detach(), *(layer.q.grad for layer in layers.values())])
    wanted, by_kernels, by_torch = found
    errors = [[error(a, b) for a, b in zip(side, wanted, strict=True)] for side in (by_kernels, by_torch)]
    assert max(errors[0]) < 3 * max(errors[1]) + 1e-6
    assert errors[0] != errors[1]  # control: they are two ways


@pytest.mark.isa
def test_a_weight_of_attention_is_at_most_one() -> None:
    """Of very large scores the rounding is large itself: less their logsumexp some come out above 0."""
    scores, gradient = torch.full((20, 20), 500.0), torch.ones(20, 20)
    scores[3] = -1.0
    beside_torch.run(learning.weights_kernel(learning.number(scores), 1.0), scores, gradient, 20, 20)
    expected = torch.ones(20, 20).tril()
    expected[3] *= math.exp(-1.0)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(gradient, expected)
