"""What a benchmark found fastest, remembered: for a model with its Θ on a program with the same settings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nkat.host.cache import Memo, own_folder
from nkat.kobold.benchmark import Speed
from nkat.kobold.choose import Choice
from nkat.kobold.command import F16, Settings
from nkat.kobold.files import RunFiles, model_key
from nkat.kobold.program import Program
from nkat.kobold.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Fastest:
    """What a benchmark of this model on this program with this context found."""

    backend: str
    layers: int
    generation: float


def remember_fastest(
    runtime: Runtime,
    program: Program,
    files: RunFiles,
    settings: Settings,
    choice: Choice,
    speed: Speed,
    values: Mapping[str, Any],
) -> Path | None:
    """Keeps the fastest as this model's default, with the program's own settings file; returns that file.

    None where there is no cache to keep it in, which is said.
    """
    memo = _memo_of(program, files, settings)
    if own_folder("kobold") is None or memo.path is None:
        return None
    path = memo.path.with_suffix(runtime.suffix)
    runtime.write(program, path, values, (), True)
    memo.set(
        {
            "backend": choice.backend.name,
            "layers": choice.layers or 0,
            "generation": speed.generation,
            "processing": speed.processing,
            "kobold": str(program.path),
            "version": program.version,
            "model": str(files.model),
        }
    )
    return path


def recall_fastest(program: Program, files: RunFiles, settings: Settings) -> Fastest | None:
    """What `remember_fastest` kept for the same model, program and settings."""
    memo = _memo_of(program, files, settings)
    return memo.get(lambda found: Fastest(str(found["backend"]), int(found["layers"]), float(found["generation"])))


def _memo_of(program: Program, files: RunFiles, settings: Settings) -> Memo:
    key = f"{model_key(files)}|{program.path}|{program.version}|{settings.context}"
    if settings.cache_type != F16 or settings.draft is not None:
        key += f"|{settings.cache_type}|{settings.draft}|{settings.draft_tokens}"
    name = f"fastest-{files.asked.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    return Memo.open(f"kobold/{name}")
