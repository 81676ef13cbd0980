"""Export: the written program is the eager model, for other batches than the one it was made with."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from nkat.errors import NKATError
from nkat_vit import checkpoint, export
from nkat_vit.checkpoint import TrainedModel, load_model
from nkat_vit.model import NKATViT
from nkat_vit.recipe import make_recipe
from tests.support.vit_data import run_module


def trained(folder: Path, dataset: str) -> TrainedModel:
    """A checkpoint of a small random model with gauge terms that matter."""
    values = {"embed_dim": 32, "depth": 1, "heads": 4, "gauge_rank": 2, "nkat_strength": 0.5}
    recipe = make_recipe(values | {"dataset": dataset})
    content = {"kind": "weights", "recipe": recipe.values(), "weights": NKATViT(recipe.model).state_dict()}
    checkpoint.save(folder / "best.pt", content | {"steps": 5, "epoch": 1, "validation": 0.5})
    return load_model(folder)


@pytest.mark.slow
def test_the_written_program_is_the_eager_model(tmp_path: Path) -> None:
    model = trained(tmp_path, "cifar10")
    target = tmp_path / "m.pt2"
    done = run_module("nkat_vit.export", "--checkpoint", tmp_path, "--output", target)
    assert done.returncode == 0, done.stderr
    program = export.open_pt2(target.read_bytes())
    assert export.largest_difference(program, model) < 1e-5
    model.model.head.bias.data[0] += 0.01  # control: another model is noticed
    with pytest.raises(NKATError, match="differ from the eager"):
        export.largest_difference(program, model)
    assert run_module("nkat_vit.export", "--checkpoint", tmp_path, "--output", target).returncode == 2
    other = run_module("nkat_vit.export", "--checkpoint", tmp_path, "--output", tmp_path / "m.bin")
    assert other.returncode == 2
    assert ".pt2 or .onnx" in other.stderr


def test_onnx_is_the_eager_model_or_names_what_is_missing(tmp_path: Path) -> None:
    model = trained(tmp_path, "cifar10")
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        with pytest.raises(NKATError, match="pip install"):
            export.export_onnx(model)
        pytest.skip("onnx, onnxscript and onnxruntime are not installed: only the message was tested")
    data = export.export_onnx(model)
    assert export.largest_difference(export.open_onnx(data), model) < export.TOLERANCE
