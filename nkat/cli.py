"""What every script's command line shares: errors as one line, and progress bars."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from tqdm import tqdm

from nkat.errors import NKATError

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a script: a user's mistake is one line on stderr and status 2, Ctrl-C is status 130."""
    try:
        main()
    except NKATError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `… | head` has read enough
        sys.stderr.close()
        sys.exit(0)
    sys.exit(0)


class Parser(argparse.ArgumentParser):
    """argparse's, but a mistake is one line and not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"error: {message} (see --help)\n")


def parser(description: str, examples: str, parents: Sequence[argparse.ArgumentParser] = ()) -> Parser:
    """A parser whose help ends with commands to copy."""
    return Parser(
        parents=list(parents),
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def positive_int(text: str) -> int:
    """For argparse: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def non_negative_int(text: str) -> int:
    """For argparse: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def bar(total: int, what: str, unit: str) -> tqdm:
    """A progress bar with ETA on stderr, for anything that turns out to take longer than a second."""
    return tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", delay=1, leave=False)


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
