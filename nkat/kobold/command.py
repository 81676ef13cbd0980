"""KoboldCpp's settings and its command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nkat.errors import NKATError
from nkat.kobold.choose import Choice
from nkat.kobold.files import RunFiles
from nkat.kobold.find import Kobold

# Ours to set: the port is waited on, the files are what the adapter was made for.
OWN_FLAGS = (
    "--model",
    "--lora",
    "--host",
    "--port",
    "--benchmark",
    "--config",
    "--contextsize",
    "--threads",
    "--gpulayers",
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user may set, with KoboldCpp's meaning."""

    context: int
    threads: int
    host: str
    port: int


def kobold_settings(kobold: Kobold, choice: Choice, files: RunFiles, settings: Settings) -> dict[str, Any]:
    """KoboldCpp's settings by their names in a `.kcpps` file, which are those of the long flags."""
    values: dict[str, Any] = {"model_param": str(files.model)}
    if files.lora is not None:
        values["lora"] = [str(files.lora)]
    index = choice.device.index if choice.device else 0
    values |= choice.backend.settings_of(kobold, index, choice.old_cpu)
    values |= {"gpulayers": choice.layers or 0, "contextsize": settings.context, "threads": settings.threads}
    return values | {"host": settings.host, "port": settings.port}


def kobold_command(kobold: Kobold, values: Mapping[str, Any], extra: Sequence[str] = ()) -> list[str]:
    """The command that runs KoboldCpp with these settings, then the user's own flags."""
    words = kobold.prefix()
    for name, value in values.items():
        words.append("--model" if name == "model_param" else f"--{name}")
        if value is not True:
            words += [str(item) for item in (value if isinstance(value, list) else [value])]
    return [*words, *extra]


def check_extra(extra: Sequence[str]) -> None:
    """Raises NKATError for flags behind `--` that are set here."""
    for word in extra:
        if word.partition("=")[0] in OWN_FLAGS:
            raise NKATError(f"{word}: is set by this script; give it before the -- (see --help)")
