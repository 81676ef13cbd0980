"""Ctrl-C held back until a step is whole, and other requests to end, which are to clean up like it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm


class Terminated(KeyboardInterrupt):
    """SIGTERM, or that the terminal is gone: what cleans up after Ctrl-C does so after this."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def termination() -> Iterator[None]:
    """SIGTERM and SIGHUP in the block raise `Terminated`, in this process alone: those forked from it just end.

    Outside the main thread, and for a signal that is ignored (nohup) or handled already, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() == owner:
            signal.signal(number, signal.SIG_IGN)  # the second one must not disturb the cleaning up
            raise Terminated(number)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    there = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    mine = [number for number in there if signal.getsignal(number) == signal.SIG_DFL]
    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def interrupts(unfinished: str) -> Iterator[list[int]]:
    """A list that holds the signal once the user asked to stop; a second request raises KeyboardInterrupt.

    unfinished: what is still brought to its end after the first, for the message
    """

    def say() -> None:
        tqdm.write(f"stopping after {unfinished}; press Ctrl-C again to stop at once", file=sys.stderr)

    with _held((signal.SIGINT, signal.SIGTERM), say) as received:
        yield received


@contextmanager
def interrupt_after() -> Iterator[None]:
    """A Ctrl-C during the block is raised when the block has ended; a second one at once.

    Outside the main thread, which alone is interrupted, and where Ctrl-C is ignored, this does nothing.
    """
    ignored = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _held((signal.SIGINT,), lambda: None) as received:
        yield
    if received:
        raise KeyboardInterrupt


@contextmanager
def _held(signals: Sequence[signal.Signals], on_first: Callable[[], None]) -> Iterator[list[int]]:
    """A list that gets the first of these signals; a second one raises KeyboardInterrupt."""
    received: list[int] = []

    def hold(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        on_first()

    previous = {number: signal.signal(number, hold) for number in signals}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
