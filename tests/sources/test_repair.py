"""Scales learned: their gradient, the descent on tiny models, and going on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from nkat.gguf.formats import BLOCK_FORMATS, dequantise
from nkat.gguf.scales import stored_scales
from nkat.lm.linear import StarLinear
from nkat.lm.load import load_model
from nkat.measure.texts import default_text
from nkat.sources.fit.data import fit_text, split_validation
from nkat.sources.fit.descent import Progress
from nkat.sources.fit.state import FitState, load_state, save_state
from nkat.sources.repair import start
from nkat.sources.repair.descent import RepairSettings, Validation, divergence_won_back, repair
from nkat.sources.repair.job import with_bytes
from nkat.sources.repair.layers import RepairedLinear, no_change, scale_gradient
from nkat.theta.layers import adaptable_layers
from tests.gguf.test_formats import HALVES, finite, flat, oracle, random_rows, row_length
from tests.gguf.test_scales import every_scaled_type
from tests.support.tiny_models import write_tiny_model

pytestmark = pytest.mark.isa
Q4_0 = gguf.GGMLQuantizationType.Q4_0


@every_scaled_type
def test_the_gradient_is_what_doubling_a_scale_does(qtype) -> None:
    """The loss is linear in each stored number, so that L(2d) − L(d) is its derivative by ln d; gguf-py gives L."""
    shape = (3, row_length(qtype, 2))
    data = finite(random_rows(qtype, shape), qtype)
    direction = torch.randn(shape, dtype=torch.float64)

    def loss(packed: np.ndarray) -> float:
        return float((direction * torch.from_numpy(oracle(packed, qtype)).double()).sum())

    weight = dequantise(flat(data), qtype, shape).double()
    found = scale_gradient(BLOCK_FORMATS[qtype], flat(data), weight, direction)
    assert found.shape == (6, len(HALVES[qtype]))
    before, wanted = loss(data), torch.zeros(found.shape)
    for block, column in np.ndindex(*found.shape):
        changed = data.copy()
        at = changed.reshape(6, -1)[block, HALVES[qtype][column] :][:2]
        at[:] = (2 * at.copy().view("<f2")).view(np.uint8)
        wanted[block, column] = loss(changed) - before
    size = float((direction * weight).abs().sum())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * size)
    assert float(wanted.abs().max()) > 1e-3 * size / found.numel()  # control: there was something to find


@pytest.mark.parametrize("qtype", [Q4_0, gguf.GGMLQuantizationType.Q4_K])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_gradient_is_the_same(qtype: gguf.GGMLQuantizationType, dtype: torch.dtype) -> None:
    shape = (4, row_length(qtype, 2))
    packed = flat(finite(random_rows(qtype, shape), qtype))
    weight, direction = dequantise(packed, qtype, shape).to(dtype), torch.randn(shape).to(dtype)
    wanted = scale_gradient(BLOCK_FORMATS[qtype], packed, weight.double(), direction.double())
    found = scale_gradient(BLOCK_FORMATS[qtype], packed, weight, direction)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert not torch.allclose(found.roll(1, 0), wanted, rtol=0.1)  # control


@pytest.mark.parametrize("bias", [False, True])
def test_a_layers_gradients_are_those_of_the_dense_formula(bias: bool) -> None:
    packed = torch.from_numpy(gguf.quants.quantize(torch.randn(32, 64).numpy(), Q4_0)).flatten()
    b = torch.randn(32, dtype=torch.float64) if bias else None
    layer = StarLinear(packed, Q4_0, (32, 64), dtype=torch.float64, bias=b)
    x = torch.randn(2, 5, 64, dtype=torch.float64, requires_grad=True)
    repaired = RepairedLinear(layer, torch.zeros(64, 1))
    assert torch.equal(repaired.packed, packed)
    torch.testing.assert_close(repaired(x), layer(x))
    direction = torch.randn(2, 5, 32, dtype=torch.float64)
    factors = torch.ones(64, 1, dtype=torch.float64, requires_grad=True)
    blocks = dequantise(packed, Q4_0, (32, 64)).double().view(64, 32)

    def dense() -> torch.Tensor:
        y = x @ (blocks * factors).view(32, 64).T
        return y if b is None else y + b

    found = torch.autograd.grad((repaired(x) * direction).sum(), (x, repaired.change))
    wanted = torch.autograd.grad((dense() * direction).sum(), (x, factors))
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1].float())


def test_a_change_is_rounded_as_the_file_will_have_it() -> None:
    packed = torch.from_numpy(gguf.quants.quantize(torch.randn(8, 32).numpy(), Q4_0)).flatten()
    layer = StarLinear(packed, Q4_0, (8, 32))
    change = torch.full((8, 1), 0.01)
    repaired = RepairedLinear(layer, change)
    expected = (stored_scales(packed, Q4_0) * change.exp()).half().float()
    assert torch.equal(stored_scales(repaired.packed, Q4_0), expected)
    assert torch.equal(repaired.weight(), dequantise(repaired.packed, Q4_0, (8, 32)))
    assert not torch.equal(repaired.packed, packed)
    assert torch.equal(layer.file_bytes, packed)  # the layer's own are what they were


class Fixture:
    """A tiny model, the same in 4 bits, and repairs that are quick enough to be run many times."""

    def __init__(self, folder: Path) -> None:
        self.better = load_model(write_tiny_model(folder / "better.gguf", "llama", blocks=2))
        self.loaded = load_model(write_tiny_model(folder / "coarse.gguf", "llama", blocks=2, qtype=Q4_0))
        text = fit_text(self.loaded.tokenizer, type(default_text())("text", default_text().content[:9000], ""))
        self.text, validation = split_validation(text, "text", 64)
        self.validation = validation.pick(slice(2))
        self.names = adaptable_layers(self.loaded.tensors)

    def run(
        self,
        state: FitState | None = None,
        stop_at: int | None = None,
        reference: bool = True,
        starts: Mapping[str, list[torch.Tensor]] | None = None,
        keep_activations: bool = False,
        **changes: object,
    ) -> tuple[Validation, FitState]:
        values = {"steps": 12, "batch": 4, "context": 64, "learning_rate": 0.01, "warmup": 2, "validate_every": 4}
        settings = RepairSettings(**{**values, "reference_share": float(reference), **changes})
        done: list[float] = []
        progress = Progress(lambda _, loss: done.append(loss), lambda: stop_at is not None and len(done) + 1 >= stop_at)
        return repair(
            self.loaded.model,
            self.names,
            self.text,
            self.validation,
            settings,
            progress,
            reference=self.better.model if reference else None,
            starts=starts,
            state=state,
            keep_activations=keep_activations,
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    return Fixture(tmp_path_factory.mktemp("models"))


def test_a_repair_nears_the_better_copy_on_text_it_has_not_seen(tiny: Fixture) -> None:
    tokens = tiny.validation.chunks[:1, :64]
    with torch.inference_mode():
        unmodified = tiny.loaded.model(tokens)
    before, state = tiny.run(steps=40)
    after = Validation.of(next(row for row in state.history if row["step"] == state.best_step))
    assert divergence_won_back(before, after) > 0.1
    with torch.inference_mode():
        assert torch.equal(tiny.loaded.model(tokens), unmodified)  # the model itself is left as it was
    changes = dict(zip(tiny.names, state.best_factors, strict=True))
    assert all(0 < float(change.abs().max()) < 0.4 for change in changes.values())
    repaired = with_bytes(tiny.loaded, packed_with(tiny, changes))
    nll = float(tiny.validation.score(repaired.model).mean())
    assert nll == pytest.approx(after.nll, rel=1e-5)  # what was validated is what a file holds
    assert nll != pytest.approx(before.nll, rel=1e-5)


def packed_with(tiny: Fixture, changes: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    layers = tiny.loaded.model.star_linears()
    return {name: RepairedLinear(layers[name], change).packed.numpy() for name, change in changes.items()}


def test_without_a_reference_the_text_is_learned(tiny: Fixture) -> None:
    before, state = tiny.run(reference=False)
    assert before.divergence is None
    assert state.best_nll < before.nll - 0.01
    assert state.best_nll == min(row["validation_nll"] for row in state.history)
    assert state.history[0] == {"step": 0, "loss": before.nll, "validation_nll": before.nll}


def test_a_repair_is_determined_by_its_seed(tiny: Fixture) -> None:
    (_, first), (_, again), (_, other) = tiny.run(), tiny.run(), tiny.run(seed=1)
    assert all(map(torch.equal, first.factors, again.factors))
    assert not any(map(torch.equal, first.factors, other.factors))


def test_keeping_activations_changes_no_bit(tiny: Fixture) -> None:
    (_, slow), (_, fast) = tiny.run(), tiny.run(keep_activations=True)
    assert all(map(torch.equal, slow.factors, fast.factors))


@pytest.mark.parametrize("stop_at", [1, 6])
def test_going_on_is_bit_exact(tiny: Fixture, tmp_path: Path, stop_at: int) -> None:
    _, whole = tiny.run()
    _, part = tiny.run(stop_at=stop_at)
    assert part.step == stop_at
    save_state(tmp_path / "s", part, "id")
    _, resumed = tiny.run(state=load_state(tmp_path / "s", "id"))
    assert (resumed.step, resumed.best_step) == (whole.step, whole.best_step)
    for a, b in ((resumed.factors, whole.factors), (resumed.best_factors, whole.best_factors)):
        assert all(map(torch.equal, a, b))
    assert not any(map(torch.equal, part.factors, whole.factors))  # control


def test_what_does_not_help_is_not_kept(tiny: Fixture) -> None:
    """Steps far too large: none beats the file, and the file's own scales stay the best."""
    _, state = tiny.run(learning_rate=1.0, clip=1e9)
    assert state.best_step == 0
    assert not any(bool(change.any()) for change in state.best_factors)


