"""Two predictions side by side: the compiled program against torch in float64, and against the scorer bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from nkat.engine import likelihoods
from nkat.engine.compared import Compared
from nkat.engine.comparing import EagerComparer, make_comparer
from nkat.engine.compiled_comparer import CompiledComparer
from nkat.engine.log_probs import heads_of, pack, row_words, unpack
from nkat.engine.scoring import make_scorer
from nkat.kernels.cpu.agreed import STORED_FLOOR
from nkat.lm.load import LoadedModel, load_model
from tests.engine.test_scoring import CHUNKS, CONTEXT, add_theta, distance
from tests.support.tiny_models import write_tiny_model

pytestmark = pytest.mark.isa

SCORED = CONTEXT - 1 - CONTEXT // 2
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def load(folder: Path, name: str = "tiny", arch: str = "llama", seed: int = 0, **options: Any) -> LoadedModel:
    kept = {k: options.pop(k) for k in ("dtype", "int8_activations") if k in options}
    return load_model(write_tiny_model(folder / f"{name}.gguf", arch, seed, **options), **kept)


def with_theta(loaded: LoadedModel, seed: int = 0) -> LoadedModel:
    add_theta(loaded, seed)
    loaded.model.set_gamma(0.9)
    return loaded


def oracle(base: torch.Tensor, own: torch.Tensor, chunks: torch.Tensor = CHUNKS) -> Compared:
    """From logits [B, context, V] in float64."""
    p, q = (x[:, CONTEXT // 2 : -1].double().log_softmax(-1) for x in (base, own))
    targets = chunks[:, CONTEXT // 2 + 1 :, None]
    base_nll, nll = (-x.gather(2, targets)[..., 0] for x in (p, q))
    return Compared(base_nll, nll, (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1))


def near(found: Compared, expected: Compared, tolerance: float = 1e-4) -> bool:
    pairs = ((found.base_nll, expected.base_nll), (found.nll, expected.nll), (found.kl, expected.kl))
    return all(distance(a, b) < tolerance for a, b in pairs) and torch.equal(found.same_top, expected.same_top)


@torch.inference_mode()
def arms(loaded: LoadedModel, chunks: torch.Tensor = CHUNKS) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits without Θ and with it."""
    gamma = loaded.model.gamma
    loaded.model.set_gamma(None)
    without = loaded.model(chunks)
    loaded.model.set_gamma(gamma)
    return without, loaded.model(chunks)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen3moe", "qwen35"])
def test_theta_beside_none(tmp_path, arch):
    """gemma2 has a cap on its logits; of a mixture fewer sequences go together than are asked for."""
    exact = with_theta(load(tmp_path, arch=arch, dtype=torch.float64))
    expected = oracle(*arms(exact))
    loaded = with_theta(load(tmp_path, arch=arch))
    comparer = make_comparer(loaded.model, 3, CONTEXT)
    assert isinstance(comparer, CompiledComparer)
    found, hidden = comparer.beside_itself(CHUNKS)
    assert found.kl.shape == (3, SCORED)
    assert near(found, expected)
    assert expected.kl.mean() > 0.01
    assert not expected.same_top.all()
    assert near(EagerComparer(loaded.model).beside_itself(CHUNKS)[0], expected)
    again, _ = comparer.beside_itself(CHUNKS, hidden)  # the base is not computed again
    assert all(torch.equal(getattr(again, name), getattr(found, name)) for name in Compared.__slots__)
    others, _ = comparer.beside_itself(CHUNKS, hidden.roll(1, 0))
    assert not torch.equal(others.base_nll, found.base_nll)


