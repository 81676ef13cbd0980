"""Every way to run a model, measured with and without its Θ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nkat.errors import NKATError
from nkat.host.console import counted, note
from nkat.host.tables import Column, Table
from nkat.kobold.benchmark import Speed, layer_splits
from nkat.kobold.choose import Choice
from nkat.kobold.command import Settings, command_of
from nkat.kobold.files import RunFiles
from nkat.kobold.launch import library_check
from nkat.kobold.program import Program
from nkat.kobold.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a program's benchmark; arm: "with Θ", "without", or "" for a model that has none."""

    choice: Choice
    arm: str
    speed: Speed

    def record(self) -> dict[str, Any]:
        """For --json."""
        how = {"backend": self.choice.backend.name, "layers": self.choice.layers, "arm": self.arm}
        return how | asdict(self.speed)


def measure_choices(
    runtime: Runtime,
    wanted: Sequence[Choice],
    files: RunFiles,
    program: Program,
    settings: Settings,
    extra: Sequence[str],
    seconds: float,
) -> list[Measured]:
    """Each choice and split, first as it would be run; one that fails is left out with a warning.

    seconds: the most that one run may take
    """
    arms = {"with Θ": files, "without": replace(files, adapters=())} if files.adapters else {"": files}
    measured = []
    for split in [split for choice in wanted for split in layer_splits(choice)]:
        for arm, loaded in arms.items():
            command = command_of(program, runtime.settings_of(program, split, loaded, settings), extra)
            what = f"{_label(split)} {arm}".strip()
            try:
                speed = runtime.measure(command, settings, what, seconds, library_check(split, program))
            except NKATError as error:
                note(f"warning: {_label(split)}: {error}")
                break
            measured.append(Measured(split, arm, speed))
    return measured


def as_run(measured: Sequence[Measured]) -> list[tuple[Choice, Speed]]:
    """Those of a model as it is run: with its Θ, where it has one."""
    return [(item.choice, item.speed) for item in measured if item.arm != "without"]


def speed_table(measured: Sequence[Measured], conditions: Mapping[str, Any] | None = None) -> Table:
    """A row a run."""
    rows = [{**item.record(), "label": _label(item.choice)} for item in measured]
    columns = [
        Column("backend", ("label", "backend", "layers"), lambda label, *_: label),
        Column("Θ", "arm"),
        Column("processing tok/s", "processing", ".1f"),
        Column("generation tok/s", ("generation", "seconds", "context", "generated"), lambda speed, *_: f"{speed:.1f}"),
    ]
    return Table("koboldcpp", columns, rows, conditions=conditions or {})


def _label(choice: Choice) -> str:
    name = choice.backend.name
    return name if choice.layers is None or choice.all_layers is None else f"{name}, {counted(choice.layers, 'layer')}"
