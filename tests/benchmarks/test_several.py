"""The benchmark of several Θ: what it counts, against the sizes of a tiny model's layers."""

from __future__ import annotations

from pathlib import Path

import gguf

from benchmarks.several import make_sets, measure
from nkat.lm.load import load_model
from nkat.theta.modelfile import open_model_file
from tests.support.tiny_models import write_tiny_model


def test_counts_are_those_of_the_factors(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "t.gguf", "llama", qtype=gguf.GGMLQuantizationType.Q8_0)
    model = open_model_file(path)
    sets = make_sets(model, 3, 2)
    sizes = [sum(model.require_base().tensors[name].shape) for name in sets["0"].layers]
    for count in (1, 3):
        loaded = load_model(model, thetas={}, gamma=1.0, int8_activations=True, repack=True)
        record = measure(loaded, {name: sets[name] for name in list(sets)[:count]})
        assert record["read_none_on"] == 0
        assert record["read_one_on"] == 2 * 2 * sum(sizes)
        assert record["read_all_on"] == count * record["read_one_on"]
        assert record["stored_bytes"] == count * sets["0"].nbytes
        assert record["kernel_bytes"] >= record["read_all_on"]