@pytest.mark.parametrize("int8_activations", [False, True])
def test_scores_are_the_scorers_bit_by_bit(tmp_path, int8_activations):
    """And do not depend on threads, nor on the chunks beside it."""
    loaded = with_theta(load(tmp_path, qtype=Q8_0, int8_activations=int8_activations))
    other = load(tmp_path, "other", seed=1, qtype=Q8_0, int8_activations=int8_activations)
    without, own = make_scorer(loaded.model, 6, CONTEXT).score_arms(CHUNKS)
    reference = make_scorer(other.model, 3, CONTEXT).score(CHUNKS)
    found, _ = make_comparer(loaded.model, 3, CONTEXT).beside_itself(CHUNKS)
    assert torch.equal(found.base_nll, without)
    assert torch.equal(found.nll, own)
    both = make_comparer(loaded.model, 3, CONTEXT, other.model).beside(CHUNKS, 2)
    assert [torch.equal(arm.base_nll, reference) for arm in both] == [True, True]
    assert torch.equal(both[0].nll, without)
    assert torch.equal(both[1].nll, own)
    for threads, batch in ((1, 1), (3, 2)):
        comparer = CompiledComparer(loaded.model, batch, CONTEXT, threads, other.model)
        parts = [comparer.beside(part, 2)[1] for part in CHUNKS.split(batch)]
        assert torch.equal(Compared.joined(parts).kl, both[1].kl)
        parts = [comparer.beside_itself(part)[0] for part in CHUNKS.split(batch)]
        assert torch.equal(Compared.joined(parts).kl, found.kl)
    assert not torch.equal(both[0].kl, both[1].kl)


def test_another_model_as_the_base(tmp_path):
    loaded, other = with_theta(load(tmp_path)), load(tmp_path, "other", seed=1, blocks=1)
    with torch.inference_mode():
        base = other.model(CHUNKS)
    expected = [oracle(base, arm) for arm in arms(loaded)]
    for comparer in (make_comparer(loaded.model, 2, CONTEXT, other.model), EagerComparer(loaded.model, other.model)):
        parts = [comparer.beside(part, 2) for part in CHUNKS.split(2)]
        found = [Compared.joined(list(arm)) for arm in zip(*parts, strict=True)]
        assert all(near(a, b) for a, b in zip(found, expected, strict=True))
        alone = comparer.beside(CHUNKS[:2], 1)
        assert torch.equal(alone[0].kl, found[1].kl[:2])
    assert distance(expected[0].kl, expected[1].kl) > 0.01


def test_nothing_diverges_from_itself(tmp_path):
    """Without Θ the divergence is 0, and with one it is above: as a mean of logarithms it cannot be below."""
    loaded = load(tmp_path)
    add_theta(loaded)
    loaded.model.set_gamma(None)
    found, _ = make_comparer(loaded.model, 3, CONTEXT).beside_itself(CHUNKS)
    assert found.kl.abs().max() < 1e-6
    assert found.same_top.all()
    assert torch.equal(found.base_nll, found.nll)
    for gamma in (0.999, 0.99, 0.9):
        loaded.model.set_gamma(gamma)
        diverged, _ = make_comparer(loaded.model, 3, CONTEXT).beside_itself(CHUNKS)
        assert diverged.kl.min() > -1e-6
        assert diverged.kl.mean() > found.kl.mean()
        found = diverged


# --- rows of log-probabilities


def test_rows_of_log_probabilities():
    """By hand: the reach of 16, the numbers' ends, an odd vocabulary, and logits that are all alike."""
    logits = torch.tensor([[0.0, 4.0, -20.0, 1.0, -11.9], [2.0, 2.0, 2.0, 2.0, 2.0]])
    rows = pack(logits)
    assert rows.shape == (2, row_words(5)) == (2, 10)
    assert rows[0, 4:9].tolist() == [round(12 / 16 * 65535), 65535, 0, round(13 / 16 * 65535), 410]
    assert rows[1, 4:].tolist() == [0] * 6
    step, lowest = heads_of(rows)[0]
    assert step == np.float32(16 / 65535)
    assert lowest == pytest.approx(-16 - float(torch.logsumexp(logits[0] - 4.0, 0)), rel=1e-6)
    exact = logits.double().log_softmax(1)
    likely = exact > STORED_FLOOR + 1e-3
    assert float((unpack(rows, 5).double() - exact)[likely].abs().max()) < 1.3e-4
    assert unpack(rows, 5)[0, 2] == pytest.approx(float(lowest))  # and not −24
    assert unpack(rows, 5)[1, 0] == pytest.approx(-np.log(5), abs=1e-6)


