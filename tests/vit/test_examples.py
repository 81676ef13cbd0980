"""The examples run as they stand, on a tiny data set."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from nkat_vit import checkpoint
from nkat_vit.model import NKATViT
from nkat_vit.recipe import make_recipe
from tests.support.vit_data import run_in_process, run_module, write_digits


def test_custom_config_pairs_equal_seeds(tmp_path: Path) -> None:
    write_digits(tmp_path, train=290)
    arguments = ["--dataset", "emnist-digits", "--data-root", tmp_path, "--seeds", 2, "--epochs", 1]
    done = run_module("examples.custom_config", *arguments, "--limit-train", 140, "--validation", 60, "--strength", 0.5)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["seed 0", "seed 1"]
    assert "n = 2" in lines[2]


def test_quick_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", run_in_process)
    write_digits(tmp_path / "data", train=400, test=100)
    command = ["--dataset", "emnist-digits", "--validation", 100, "--batch-size", 32, "--data-root", tmp_path / "data"]
    done = run_module("examples.quick_demo", *command, "--limit-train", 0, "--epochs", 4, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out" / "pictures").glob("nkat_attention_sample_*.png"))) == 10
    assert "test        " in done.stdout


def test_explain_image_is_captums_usual_call(tmp_path: Path) -> None:
    write_digits(tmp_path)
    recipe = make_recipe({"dataset": "emnist-digits", "embed_dim": 16, "depth": 1, "heads": 2, "validation": 24})
    content = {"kind": "weights", "recipe": recipe.values(), "weights": NKATViT(recipe.model).state_dict()}
    checkpoint.save(tmp_path / "best.pt", content | {"steps": 5, "epoch": 1, "validation": 0.5})
    picture = tmp_path / "why.png"
    done = run_module("examples.explain_image", tmp_path, "--data-root", tmp_path, "--output", picture)
    if importlib.util.find_spec("captum") is None:
        assert (done.returncode, done.stderr.strip()) == (
            2,
            "error: this example needs the package captum: pip install captum",
        )
        pytest.skip("captum is not installed: only the message was tested")
    assert done.returncode == 0, done.stderr
    assert Image.open(picture).size[0] > 500


def test_full_training_uses_flags_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run itself takes hours; its commands are looked up in the help of the programs they are for."""
    commands: list[list[str]] = []

    def noted(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, 0)

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", noted)
        done = run_module("examples.full_training", "--output", tmp_path / "o", "--download", "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert [command[0].removeprefix("nkat_vit.") for command in commands] == [
        "download",
        "evaluate",
        "interpret",
        "export",
    ]
    for module, *arguments in commands:
        words = run_module(module, "--help").stdout.replace(",", " ").split()
        flags = [argument for argument in arguments if argument.startswith("--")]
        assert flags
        assert set(flags) <= set(words)
    assert (tmp_path / "o").is_dir()
