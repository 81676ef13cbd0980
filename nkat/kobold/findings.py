"""What is here: KoboldCpp, the machine, the model with its Θ, and in which ways it can run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nkat.kobold.choose import Choice, choices, memory_of, prefer
from nkat.kobold.config import recall_fastest
from nkat.kobold.files import RunFiles, prepare_files
from nkat.kobold.find import Kobold
from nkat.kobold.layers import ModelMemory
from nkat.kobold.machine import Machine
from nkat.kobold.options import KoboldOptions


@dataclass(frozen=True, slots=True)
class Model:
    """The model to run: the files KoboldCpp loads, and what they take."""

    files: RunFiles
    memory: ModelMemory


@dataclass(frozen=True, slots=True)
class Findings:
    """What one run has to do with.

    choices: every backend, the best one first and what is not usable last
    model: None when there is none yet
    """

    kobold: Kobold
    machine: Machine
    choices: tuple[Choice, ...]
    model: Model | None

    def record(self) -> dict[str, Any]:
        """For --json."""
        found: dict[str, Any] = {
            "kobold": {
                "path": str(self.kobold.path),
                "version": self.kobold.version,
                "libraries": None if self.kobold.libraries is None else sorted(self.kobold.libraries),
                "flags": sorted(self.kobold.flags),
            },
            "machine": {
                "features": sorted(self.machine.features),
                "cores": self.machine.cores,
                "memory": self.machine.memory,
                "available": self.machine.available,
                "gpus": [asdict(gpu) for gpu in self.machine.gpus],
            },
            "choices": [choice.record() for choice in self.choices],
        }
        if self.model is not None:
            files, memory = self.model.files, self.model.memory
            found["files"] = {
                "asked": str(files.asked),
                "model": str(files.model),
                "how": files.how,
                "lora": str(files.lora) if files.lora else None,
                "rank": files.rank,
                "gamma": files.gamma,
            }
            found["memory"] = {
                "blocks": list(memory.blocks),
                "cache_per_block": memory.cache,
                "output": memory.output,
                "compute": memory.compute,
                "total": memory.total,
            }
        return found


def gather_findings(options: KoboldOptions, model_path: Path | None, kobold: Kobold, machine: Machine) -> Findings:
    """Finds or makes the files of a model and puts the choices in order, first what a benchmark found fastest.

    Raises NKATError when there is no base model for a Θ, or the file is no language model.
    """
    if model_path is None:
        return Findings(kobold, machine, tuple(choices(kobold, machine, None, options.gpulayers)), None)
    files = prepare_files(model_path, options.theta, options.base)
    memory = memory_of(files, options.contextsize, kobold, options.extra)
    found = choices(kobold, machine, memory, options.gpulayers)
    if options.gpulayers is None:
        best = recall_fastest(kobold, files, options.contextsize)
        if best is not None:
            found = prefer(found, best.backend, best.layers, best.generation)
    return Findings(kobold, machine, tuple(found), Model(files, memory))
