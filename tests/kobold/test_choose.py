"""Which backend is picked on which machine with which KoboldCpp, and the settings that makes."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from nkat.errors import NKATError
from nkat.host.hardware import Gpu
from nkat.host.programs import shell_line
from nkat.kobold.choose import Choice, advice, check_draft, choices, memory_of, prefer
from nkat.kobold.command import Settings, check_extra, command_of
from nkat.kobold.files import Adapter, RunFiles
from nkat.kobold.koboldcpp import KOBOLDCPP, settings_of
from nkat.kobold.layers import ModelMemory
from nkat.kobold.machine import Machine, free_bytes, look_at_machine
from nkat.kobold.program import Program
from tests.support.tiny_models import write_tiny_model

GIB = 1 << 30
OLD = Program(
    Path("/k/koboldcpp.py"),
    "1.76",
    frozenset(
        [
            "--model",
            "--port",
            "--contextsize",
            "--usecublas",
            "--usevulkan",
            "--useclblast",
            "--usecpu",
            "--noavx2",
            "--nommap",
        ]
    ),
    frozenset({"default", "failsafe", "noavx2", "cublas", "vulkan", "vulkan_noavx2", "clblast"}),
)
NEW = Program(
    Path("/k/koboldcpp"),
    "1.115.1",
    frozenset(
        [
            "--model",
            "--port",
            "--contextsize",
            "--usecuda",
            "--usecublas",
            "--usevulkan",
            "--usecpu",
            "--noavx2",
            "--failsafe",
        ]
    ),
    frozenset({"default", "failsafe", "noavx2", "cublas", "vulkan", "vulkan_noavx2"}),
)
RTX = Gpu("cuda", 1, "NVIDIA GeForce RTX 3080", "discrete", 10 * GIB, 9 * GIB, "NVML")
RADEON = Gpu("vulkan", 2, "AMD Radeon RX 6800", "discrete", 16 * GIB, 15 * GIB, "Vulkan")
IRIS = Gpu("vulkan", 0, "Intel Iris Xe", "integrated", 8 * GIB, None, "Vulkan")
LAVA = Gpu("vulkan", 0, "llvmpipe", "software", 2 * GIB, None, "Vulkan")
# 32 blocks of 120 MiB and 4 GiB in all: a 7B model in Q4.
SEVEN_B = ModelMemory((120 << 20,) * 32, 32 << 20, 100 << 20, 80 << 20, 50 << 20, 2048)
FILES = RunFiles(Path("m.nkat"), Path("/m/base model.gguf"), "", (Adapter(Path("/c/theta.gguf")),), {}, 4, 0.97)
SETTINGS = Settings(2048, 8, "127.0.0.1", 5001)


def machine(*gpus: Gpu, old_cpu: bool = False, features: tuple[str, ...] = ("avx", "avx2")) -> Machine:
    return Machine(old_cpu, frozenset(features), 8, 32 * GIB, 30 * GIB, gpus, "no NVIDIA driver", "no Vulkan library")


def order(found: list[Choice]) -> list[str]:
    return [choice.backend.name for choice in found if choice.lacks is None]


def pick(backend: str, found: list[Choice]) -> Choice:
    return next(choice for choice in found if choice.backend.name == backend)


def test_best_first() -> None:
    assert order(choices(OLD, machine(), SEVEN_B)) == ["cpu", "failsafe"]
    assert order(choices(OLD, machine(RADEON), SEVEN_B)) == ["vulkan", "clblast", "cpu", "failsafe"]
    assert order(choices(NEW, machine(RTX, RADEON), SEVEN_B)) == ["cuda", "vulkan", "cpu", "failsafe"]
    assert order(choices(NEW, machine(IRIS), SEVEN_B)) == ["cpu", "vulkan", "failsafe"]
    assert order(choices(NEW, machine(LAVA), SEVEN_B)) == ["cpu", "failsafe"]
    full = replace(RTX, free=GIB)
    assert order(choices(NEW, machine(full), SEVEN_B)) == ["cpu", "cuda", "failsafe"]
    assert "no layer fits" in pick("cuda", choices(NEW, machine(full), SEVEN_B)).reason


def test_layers_come_from_free_memory() -> None:
    whole = choices(NEW, machine(RTX), SEVEN_B)[0]
    assert (whole.backend.name, whole.layers, whole.all_layers) == ("cuda", 33, 33)
    assert "9.7 GB free: holds all of it" in whole.reason
    part = choices(NEW, machine(replace(RTX, free=3 * GIB)), SEVEN_B)[0]
    assert 10 < part.layers < 20
    assert "holds a part" in part.reason
    assert choices(NEW, machine(RTX), SEVEN_B, layers=7)[0].layers == 7
    assert choices(NEW, machine(RTX), SEVEN_B, layers=99)[0].layers == 33
    assert choices(NEW, machine(RTX), None)[0].layers is None
    assert free_bytes(IRIS) == int(0.8 * 8 * GIB)


def test_records_keep_their_keys_and_ranks() -> None:
    """Rank: the GPUs' backends, the processor, a GPU without room, one that shares memory, and what is left."""
    ranks = {choice.backend.name: choice.rank for choice in choices(NEW, machine(RTX, RADEON), SEVEN_B)}
    assert ranks == {"cuda": 0, "vulkan": 1, "clblast": 2, "cpu": 3, "failsafe": 6}
    assert pick("cuda", choices(NEW, machine(replace(RTX, free=GIB)), SEVEN_B)).rank == 4
    shared = pick("vulkan", choices(NEW, machine(IRIS), SEVEN_B)).record()
    keys = ["backend", "rank", "lacks", "reason", "libraries", "old_cpu", "device", "layers", "all_layers", "speed"]
    assert (list(shared), shared["rank"], shared["device"]["name"]) == (keys, 5, "Intel Iris Xe")
    assert json.loads(json.dumps(shared))["backend"] == "vulkan"


