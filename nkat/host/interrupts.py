"""Ctrl-C held back until a step is whole."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm


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
