"""Scores of a text's tokens: the compiled program against the model's own forward pass and against float64."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from nkat.engine.compiled_scorer import CompiledScorer
from nkat.engine.scoring import EagerScorer, KeptScorer, make_scorer
from nkat.kernels.cpu import batch, matmul
from nkat.kernels.cpu.matmul import EXACT, Rounding
from nkat.lm.load import LoadedModel, load_model
from nkat.theta.algebra import quantise_factors
from tests.engine.test_compiled import FAMILIES
from tests.support.tiny_models import write_tiny_model

pytestmark = pytest.mark.isa

CONTEXT = 37  # no multiple of a panel or of a block of keys
CHUNKS = torch.randint(0, 100, (3, CONTEXT), generator=torch.Generator().manual_seed(0))
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def load(folder: Path, family: str = "llama", qtype: Any = None, **options: Any) -> LoadedModel:
    arch, changes = FAMILIES[family]
    changes = changes | ({} if qtype is None else {"qtype": qtype})
    return load_model(write_tiny_model(folder / "tiny.gguf", arch, **changes), **options)


def compiled(loaded: LoadedModel, count: int = 3, threads: int = 2) -> CompiledScorer:
    return CompiledScorer(loaded.model, count, CONTEXT, threads)


def add_theta(loaded: LoadedModel, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    loaded.model.set_thetas(
        {
            name: quantise_factors(*torch.randn(2, max(layer.shape), 3, generator=generator))
            for name, layer in loaded.model.star_linears().items()
        }
    )


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_forward_pass(tmp_path, family):
    loaded = load(tmp_path, family)
    scores = make_scorer(loaded.model, 3, CONTEXT)
    assert isinstance(scores, CompiledScorer)
    found, expected = scores.score(CHUNKS), EagerScorer(loaded.model).score(CHUNKS)
    assert found.shape == expected.shape == (3, CONTEXT - 1 - CONTEXT // 2)
    assert distance(found, expected) < 1e-4
    assert abs(found.mean() / expected.mean() - 1) < 1e-5
    assert distance(found.roll(1, dims=0), expected) > 0.1


@pytest.fixture
def inputs_as_they_are(monkeypatch):
    """In float32 on every processor."""
    monkeypatch.setattr(matmul, "wide_rounding", lambda qtype: EXACT)


def test_scores_equal_float64(tmp_path, inputs_as_they_are):
    exact = EagerScorer(load(tmp_path, qtype=Q8_0, dtype=torch.float64).model).score(CHUNKS)
    assert distance(compiled(load(tmp_path, qtype=Q8_0)).score(CHUNKS), exact) < 1e-4


def test_inputs_of_three_bytes_score_as_float32(tmp_path, monkeypatch):
    """A token's score as near as sixteen bits are, a hundred times nearer than eight; the mean nearer still."""
    monkeypatch.setattr(matmul, "wide_rounding", lambda qtype: Rounding(32, 32, digits=3))
    exact = EagerScorer(load(tmp_path, qtype=Q8_0, dtype=torch.float64).model).score(CHUNKS)
    off = compiled(load(tmp_path, qtype=Q8_0)).score(CHUNKS) - exact
    of_eight_bits = compiled(load(tmp_path, qtype=Q8_0, int8_activations=True)).score(CHUNKS) - exact
    assert 0 < off.abs().max() < 3e-3
    assert of_eight_bits.square().mean() > 100**2 * off.square().mean()
    assert abs(off.mean() / exact.mean()) < 2e-5


def test_scores_with_rounded_inputs(tmp_path):
    """Which input tips over to its neighbour depends on the last bit before it: near, but not equal."""
    rounded = load(tmp_path, qtype=Q8_0, int8_activations=True)
    found, expected = compiled(rounded).score(CHUNKS), EagerScorer(rounded.model).score(CHUNKS)
    unrounded = compiled(load(tmp_path, qtype=Q8_0)).score(CHUNKS)
    own = float((expected - unrounded).square().mean().sqrt())
    assert 1e-4 < own < 0.5
    assert float((found - expected).square().mean().sqrt()) < own


@pytest.mark.parametrize("int8_activations", [False, True])
def test_what_a_score_does_not_depend_on(tmp_path, int8_activations):
    """Bit by bit: threads, the chunks beside it, whether weights were repacked, and what was scored before."""
    loaded = load(
        tmp_path, "gemma3 window", qtype=Q8_0 if int8_activations else None, int8_activations=int8_activations
    )
    add_theta(loaded)
    loaded.model.set_gamma(0.9)
    together = compiled(loaded).score(CHUNKS)
    for threads in (1, 3):
        assert torch.equal(compiled(loaded, threads=threads).score(CHUNKS), together)
    one = compiled(loaded, 1)
    alone = [one.score(chunk[None]) for chunk in CHUNKS]
    assert torch.equal(torch.cat(alone), together)
    several = compiled(loaded, 5)
    assert torch.equal(several.score(CHUNKS[1:]), together[1:])
    assert torch.equal(several.score(CHUNKS), together)
    for layer in loaded.model.star_linears().values():
        layer.repack()
    assert torch.equal(compiled(loaded).score(CHUNKS), together)
    assert not torch.equal(compiled(loaded).score(CHUNKS.flip(0)), together)


