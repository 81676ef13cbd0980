"""Export: the written program is the eager model, for other batches than the one it was made with."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

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
    assert "next: python -m nkat_vit.evaluate " in done.stderr
    program = export.open_pt2(target.read_bytes())
    assert export.largest_difference(program, model) < 1e-5
    said = {export.DESCRIPTION: ""}
    torch.export.load(target, extra_files=said)
    assert json.loads(said[export.DESCRIPTION]) == export.describe_input(model)
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
    import onnxruntime

    said = onnxruntime.InferenceSession(data).get_modelmeta().custom_metadata_map
    assert said == export.describe_input(model)


def test_a_file_says_what_it_expects(tmp_path: Path) -> None:
    said = export.describe_input(trained(tmp_path, "cifar10"))
    assert json.loads(said["classes"])[:2] == ["airplane", "automobile"]
    assert (json.loads(said["mean"]), json.loads(said["std"])) == ([0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616])
    assert (said["image_size"], said["channels"], said["dataset"]) == ("32", "3", "cifar10")
    assert "float32 [batch, 3, 32, 32], red, green and blue planes, values from 0 to 1" in said["input"]
    grey = export.describe_input(trained(tmp_path, "emnist"))
    assert len(json.loads(grey["classes"])) == 47
    assert "float32 [batch, 1, 28, 28], one grey plane" in grey["input"]