def test_the_card_with_most_free_memory_is_taken() -> None:
    small = replace(RTX, index=0, free=GIB)
    assert choices(NEW, machine(small, RTX), SEVEN_B)[0].device == RTX
    assert pick("vulkan", choices(NEW, machine(IRIS, RADEON, LAVA), SEVEN_B)).device == RADEON


def test_what_is_lacking_is_said() -> None:
    bare = replace(NEW, libraries=frozenset({"default"}))
    found = choices(bare, machine(RTX), SEVEN_B)
    assert order(found) == ["cpu"]
    assert pick("cuda", found).reason == "this KoboldCpp carries no koboldcpp_cublas or koboldcpp_hipblas"
    assert pick("clblast", found).reason == "KoboldCpp 1.115.1 has no --useclblast"
    assert pick("failsafe", found).lacks == "program"
    assert pick("cuda", choices(NEW, machine(), SEVEN_B)).reason == "no NVIDIA driver"
    assert pick("vulkan", choices(NEW, machine(LAVA), SEVEN_B)).reason == "only a software device (llvmpipe)"
    assert order(choices(replace(NEW, libraries=None), machine(RTX), SEVEN_B))[0] == "cuda"  # the log will tell
    assert (
        pick("failsafe", choices(replace(OLD, libraries=OLD.libraries - {"noavx2"}), machine(), None)).lacks
        == "program"
    )


def test_amd_with_a_hipblas_build() -> None:
    rocm = replace(NEW, libraries=frozenset({"default", "hipblas"}))
    cuda = pick("cuda", choices(rocm, machine(RADEON), SEVEN_B))
    assert (cuda.lacks, cuda.device.name, cuda.device.index) == (None, "AMD Radeon RX 6800", 0)
    assert pick("cuda", choices(NEW, machine(RADEON), SEVEN_B)).lacks == "device"


def test_processors_without_avx2() -> None:
    old = machine(RADEON, RTX, old_cpu=True, features=("avx",))
    found = choices(NEW, old, SEVEN_B)
    assert pick("cpu", found).libraries == ("noavx2",)
    assert pick("vulkan", found).libraries == ("vulkan_noavx2",)
    assert pick("cuda", found).lacks == "program"
    assert settings_of(NEW, pick("cpu", found), FILES, SETTINGS)["noavx2"] is True
    assert settings_of(NEW, pick("vulkan", found), FILES, SETTINGS)["noavx2"] is True
    oldpc = replace(NEW, libraries=frozenset({"noavx2", "cublas"}))
    assert order(choices(oldpc, old, SEVEN_B)) == ["cuda", "cpu"]
    assert "noavx2" not in settings_of(oldpc, choices(oldpc, old, SEVEN_B)[0], FILES, SETTINGS)
    ancient = choices(NEW, machine(old_cpu=True, features=()), SEVEN_B)
    assert order(ancient) == ["failsafe"]


