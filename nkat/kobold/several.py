"""All models of a folder in one program, by name, each with its own Θ and its own split."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nkat.errors import NKATError
from nkat.kobold.files import kobold_cache
from nkat.kobold.findings import gather_findings, pick_choice, settings_from
from nkat.kobold.machine import Machine
from nkat.kobold.neighbours import files_in, readable
from nkat.kobold.options import KoboldOptions
from nkat.kobold.program import Program
from nkat.kobold.runtime import Served, Several


def served_models(options: KoboldOptions, program: Program, machine: Machine) -> list[Served]:
    """What of the folder can be served, what the user named first; the rest is skipped with a word.

    Raises NKATError when nothing can, or the program serves one model only.
    """
    folder = options.folder
    several_of(options).check(program, settings_from(options, machine))
    if folder is None or not folder.is_dir():
        raise NKATError(f"{folder}: no such folder")
    named = [] if options.model is None else [options.model]
    others = [path for path in files_in(folder, ".nkat", ".gguf") if not named or not path.samefile(named[0])]
    paths = [*named, *others]
    stems = Counter(path.stem for path in paths)

    def one(path: Path) -> Served:
        findings = gather_findings(options, path, program, machine)
        if findings.model is None:
            raise NKATError(f"{path}: no model")
        choice, files = pick_choice(findings, options.backend), findings.model.files
        values = options.runtime.settings_of(program, choice, files, findings.settings)
        return Served(path.stem if stems[path.stem] == 1 else path.name, files, choice, values)

    served = [one(path) for path in named] + list(readable(others, one))
    if not served:
        raise NKATError(f"{folder}: no model in it that can be served")
    return served


def command_for(options: KoboldOptions, program: Program, machine: Machine, served: Sequence[Served]) -> list[str]:
    """Writes what the program needs into the cache, and gives the command."""
    told = json.dumps({one.name: dict(one.values) for one in served}, sort_keys=True)
    target = kobold_cache() / f"served-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    return several_of(options).command(program, target, served, settings_from(options, machine), options.extra)


def several_of(options: KoboldOptions) -> Several:
    """How the program that was asked for does it. Raises NKATError when it does not."""
    several = options.runtime.router if options.router is not None else options.runtime.admin
    if several is None:
        raise NKATError(f"--runtime {options.runtime.name} has no --admin")
    return several
