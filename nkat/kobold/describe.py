"""What is said before anything runs: what was found, and the arithmetic and warnings of a choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nkat.host.console import counted, format_bytes, format_table, note, remark
from nkat.kobold.api import is_private
from nkat.kobold.choose import Choice
from nkat.kobold.command import given
from nkat.kobold.findings import Findings
from nkat.kobold.layers import ModelMemory, gpu_bytes, layer_table
from nkat.kobold.machine import Machine, free_bytes
from nkat.kobold.menu import choice_table
from nkat.kobold.options import KoboldOptions
from nkat.kobold.runtime import Served


def print_findings(findings: Findings) -> None:
    """The program, the machine and the model, a line each, and the table of choices."""
    width = max(len("libraries"), len(findings.program.title))
    for label, text in _found_lines(findings):
        remark(f"{label:<{width}}  {text}")
    remark("")
    remark(choice_table(findings.choices))
    remark("")


def _found_lines(findings: Findings) -> Iterator[tuple[str, str]]:
    program, machine = findings.program, findings.machine
    carried = program.libraries
    yield program.title, f"{program.version or 'of unknown version'}, {program.path}"
    if findings.runtime.watch.library is not None:
        yield "libraries", f"{'cannot be told' if carried is None else ', '.join(sorted(carried)) or 'none'}"
    else:
        yield "devices", f"{', '.join(gpu.name for gpu in program.devices) or 'the processor only'}"
    for gpu in machine.gpus:
        yield "GPU", f"{gpu.name} ({gpu.kind}, by {gpu.source}), {_memory_text(gpu.total, gpu.free)}"
    yield "memory", _memory_text(machine.memory, machine.available)
    if findings.model is not None:
        files = findings.model.files
        yield "model", f"{files.model} ({files.how})"
        if not files.adapters:
            yield "Θ", "none: this is a plain model"
        for adapter in files.adapters:
            size = format_bytes(adapter.path.stat().st_size)
            yield "Θ", f"{adapter.path} ({size}, {adapter.about})"


def print_layers(choice: Choice, memory: ModelMemory, machine: Machine, options: KoboldOptions) -> None:
    """The arithmetic behind the number of layers, and warnings about what will not go well."""
    if options.autofit and choice.backend.on_gpu:
        note(f"note: --autofit: {options.runtime.title} itself decides what goes onto the GPU")
    elif choice.backend.on_gpu and choice.device is not None and choice.layers is not None:
        free = free_bytes(choice.device)
        remark(layer_table(memory, choice.layers, choice.device.name, free))
        remark("")
        if choice.layers and gpu_bytes(memory, choice.layers) > free:
            note(f"warning: {counted(choice.layers, 'layer')} need more than is free on {choice.device.name}")
    elif memory.total > machine.available:
        note(
            f"warning: the model needs {format_bytes(memory.total)} but only "
            f"{format_bytes(machine.available)} of memory are free"
        )
    unused = "--gpulayers" if options.gpulayers else "--autofit" if options.autofit else ""
    if unused and not choice.backend.on_gpu:
        note(f"note: {choice.backend.name} runs on the processor, so {unused} has no meaning")


def print_served(served: Sequence[Served]) -> None:
    """The models of a folder, a line each."""
    rows = []
    for one in served:
        theta = "; ".join(adapter.about for adapter in one.files.adapters) or "none"
        rows.append([one.name, one.choice.backend.name, theta, str(one.files.model)])
    remark(format_table(rows, ["name", "backend", "Θ", "model"]))
    remark("")


def warn_of_strangers(options: KoboldOptions) -> None:
    """Says so when others can use the program and nothing keeps them out."""
    runtime = options.runtime
    if not is_private(options.host) and not given(options.extra, *runtime.password_flags):
        note(
            f"warning: --host {options.host or '(empty)'}: everybody in your network can use this {runtime.title}; "
            f"-- {runtime.password_flags[0]} WORD asks them for a password"
        )


def _memory_text(total: int, free: int | None) -> str:
    return f"{format_bytes(total)}, {'free: not told' if free is None else f'{format_bytes(free)} free'}"
