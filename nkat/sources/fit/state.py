"""A fit that was interrupted: its state in a file, bound to the inputs and settings it came from."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import zipfile
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
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise NKATError(f"{path}: cannot be read as the state of a fit: {str(error).splitlines()[0]}") from None
    if not isinstance(record, dict) or record.pop("format", None) != _FORMAT:
        raise NKATError(f"{path}: is not the state of a fit made by this version")
    if record.pop("identity") != identity:
        raise NKATError(f"{path}: belongs to a fit of other files or settings; --force starts anew")
    return FitState(**record)
