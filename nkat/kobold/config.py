"""Settings for KoboldCpp in its own `.kcpps` files, and what a benchmark found fastest, remembered."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.host.cache import Memo, own_folder
from nkat.host.environment import users_environment
from nkat.host.files import atomic_output
from nkat.host.record import parse_json
from nkat.kobold.benchmark import Speed
from nkat.kobold.choose import Choice
from nkat.kobold.files import RunFiles, model_key
from nkat.kobold.find import Kobold

_EXPORT_SECONDS = 180


@dataclass(frozen=True, slots=True)
class Fastest:
    """What a benchmark of this model on this KoboldCpp with this context found."""

    backend: str
    layers: int
    generation: float


def write_config(path: Path, values: Mapping[str, Any], force: bool) -> None:
    """Writes a `.kcpps`, atomically. ASCII only: older versions read it in the system's own encoding."""
    data = (json.dumps(values, indent=2) + "\n").encode("ascii")
    with atomic_output(path, len(data), force) as file:
        file.write(data)


def config_with_extra(kobold: Kobold, command: Sequence[str]) -> dict[str, Any]:
    """The settings of a command that has flags of the user's own, translated by KoboldCpp itself.

    Raises NKATError for versions that cannot.
    """
    if "--exportconfig" not in kobold.flags:
        raise NKATError(
            f"{kobold.label} cannot write flags behind -- into a .kcpps file; leave them out here and give them "
            "beside --config"
        )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "exported.kcpps"
        done = subprocess.run(
            [*command, "--exportconfig", str(target)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            stdin=subprocess.DEVNULL,
            env=users_environment(),
            timeout=_EXPORT_SECONDS,
        )
        if not target.is_file():
            said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
            raise NKATError(f"KoboldCpp did not accept these flags: {said}")
        try:
            found = parse_json(target.read_bytes())
        except ValueError as error:
            raise NKATError(f"KoboldCpp wrote settings that are no JSON: {error}") from None
        if not isinstance(found, dict):
            raise NKATError(f"KoboldCpp wrote settings that are no JSON object: {found!r:.80}")
        return found


def remember_fastest(
    kobold: Kobold, files: RunFiles, choice: Choice, speed: Speed, values: Mapping[str, Any]
) -> Path | None:
    """Keeps the fastest as this model's default, with a `.kcpps` that KoboldCpp loads; returns that file.

    None where there is no cache to keep it in, which is said.
    """
    memo = _memo_of(kobold, files, speed.context)
    if own_folder("kobold") is None or memo.path is None:
        return None
    path = memo.path.with_suffix(".kcpps")
    write_config(path, values, force=True)
    memo.set(
        {
            "backend": choice.backend.name,
            "layers": choice.layers or 0,
            "generation": speed.generation,
            "processing": speed.processing,
            "kobold": str(kobold.path),
            "version": kobold.version,
            "model": str(files.model),
        }
    )
    return path


def recall_fastest(kobold: Kobold, files: RunFiles, context: int) -> Fastest | None:
    """What `remember_fastest` kept for the same model, KoboldCpp and context."""
    memo = _memo_of(kobold, files, context)
    return memo.get(lambda found: Fastest(str(found["backend"]), int(found["layers"]), float(found["generation"])))


def _memo_of(kobold: Kobold, files: RunFiles, context: int) -> Memo:
    key = f"{model_key(files)}|{kobold.path}|{kobold.version}|{context}"
    name = f"fastest-{files.asked.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    return Memo.open(f"kobold/{name}")
