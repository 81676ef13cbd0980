"""A program that serves models over HTTP, as far as it has told about itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nkat.errors import NKATError
from nkat.host.environment import users_environment
from nkat.host.hardware import Gpu

SOURCE = "koboldcpp.py"
_ANSWER_SECONDS = 180  # a one-file program unpacks some hundred megabytes first, and a virus scanner reads them


@dataclass(frozen=True, slots=True)
class Program:
    """One that answers.

    path: the program, or koboldcpp.py
    version: as it says, or None for one so old that it does not
    flags: the long flags it accepts, with their dashes
    libraries: the backends' libraries it carries, such as "default" or "cublas"; None: cannot be told
    cache_types: what its flag for the KV cache's type takes, in its own spelling; (): cannot be told
    devices: the GPUs that it lists itself; () for one that does not
    title: what people call it
    """

    path: Path
    version: str | None
    flags: frozenset[str]
    libraries: frozenset[str] | None
    cache_types: tuple[str, ...] = ()
    devices: tuple[Gpu, ...] = ()
    title: str = "KoboldCpp"

    @property
    def is_source(self) -> bool:
        return self.path.name == SOURCE

    @property
    def label(self) -> str:
        return f"{self.title} {self.version or '(version unknown)'}"

    def prefix(self) -> list[str]:
        """The command that starts it, without flags."""
        return command_prefix(self.path)

    def flag(self, *names: str) -> str | None:
        """The first of these flags that it accepts: names changed between versions."""
        return next((name for name in names if name in self.flags), None)

    def require_flag(self, *names: str) -> str:
        """The same; raises NKATError when it accepts none of them."""
        found = self.flag(*names)
        if found is None:
            raise NKATError(f"{self.label} has no {names[0]}; a newer one may have it")
        return found

    def has_library(self, name: str) -> bool:
        """Whether it carries a backend's library; where that cannot be told, its start-up log will."""
        return self.libraries is None or name in self.libraries


def command_prefix(path: Path) -> list[str]:
    """The command that starts the program at `path`: a source folder's script runs in this Python."""
    return [sys.executable, str(path)] if path.name == SOURCE else [str(path)]


def ask(path: Path, *flags: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Runs the program with flags that make it answer and end: its status, stdout and stderr. Raises NKATError."""
    try:
        done = subprocess.run(
            [*command_prefix(path), *flags],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_ANSWER_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**users_environment(), **(environment or {})},
        )
    except subprocess.TimeoutExpired:
        raise NKATError(f"{path}: did not answer {' '.join(flags)} within {_ANSWER_SECONDS} seconds") from None
    except OSError as error:
        raise NKATError(f"{path}: cannot be started: {error.strerror or error}") from None
    return done.returncode, done.stdout, done.stderr


def last_words(said: Sequence[str]) -> str:
    """The last line of what a program said, stderr before stdout."""
    text = next((part.strip() for part in said if part.strip()), "it said nothing")
    return text.splitlines()[-1]
