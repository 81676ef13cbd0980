"""Which backend a program should run a model with on this machine, and how many layers go onto the GPU.

A backend is usable when three things hold: the program accepts its flag, carries its library, and the machine has the
device. KoboldCpp itself checks none of them: without the library it takes its default one and says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.gguf.split import open_gguf
from nkat.host.console import format_bytes
from nkat.host.hardware import Gpu
from nkat.host.programs import shell_line
from nkat.kobold.backends import BACKENDS, Backend, Place
from nkat.kobold.command import Settings
from nkat.kobold.files import RunFiles
from nkat.kobold.layers import MARGIN, ModelMemory, layers_that_fit, model_memory
from nkat.kobold.machine import Machine, free_bytes
from nkat.kobold.program import Program

_VOCABULARY_SLACK = 128  # tokens at the end that one may have and the other not: llama.cpp's own bound
_FIRST_COMPARED = 5  # the first few are special ones, which differ harmlessly


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run.

    place: where it stands among those that can run
    lacks: None when usable; "program" when this KoboldCpp cannot, "device" when the machine has not what it takes
    reason: why it is where it is in the order, or what is lacking
    rank: its number in the order of all, were it to run
    libraries: names of the libraries that count as this backend when KoboldCpp loads them
    old_cpu: those are the ones for an x86 processor without AVX2
    layers: on the GPU, of `all_layers`; None when the model or the GPU's memory is not known
    speed: tokens a second it generated when it was measured
    """

    backend: Backend
    place: Place
    lacks: str | None
    reason: str
    libraries: tuple[str, ...]
    old_cpu: bool = False
    device: Gpu | None = None
    layers: int | None = 0
    all_layers: int | None = None
    speed: float | None = None
    rank: int = 0

    def record(self) -> dict[str, Any]:
        """For --json."""
        return {
            "backend": self.backend.name,
            "rank": self.rank,
            "lacks": self.lacks,
            "reason": self.reason,
            "libraries": self.libraries,
            "old_cpu": self.old_cpu,
            "device": None if self.device is None else asdict(self.device),
            "layers": self.layers,
            "all_layers": self.all_layers,
            "speed": self.speed,
        }


def memory_of(files: RunFiles, settings: Settings, flash: bool) -> ModelMemory:
    """What the model takes with its adapters and its draft model. Raises NKATError for one that is no language model.

    flash: it is run with flash attention
    """

    def read(path: Path, adapters: Mapping[str, int]) -> ModelMemory:
        with open_gguf(path) as file:
            if "token_embd.weight" not in file.tensors:
                raise NKATError(f"{path}: has no token_embd.weight; it is not a language model")
            cache = (flash, settings.cache_type)
            return model_memory(file.metadata, file.tensors, settings.context, adapters, *cache)

    memory = read(files.model, files.lora_bytes)
    return memory if settings.draft is None else replace(memory, draft=read(settings.draft, {}).total)


def check_draft(model: Path, draft: Path) -> None:
    """Raises NKATError unless a draft model's tokens are the model's: both programs then run without it, or wrongly."""
    said = []
    for path in (model, draft):
        with open_gguf(path) as file:
            tokens = file.metadata.get("tokenizer.ggml.tokens")
            said.append((file.metadata.get("tokenizer.ggml.model"), [] if tokens is None else list(tokens)))
    (kind, tokens), (other_kind, other) = said
    if not other:  # a head for its own model's guesses has none; the program says whether it fits
        return
    count = min(len(tokens), len(other))
    if kind != other_kind or abs(len(tokens) - len(other)) > _VOCABULARY_SLACK:
        raise NKATError(
            f"{draft}: cannot draft for {model}: {len(other)} tokens ({other_kind}), not {len(tokens)} ({kind})"
        )
    differing = next((n for n in range(_FIRST_COMPARED, count) if tokens[n] != other[n]), None)
    if differing is not None:
        raise NKATError(
            f"{draft}: cannot draft for {model}: token {differing} is {str(other[differing])!r:.40} there and "
            f"{str(tokens[differing])!r:.40} here"
        )


