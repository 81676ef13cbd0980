"""The toolkit's commands: what each is called, how one starts another, and what a user would do next.

The setup check uses this where nothing else is installed: standard library alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nkat.host import output
from nkat.host.programs import shell_line
from nkat.host.streams import printable

# Name as installed, and the script or module of a checkout.
TOOLS = {
    "convert": ("nkat-convert", "nkat_gguf_converter.py"),
    "engine": ("nkat-engine", "nkat_inference_engine.py"),
    "optimize": ("nkat-optimize", "nkat_auto_optimizer.py"),
    "kobold": ("nkat-kobold", "backend_selector.py"),
    "serve": ("nkat-serve", "nkat_server.py"),
    "setup": ("nkat-setup", "setup_nkat_kobold_integration.py"),
    "models": ("nkat-models", "nkat.models"),
    "vit download": ("nkat-vit-download", "nkat_vit.download"),
    "vit train": ("nkat-vit-train", "nkat_vit.train"),
    "vit evaluate": ("nkat-vit-evaluate", "nkat_vit.evaluate"),
    "vit interpret": ("nkat-vit-interpret", "nkat_vit.interpret"),
    "vit predict": ("nkat-vit-predict", "nkat_vit.predict"),
    "vit export": ("nkat-vit-export", "nkat_vit.export"),
}


def is_installed() -> bool:
    """Whether this process is a command of an installed toolkit, and not a script or module of a checkout."""
    return Path(sys.argv[0]).name.startswith("nkat-")


def tool_command(tool: str) -> list[str]:
    """How a command of TOOLS is started where this one was, by whatever folder: for a record or another process."""
    installed, script = TOOLS[tool]
    if is_installed():
        return [str(Path(sys.argv[0]).absolute().with_name(installed))]
    if not script.endswith(".py"):
        return [sys.executable, "-m", script]
    beside = Path(sys.argv[0]).absolute().with_name(script)
    return [sys.executable, str(beside)] if beside.is_file() else [installed]


def tool_words(tool: str) -> list[str]:
    """The same as a user types it, in the folder where this command was typed."""
    installed, script = TOOLS[tool]
    if is_installed():
        return [installed]
    if not script.endswith(".py"):
        return ["python", "-m", script]
    beside = Path(sys.argv[0]).with_name(script)
    return ["python", str(beside) if beside.is_file() else script]


def suggest(tool: str, *arguments: object, why: str = "") -> None:
    """The command that a user may want next, as the last line on stderr: stdout is for results. Not with --quiet."""
    suggest_program([*tool_words(tool), *arguments], why)


def suggest_program(words: Sequence[object], why: str = "") -> None:
    """The same for a program that is not ours: its name, then what it is given."""
    if output.is_quiet():
        return
    line = shell_line(words)
    print(f"\nnext{', ' if why else ''}{why}: {printable(line)}", file=sys.stderr, flush=True)
