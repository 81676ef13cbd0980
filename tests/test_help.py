"""What `--help` says: of every script, module and benchmark that a user may call."""

from __future__ import annotations

import importlib
import runpy
import sys

import pytest

from nkat_vit.recipe import PRESETS, describe_presets, make_recipe
from tests.conftest import ROOT

# Of another benchmark: no commands by themselves.
_PARTS = {
    **dict.fromkeys(("low_rank", "quality_report"), "quality"),
    **dict.fromkeys(("architecture_speed", "greedy"), "architectures"),
    "vit_cnn": "vit_peers",
    "vit_worker": "vit_against",
    **dict.fromkeys(("gpu_checks", "gpu_figures", "gpu_first_use", "gpu_speed"), "gpu"),
}


def commands() -> list[list[str]]:
    """Scripts, modules that begin a command, all benchmarks and examples."""
    scripts = [[path.name] for path in sorted(ROOT.glob("*.py"))]
    modules = [
        path
        for folder in ("nkat", "nkat_vit", "benchmarks", "examples")
        for path in sorted((ROOT / folder).glob("*.py"))
        if folder in ("benchmarks", "examples") or 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    names = [f"{path.parent.name}.{path.stem}" for path in modules if path.stem not in ("__init__", *_PARTS)]
    return [*scripts, *(["-m", name] for name in names)]


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[-1])
def test_every_help_says_something_and_how_it_ends(
    command: list[str], script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if command[0] != "-m":
        said = script(*command, "--help").stdout
    else:
        monkeypatch.setattr(sys, "argv", [command[1], "--help"])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(command[1]).main()
        assert not ended.value.code
        said = capsys.readouterr().out
    assert said.startswith("usage: ")
    assert "\nexamples:\n" in said
    assert "\nexit status:\n" in said
    assert "--quiet" in said


def test_all_of_them_are_asked() -> None:
    asked = {command[-1] for command in commands()}
    assert {"backend_selector.py", "nkat.models", "nkat.setup_check", "nkat_vit.train", "benchmarks.quality"} < asked


@pytest.mark.parametrize(("part", "whole"), _PARTS.items())
def test_a_part_of_a_benchmark_names_it(part: str, whole: str) -> None:
    with pytest.raises(SystemExit, match=rf"python -m benchmarks\.{whole} --help"):
        runpy.run_path(str(ROOT / "benchmarks" / f"{part}.py"), run_name="__main__")


def test_help_has_the_presets_numbers() -> None:
    text = " ".join(describe_presets().split())
    for name, preset in PRESETS.items():
        assert f"{name}" in text
        values = make_recipe({"dataset": "cifar10"} | preset).values()
        said = text.partition(f"{name},")[2] or text
        for key in ("conv_stem", "lr", "epochs", "ema"):
            if name == "stage2" or values[key] != make_recipe({"dataset": "cifar10"}).values()[key]:
                assert f"{key} {values[key]}" in said
