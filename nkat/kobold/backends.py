"""KoboldCpp's backends, a row each: its flags and libraries, the device it computes on, how it is configured.

A new one is a row in `BACKENDS`, at its place in the order of preference, with two functions: which device of this
machine it would take, and KoboldCpp's settings for it. Everything else here asks the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from nkat.host import hardware
from nkat.host.hardware import Gpu
from nkat.kobold.machine import Machine, free_bytes
from nkat.kobold.program import Program


class Place(IntEnum):
    """Where a backend stands among those that can run, the best first; equals keep the order of `BACKENDS`."""

    GPU = 0
    CPU = 1
    GPU_TOO_SMALL = 2  # not one layer fits
    GPU_SHARES_MEMORY = 3  # with the processor, so that nobody knows which of them is faster
    LAST = 4


@dataclass(frozen=True, slots=True)
class Device:
    """What a backend computes on.

    gpu: None for the processor, and where there is no GPU for this backend
    text: for people
    problem: why it should not be used; None when nothing speaks against it
    """

    gpu: Gpu | None
    text: str
    problem: str | None = None


def _nothing(program: Program, old_cpu: bool) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Backend:
    """One way in which a program computes.

    name: as `--backend` takes it
    place: where it stands when nothing speaks against it
    flags: the program's flags for it, the newest name first; one is enough, and () needs none
    libraries: names of KoboldCpp's libraries that serve it, `koboldcpp_` left out; one is enough, and () needs none
    old_libraries: the same on a processor without AVX2; None: that makes no difference to it
    device_of: what of this machine it would take
    settings_of: its part of the program's settings, by their names in its own file, which are those of the long flags;
    from the GPU's index, and whether the processor is without AVX2
    refusal_of: why this KoboldCpp cannot although it has flag and library, from the same about the processor
    default_is_old: `old_libraries` serve every processor where this KoboldCpp carries none of `libraries`
    make_flag: what KoboldCpp's Makefile needs to build its library
    tells_buffers: the log names its GPU as the place of the weights that are there
    """

    name: str
    place: Place
    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    old_libraries: tuple[str, ...] | None
    device_of: Callable[[Program, Machine], Device]
    settings_of: Callable[[Program, int, bool], dict[str, Any]]
    refusal_of: Callable[[Program, bool], str | None] = _nothing
    default_is_old: bool = False
    make_flag: str = ""
    tells_buffers: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.place is Place.GPU

    def libraries_in(self, program: Program, old_cpu: bool) -> tuple[str, ...]:
        """The libraries of which one has to be there, and of which one shall be loaded."""
        if self.old_libraries is None:
            return self.libraries
        carried = any(program.has_library(name) for name in self.libraries)
        return self.old_libraries if old_cpu or (self.default_is_old and not carried) else self.libraries

    def lacking_in(self, program: Program, old_cpu: bool) -> str | None:
        """What this program lacks; None when it can run this backend."""
        if self.flags and program.flag(*self.flags) is None:
            return f"{program.label} has no {self.flags[0]}"
        names = self.libraries_in(program, old_cpu)
        if names and not any(program.has_library(name) for name in names):
            return f"this KoboldCpp carries no {' or '.join(f'koboldcpp_{name}' for name in names)}"
        return self.refusal_of(program, old_cpu)


def best_gpu(candidates: Sequence[Gpu], none: str) -> Device:
    """The one with the most free memory, a card of its own first; `none`: why there are no candidates."""
    order = ("discrete", "virtual", "other", "integrated", "software")
    best = min(candidates, key=lambda gpu: (order.index(gpu.kind), -free_bytes(gpu)), default=None)
    if best is None:
        return Device(None, "", none)
    return Device(best, best.name, f"only a software device ({best.name})" if best.kind == "software" else None)


def _cuda_device(program: Program, machine: Machine) -> Device:
    candidates = machine.gpus_by("cuda")
    if not candidates and program.libraries and "cublas" not in program.libraries:  # a hipBLAS build: AMD
        amd = [gpu for gpu in machine.gpus_by("vulkan") if "AMD" in gpu.name or "Radeon" in gpu.name]
        return best_gpu([replace(gpu, index=0) for gpu in amd], "no AMD GPU")
    return best_gpu(candidates, machine.no_cuda or "no NVIDIA GPU")


def _cuda_settings(program: Program, index: int, old_cpu: bool) -> dict[str, Any]:
    flag = program.flag(*CUDA.flags) or CUDA.flags[0]
    return {flag.removeprefix("--"): ["normal", str(index), "mmq"]}  # with noavx2 it would take a CPU library


def _cuda_refusal(program: Program, old_cpu: bool) -> str | None:
    if old_cpu and program.has_library("default"):  # builds for old processors have none
        return "its CUDA library needs AVX2, which this processor has not; there are builds named oldpc"
    return None


def _vulkan_device(program: Program, machine: Machine) -> Device:
    return best_gpu(machine.gpus_by("vulkan"), machine.no_vulkan or "no GPU")


def _vulkan_settings(program: Program, index: int, old_cpu: bool) -> dict[str, Any]:
    return {"usevulkan": [index], **_old_flag(old_cpu)}


def _clblast_device(program: Program, machine: Machine) -> Device:
    return best_gpu(machine.gpus_by("vulkan") or machine.gpus_by("cuda"), machine.no_vulkan or "no GPU")


def _clblast_settings(program: Program, index: int, old_cpu: bool) -> dict[str, Any]:
    # Platform and device; others by `-- --useclblast P D`.
    return {"useclblast": [0, 0], **_old_flag(old_cpu)}


def processor(program: Program, machine: Machine) -> Device:
    level = next((name for name in ("avx512", "avx2", "avx") if name in machine.features), None)
    named = {"avx512": "AVX-512", "avx2": "AVX2", "avx": "AVX", None: "no AVX"}[level]
    text = f"{machine.cores} cores, {named if hardware.is_x86() else 'not x86'}"
    too_old = machine.old_cpu and "avx" not in machine.features
    return Device(None, text, "the processor has no AVX" if too_old else None)


def _cpu_settings(program: Program, index: int, old_cpu: bool) -> dict[str, Any]:
    return {"usecpu": True, **_old_flag(old_cpu)}


def _any_processor(program: Program, machine: Machine) -> Device:
    return Device(None, "any processor; slow")


def _failsafe_settings(program: Program, index: int, old_cpu: bool) -> dict[str, Any]:
    if "--failsafe" in program.flags:
        return {"usecpu": True, "failsafe": True}
    return {"usecpu": True, "noavx2": True, "nommap": True}  # versions without that flag: these three together


def _failsafe_refusal(program: Program, old_cpu: bool) -> str | None:
    # Versions before --failsafe reach this library only where koboldcpp_noavx2 is there too.
    if "--failsafe" in program.flags or program.has_library("noavx2"):
        return None
    return "this KoboldCpp carries no koboldcpp_noavx2"


def _old_flag(old_cpu: bool) -> dict[str, Any]:
    return {"noavx2": True} if old_cpu else {}


CUDA = Backend(
    name="cuda",
    place=Place.GPU,
    flags=("--usecuda", "--usecublas"),
    libraries=("cublas", "hipblas"),
    old_libraries=("cublas", "hipblas"),  # builds for old processors have it by the same name
    device_of=_cuda_device,
    settings_of=_cuda_settings,
    refusal_of=_cuda_refusal,
    make_flag="LLAMA_CUBLAS=1",
    tells_buffers=True,
)
VULKAN = Backend(
    name="vulkan",
    place=Place.GPU,
    flags=("--usevulkan",),
    libraries=("vulkan",),
    old_libraries=("vulkan_noavx2",),
    device_of=_vulkan_device,
    settings_of=_vulkan_settings,
    make_flag="LLAMA_VULKAN=1",
    tells_buffers=True,
)
CLBLAST = Backend(
    name="clblast",
    place=Place.GPU,
    flags=("--useclblast",),
    libraries=("clblast",),
    old_libraries=("clblast_noavx2",),
    device_of=_clblast_device,
    settings_of=_clblast_settings,
    make_flag="LLAMA_CLBLAST=1",
)
CPU = Backend(
    name="cpu",
    place=Place.CPU,
    flags=(),
    libraries=("default",),
    old_libraries=("noavx2",),
    device_of=processor,
    settings_of=_cpu_settings,
    default_is_old=True,  # builds for old processors carry no default library; KoboldCpp then takes this one by itself
)
FAILSAFE = Backend(
    name="failsafe",
    place=Place.LAST,
    flags=(),
    libraries=("failsafe",),
    old_libraries=None,
    device_of=_any_processor,
    settings_of=_failsafe_settings,
    refusal_of=_failsafe_refusal,
)
BACKENDS = (CUDA, VULKAN, CLBLAST, CPU, FAILSAFE)  # what serves best first
