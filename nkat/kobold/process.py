"""Runs a program that serves models and watches it: what it says it loaded, when it is ready, how it ended.

What counts as loaded is the name of the library that its log says it opened, and the devices on which it put weights;
llama.cpp's line "offloaded 5/31 layers to GPU" is written without any GPU too and counts for nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from nkat.errors import NKATError
from nkat.host import console
from nkat.host.console import note
from nkat.host.environment import users_environment
from nkat.kobold.guard import Guard, kill_group, signal_group

_LAST_LINES = 12  # of its log, shown when it fails
_END_SECONDS = 10.0  # between a forwarded signal and the end by force
_POLL_SECONDS = 0.25
_LOG_SECONDS = 5.0  # for a line of the log that was written before KoboldCpp answered to be read here
_BUFFER = re.compile(r"load_tensors:\s+(.+?) (?:model )?buffer size =\s+([\d.]+) MiB")
_ADAPTER = re.compile(r"loaded (\d+) tensors from lora file")
# Main memory by its names. What is left is a GPU: CUDA0 or Vulkan0, and in older versions the card's own name.
_MAIN_MEMORY = re.compile(r"(CPU|AMX|BLAS)|.*_Host$")


@dataclass(frozen=True, slots=True)
class Watch:
    """What a program tells, and how. What llama.cpp itself says is the same in all of them and is not here.

    title: what people call it
    version, library: patterns of its log, whose group is what they are named for; None: it does not say
    failures: patterns of lines after which nothing good will come, with what that means; {url}: where it should be
    undrafted: of a line that says that a draft model is not used
    name_of: the model's name that its server at a URL gives, or None as long as it has loaded none
    """

    title: str
    version: re.Pattern[str] | None
    library: re.Pattern[str] | None
    failures: tuple[tuple[re.Pattern[str], str], ...]
    undrafted: re.Pattern[str]
    name_of: Callable[[str], str | None]


@dataclass(slots=True)
class Loaded:
    """What the log says was really loaded.

    library: "default", "cublas", ...; None before it was opened
    buffers: MiB of weights on each device, such as {"CUDA0": 3821.0, "CPU": 70.3}
    adapters: how many LoRA adapters were loaded; adapter_tensors: of all of them, None when there is none
    """

    version: str | None = None
    library: str | None = None
    buffers: dict[str, float] = field(default_factory=dict)
    adapter_tensors: int | None = None
    adapters: int = 0

    def read(self, line: str, watch: Watch) -> None:
        """Takes one line of the log into account."""
        if watch.version is not None and (match := watch.version.search(line)):
            self.version = match[1]
        elif watch.library is not None and (match := watch.library.search(line)):
            self.library = match[1]
        elif match := _BUFFER.search(line):
            self.buffers[match[1]] = self.buffers.get(match[1], 0.0) + float(match[2])
        elif match := _ADAPTER.search(line):
            self.adapters += 1
            self.adapter_tensors = (self.adapter_tensors or 0) + int(match[1])

    @property
    def gpu_megabytes(self) -> float:
        """MiB of weights that are on a GPU."""
        return sum(size for name, size in self.buffers.items() if not _MAIN_MEMORY.match(name))


class ServerProcess:
    """A running program; made by `running`."""

    def __init__(self, child: subprocess.Popen[bytes], watch: Watch) -> None:
        self.child = child
        self.watch = watch
        self.loaded = Loaded()
        self.lines: deque[str] = deque(maxlen=2000)
        self.on_line: Callable[[str], object] | None = None
        self.signalled: int | None = None
        self._kill_at = float("inf")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for raw in self.child.stdout:
            line = raw.decode("utf-8", "replace").rstrip("\r\n").rpartition("\r")[2]
            self.lines.append(line)
            self.loaded.read(line, self.watch)
            if self.on_line is not None:
                self.on_line(line)

    def told(self, what: Callable[[Loaded], bool]) -> bool:
        """Whether the log says so. Its reader can be behind what its server already answers, so it is waited for."""
        deadline = time.monotonic() + _LOG_SECONDS
        while not what(self.loaded) and self.child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return what(self.loaded)

    def forward(self, number: int) -> None:
        """Passes a signal on; a second one, or ten seconds without effect, end it by force."""
        if self.signalled is not None:
            kill_group(self.child)
            return
        self.signalled = number
        self.end_by(time.monotonic() + _END_SECONDS)
        if os.name != "nt":  # on Windows Ctrl-C reaches every program of the console by itself
            signal_group(self.child, number)

    def end_by(self, deadline: float) -> None:
        """Ends it by force at this time (of time.monotonic) unless it ends before."""
        self._kill_at = min(self._kill_at, deadline)

    def poll(self) -> int | None:
        """Its exit status, or None while it runs; ends it by force when a forwarded signal had no effect."""
        if time.monotonic() > self._kill_at:
            kill_group(self.child)
        status = self.child.poll()
        if status is not None:
            self._reader.join(timeout=2)  # what it said last; a grandchild may hold the pipe open
        return status

    def wait(self) -> int:
        """Waits until it has ended and returns its exit status."""
        while (status := self.poll()) is None:
            time.sleep(_POLL_SECONDS)
        return status

    def check_log(self, url: str) -> None:
        """Raises NKATError where a line says that nothing good will come."""
        for line in list(self.lines):
            for pattern, meaning in self.watch.failures:
                if pattern.search(line):
                    raise self.failure(meaning.format(url=url))

    def failure(self, what: str) -> NKATError:
        """An error in one line; its own last lines are shown above it."""
        words = [line[:300] for line in self.lines if line.strip()][-_LAST_LINES:]
        if not words:
            return NKATError(f"{what}; it said nothing")
        note(f"{self.watch.title}'s last lines:\n" + "\n".join(f"    {word}" for word in words))
        telling = next((word for word in words if "error" in word.lower()), words[-1])
        too_old = f"; a newer {self.watch.title} may know it" if "unknown model architecture" in telling else ""
        return NKATError(f"{what}: {telling}{too_old}")


@contextlib.contextmanager
def running(command: Sequence[str], watch: Watch) -> Iterator[ServerProcess]:
    """Starts a program without a shell and ends it, with everything it started, when the block ends.

    While the block runs, the signals that ask this process to stop go to that one instead.
    """
    with _Signals() as signals, Guard() as guard:
        try:
            child = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**users_environment(), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
                **guard.popen_options,
            )
        except OSError as error:
            raise NKATError(f"{command[0]}: cannot be started: {error.strerror or error}") from None
        guard.watch(child)
        process = ServerProcess(child, watch)
        signals.go_to(process)
        try:
            yield process
        finally:
            if child.poll() is None:
                signal_group(child, signal.SIGTERM)
                process.end_by(time.monotonic() + _END_SECONDS)
                process.wait()


def wait_until_ready(process: ServerProcess, url: str, seconds: float, check: Callable[[Loaded], None]) -> str:
    """Waits for the server and returns its model's name.

    check: is called as the log goes on and raises NKATError when something else was loaded than was asked for
    Raises NKATError when it ends, says that it cannot go on, or is not ready in time. Returns "" after a signal.
    """
    started, watch = time.monotonic(), process.watch
    with console.bar(None, f"{watch.title} loads", at_once=True, form="{desc}: {elapsed} {postfix}") as bar:
        while True:
            status = process.poll()
            check(process.loaded)
            if process.signalled is not None and status is not None:
                return ""
            if status is not None:
                raise process.failure(f"{watch.title} {_ended(status)} before it was ready")
            process.check_log(url)
            name = watch.name_of(url)
            if name is not None:
                if watch.library is not None:
                    process.told(lambda loaded: loaded.library is not None)
                check(process.loaded)
                return name
            if time.monotonic() - started > seconds:
                raise process.failure(
                    f"{watch.title} was not ready within {seconds:.0f} seconds (--timeout allows more)"
                )
            bar.set_postfix_str(next((line for line in reversed(list(process.lines)) if line.strip()), "")[:60])
            bar.update(0)
            time.sleep(_POLL_SECONDS)


def check_loaded(loaded: Loaded, libraries: Sequence[str], backend: str, advice: str) -> None:
    """Raises NKATError as soon as the log shows another library than one of `libraries`."""
    if loaded.library is not None and loaded.library not in libraries:
        raise NKATError(
            f"asked for {backend}, but KoboldCpp loaded koboldcpp_{loaded.library} without a word, "
            f"because it has no koboldcpp_{' or koboldcpp_'.join(libraries)}; {advice}"
        )


def _ended(status: int) -> str:
    if status < 0 or status > 128:
        number = -status if status < 0 else status - 128
        with contextlib.suppress(ValueError):
            return f"crashed ({signal.Signals(number).name}, status {128 + number})"
    return f"ended with status {status}"


class _Signals:
    """While the block runs, the signals that ask this process to stop go to the program; early ones wait for it."""

    def __init__(self) -> None:
        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
        self._numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self._before: dict[int, Any] = {}
        self._early: list[int] = []
        self._process: ServerProcess | None = None

    def __enter__(self) -> _Signals:
        self._before = {number: signal.signal(number, self._handle) for number in self._numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._before.items():
            signal.signal(number, previous)

    def go_to(self, process: ServerProcess) -> None:
        self._process = process
        for number in self._early:
            process.forward(number)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._process is None:
            self._early.append(number)
        else:
            self._process.forward(number)
