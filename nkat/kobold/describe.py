"""What is said before anything runs: what was found, and the arithmetic and warnings of a choice."""

from __future__ import annotations

from nkat.host.console import counted, format_bytes, note, remark
from nkat.kobold.api import is_private
from nkat.kobold.choose import Choice
from nkat.kobold.findings import Findings
from nkat.kobold.layers import ModelMemory, gpu_bytes, layer_table
from nkat.kobold.machine import Machine, free_bytes
from nkat.kobold.menu import choice_table
from nkat.kobold.options import KoboldOptions


def print_findings(findings: Findings) -> None:
    """KoboldCpp, the machine and the model, a line each, and the table of choices."""
    kobold, machine = findings.kobold, findings.machine
    carried = kobold.libraries
    remark(f"KoboldCpp  {kobold.version or 'of unknown version'}, {kobold.path}")
    remark(f"libraries  {'cannot be told' if carried is None else ', '.join(sorted(carried)) or 'none'}")
    for gpu in machine.gpus:
        remark(f"GPU        {gpu.name} ({gpu.kind}, by {gpu.source}), {_memory_text(gpu.total, gpu.free)}")
    remark(f"memory     {_memory_text(machine.memory, machine.available)}")
    if findings.model is not None:
        files = findings.model.files
        remark(f"model      {files.model} ({files.how})")
        if files.lora is None:
            remark("Θ          none: this is a plain model")
        else:
            size = format_bytes(sum(files.lora_bytes.values()))
            remark(f"Θ          {files.lora} ({size}, rank {files.rank}, gamma {files.gamma:g})")
    remark("")
    remark(choice_table(findings.choices))
    remark("")


def print_layers(choice: Choice, memory: ModelMemory, machine: Machine, options: KoboldOptions) -> None:
    """The arithmetic behind the number of layers, and warnings about what will not go well."""
    if choice.backend.on_gpu and choice.device is not None and choice.layers is not None:
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
    if not choice.backend.on_gpu and options.gpulayers:
        note(f"note: {choice.backend.name} runs on the processor, so --gpulayers has no meaning")
    if not is_private(options.host) and not any(word.partition("=")[0] == "--password" for word in options.extra):
        note(
            f"warning: --host {options.host or '(empty)'}: everybody in your network can use this KoboldCpp; "
            "-- --password WORD asks them for a password"
        )


def _memory_text(total: int, free: int | None) -> str:
    return f"{format_bytes(total)}, {'free: not told' if free is None else f'{format_bytes(free)} free'}"
