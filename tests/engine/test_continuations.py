"""Continuations that share their beginnings: against the model's own forward pass, one sequence at a time."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from nkat.engine import continuations, tree_scorer
from nkat.engine.continuations import Continuation, Prediction, predict
from nkat.engine.scoring import make_scorer
from nkat.engine.tree import batches, in_common, token_tree
from nkat.errors import NKATError
from nkat.lm.load import LoadedModel, load_model
from tests.engine.test_compiled import FAMILIES
from tests.engine.test_scoring import add_theta
from tests.support.tiny_models import write_tiny_model

pytestmark = pytest.mark.isa

BASE = [(29 * i + 5) % 97 for i in range(60)]
# Questions with answers of several lengths; one that goes on from another; what is asked twice; single tokens.
CONTINUATIONS = [
    *(Continuation((*BASE[:37], *answer), 37) for answer in ((3,), (4,), (3, 9, 11), (3, 9, 12), tuple(range(20)))),
    *(Continuation((*BASE[:37], 50, 51, *answer), 39) for answer in ((1, 2), (1, 2, 3), (1, 2))),
    Continuation(tuple(BASE), 1),
    Continuation(tuple(BASE[::-1]), 30),
    Continuation((7, 8), 1),
    Continuation((*BASE[:16], 5, 6), 16),  # parts a segment where a block of keys ends
]


def load(folder: Path, family: str = "llama", qtype: Any = None, **options: Any) -> LoadedModel:
    arch, changes = FAMILIES[family]
    changes = changes | ({} if qtype is None else {"qtype": qtype})
    return load_model(write_tiny_model(folder / "tiny.gguf", arch, **changes), **options)


def found_in(loaded: LoadedModel, continuations: list[Continuation] | None = None, **options: Any) -> list[Prediction]:
    """In the order of the continuations."""
    continuations = CONTINUATIONS if continuations is None else continuations
    found = dict(predict(loaded.model, continuations, **options))
    assert len(found) == len(continuations)
    return [found[i] for i in range(len(continuations))]


@torch.inference_mode()
def expected_of(loaded: LoadedModel, each: Continuation) -> Prediction:
    """By a forward pass of the whole sequence."""
    logits = loaded.model(torch.tensor([each.read]))[0, each.first - 1 :].double()
    targets = torch.tensor(each.tokens[each.first :])
    chosen = logits.log_softmax(dim=1)[torch.arange(len(targets)), targets]
    return Prediction(-chosen.numpy(), (logits.argmax(dim=1) == targets).numpy())


def distance(a: list[Prediction], b: list[Prediction]) -> float:
    assert [each.nll.shape for each in a] == [each.nll.shape for each in b]
    return max(float(np.abs(x.nll - y.nll).max()) for x, y in zip(a, b, strict=True))


def same_best(a: list[Prediction], b: list[Prediction]) -> bool:
    return all(np.array_equal(x.best, y.best) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_equal_the_forward_pass(tmp_path, family):
    loaded = load(tmp_path, family)
    # a greedy continuation, so that both answers of `best` are met
    greedy = [*BASE[:20]]
    with torch.inference_mode():
        for _ in range(3):
            greedy.append(int(loaded.model(torch.tensor([greedy]))[0, -1].argmax()))
    asked = [*CONTINUATIONS, Continuation(tuple(greedy), 20)]
    found, expected = found_in(loaded, asked), [expected_of(loaded, each) for each in asked]
    assert distance(found, expected) < 3e-4  # of about 10: without vector instructions sums have another order again
    assert same_best(found, expected)
    assert found[-1].best.all()
    assert not all(each.best.all() for each in found)
    assert distance(found[1:2], expected[:1]) > 0.01  # the control: another answer to the same question


@pytest.mark.parametrize("int8_activations", [False, True])
def test_a_sequence_by_itself_is_scored_as_in_a_perplexity(tmp_path, int8_activations):
    """Bit by bit."""
    loaded = load(tmp_path, "gemma3 window", qtype=gguf.GGMLQuantizationType.Q8_0, int8_activations=int8_activations)
    chunk = torch.tensor([BASE])
    plain = make_scorer(loaded.model, 1, len(BASE)).score(chunk)[0].numpy()
    (found,) = found_in(loaded, [Continuation(tuple(BASE), len(BASE) // 2 + 1)])
    assert np.array_equal(found.nll, plain)


@pytest.mark.parametrize("options", [{"dtype": torch.float64}, {}])
def test_without_kernels(tmp_path, monkeypatch, options):
    """An operation at a time, each sequence from where it differs from the one before."""
    loaded = load(tmp_path, "gemma3 window", **options)
    monkeypatch.setattr("nkat.engine.continuations.has_kernels", lambda model: False)
    found = found_in(loaded)
    assert distance(found, [expected_of(loaded, each) for each in CONTINUATIONS]) < 1e-4


@pytest.mark.parametrize("kernels", [False, True])
def test_a_recurrent_model_goes_on_from_states_that_it_kept(tmp_path, monkeypatch, kernels):
    """It computes no token more than a model that can forget any number of them."""
    monkeypatch.setattr("nkat.engine.chain_scorer._PASS_TOKENS", 16)
    computed = {}
    for arch, has_kernels in (("llama", False), ("qwen35", kernels)):
        monkeypatch.setattr("nkat.engine.continuations.has_kernels", lambda model, has=has_kernels: has)
        loaded = load_model(write_tiny_model(tmp_path / "tiny.gguf", arch))
        expected = [expected_of(loaded, each) for each in CONTINUATIONS]
        make, counts = continuations._make_reader, []

        def watched(*arguments, make=make, counts=counts):
            reader = make(*arguments)
            read = reader.read
            reader.read = lambda tokens: counts.append(len(tokens)) or read(tokens)
            return reader

        with monkeypatch.context() as patch:
            patch.setattr(continuations, "_make_reader", watched)
            assert distance(found_in(loaded), expected) < 3e-4
        computed[arch] = sum(counts)
    assert computed["qwen35"] == computed["llama"] < sum(map(len, {each.read for each in CONTINUATIONS})) - 100


@pytest.mark.parametrize("int8_activations", [False, True])
def test_what_a_prediction_does_not_depend_on(tmp_path, monkeypatch, int8_activations):
    """Threads: bit by bit. Order, and what is asked beside it: up to rounding, which is where a segment is parted."""
    qtype = gguf.GGMLQuantizationType.Q8_0 if int8_activations else None
    loaded = load(tmp_path, qtype=qtype, int8_activations=int8_activations)
    add_theta(loaded)
    loaded.model.set_gamma(0.9)
    together = found_in(loaded)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        again = found_in(loaded)
        assert all(np.array_equal(a.nll, b.nll) for a, b in zip(again, together, strict=True))
    torch.set_num_threads(before)
    # rounding to 8 bits can tip over where the last bit before it differs
    tolerance = 0.05 if int8_activations else 1e-4
    assert distance(found_in(loaded, CONTINUATIONS[::-1])[::-1], together) == 0
    assert distance(found_in(loaded, most=1), together) < tolerance
    monkeypatch.setattr(tree_scorer, "TREE_TOKENS", 64)
    monkeypatch.setattr(tree_scorer, "_HEAD_ROWS", 8)
    small = found_in(loaded)
    assert distance(small, together) < tolerance
    loaded.model.set_gamma(None)
    assert distance(found_in(loaded), together) > 1e-3


def test_longer_than_a_pass_of_several(tmp_path, monkeypatch):
    loaded = load(tmp_path)
    monkeypatch.setattr(tree_scorer, "TREE_TOKENS", 24)
    long = Continuation(tuple((7 * i + 1) % 90 for i in range(300)), 150)
    asked = [*CONTINUATIONS, long]
    assert distance(found_in(loaded, asked), [expected_of(loaded, each) for each in asked]) < 1e-4


def test_sequences_beyond_the_original_context_turn_otherwise(tmp_path):
    """Each by its own length, whatever is asked beside it."""
    path = write_tiny_model(
        tmp_path / "tiny.gguf",
        "phi3",
        long_factors=True,
        metadata={"rope.scaling.original_context_length": 38},
    )
    loaded = load_model(path)
    assert loaded.config.rope.original_context == 38
    expected = [expected_of(loaded, each) for each in CONTINUATIONS]
    assert distance(found_in(loaded), expected) < 1e-4
    loaded.model.long_frequencies = loaded.model.frequencies
    assert distance(found_in(loaded), expected) > 1e-3


def test_damage_and_ids_that_are_none(tmp_path):
    loaded = load(tmp_path)
    with pytest.raises(NKATError, match="outside the vocabulary"):
        found_in(loaded, [Continuation((1, loaded.config.vocab_size), 1)])
    for first in (0, 2):
        with pytest.raises(NKATError, match="cannot begin"):
            Continuation((1, 2), first)
    loaded.model.output_norm[3] = float("nan")
    with pytest.raises(NKATError, match="not finite"):
        found_in(loaded)


# --- the tree itself


def sequences() -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return sorted({tuple(rng.integers(0, 2, rng.integers(1, 40)).tolist()) for _ in range(60)})


def test_a_tree_has_each_beginning_once():
    rows = sequences()
    tree = token_tree(rows)
    beginnings = {row[: i + 1] for row in rows for i in range(len(row))}
    assert len(tree.tokens) == len(beginnings) < sum(map(len, rows))
    for row, path in zip(rows, tree.paths, strict=True):
        assert tuple(tree.tokens[path]) == row
        assert tree.places[path, 0].tolist() == list(range(len(row)))
    assert len(set(tree.places[:, 1].tolist())) == len(tree.tokens)


def test_every_token_sees_what_leads_to_it_and_no_more():
    """Read from the tables as the kernel reads them."""
    rows = sequences()
    tree = token_tree(rows)
    at = {place: token for token, place in enumerate(tree.places[:, 1].tolist())}
    seen: dict[int, list[int]] = {}
    assert tree.tiles[0, 0] == len(tree.tiles) - 1
    for token, begin, end, position, first, before in tree.tiles[1:].tolist():
        for own in range(begin, end):
            blocks = tree.blocks[first : first + before + own // 16 + 1].tolist()
            keys = [(at[16 * place + i], start + i) for place, start, count in blocks for i in range(count)]
            assert token + own not in seen
            seen[token + own] = [key for key, where in keys if where <= position + own]
    for path in tree.paths:
        assert seen[int(path[-1])] == path.tolist()
    assert len(seen) == len(tree.tokens)


@pytest.mark.parametrize(("tokens", "blocks", "most"), [(50, 1000, None), (1000, 12, None), (1000, 1000, 7)])
def test_batches_keep_to_their_bounds(tokens, blocks, most):
    rows = sequences()
    cuts = list(batches(rows, tokens, blocks, most))
    assert [low for low, _ in cuts] == [0, *(high for _, high in cuts[:-1])]
    assert cuts[-1][1] == len(rows)
    assert len(cuts) > 3
    for low, high in cuts:
        tree = token_tree(rows[low:high])
        assert len(tree.tokens) <= tokens
        assert tree.places[:, 1].max() < 16 * blocks
        assert most is None or high - low <= most
    assert list(batches([], 10, 10)) == []
    assert list(batches([(1, 2, 3)], 1, 1)) == [(0, 1)]  # longer than allowed, by itself


def test_what_two_sequences_begin_with():
    assert in_common((1, 2, 3), (1, 2, 4)) == 2
    assert in_common((1, 2), (1, 2, 4)) == 2
    assert in_common((), (1,)) == 0
