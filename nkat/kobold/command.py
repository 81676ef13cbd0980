"""What a program is to be started with: the settings that are the user's, and a command line out of its own ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.kobold.program import Program

F16 = "f16"
CACHE_TYPES = (F16, "bf16", "q8_0", "q5_1", "q4_0")  # of the KV cache, as ggml and both programs call them


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user may set, whatever the program.

    context: tokens
    cache_type: of the KV cache, one of `CACHE_TYPES`
    draft: a small model that guesses tokens for the large one to check; None: none
    draft_tokens: how many it guesses at a time; None: as the program does
    autofit: the program itself decides what goes onto the GPU
    """

    context: int
    threads: int
    host: str
    port: int
    cache_type: str = F16
    draft: Path | None = None
    draft_tokens: int | None = None
    autofit: bool = False


def command_of(program: Program, values: Mapping[str, Any], extra: Sequence[str] = ()) -> list[str]:
    """The command that runs a program with its settings, then the user's own flags."""
    return [*program.prefix(), *flags_of(values), *extra]


def flags_of(values: Mapping[str, Any]) -> list[str]:
    """A program's settings as flags: True is one without a value."""
    words: list[str] = []
    for name, value in values.items():
        words.append("--model" if name == "model_param" else f"--{name}")
        if value is not True:
            words += [str(item) for item in (value if isinstance(value, list) else [value])]
    return words


def check_extra(extra: Sequence[str], own_flags: Sequence[str]) -> None:
    """Raises NKATError for flags behind `--` that are set here."""
    for word in extra:
        if word.partition("=")[0] in own_flags:
            raise NKATError(f"{word}: is set by this script; give it before the -- (see --help)")


def given(extra: Sequence[str], *flags: str) -> bool:
    """Whether one of these flags is among the user's own."""
    return any(word.partition("=")[0] in flags for word in extra)