def test_rows_that_are_stored(tmp_path):
    """Those of the compiled program are those of the logits, but for what float32 rounds otherwise."""
    loaded = with_theta(load(tmp_path))
    comparer = make_comparer(loaded.model, 3, CONTEXT)
    assert isinstance(comparer, CompiledComparer)
    nll, rows = comparer.stored(CHUNKS[:2])
    vocabulary = loaded.config.vocab_size
    assert rows.shape == (2 * SCORED, row_words(vocabulary))
    assert torch.equal(nll, make_scorer(loaded.model, 6, CONTEXT).score_arms(CHUNKS[:2])[0])
    expected_nll, expected = EagerComparer(loaded.model).stored(CHUNKS[:2])
    assert distance(nll, expected_nll) < 1e-4
    assert distance(unpack(rows, vocabulary), unpack(expected, vocabulary)) < 5e-4
    assert distance(unpack(rows, vocabulary), unpack(expected[::-1].copy(), vocabulary)) > 0.1
    kept = rows.copy()
    _, others = comparer.stored(CHUNKS[1:])  # of fewer or other chunks nothing is left over
    assert np.array_equal(others[:SCORED], kept[SCORED:])


def test_stored_rows_as_the_base(tmp_path):
    """Against what the rows say in float64: what is very unlikely there is left out."""
    loaded, other = (with_theta(load(tmp_path, name, seed=seed)) for seed, name in enumerate("ab"))
    vocabulary = loaded.config.vocab_size
    other.model.output_norm *= 2.0  # so that much is very unlikely
    _, rows = make_comparer(other.model, 3, CONTEXT).stored(CHUNKS)
    base = unpack(rows, vocabulary).double()
    assert 0.05 < (base <= STORED_FLOOR).double().mean() < 0.9
    own = [x[:, CONTEXT // 2 : -1].flatten(0, 1).double().log_softmax(1) for x in arms(loaded)]
    targets = CHUNKS[:, CONTEXT // 2 + 1 :].reshape(-1, 1)
    for comparer in (make_comparer(loaded.model, 3, CONTEXT), EagerComparer(loaded.model)):
        for found, arm in zip(comparer.beside(CHUNKS, 2, rows), own, strict=True):
            weight = torch.where(base > STORED_FLOOR, base.exp(), 0.0)
            assert distance(found.kl.flatten(), (weight * (base - arm)).sum(1)) < 1e-4
            assert distance(found.base_nll.flatten(), -base.gather(1, targets)[:, 0]) < 1e-5
            assert torch.equal(found.same_top.flatten(), base.argmax(1) == arm.argmax(1))


@pytest.mark.parametrize("tiles", [1, 3, 5])
def test_blocks_of_the_vocabulary(tmp_path, monkeypatch, tiles):
    """However many ids are in a block, the last one's end among them, the figures are the same."""
    loaded, other = with_theta(load(tmp_path, arch="gemma2")), load(tmp_path, "other", arch="gemma2", seed=1)
    assert loaded.config.vocab_size % 16

    def measured() -> list[Compared]:
        comparer = CompiledComparer(loaded.model, 3, CONTEXT, 2, other.model)
        _, rows = comparer.stored(CHUNKS)
        rows = rows.copy()
        return [comparer.beside_itself(CHUNKS)[0], *comparer.beside(CHUNKS, 2), *comparer.beside(CHUNKS, 2, rows)]

    whole = measured()
    monkeypatch.setattr(likelihoods, "_BLOCK_TILES", tiles)
    assert all(near(a, b) for a, b in zip(measured(), whole, strict=True))