def test_no_change_is_one_number_a_scale(tiny: Fixture) -> None:
    layers = tiny.loaded.model.star_linears()
    for name, change in zip(tiny.names, no_change(layers, tiny.names), strict=True):
        m, n = layers[name].shape
        assert change.shape == (m * n // 32, 1)


@pytest.mark.parametrize("qtype", [Q4_0, gguf.GGMLQuantizationType.Q4_1], ids=lambda qtype: qtype.name)
@pytest.mark.parametrize("full", [True, False], ids=["full", "diagonal"])
def test_the_closed_form_is_the_least_squares_solution(qtype, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against NumPy's least squares on the outputs themselves, row by row, without the ridge."""
    monkeypatch.setattr(start, "_RIDGE", 0.0)
    monkeypatch.setattr(start, "_TILE_ELEMENTS", 40)  # two rows of four scales, or more than one tile in any case
    wanted = torch.randn(5, 64)
    packed = torch.from_numpy(gguf.quants.quantize(wanted.numpy(), qtype)).flatten()
    inputs = torch.randn(400, 64) @ (torch.randn(64, 64) if full else torch.diag(torch.rand(64) + 0.5))
    moments = inputs.T @ inputs / len(inputs) if full else inputs.square().mean(dim=0)
    found = start.closed_form(packed, qtype, wanted, moments).exp()
    parts = start._parts(packed, qtype, (5, 64)).double()
    torch.testing.assert_close(parts.sum(dim=0).float(), dequantise(packed, qtype, (5, 64)))
    k = len(parts)
    for row in range(5):
        columns = []
        for block in range(2):
            for part in parts:
                only = torch.zeros(64, dtype=torch.float64)
                only[32 * block :][:32] = part[row, 32 * block :][:32]
                columns.append(only)
        root = inputs.double() if full else moments.double().sqrt().diag()
        expected, *_ = np.linalg.lstsq(
            (root @ torch.stack(columns, dim=1)).numpy(), (root @ wanted[row].double()).numpy()
        )
        result = found.view(5, 2 * k)[row].numpy()
        np.testing.assert_allclose(result, np.clip(expected, 0.5, 2.0), rtol=2e-3)
        assert np.abs(result - 1).max() > 1e-3


def test_the_best_start_is_taken(tiny: Fixture) -> None:
    zero = no_change(tiny.loaded.model.star_linears(), tiny.names)
    _, learned = tiny.run(steps=24)
    bad = [change + 0.5 for change in zero]
    _, state = tiny.run(steps=1, starts={"bad": bad, "good": learned.best_factors})
    assert state.start == "good"
    assert tiny.run(steps=1, starts={"bad": bad})[1].start == "file"
