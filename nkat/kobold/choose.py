"""Which backend KoboldCpp should run a model with on this machine, and with which flags.

A backend is usable when three things hold: this KoboldCpp accepts its flag, carries its library, and the machine has
the device. KoboldCpp itself checks none of them: without the library it takes its default one and says nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nkat.errors import NKATError
from nkat.gguf.file import GGUFFile
from nkat.host import hardware
from nkat.host.console import format_bytes
from nkat.host.hardware import Gpu
from nkat.kobold.backends import GPU_FLAGS, GPU_LIBRARIES, GPU_OLD_LIBRARIES, ON_GPU
from nkat.kobold.files import RunFiles
from nkat.kobold.find import Kobold
from nkat.kobold.layers import MARGIN, ModelMemory, layers_that_fit, model_memory

_UNTOLD_SHARE = 0.8  # of a GPU's memory, where the driver does not tell how much of it is free


@dataclass(frozen=True, slots=True)
class Machine:
    """What of the machine matters here.

    old_cpu: an x86 processor without AVX2, which KoboldCpp's default libraries need
    no_cuda, no_vulkan: why there is no such device
    """

    old_cpu: bool
    features: frozenset[str]
    cores: int
    memory: int
    available: int
    gpus: tuple[Gpu, ...]
    no_cuda: str | None
    no_vulkan: str | None


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run.

    lacks: None when usable; "program" when this KoboldCpp cannot, "device" when the machine has not what it takes
    reason: why it is where it is in the order, or what is lacking
    libraries: names of the libraries that count as this backend when KoboldCpp loads them
    layers: on the GPU, of `all_layers`; None when the model or the GPU's memory is not known
    speed: tokens a second it generated when it was measured
    """

    backend: str
    rank: int
    lacks: str | None
    reason: str
    libraries: tuple[str, ...]
    old_cpu: bool = False
    device: Gpu | None = None
    layers: int | None = 0
    all_layers: int | None = None
    speed: float | None = None


def look() -> Machine:
    """Asks the hardware."""
    features = hardware.cpu_features()
    cuda, no_cuda = hardware.nvidia_gpus()
    vulkan, no_vulkan = hardware.vulkan_gpus()
    total, available = hardware.memory()
    old_cpu = hardware.is_x86() and "avx2" not in features
    cores = hardware.physical_cores()
    return Machine(old_cpu, features, cores, total, available, (*cuda, *vulkan), no_cuda, no_vulkan)


def memory_of(files: RunFiles, context: int, kobold: Kobold, extra: Sequence[str]) -> ModelMemory:
    """What the model with its adapter takes. Raises NKATError for a file that is no language model."""
    # Old versions have a flag that turns flash attention on, new ones a flag that turns it off.
    on, off = "--flashattention", "--noflashattention"
    flash = on in extra if on in kobold.flags else off not in extra
    with GGUFFile.open(files.model) as file:
        if "token_embd.weight" not in file.tensors:
            raise NKATError(f"{files.model}: has no token_embd.weight; it is not a language model")
        return model_memory(file.metadata, file.tensors, context, files.lora_bytes, flash)


def choices(kobold: Kobold, machine: Machine, memory: ModelMemory | None, layers: int | None = None) -> list[Choice]:
    """All backends, the best one first and what is not usable last.

    memory: of the model, None when there is none yet; layers: on the GPU, None: as many as fit
    """
    found = [_on_gpu(backend, kobold, machine, memory, layers) for backend in ON_GPU]
    found += [_on_cpu(kobold, machine), _failsafe(kobold, machine)]
    return sorted(found, key=lambda choice: (choice.lacks is not None, choice.rank))


def free_bytes(gpu: Gpu) -> int:
    """What a model may use: what is free, or a share of everything where the driver does not tell."""
    return int(gpu.total * _UNTOLD_SHARE) if gpu.free is None else gpu.free


def prefer(found: Sequence[Choice], backend: str, layers: int, speed: float) -> list[Choice]:
    """Puts what a benchmark found fastest first, with the split it was measured with."""
    fastest = [
        replace(c, layers=layers, speed=speed, reason=f"measured fastest: generates {speed:.1f} tokens/s")
        for c in found
        if c.backend == backend and c.lacks is None
    ]
    return [*fastest, *(c for c in found if c.backend != backend or not fastest)]


def advice(choice: Choice, kobold: Kobold) -> str:
    """What to do when KoboldCpp loaded another library than this backend's."""
    library = choice.libraries[0]
    if not kobold.is_source:
        return f"get a KoboldCpp program that carries {library}, or take another backend (--list shows which there are)"
    make = {"cuda": " LLAMA_CUBLAS=1", "vulkan": " LLAMA_VULKAN=1", "clblast": " LLAMA_CLBLAST=1"}.get(
        choice.backend, ""
    )
    return (
        f"build it with: make -C {shlex.quote(str(kobold.path.parent))} koboldcpp_{library}{make}; "
        "or take another backend (--list shows which there are)"
    )