def test_the_strength_follows_the_model(tmp_path):
    loaded = load(tmp_path)
    plain = compiled(loaded).score(CHUNKS)
    add_theta(loaded)
    scorer = compiled(loaded)
    for gamma in (None, 0.9, 1.0, 0.99):
        loaded.model.set_gamma(gamma)
        found = scorer.score(CHUNKS)
        assert distance(found, EagerScorer(loaded.model).score(CHUNKS)) < 3e-4
        assert torch.equal(found, plain) == (gamma in (None, 1.0))


@pytest.mark.parametrize("int8_activations", [False, True])
def test_both_arms_in_one_pass(tmp_path, int8_activations, inputs_as_they_are):
    """Bit by bit what each arm gives by itself, wherever a panel of tokens has some of both."""
    loaded = load(tmp_path, qtype=Q8_0, int8_activations=int8_activations)
    assert len(CHUNKS) * CONTEXT % batch.batch_tokens()
    plain = compiled(loaded).score(CHUNKS)
    assert torch.equal(compiled(loaded, 6).score_arms(CHUNKS), torch.stack((plain, plain)))  # there is no Θ yet
    add_theta(loaded)
    loaded.model.set_gamma(0.9)
    scorer = compiled(loaded, 7)
    with_theta = scorer.score(CHUNKS)
    for threads in (1, 3):
        assert torch.equal(compiled(loaded, 6, threads).score_arms(CHUNKS), torch.stack((plain, with_theta)))
    assert torch.equal(scorer.score_arms(CHUNKS[:2]), torch.stack((plain[:2], with_theta[:2])))
    assert torch.equal(scorer.score(CHUNKS), with_theta)  # it forgets which tokens did not feel Θ
    assert distance(plain, with_theta) > 1e-3
    if not int8_activations:
        expected = EagerScorer(loaded.model).score_arms(CHUNKS)
        assert loaded.model.gamma == 0.9
        assert distance(scorer.score_arms(CHUNKS), expected) < 3e-4


def test_the_vocabulary_goes_in_blocks(tmp_path, monkeypatch):
    """Several blocks, the last of them not full, give what one does; a logit that is no number shows in the score."""
    loaded = load(tmp_path)
    whole = compiled(loaded).score(CHUNKS)
    monkeypatch.setattr("nkat.engine.likelihoods._BLOCK_TILES", 2)
    blocks = compiled(loaded)
    assert distance(blocks.score(CHUNKS), whole) < 1e-5
    assert loaded.config.vocab_size % 32
    loaded.model.output_norm[3] = float("nan")
    assert not torch.isfinite(compiled(loaded).score(CHUNKS)).any()


@pytest.mark.parametrize("int8_activations", [False, True])
def test_columns_are_unpacked_in_blocks_too(tmp_path, monkeypatch, int8_activations, inputs_as_they_are):
    """A block that holds fewer columns than the layers have: the sums go on in the output, in the same order."""
    loaded = load(tmp_path, qtype=Q8_0, int8_activations=int8_activations)
    whole = compiled(loaded).score(CHUNKS)
    monkeypatch.setattr(batch, "_block_columns", lambda rounding: 32)
    batch.batch_kernel.cache_clear()
    blocks = compiled(loaded).score(CHUNKS)
    batch.batch_kernel.cache_clear()
    assert torch.equal(blocks, whole)


def test_other_models_score_by_themselves(tmp_path):
    """In another precision, or with a layer that something else stands in for."""
    assert isinstance(make_scorer(load(tmp_path, dtype=torch.float64).model, 1, CONTEXT), EagerScorer)
    loaded = load(tmp_path)
    loaded.model.blocks[1].linears["ffn_up"] = torch.nn.Linear(64, 96)
    assert isinstance(make_scorer(loaded.model, 1, CONTEXT), EagerScorer)


def test_a_kept_scorer_is_made_once_for_each_theta(tmp_path, monkeypatch):
    """Whatever the strength and the number of chunks; and its figures are those of one made anew."""
    loaded = load(tmp_path)
    made: list[int] = []

    def counting(model: Any, batch: int, context: int) -> Any:
        made.append(batch)
        return make_scorer(model, batch, context)

    monkeypatch.setattr("nkat.engine.scoring.make_scorer", counting)
    kept = KeptScorer(least=2)

    def score(count: int) -> torch.Tensor:
        found = kept(loaded.model, count, CONTEXT).score(CHUNKS[:count])
        assert torch.equal(found, make_scorer(loaded.model, count, CONTEXT).score(CHUNKS[:count]))
        return found

    add_theta(loaded)
    loaded.model.set_gamma(0.97)
    weak = score(1)
    loaded.model.set_gamma(0.90)
    assert not torch.equal(score(2)[:1], weak)
    loaded.model.set_gamma(None)
    score(1)
    thetas = {name: layer.theta for name, layer in loaded.model.star_linears().items()}
    loaded.model.set_thetas(thetas)  # the very same: nothing is stale
    score(1)
    assert made == [2]
    add_theta(loaded, seed=1)
    loaded.model.set_gamma(0.97)
    assert not torch.equal(score(1), weak)
    assert made == [2, 2]
    score(3)  # more than there is room for
    assert made == [2, 2, 3]
