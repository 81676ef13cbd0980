"""What `--model_args` may say, checked before a model is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nkat.errors import NKATError

ACTIVATIONS = ("float", "int8")


@dataclass(frozen=True, slots=True)
class ModelArguments:
    """The names are those of `--model_args`.

    path: a .gguf or .nkat of any layout;  theta: a file with Θ alone, in place of that in the model's file
    gamma: strength of Θ, 1 turns it off; None: the one recorded with it
    threads: None: as many as torch takes
    activations: "float": exact; "int8": the layers' inputs rounded as llama.cpp does
    max_length: tokens of a request at most; None: what the model was made for
    batch_size: sequences that go through the model together at most; None: as many as are worth it
    """

    path: Path
    theta: Path | None = None
    gamma: float | None = None
    threads: int | None = None
    activations: str = "float"
    max_length: int | None = None
    batch_size: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ModelArguments:
        """From what lm-eval has read of the command line. Raises NKATError for what is unknown or impossible."""
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                raise NKATError(f"--model_args: {name} is not known to the model nkat; known are {', '.join(names)}")
        if not given.get("path"):
            raise NKATError("--model_args: the model nkat needs path=FILE, a .gguf or .nkat")
        activations = given.get("activations", "float")
        if activations not in ACTIVATIONS:
            raise NKATError(f"--model_args: activations must be float or int8, got {activations}")
        theta = given.get("theta")
        return cls(
            path=Path(str(given["path"])).expanduser(),
            theta=None if theta is None else Path(str(theta)).expanduser(),
            gamma=_number(given, "gamma"),
            threads=_count(given, "threads", 1),
            activations=activations,
            max_length=_count(given, "max_length", 2),
            batch_size=_batch(given.get("batch_size")),
        )


def _number(given: Mapping[str, Any], name: str) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NKATError(f"--model_args: {name} must be a number, got {value}")
    return float(value)


def _count(given: Mapping[str, Any], name: str, least: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise NKATError(f"--model_args: {name} must be a whole number from {least} on, got {value}")
    return value


def _batch(value: object) -> int | None:
    """lm-eval's own default is 1, which nobody asked for: it means the same as `auto`."""
    text = str(value)
    if value is None or text == "auto" or text.startswith("auto:"):
        return None
    if not text.isdecimal() or int(text) < 1:
        raise NKATError(f"--batch_size must be auto or a whole number from 1 on, got {text}")
    return int(text) if int(text) > 1 else None
