"""A program that serves models, as a row: all in which one differs from another. What launches and watches is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nkat.kobold.backends import Backend
from nkat.kobold.benchmark import Speed
from nkat.kobold.choose import Choice
from nkat.kobold.command import Settings
from nkat.kobold.files import RunFiles
from nkat.kobold.find import Sought
from nkat.kobold.process import Loaded, Watch
from nkat.kobold.program import Program


@dataclass(frozen=True, slots=True)
class Served:
    """One of the models that a program serves by name.

    values: the settings it is loaded with
    """

    name: str
    files: RunFiles
    choice: Choice
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Several:
    """How a program serves several models.

    check: raises NKATError where it cannot, before anything is read
    command: writes into a folder what it needs, of which the first model is loaded, and gives the command
    """

    check: Callable[[Program, Settings], None]
    command: Callable[[Program, Path, Sequence[Served], Settings, Sequence[str]], list[str]]


@dataclass(frozen=True, slots=True)
class Runtime:
    """One program.

    name: as `--runtime` takes it; key: under which records tell about the program
    sought: how it is found; probe: asks the one at a path what it can do, and may remember the answer
    backends: what it can compute with, what serves best first
    own_flags: its flags that are ours to set; password_flags: those that keep strangers out; secure_flag: for https
    separate_adapters: several adapters are loaded beside each other, each with its weight, instead of as one
    flash_attention: whether it will use it, from these settings and the user's own flags
    settings_of: its settings for a choice and files, by their names in its own file
    suffix: of that file; write: writes one, with the user's own flags where it can hold them
    loading: the command that runs it with the settings of such a file
    watch: what its log and its server tell; measure: its speed with a command, by that command's settings
    router: several models, of which a request names one; admin: several between which one switches; None: it cannot
    """

    name: str
    key: str
    sought: Sought
    probe: Callable[[Path, bool], Program]
    backends: tuple[Backend, ...]
    own_flags: tuple[str, ...]
    password_flags: tuple[str, ...]
    secure_flag: str
    separate_adapters: bool
    flash_attention: Callable[[Program, Settings, Sequence[str]], bool]
    settings_of: Callable[[Program, Choice, RunFiles, Settings], dict[str, Any]]
    suffix: str
    write: Callable[[Program, Path, Mapping[str, Any], Sequence[str], bool], None]
    loading: Callable[[Program, Path, Settings, Sequence[str]], list[str]]
    watch: Watch
    measure: Callable[[Sequence[str], Settings, str, float, Callable[[Loaded], None]], Speed]
    router: Several
    admin: Several | None

    @property
    def title(self) -> str:
        """What people call it."""
        return self.sought.title
