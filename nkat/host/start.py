"""How a command begins: Ctrl-C while its modules load, which takes seconds, is one line and no traceback.

Whoever starts a command imports this before anything else, so this imports nearly nothing; the setup check uses it on
old Pythons too.
"""

from __future__ import annotations

import os
import signal
import threading
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from types import ModuleType

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
MESSAGE = "interrupted; nothing was written"


def start(module: str) -> None:
    """Runs the `main` of a module, which is loaded only now, as a command (`nkat.host.commandline.run`)."""
    load("nkat.host.commandline").run(lambda: load(module).main())


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
