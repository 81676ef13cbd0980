"""Several Θ on one model, switched while it runs: in every way to run a model, against the sum on the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from nkat.engine.compiled import CompiledDecoder
from nkat.engine.compiled_scorer import CompiledScorer
from nkat.engine.cuda_graph import CudaGraphDecoder, StaticDecoder
from nkat.engine.decoder import make_decoder
from nkat.engine.eager import EagerDecoder
from nkat.engine.plan import TorchOps
from nkat.engine.session import Session
from nkat.errors import NKATError
from nkat.lm.load import LoadedModel, load_model
from nkat.lm.mix import ThetaMix
from nkat.theta.algebra import Theta, coupling, of_experts, quantise_factors
from nkat.theta.combine import Weighted, combined
from nkat.theta.set import ThetaSet
from tests.support.oracle import dense_theta
from tests.support.tiny_models import MIXTURE_FAMILIES, write_tiny_model

pytestmark = pytest.mark.isa

IDS = [(29 * i + 5) % 200 for i in range(40)]
CHUNKS = torch.tensor([IDS[:21], IDS[19:]])
Q8_0 = gguf.GGMLQuantizationType.Q8_0
WEIGHTS: tuple[dict[str, float], ...] = (
    {"a": 1.0},
    {"a": 1.0, "b": 0.5, "c": -0.3},
    {},
    {"b": 2.0},
    {"a": 0.25, "b": 0.5, "c": -1.0},
    {"c": 1.0, "a": 1.0},
)


def load(folder: Path, arch: str = "llama", **options: Any) -> LoadedModel:
    path = folder / "tiny.gguf"
    return load_model(path if path.exists() else write_tiny_model(path, arch, qtype=Q8_0), **options)


def make_set(loaded: LoadedModel, rank: int, gamma: float, seed: int, names: str = "") -> ThetaSet:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: quantise_factors(*0.4 * torch.randn(2, max(layer.shape), rank, generator=generator))
        for name, layer in loaded.model.star_linears().items()
        if names in name
    }
    return ThetaSet(layers, gamma, "weight", seed, "0" * 64, "tiny", 1)


def make_sets(loaded: LoadedModel) -> dict[str, ThetaSet]:
    """c is on some layers only, and stronger."""
    return {
        "a": make_set(loaded, 3, 0.9, 1),
        "b": make_set(loaded, 5, 0.95, 2),
        "c": make_set(loaded, 2, 0.8, 3, names="attn"),
    }


def total(sets: dict[str, ThetaSet], weights: dict[str, float]) -> ThetaSet | None:
    return combined([Weighted(sets[name], weights.get(name, 0.0), name) for name in sets])


def put(loaded: LoadedModel, theta: ThetaSet | None) -> LoadedModel:
    """The sum on a model of its own, as one Θ."""
    loaded.model.set_thetas({} if theta is None else theta.layers)
    loaded.model.set_gamma(None if theta is None else theta.gamma)
    return loaded


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@torch.inference_mode()
def dense_logits(loaded: LoadedModel, sets: dict[str, ThetaSet], weights: dict[str, float]) -> torch.Tensor:
    """Of a float64 model whose weights have Σ w κ Θ added, with no Θ beside them."""
    model = loaded.model
    for name, layer in model.star_linears().items():
        weight = layer.weight().clone()
        m, n = layer.shape
        for key, factor in weights.items():
            theta = sets[key].layers.get(name)
            if theta is not None:
                weight += factor * coupling(sets[key].gamma) * dense_theta(*theta.factors(torch.float64))[:m, :n]
        layer.dense = weight
    return model(torch.tensor([IDS]))[0, -1]


# --- the sum


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_sum_equals_weights_with_it_added(tmp_path: Path, weights: dict[str, float]) -> None:
    loaded = load(tmp_path, dtype=torch.float64)
    sets = make_sets(loaded)
    mix = ThetaMix(loaded.model, sets)
    mix.set_weights(weights)
    with torch.inference_mode():
        found = loaded.model(torch.tensor([IDS]))[0, -1]
    assert distance(found, dense_logits(load(tmp_path, dtype=torch.float64), sets, weights)) < 1e-5
    wrong = {"a": 1.01, "b": -0.5}
    assert distance(found, dense_logits(load(tmp_path, dtype=torch.float64), sets, wrong)) > 1e-3  # control


# --- switched while it runs, each bit as with the sum put on by itself


@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_compiled_decoder_follows(tmp_path: Path, int8_activations: bool, threads: int) -> None:
    how = {"repack": True, "int8_activations": int8_activations}
    loaded, plain = load(tmp_path, **how), load(tmp_path, **how)
    sets = make_sets(loaded)
    mix = ThetaMix(loaded.model, sets)
    made = make_decoder(loaded.model, 64)
    assert isinstance(made, CompiledDecoder)
    made = CompiledDecoder(loaded.model, 64, threads)
    program = made._many.program
    results = []
    for weights in (*WEIGHTS, WEIGHTS[0]):
        mix.set_weights(weights)
        made.length = 0
        found = torch.stack([made.prefill(IDS).clone(), made.step(7).clone()])
        alone = CompiledDecoder(put(plain, total(sets, weights)).model, 64, threads)
        assert torch.equal(found, torch.stack([alone.prefill(IDS).clone(), alone.step(7).clone()])), weights
        results.append(found)
    assert made._many.program is program  # nothing was made anew
    assert torch.equal(results[0], results[-1])
    assert distance(results[0], results[1]) > 0.01
    put(plain, None)
    assert torch.equal(CompiledDecoder(plain.model, 64, threads).prefill(IDS), results[2][0])  # {} is no Θ at all


def test_weights_change_between_tokens(tmp_path: Path) -> None:
    """What is in the cache stays: the tokens behind it feel the other weights."""
    loaded = load(tmp_path, repack=True)
    mix = ThetaMix(loaded.model, make_sets(loaded))
    made, eager = make_decoder(loaded.model, 64), EagerDecoder(loaded.model, 64)
    for weights, token in zip(WEIGHTS, IDS, strict=False):
        mix.set_weights(weights)
        assert distance(made.step(token), eager.step(token)) < 3e-4


def test_a_session_keeps_its_decoder_and_nothing_of_what_was_computed(tmp_path: Path) -> None:
    loaded = load(tmp_path, repack=True)
    mix = ThetaMix(loaded.model, make_sets(loaded))
    session = Session(loaded.model, 64)
    decoder = session.decoder
    found = []
    for weights in ({"a": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 1.0}):
        mix.set_weights(weights)
        assert session.reuse(IDS) == 0
        found.append(session.prefill(IDS).clone())
    assert session.decoder is decoder
    assert torch.equal(found[0], found[2])
    assert distance(found[0], found[1]) > 0.01
    assert session.reuse(IDS) == len(IDS) - 1  # control: nothing was switched


def test_a_scorer_follows(tmp_path: Path) -> None:
    loaded, plain = load(tmp_path), load(tmp_path)
    sets = make_sets(loaded)
    mix = ThetaMix(loaded.model, sets)
    scorer = CompiledScorer(loaded.model, 4, CHUNKS.shape[1], 2)
    for weights in WEIGHTS:
        mix.set_weights(weights)
        put(plain, total(sets, weights))
        alone = CompiledScorer(plain.model, 4, CHUNKS.shape[1], 2)
        assert torch.equal(scorer.score(CHUNKS), alone.score(CHUNKS)), weights
        assert torch.equal(scorer.score_arms(CHUNKS)[0], alone.score_arms(CHUNKS)[0])
    assert distance(scorer.score_arms(CHUNKS)[0], scorer.score(CHUNKS)) > 0.01


def test_a_fixed_step_follows(tmp_path: Path) -> None:
    """As a CUDA graph needs it: the same operations on the same memory."""
    loaded, plain = load(tmp_path, dtype=torch.float64), load(tmp_path, dtype=torch.float64)
    sets = make_sets(loaded)
    mix = ThetaMix(loaded.model, sets)
    step = StaticDecoder(loaded.model, 16, TorchOps(star=False), TorchOps(star=True))
    places = [place.down.data_ptr() for place in step._plan.places]
    for weights in WEIGHTS:
        mix.set_weights(weights)
        step.length = 0
        found = torch.stack([step.step(token) for token in IDS[:4]])
        with torch.inference_mode():
            expected = put(plain, total(sets, weights)).model(torch.tensor([IDS[:4]]))[0]
        assert distance(found, expected) < 1e-4, weights
    assert [place.down.data_ptr() for place in step._plan.places] == places
    mix.set_weights({"a": 1.0})
    with torch.inference_mode():
        assert distance(step.step(5), put(plain, None).model(torch.tensor([[*IDS[:4], 5]]))[0, -1]) > 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_follows_on_a_gpu(tmp_path: Path) -> None:
    loaded = load(tmp_path, device="cuda", dtype=torch.float32, repack=True)
    plain = load(tmp_path)
    sets = make_sets(plain)
    mix = ThetaMix(loaded.model, sets)
    graph = CudaGraphDecoder(loaded.model, 64)
    for weights in (*WEIGHTS, WEIGHTS[0]):
        mix.set_weights(weights)
        graph.length = 0
        with torch.inference_mode():
            expected = put(plain, total(sets, weights)).model(torch.tensor([IDS]))[0]
        assert distance(graph.prefill(IDS[:30]).cpu(), expected[29].float()) < 2e-2
        for i in range(30, 36):
            assert distance(graph.step(IDS[i]).cpu(), expected[i].float()) < 2e-2


# --- what it costs, counted


def test_what_is_off_is_not_read_and_memory_is_counted(tmp_path: Path) -> None:
    loaded = load(tmp_path, repack=True, int8_activations=True)
    sets = make_sets(loaded)
    mix = ThetaMix(loaded.model, sets)
    made = make_decoder(loaded.model, 64)
    made.prefill(IDS)
    assert mix.nbytes == sum(one.nbytes for one in sets.values())

    def terms() -> list[int]:
        made.length = 0
        made.step(1)
        return [int(step.terms[0]) for layer, step in made.stars]

    def tiles() -> dict[str, int]:
        return {name: layer.compiled.tiles.ctypes.data for name, layer in loaded.model.star_linears().items()}

    where = tiles()
    mix.set_weights({"a": 1.0, "b": 0.5})
    assert set(terms()) == {2 * (3 + 5)}
    assert mix.theta.nbytes == sets["a"].nbytes + sets["b"].nbytes
    mix.set_weights({"a": 1.0})
    assert set(terms()) == {2 * 3}
    mix.set_weights({"c": 1.0})
    assert set(terms()) == {0, 2 * 2}  # not on every layer
    mix.set_weights({})
    assert set(terms()) == {0}
    assert tiles() == where  # no weight was packed again
    for name, layer in loaded.model.star_linears().items():
        star = layer.compiled.star
        assert star.room == sum(one.layers[name].rank for one in sets.values() if name in one.layers)


def test_other_weights_of_the_same_sets_move_no_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(tmp_path, repack=True)
    mix = ThetaMix(loaded.model, make_sets(loaded))
    made = make_decoder(loaded.model, 64)
    mix.set_weights({"a": 1.0, "b": 0.5})
    first = made.step(1).clone()
    laid_out: list[object] = []
    monkeypatch.setattr("nkat.kernels.cpu.linear.CpuStar._lay_out", lambda star, theta: laid_out.append(star))
    mix.set_weights({"a": 0.5, "b": 1.5})
    made.length = 0
    assert distance(made.step(1), first) > 1e-3
    assert not laid_out
    mix.set_weights({"a": 0.5})
    made.length = 0
    made.step(1)
    assert laid_out  # control


# --- mixtures of experts, mistakes


@pytest.mark.parametrize(("arch", "options"), MIXTURE_FAMILIES[:1])
def test_experts_are_decoded_an_operation_at_a_time_from_the_start(
    tmp_path: Path, arch: str, options: dict[str, Any]
) -> None:
    """Also while theirs is off, as the compiled program has no place for it."""
    path = write_tiny_model(tmp_path / "moe.gguf", arch, **options)
    loaded = load_model(path, repack=True)
    name = "blk.0.ffn_down_exps.weight"
    count, m, n = loaded.tensors[name].shape
    generator = torch.Generator().manual_seed(0)
    each = [quantise_factors(*torch.randn(2, max(m, n), 2, generator=generator)) for _ in range(count)]
    experts = ThetaSet({name: of_experts(each)}, 0.5, "weight", 0, "0" * 64, "tiny", 1)
    mix = ThetaMix(loaded.model, {"attention": make_set(loaded, 2, 0.9, 1, "attn"), "experts": experts})
    mix.set_weights({"attention": 1.0})
    made = make_decoder(loaded.model, 64)
    assert isinstance(made, EagerDecoder)
    without = made.prefill(IDS).clone()
    mix.set_weights({"attention": 1.0, "experts": 1.0})
    made.length = 0
    assert distance(made.prefill(IDS), without) > 1e-3
    mix.set_weights({"attention": 1.0})
    compiled = CompiledDecoder(loaded.model, 2 * len(IDS), 1)
    compiled.prefill(IDS)
    mix.set_weights({"experts": 0.5})
    with pytest.raises(NKATError, match="make a new one"):
        compiled.prefill(IDS)


def test_a_decoder_that_was_made_before_the_mix_has_no_room(tmp_path: Path) -> None:
    loaded = load(tmp_path, repack=True)
    made = make_decoder(loaded.model, 64)
    mix = ThetaMix(loaded.model, make_sets(loaded))
    made.step(1)  # all are off
    mix.set_weights({"a": 1.0})
    assert not made.can_follow()
    with pytest.raises(NKATError, match="make a new one"):
        made.step(1)
    mix.set_weights({})
    assert made.can_follow()
    made.step(1)


def test_mistakes_change_nothing(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    sets = make_sets(loaded)
    mix = ThetaMix(loaded.model, sets)
    mix.set_weights({"a": 1.0})
    before = mix.theta
    for weights, gamma, message in (
        ({"x": 1.0}, None, "no Θ named 'x', only 'a', 'b', 'c'"),
        ({"a": float("nan")}, None, "finite"),
        ({"a": 1.0, "b": 1.0}, 1.5, "gamma"),
        ({"a": 1e300, "b": 1.0}, None, "too large"),
    ):
        with pytest.raises(NKATError, match=message):
            mix.set_weights(weights, gamma)
    assert mix.theta is before
    assert mix.weights == {"a": 1.0, "b": 0.0, "c": 0.0}
    large = Theta(torch.ones(999, 1, dtype=torch.int8), torch.ones(999, 1, dtype=torch.int8), torch.ones(2, 1))
    with pytest.raises(NKATError, match="does not fit"):
        ThetaMix(loaded.model, {"d": ThetaSet({"output.weight": large}, 0.9, "weight", 0, "0" * 64, "tiny", 1)})


def test_gamma_takes_the_place_of_every_ones_own(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    mix = ThetaMix(loaded.model, make_sets(loaded))
    mix.set_weights({"a": 1.0, "c": 1.0}, gamma=0.5)
    assert loaded.model.gamma == mix.theta.gamma == 0.5
    mix.set_weights({"a": 1.0, "c": 1.0}, gamma=1.0)
    with torch.inference_mode():
        found = loaded.model(torch.tensor([IDS]))
        mix.set_weights({})
        assert torch.equal(found, loaded.model(torch.tensor([IDS])))
