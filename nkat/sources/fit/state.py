"""A fit that was interrupted: its state in a file, bound to the inputs and settings it came from."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nkat.errors import NKATError
from nkat.host.files import atomic_output

_FORMAT = 1


@dataclass(slots=True)
class FitState:
    """How far a fit has come. Everything else is made anew from its inputs.

    start: where it began;  step: steps done
    factors: P and Q of one layer after the other, float32;  optimizer: AdamW's own state
    best_*: of the step with the lowest validation loss so far, None before the first validation
    history: one record a validation
    """

    start: str
    step: int
    factors: list[torch.Tensor]
    optimizer: dict[str, Any] = field(default_factory=dict)
    best_step: int | None = None
    best_nll: float | None = None
    best_factors: list[torch.Tensor] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def run_identity(inputs: Mapping[str, Any]) -> str:
    """A name for one fit: a hash of the hashes of its files and of its settings."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def save_state(path: Path, state: FitState, identity: str) -> None:
    """Writes the state in place of an older one, atomically."""
    buffer = io.BytesIO()
    values = {name: getattr(state, name) for name in FitState.__slots__}
    torch.save({"format": _FORMAT, "identity": identity, **values}, buffer)
    with atomic_output(path, buffer.tell(), force=True) as file:
        file.write(buffer.getbuffer())


def load_state(path: Path, identity: str) -> FitState:
    """Reads a state. Raises NKATError when it is damaged, or belongs to other files or settings."""
    try:
        record = torch.load(path, weights_only=True)
    except Exception as error:  # whatever a damaged archive, or the pickle in it, can raise
        lines = str(error).splitlines() or [type(error).__name__]
        raise NKATError(f"{path}: cannot be read as the state of a fit: {lines[0]}") from None
    if not isinstance(record, dict) or record.pop("format", None) != _FORMAT:
        raise NKATError(f"{path}: is not the state of a fit made by this version")
    if record.pop("identity", None) != identity:
        raise NKATError(f"{path}: belongs to a fit of other files or settings; --force starts anew")
    wrong = _wrong_part(record)
    if wrong:
        raise NKATError(f"{path}: the state of the fit is damaged ({wrong}); --force starts anew")
    return FitState(**record)


def _wrong_part(record: Mapping[str, Any]) -> str | None:
    """What of a record is missing, too much, or not what a fit writes."""
    names = set(FitState.__slots__)
    if record.keys() != names:
        return f"{', '.join(sorted(map(str, record.keys() ^ names)))} missing or unknown"

    def are_factors(value: object) -> bool:
        return isinstance(value, list) and all(
            isinstance(t, torch.Tensor) and t.ndim == 2 and t.dtype == torch.float32 for t in value
        )

    def is_count(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    fits = {
        "start": isinstance(record["start"], str),
        "step": is_count(record["step"]),
        "factors": are_factors(record["factors"]),
        "optimizer": isinstance(record["optimizer"], dict),
        "best_step": record["best_step"] is None or is_count(record["best_step"]),
        "best_nll": record["best_nll"] is None or isinstance(record["best_nll"], float),
        "best_factors": are_factors(record["best_factors"]),
        "history": isinstance(record["history"], list)
        and all(isinstance(r, dict) and is_count(r.get("step")) for r in record["history"]),
        "seconds": isinstance(record["seconds"], int | float),
    }
    return next((name for name, good in fits.items() if not good), None)