def choices(
    program: Program,
    machine: Machine,
    memory: ModelMemory | None,
    layers: int | None = None,
    backends: Sequence[Backend] = BACKENDS,
) -> list[Choice]:
    """All backends, the best one first and what is not usable last.

    memory: of the model, None when there is none yet; layers: on the GPU, None: as many as fit
    backends: of this kind of program
    """
    on_gpu = [backend for backend in backends if backend.on_gpu]
    found = [_choice_of(backend, program, machine, memory, layers) for backend in backends]
    for number, choice in enumerate(found):
        rank = on_gpu.index(choice.backend) if choice.place is Place.GPU else len(on_gpu) - 1 + choice.place
        found[number] = replace(choice, rank=rank)
    return sorted(found, key=lambda choice: (choice.lacks is not None, choice.rank))


def prefer(found: Sequence[Choice], backend: str, layers: int, speed: float) -> list[Choice]:
    """Puts what a benchmark found fastest first, with the split it was measured with."""
    fastest = [
        replace(c, layers=layers, speed=speed, reason=f"measured fastest: generates {speed:.1f} tokens/s")
        for c in found
        if c.backend.name == backend and c.lacks is None
    ]
    return [*fastest, *(c for c in found if c.backend.name != backend or not fastest)]


def advice(choice: Choice, program: Program) -> str:
    """What to do when KoboldCpp loaded another library than this backend's."""
    library = choice.libraries[0]
    if not program.is_source:
        return f"get a KoboldCpp program that carries {library}, or take another backend (--list shows which there are)"
    make = f"make -C {shell_line([program.path.parent])} koboldcpp_{library} {choice.backend.make_flag}".rstrip()
    return f"build it with: {make}; or take another backend (--list shows which there are)"


def _choice_of(
    backend: Backend, program: Program, machine: Machine, memory: ModelMemory | None, layers: int | None
) -> Choice:
    old = machine.old_cpu and backend.old_libraries is not None
    names = backend.libraries_in(program, machine.old_cpu)
    none = None if backend.on_gpu else 0
    lacking = backend.lacking_in(program, machine.old_cpu)
    if lacking is not None:
        return Choice(backend, backend.place, "program", lacking, names, old, layers=none)
    device = backend.device_of(program, machine)
    lacks, reason = (None, device.text) if device.problem is None else ("device", device.problem)
    choice = Choice(backend, backend.place, lacks, reason, names, old, device.gpu, none)
    if not backend.on_gpu:
        return choice
    if device.gpu is None or memory is None:
        return replace(choice, layers=layers)
    return _with_layers(choice, device.gpu, memory, layers)


def _with_layers(choice: Choice, gpu: Gpu, memory: ModelMemory, layers: int | None) -> Choice:
    """The choice with its number of layers, and with the place and the reason that follow from it."""
    free = free_bytes(gpu)
    fitting = layers_that_fit(memory, free)
    choice = replace(choice, layers=fitting if layers is None else min(layers, memory.layers), all_layers=memory.layers)
    if choice.lacks is not None:
        return choice
    told = f"{gpu.name}, {format_bytes(free)} {'free' if gpu.free is not None else 'counted on'}"
    if gpu.kind == "integrated":
        reason = f"{told}; shares main memory, so only --benchmark tells whether it helps"
        return replace(choice, place=Place.GPU_SHARES_MEMORY, reason=reason)
    if fitting == 0:
        reason = f"{told}: no layer fits beside {format_bytes(MARGIN)} of margin"
        return replace(choice, place=Place.GPU_TOO_SMALL, reason=reason)
    return replace(choice, reason=f"{told}: " + ("holds all of it" if fitting == memory.layers else "holds a part"))