@pytest.mark.parametrize(
    ("kobold", "backend", "expected"),
    [
        (OLD, "cuda", {"usecublas": ["normal", "1", "mmq"], "gpulayers": 33}),
        (NEW, "cuda", {"usecuda": ["normal", "1", "mmq"], "gpulayers": 33}),
        (OLD, "vulkan", {"usevulkan": [2], "gpulayers": 33}),
        (OLD, "clblast", {"useclblast": [0, 0], "gpulayers": 33}),
        (NEW, "cpu", {"usecpu": True, "gpulayers": 0}),
        (NEW, "failsafe", {"usecpu": True, "failsafe": True, "gpulayers": 0}),
        (OLD, "failsafe", {"usecpu": True, "noavx2": True, "nommap": True, "gpulayers": 0}),
    ],
)
def test_settings_by_version(kobold: Program, backend: str, expected: dict) -> None:
    found = settings_of(kobold, pick(backend, choices(kobold, machine(RTX, RADEON), SEVEN_B)), FILES, SETTINGS)
    common = {"model_param": "/m/base model.gguf", "lora": ["/c/theta.gguf"], "contextsize": 2048, "threads": 8}
    assert {key: value if key not in ("model_param", "lora") else common[key] for key, value in found.items()} == {
        **common,
        **expected,
        "host": "127.0.0.1",
        "port": 5001,
    }
    json.dumps(found)


def test_the_command_is_the_settings() -> None:
    values = settings_of(OLD, pick("cuda", choices(OLD, machine(RTX), SEVEN_B)), FILES, SETTINGS)
    words = command_of(OLD, values, ["--quiet"])
    text = " ".join(words[2:])
    assert "--usecublas normal 1 mmq --gpulayers 33 --contextsize 2048 --threads 8" in text
    assert text.endswith("--host 127.0.0.1 --port 5001 --quiet")
    assert words[words.index("--model") + 1].endswith("base model.gguf")
    cpu = settings_of(NEW, pick("cpu", choices(NEW, machine(), None)), replace(FILES, adapters=()), SETTINGS)
    words = command_of(NEW, cpu)
    assert "--lora" not in words
    assert words[words.index("--usecpu") + 1] == "--gpulayers"


def test_what_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/home/me/my koboldcpp", "--model", "it's.gguf", "$HOME", "a&b"]
    assert shlex.split(shell_line(words)) == words
    monkeypatch.setattr("nkat.host.programs.sys.platform", "win32")
    assert shell_line(["C:\\my k\\k.exe", "--model", "C:\\a b.gguf"]) == '"C:\\my k\\k.exe" --model "C:\\a b.gguf"'


def test_own_flags_are_refused_behind_the_dashes() -> None:
    check_extra(["--quiet", "--password", "x"], KOBOLDCPP.own_flags)
    for word in ("--port", "--model", "--lora=x", "--host"):
        with pytest.raises(NKATError, match="is set by this script"):
            check_extra(["--quiet", word], KOBOLDCPP.own_flags)


def test_what_was_measured_comes_first() -> None:
    found = choices(NEW, machine(RTX, RADEON), SEVEN_B)
    first = prefer(found, "vulkan", 20, 44.4)[0]
    assert (first.backend.name, first.layers, first.speed) == ("vulkan", 20, 44.4)
    assert "44.4 tokens/s" in first.reason
    assert len(prefer(found, "vulkan", 20, 44.4)) == len(found)
    assert prefer(found, "clblast", 20, 44.4) == found  # no longer usable: the record is of no use


def test_advice() -> None:
    choice = pick("vulkan", choices(OLD, machine(RADEON), SEVEN_B))
    assert "make -C /k koboldcpp_vulkan LLAMA_VULKAN=1" in advice(choice, OLD).replace("\\", "/")
    assert "carries vulkan" in advice(choice, NEW)


def test_this_machine() -> None:
    found = look_at_machine()
    assert found.cores >= 1
    assert bool([gpu for gpu in found.gpus if gpu.interface == "cuda"]) == (found.no_cuda is None)
    assert order(choices(replace(NEW, libraries=None), found, None))


def test_a_draft_model_must_have_the_models_tokens(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", "llama")
    check_draft(model, write_tiny_model(tmp_path / "d.gguf", "llama", blocks=1, seed=2))
    with pytest.raises(NKATError, match=r"d2\.gguf: cannot draft for .*tokens"):
        check_draft(model, write_tiny_model(tmp_path / "d2.gguf", "llama", blocks=1, vocab="spm"))
    other = write_tiny_model(tmp_path / "d3.gguf", "llama", blocks=1)
    other.write_bytes(other.read_bytes().replace("Ġthe".encode(), "Ġthx".encode()))
    with pytest.raises(NKATError, match=r"token \d+ is 'Ġthx' there and 'Ġthe' here"):
        check_draft(model, other)


def test_its_memory_counts_and_lowers_the_layers(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", "llama")
    files = RunFiles(model, model, "", (), {})
    plain = memory_of(files, SETTINGS, True)
    drafted = memory_of(files, replace(SETTINGS, draft=model), True)
    assert (plain.draft, drafted.draft) == (0, plain.total)
    quantised = memory_of(files, replace(SETTINGS, cache_type="q8_0"), True)
    assert quantised.cache < plain.cache
