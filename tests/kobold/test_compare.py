"""Measuring every way to run, with and without Θ: one that fails does not end the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nkat.host.tables import as_text
from nkat.kobold.backends import CPU, VULKAN, Place
from nkat.kobold.choose import Choice
from nkat.kobold.command import Settings
from nkat.kobold.compare import as_run, measure_choices, speed_table
from nkat.kobold.files import Adapter, RunFiles
from nkat.kobold.koboldcpp import KOBOLDCPP
from nkat.kobold.probe import probe_kobold
from tests.support.fake_koboldcpp import NEW, install
from tests.support.tiny_models import write_tiny_model

ON_CPU = Choice(CPU, Place.CPU, None, "", ("default",))
ON_GPU = Choice(VULKAN, Place.GPU, None, "", ("vulkan",), layers=4, all_layers=4)


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    model = write_tiny_model(tmp_path / "m.gguf", "llama")
    return RunFiles(
        model, model, "", (Adapter(model),), {}
    )  # the stand-in looks whether an adapter is there, not what it holds


def test_both_arms_of_every_split(tmp_path: Path, files: RunFiles) -> None:
    kobold = probe_kobold(install(tmp_path / "kobold", NEW, ("default", "vulkan")))
    measured = measure_choices(KOBOLDCPP, [ON_GPU, ON_CPU], files, kobold, Settings(512, 1, "127.0.0.1", 5001), (), 60)
    lines = [line.split()[:-2] for line in as_text(speed_table(measured)).splitlines()[2:]]
    assert lines == [
        [*name, *arm]
        for name in (["vulkan,", "4", "layers"], ["vulkan,", "2", "layers"], ["vulkan,", "0", "layers"], ["cpu"])
        for arm in (["with", "Θ"], ["without"])
    ]
    assert [speed.generation for _, speed in as_run(measured)] == [21.6, 19.8, 18.0, 18.0]
    assert measured[1].record() == {
        "backend": "vulkan",
        "layers": 4,
        "arm": "without",
        "processing": 100.0,
        "generation": 24.0,
        "seconds": 8.287,
        "context": 512,
        "generated": 100,
    }


def test_one_that_fails_is_a_warning(tmp_path: Path, files: RunFiles, capsys: pytest.CaptureFixture) -> None:
    kobold = probe_kobold(install(tmp_path / "kobold", NEW))
    plain = replace(files, adapters=())
    measured = measure_choices(KOBOLDCPP, [ON_GPU, ON_CPU], plain, kobold, Settings(512, 1, "127.0.0.1", 5001), (), 60)
    assert [(item.choice, item.arm) for item in measured] == [(ON_CPU, "")]
    assert as_run(measured) == [(ON_CPU, measured[0].speed)]
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 3  # 4, 2 and 0 layers
    assert "asked for vulkan, but KoboldCpp loaded koboldcpp_default" in warned[0]
