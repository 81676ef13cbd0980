"""How a command begins: Ctrl-C while its modules load, which takes seconds, is one line and no traceback; so is a
package that is not installed.

Whoever starts a command imports this before anything else, so this imports nearly nothing; the setup check uses it on
old Pythons too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from types import ModuleType

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
MESSAGE = "interrupted; nothing was written"
SETUP = "setup_nkat_kobold_integration.py"


def start(module: str) -> None:
    """Runs the `main` of a module, which is loaded only now, as a command (`nkat.host.commandline.run`)."""
    try:
        load("nkat.host.commandline").run(lambda: load(module).main())
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or (_ROOT / package).is_dir():  # one of ours: a fault, or half of a checkout
            raise
        print(
            f"error: this Python has no {package}; what else is missing, and how to get it: {_setup()}", file=sys.stderr
        )
        sys.exit(2)


_ROOT = Path(__file__).resolve().parents[2]


def _setup() -> str:
    """The command of the setup check, which needs no package."""
    script = _ROOT / SETUP
    if not script.is_file():
        return "nkat-setup"
    beside = Path.cwd() == _ROOT
    line: str = load("nkat.host.programs").shell_line(["python", SETUP if beside else script])
    return line


def load(module: str) -> ModuleType:
    """The module; Ctrl-C while it loads ends this process at once.

    Not by an exception: one in a callback of Python's import system or in a library's own `try` is lost there, with a
    traceback. Outside the main thread, and where Ctrl-C is ignored (nohup) or handled already, this changes nothing.
    """
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        return import_module(module)
    signal.signal(signal.SIGINT, _end)
    try:
        return import_module(module)
    finally:
        signal.signal(signal.SIGINT, usual)  # from here on there can be something to clean up


def _end(*_: object) -> NoReturn:
    try:
        os.write(2, f"{MESSAGE}\n".encode())
    finally:  # also where stderr is closed
        os._exit(INTERRUPTED)
