"""What is here: the program, the machine, the model with its Θ, and in which ways it can run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.host.console import note
from nkat.kobold.choose import Choice, advice, check_draft, choices, memory_of, prefer
from nkat.kobold.command import Settings
from nkat.kobold.config import recall_fastest
from nkat.kobold.files import RunFiles, prepare_files
from nkat.kobold.layers import ModelMemory
from nkat.kobold.machine import Machine
from nkat.kobold.menu import check_usable
from nkat.kobold.options import AUTO, KoboldOptions
from nkat.kobold.program import Program
from nkat.kobold.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Model:
    """The model to run: the files that are loaded, and what they take."""

    files: RunFiles
    memory: ModelMemory


@dataclass(frozen=True, slots=True)
class Findings:
    """What one run has to do with.

    settings: what the user asked for, whatever the backend
    choices: every backend, the best one first and what is not usable last
    model: None when there is none yet
    """

    runtime: Runtime
    program: Program
    machine: Machine
    settings: Settings
    choices: tuple[Choice, ...]
    model: Model | None

    def record(self) -> dict[str, Any]:
        """For --json."""
        found: dict[str, Any] = {
            "runtime": self.runtime.name,
            self.runtime.key: {
                "path": str(self.program.path),
                "version": self.program.version,
                "libraries": None if self.program.libraries is None else sorted(self.program.libraries),
                "flags": sorted(self.program.flags),
                "cache_types": list(self.program.cache_types),
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
                "lora": str(files.adapters[0].path) if files.adapters else None,
                "adapters": [{"path": str(one.path), "weight": one.weight} for one in files.adapters],
                "rank": files.rank,
                "gamma": files.gamma,
            }
            found["memory"] = {
                "blocks": list(memory.blocks),
                "cache_per_block": memory.cache,
                "output": memory.output,
                "compute": memory.compute,
                "cache_type": memory.cache_type,
                "draft": memory.draft,
                "total": memory.total,
            }
        return found


def gather_findings(options: KoboldOptions, model_path: Path | None, program: Program, machine: Machine) -> Findings:
    """Finds or makes the files of a model and puts the choices in order, first what a benchmark found fastest.

    Raises NKATError when there is no base model for a Θ, or the file is no language model.
    """
    runtime = options.runtime
    settings = settings_from(options, machine)
    if model_path is None:
        found = choices(program, machine, None, options.gpulayers, runtime.backends)
        return Findings(runtime, program, machine, settings, tuple(found), None)
    files = prepare_files(model_path, options.thetas, options.base, runtime.separate_adapters)
    if settings.draft is not None:
        check_draft(files.model, settings.draft)
    memory = memory_of(files, settings, runtime.flash_attention(program, settings, options.extra))
    found = choices(program, machine, memory, options.gpulayers, runtime.backends)
    if options.gpulayers is None and not options.autofit:
        best = recall_fastest(program, files, settings)
        if best is not None:
            found = prefer(found, best.backend, best.layers, best.generation)
    return Findings(runtime, program, machine, settings, tuple(found), Model(files, memory))


def settings_from(options: KoboldOptions, machine: Machine) -> Settings:
    """What does not depend on the backend."""
    return Settings(
        context=options.contextsize,
        threads=options.threads or machine.cores,
        host=options.host,
        port=options.port,
        cache_type=options.quantkv,
        draft=None if options.draftmodel is None else options.draftmodel.absolute(),
        draft_tokens=options.draftamount,
        autofit=options.autofit,
    )


def pick_choice(findings: Findings, asked: str) -> Choice:
    """The best one, or the one asked for by its name. Raises NKATError when that cannot be."""
    if asked == AUTO:
        check_usable(findings.choices, findings.runtime.sought.how_to_get())
        return findings.choices[0]
    choice = next(choice for choice in findings.choices if choice.backend.name == asked)
    if choice.lacks == "program":
        hint = advice(choice, findings.program) if choice.libraries else "see --list"
        raise NKATError(f"--backend {asked}: {choice.reason}; {hint}")
    if choice.lacks == "device":
        note(f"warning: {asked}: {choice.reason}; trying it because you asked for it")
    if choice.layers is None and not findings.settings.autofit:
        raise NKATError(f"--backend {asked}: how many layers fit cannot be told ({choice.reason}); give --gpulayers N")
    return choice