def _on_gpu(backend: str, kobold: Kobold, machine: Machine, memory: ModelMemory | None, layers: int | None) -> Choice:
    names = GPU_OLD_LIBRARIES[backend] if machine.old_cpu and backend != "cuda" else GPU_LIBRARIES[backend]
    rank = ON_GPU.index(backend)
    if kobold.flag(*GPU_FLAGS[backend]) is None:
        reason = f"{kobold.label} has no {GPU_FLAGS[backend][0]}"
        return Choice(backend, rank, "program", reason, names, machine.old_cpu, None, None)
    if not any(kobold.has_library(name) for name in names):
        reason = f"this KoboldCpp carries no {' or '.join(f'koboldcpp_{name}' for name in names)}"
        return Choice(backend, rank, "program", reason, names, machine.old_cpu, None, None)
    if backend == "cuda" and machine.old_cpu and kobold.has_library("default"):  # builds for old processors have none
        reason = "its CUDA library needs AVX2, which this processor has not; there are builds named oldpc"
        return Choice(backend, rank, "program", reason, names, True, None, None)
    device, problem = _device(backend, kobold, machine)
    choice = Choice(backend, rank, "device" if problem else None, problem or "", names, machine.old_cpu, device)
    if device is None or memory is None:
        return replace(choice, layers=layers, reason=problem or (device.name if device else ""))
    free = free_bytes(device)
    fitting = layers_that_fit(memory, free)
    chosen = fitting if layers is None else min(layers, memory.layers)
    choice = replace(choice, layers=chosen, all_layers=memory.layers)
    if problem:
        return choice
    told = f"{device.name}, {format_bytes(free)} " + ("free" if device.free is not None else "counted on")
    if device.kind == "integrated":
        return replace(choice, rank=5, reason=f"{told}; shares main memory, so only --benchmark tells whether it helps")
    if fitting == 0:
        return replace(choice, rank=4, reason=f"{told}: no layer fits beside {format_bytes(MARGIN)} of margin")
    return replace(choice, reason=f"{told}: " + ("holds all of it" if fitting == memory.layers else "holds a part"))


def _device(backend: str, kobold: Kobold, machine: Machine) -> tuple[Gpu | None, str | None]:
    """The GPU with the most free memory that this backend can use, and why it should not be used."""
    cuda = [gpu for gpu in machine.gpus if gpu.interface == "cuda"]
    vulkan = [gpu for gpu in machine.gpus if gpu.interface == "vulkan"]
    none = machine.no_vulkan or "no GPU"
    if backend == "cuda":
        candidates, none = cuda, machine.no_cuda or "no NVIDIA GPU"
        if not candidates and kobold.libraries and "cublas" not in kobold.libraries:  # a hipBLAS build: AMD
            candidates = [replace(g, index=0) for g in vulkan if "AMD" in g.name or "Radeon" in g.name]
            none = "no AMD GPU"
    else:
        candidates = vulkan or (cuda if backend == "clblast" else [])
    order = ("discrete", "virtual", "other", "integrated", "software")
    best = min(candidates, key=lambda gpu: (order.index(gpu.kind), -free_bytes(gpu)), default=None)
    if best is None:
        return None, none
    return best, f"only a software device ({best.name})" if best.kind == "software" else None


def _on_cpu(kobold: Kobold, machine: Machine) -> Choice:
    # Builds for old processors carry no default library; KoboldCpp then takes this one by itself.
    plain = kobold.has_library("default") and not machine.old_cpu
    name = "default" if plain else "noavx2"
    if not kobold.has_library(name):
        return Choice("cpu", 3, "program", f"this KoboldCpp carries no koboldcpp_{name}", (name,), machine.old_cpu)
    if machine.old_cpu and "avx" not in machine.features:
        return Choice("cpu", 3, "device", "the processor has no AVX", (name,), True)
    level = next((n for n in ("avx512", "avx2", "avx") if n in machine.features), None)
    named = {"avx512": "AVX-512", "avx2": "AVX2", "avx": "AVX", None: "no AVX"}[level]
    reason = f"{machine.cores} cores, {named if hardware.is_x86() else 'not x86'}"
    return Choice("cpu", 3, None, reason, (name,), machine.old_cpu)


def _failsafe(kobold: Kobold, machine: Machine) -> Choice:
    names = ("failsafe",)
    # Versions before --failsafe reach this library only where koboldcpp_noavx2 is there too.
    needed = names if "--failsafe" in kobold.flags else ("failsafe", "noavx2")
    missing = [name for name in needed if not kobold.has_library(name)]
    if missing:
        return Choice("failsafe", 6, "program", f"this KoboldCpp carries no koboldcpp_{missing[0]}", names)
    return Choice("failsafe", 6, None, "any processor; slow", names)
