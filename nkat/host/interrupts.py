"""Ctrl-C held back until a step is whole, and other requests to end, which are to clean up like it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class Terminated(KeyboardInterrupt):
    """SIGTERM, or that the terminal is gone: what cleans up after Ctrl-C does so after this."""


@contextmanager
def termination() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP in the block raise `Terminated`, in this process alone: those forked from it just end.

    Gives a list that holds the signal once it came, for where the block ends in another way nevertheless.

    Outside the main thread, and for a signal that is ignored (nohup) or handled already, this does nothing.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    owner = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() == owner:
            signal.signal(number, signal.SIG_IGN)  # the second one must not disturb the cleaning up
            received.append(number)
            raise Terminated
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    there = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    mine = [number for number in there if signal.getsignal(number) == signal.SIG_DFL]
    for number in mine:
        signal.signal(number, end)
    try:
        yield received
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


class Gate:
    """Ctrl-C and SIGTERM wait, but for the blocks that let them through; a second one does not wait."""

    def __init__(self) -> None:
        self._waiting: list[int] = []
        self._before: dict[int, Any] = {}
        self._open = False

    def check(self) -> None:
        """Lets through what waits."""
        if self._waiting:
            self._deliver(self._waiting.pop(), None)

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """What comes during the block, or waits, ends it."""
        self.check()
        self._open = True
        try:
            yield
        finally:
            self._open = False

    @contextmanager
    def closed(self) -> Iterator[Gate]:
        """The block. Outside the main thread, and for a signal that is ignored, nothing waits."""
        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGINT, signal.SIGTERM):
                if callable(before := signal.getsignal(each)):
                    self._before[each] = before
                    signal.signal(each, self._handle)
        try:
            yield self
        finally:
            for number, before in self._before.items():
                signal.signal(number, before)
        self.check()

    def _handle(self, number: int, frame: object) -> None:
        if self._open or self._waiting:
            self._deliver(number, frame)
        self._waiting.append(number)

    def _deliver(self, number: int, frame: object) -> None:
        self._before[number](number, frame)  # raises KeyboardInterrupt


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
