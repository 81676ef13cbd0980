"""The table of backends, and that a row is all there is to a new one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nkat.host.hardware import Gpu
from nkat.kobold import options
from nkat.kobold.backends import BACKENDS, CPU, VULKAN, Backend, Device, Place
from nkat.kobold.benchmark import layer_splits
from nkat.kobold.choose import advice, choices
from nkat.kobold.command import Settings, command_of
from nkat.kobold.files import RunFiles
from nkat.kobold.koboldcpp import KOBOLDCPP, settings_of
from nkat.kobold.layers import ModelMemory
from nkat.kobold.machine import Machine
from nkat.kobold.probe import find_kobold, probe_kobold
from nkat.kobold.program import Program
from tests.support.fake_koboldcpp import NEW, OLD, install

GIB = 1 << 30
ARC = Gpu("level zero", 3, "Intel Arc B580", "discrete", 12 * GIB, 11 * GIB, "SYCL")
MACHINE = Machine(False, frozenset({"avx2"}), 8, 32 * GIB, 30 * GIB, (ARC,), "no NVIDIA driver", "no Vulkan library")
MEMORY = ModelMemory((120 << 20,) * 32, 32 << 20, 100 << 20, 80 << 20, 50 << 20, 2048)
FILES = RunFiles(Path("m.gguf"), Path("m.gguf"), "", (), {})


def arc_of(kobold: Program, machine: Machine) -> Device:
    found = machine.gpus_by("level zero")
    return Device(found[0], found[0].name) if found else Device(None, "", "no Intel GPU")


SYCL = Backend(
    name="sycl",
    place=Place.GPU,
    flags=("--usesycl",),
    libraries=("sycl",),
    old_libraries=("sycl_noavx2",),
    device_of=arc_of,
    settings_of=lambda kobold, index, old_cpu: {"usesycl": [index]},
    make_flag="LLAMA_SYCL=1",
)  # made up


TABLE = (*BACKENDS[:1], SYCL, *BACKENDS[1:])


@pytest.fixture
def with_sycl() -> Program:
    """A KoboldCpp that has it."""
    return Program(
        Path("/k/koboldcpp.py"), "9", frozenset({"--usesycl", "--usecpu"}), frozenset({"default", "sycl", "failsafe"})
    )


def test_a_row_is_all_there_is_to_a_new_one(with_sycl: Program) -> None:
    first, *others = choices(with_sycl, MACHINE, MEMORY, backends=TABLE)
    assert (first.backend, first.lacks, first.layers, first.device) == (SYCL, None, 33, ARC)
    assert first.reason == "Intel Arc B580, 11.8 GB free: holds all of it"
    assert [choice.backend.name for choice in others if choice.lacks is None] == ["cpu"]
    assert (first.rank, [choice.rank for choice in others if choice.backend is CPU]) == (1, [4])
    assert [choice.layers for choice in layer_splits(first)] == [33, 16, 0]
    words = command_of(with_sycl, settings_of(with_sycl, first, FILES, Settings(512, 1, "", 5001)))
    assert words[words.index("--usesycl") : words.index("--contextsize")] == ["--usesycl", "3", "--gpulayers", "33"]
    assert "make -C /k koboldcpp_sycl LLAMA_SYCL=1;" in advice(first, with_sycl).replace("\\", "/")


def test_what_a_new_one_lacks_is_said(with_sycl: Program) -> None:
    def reason(kobold: Program, machine: Machine) -> tuple[str | None, str]:
        found = next(choice for choice in choices(kobold, machine, MEMORY, backends=TABLE) if choice.backend is SYCL)
        return found.lacks, found.reason

    assert reason(with_sycl, replace(MACHINE, gpus=())) == ("device", "no Intel GPU")
    assert reason(replace(with_sycl, flags=frozenset()), MACHINE) == ("program", "KoboldCpp 9 has no --usesycl")
    missing = "this KoboldCpp carries no koboldcpp_sycl_noavx2"
    assert reason(with_sycl, replace(MACHINE, old_cpu=True)) == ("program", missing)


def test_without_the_row_it_is_no_backend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    asked = ["--backend", "sycl", "--list"]  # llama-server has one of this name
    with pytest.raises(SystemExit):
        options.parse_arguments(asked)
    assert "--runtime koboldcpp has no backend sycl" in capsys.readouterr().err
    monkeypatch.setitem(options.RUNTIMES, "koboldcpp", replace(KOBOLDCPP, backends=TABLE))
    assert options.parse_arguments(asked).backend == "sycl"


@pytest.mark.parametrize("version", [OLD, NEW])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_koboldcpp_accepts_the_settings(tmp_path: Path, version: str, backend: Backend) -> None:
    """The stand-in has each version's own flags: a setting that is no flag there would not be accepted."""
    kobold = probe_kobold(find_kobold(install(tmp_path, version)))
    if backend.flags and kobold.flag(*backend.flags) is None:
        assert (backend.name, version) == ("clblast", NEW)
        return
    for old_cpu in (False, True):
        assert {f"--{name}" for name in backend.settings_of(kobold, 0, old_cpu)} <= kobold.flags


def test_names_and_flags_are_each_ones_own() -> None:
    names = [backend.name for backend in BACKENDS]
    flags = [flag for backend in BACKENDS for flag in backend.flags]
    assert len(set(names)) == len(names)
    assert len(set(flags)) == len(flags)
    assert VULKAN.on_gpu
    assert not CPU.on_gpu
    assert list(BACKENDS) == sorted(BACKENDS, key=lambda backend: backend.place)
