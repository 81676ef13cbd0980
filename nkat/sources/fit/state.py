"""A fit that was interrupted: its state in a file, bound to the inputs and settings it came from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nkat.errors import NKATError
from nkat.host.tensors import load_tensors, save_tensors

_FORMAT = 2
_MOST_STEPS = (1 << 31) - 1  # a Θ file notes them


@dataclass(slots=True)
class FitState:
    """How far a fit has come. Everything else is made anew from its inputs.

    start: where it began;  step: steps done
    factors: P and Q of one layer after the other, float32;  optimizer: AdamW's own state
    best_*: of the step with the lowest validation loss so far, None before the first validation
    snapshots: factors after some of the steps so far, by their numbers, among which is chosen in the end
    history: one record a validation
    """

    start: str
    step: int
    factors: list[torch.Tensor]
    optimizer: dict[str, Any] = field(default_factory=dict)
    best_step: int | None = None
    best_nll: float | None = None
    best_factors: list[torch.Tensor] = field(default_factory=list)
    snapshots: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def candidates(self) -> dict[int, list[torch.Tensor]]:
        """Factors by the step after which they were so, ascending: the snapshots, and those that validated best."""
        best = {} if self.best_step is None else {self.best_step: self.best_factors}
        return dict(sorted({**best, **self.snapshots}.items()))


def run_identity(inputs: Mapping[str, Any]) -> str:
    """A name for one fit: a hash of the hashes of its files and of its settings."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def save_state(path: Path, state: FitState, identity: str) -> None:
    """Writes the state in place of an older one, atomically."""
    values = {name: getattr(state, name) for name in FitState.__slots__}
    save_tensors(path, {"format": _FORMAT, "identity": identity, **values})


def load_state(path: Path, identity: str) -> FitState:
    """Reads a state. Raises NKATError when it is damaged, or belongs to other files or settings."""
    record = load_tensors(path, "the state of a fit")
    if not isinstance(record, dict) or not _is(record.pop("format", None), _FORMAT):
        raise NKATError(f"{path}: is not the state of a fit made by this version")
    if not _is(record.pop("identity", None), identity):
        raise NKATError(f"{path}: belongs to a fit of other files or settings; --force starts anew")
    wrong = _wrong_part(record)
    if wrong:
        raise NKATError(f"{path}: the state of the fit is damaged ({wrong}); --force starts anew")
    return FitState(**record)


def check_place(state: FitState, shapes: Sequence[tuple[int, int]], steps: int, path: Path) -> None:
    """Raises NKATError unless a state is of a fit of so many steps whose P and Q, each, have these shapes."""
    if [tuple(factor.shape) for factor in state.factors] != [shape for shape in shapes for _ in "PQ"]:
        raise NKATError(f"{path}: the state of the fit is damaged (factors); --force starts anew")
    if state.step > steps:
        raise NKATError(f"{path}: the state of the fit is damaged (step {state.step} of {steps}); --force starts anew")


def _is(found: object, wanted: str | int) -> bool:
    """Also where what was found cannot be compared, as a tensor."""
    return type(found) is type(wanted) and found == wanted


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _is_number(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _are_like(values: object, wanted: Sequence[torch.Tensor]) -> bool:
    """Whether these are finite float32 tensors of the shapes of the others."""
    return (
        isinstance(values, list)
        and len(values) == len(wanted)
        and all(
            isinstance(t, torch.Tensor) and t.dtype == torch.float32 and t.shape == w.shape and bool(t.isfinite().all())
            for t, w in zip(values, wanted, strict=True)
        )
    )


def _wrong_part(record: Mapping[str, Any]) -> str | None:
    """What of a record is missing, too much, or not what a fit writes."""
    names = set(FitState.__slots__)
    if record.keys() != names:
        return f"{', '.join(sorted(map(str, record.keys() ^ names)))} missing or unknown"
    factors, step, validated = record["factors"], record["step"], record["best_step"] is not None
    if not isinstance(factors, list) or any(not isinstance(t, torch.Tensor) or t.ndim != 2 for t in factors):
        return "factors"
    if not _is_count(step, _MOST_STEPS):
        return "step"
    fits = {
        "start": isinstance(record["start"], str),
        "factors": _are_like(factors, factors),
        "optimizer": _are_moments(record["optimizer"], factors),
        "best_step": not validated or _is_count(record["best_step"], step),
        "best_nll": _is_number(record["best_nll"]) if validated else record["best_nll"] is None,
        "best_factors": _are_like(record["best_factors"], factors if validated else []),
        "snapshots": _are_snapshots(record["snapshots"], factors, step),
        "history": isinstance(record["history"], list) and all(_is_row(row, step) for row in record["history"]),
        "seconds": _is_number(record["seconds"]) and record["seconds"] >= 0,
    }
    return next((name for name, good in fits.items() if not good), None)


def _are_snapshots(snapshots: object, factors: Sequence[torch.Tensor], step: int) -> bool:
    return isinstance(snapshots, dict) and all(
        _is_count(number, step) and _are_like(kept, factors) for number, kept in snapshots.items()
    )


def _is_row(row: object, step: int) -> bool:
    """Of the history: what one validation found."""
    return (
        isinstance(row, dict)
        and _is_count(row.get("step"), step)
        and all(_is_number(row.get(name)) for name in ("loss", "validation_nll"))
    )


def _are_moments(optimizer: object, factors: Sequence[torch.Tensor]) -> bool:
    """Whether AdamW can go on from there with these factors; its settings are the fit's, whatever stands there."""
    if not isinstance(optimizer, dict) or not optimizer:
        return optimizer == {}
    states = optimizer.get("state")
    if not isinstance(states, dict) or list(states) != list(range(len(factors))):
        return False
    return all(
        isinstance(state, dict)
        and state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        and _are_like([*state.values()], [torch.tensor(0.0) if name == "step" else factor for name in state])
        for state, factor in zip(states.values(), factors, strict=True)
    )
