"""A list of compiled kernels, run from end to end by several threads without Python in between.

A `Program` is what a forward pass becomes: kernels with their arguments, and barriers where one needs what other
threads computed. Every thread runs every step and takes its own part of it (`Builder.thread`, `Builder.threads`).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import sys
import threading
from collections.abc import Callable, Iterable

import numpy as np

from nkat.errors import NKATError
from nkat.kernels.cpu.jit import KERNEL, compile_kernel
from nkat.kernels.cpu.llvm import I64, Builder, Value

Argument = np.ndarray | int

_SPINS = 2000  # looks at the barrier before the thread sleeps: about the time of a short step
# Linux' system call, by processor (include/uapi/asm-generic/unistd.h, arch/x86/entry/syscalls/syscall_64.tbl), and what
# is asked of it (include/uapi/linux/futex.h), among the threads of one process
_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}
_WAIT, _WAKE = 0x80, 0x81


class Program:
    """Steps, laid out in one array. Keeps the arrays among its arguments alive.

    add(kernel, arguments): an array stands for its address
    barrier(): what follows sees what all threads did before
    """

    def __init__(self) -> None:
        self._kernels: list[int] = []
        self._arguments: list[np.ndarray] = []
        self._kept: list[np.ndarray] = []
        self._meeting = np.zeros(32, dtype=np.int64)  # arrived; round and asleep: on two cache lines
        self._steps: np.ndarray | None = None

    def add(self, kernel: int, arguments: Iterable[Argument]) -> np.ndarray:
        """Appends a step; returns its arguments, int64, which may be changed between runs."""
        given = list(arguments)
        self._kept += [a for a in given if isinstance(a, np.ndarray)]
        words = np.array([a.ctypes.data if isinstance(a, np.ndarray) else a for a in given], dtype=np.int64)
        self._kernels.append(kernel)
        self._arguments.append(words)
        return words

    def keep(self, *arrays: np.ndarray) -> None:
        """Keeps alive what the steps find in other ways than by their arguments."""
        self._kept += arrays

    def barrier(self) -> None:
        if self._kernels:
            call, number = _pause()
            self.add(_barrier_kernel(number != 0), (self._meeting, self._meeting[16:], call, number))

    def run(self, threads: Threads) -> None:
        if self._steps is None:
            pairs = [(k, a.ctypes.data) for k, a in zip(self._kernels, self._arguments, strict=True)]
            self._steps = np.array([(len(pairs), 0), *pairs], dtype=np.int64)
        threads.run(_runner_kernel(), self._steps)


class Threads:
    """Threads that wait for a kernel to run. The caller only waits, so that Ctrl-C finds no kernel half started."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._start = [threading.Lock() for _ in range(count)]  # held until there is something to do
        self._done = threading.Lock()  # held until the last thread has finished
        self._counting = threading.Lock()
        self._left = 0  # threads that have not finished
        self._job = (0, 0)
        self._busy = threading.Lock()  # one program at a time
        for i, start in enumerate(self._start):
            start.acquire()
            try:
                threading.Thread(target=self._work, args=(i,), daemon=True, name=f"nkat-{i}").start()
            except RuntimeError as error:  # a limit of the system's
                raise NKATError(
                    f"only {i} of {count} threads could be started ({error}): give fewer --threads"
                ) from None

    def run(self, kernel: int, arguments: np.ndarray) -> None:
        """Runs a kernel on all threads and waits for the last; a Ctrl-C meanwhile is raised after that."""
        interrupt = None
        with self._busy:
            self._done.acquire(blocking=False)
            self._job = (kernel, arguments.ctypes.data)
            self._left = self.count
            for start in self._start:
                start.release()
            while self._left:
                try:
                    self._done.acquire()
                except KeyboardInterrupt as error:  # the kernels still use the caller's arrays
                    interrupt = error
        if interrupt is not None:
            raise interrupt

    def _work(self, index: int) -> None:
        while True:
            self._start[index].acquire()
            kernel, arguments = self._job
            _call(kernel)(arguments, index, self.count)
            with self._counting:
                self._left -= 1
                if self._left == 0:
                    self._done.release()


_HUGE = 1 << 21  # bytes of a large page on x86-64 and most of ARM


def aligned(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros that begin on a cache line; large arrays on a large page. Raises MemoryError where there is no room.

    Reading a weight of which a part lies on small pages takes up to a fifth longer: more addresses to be looked up.
    """
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if count >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        try:  # private: the system keeps what processes share on small pages
            pages = mmap.mmap(-1, count + _HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{count} bytes: {error.strerror}") from None
        pages.madvise(mmap.MADV_HUGEPAGE)
        raw, alignment = np.frombuffer(pages, np.uint8), _HUGE
    else:
        raw, alignment = np.zeros(count + 64, dtype=np.uint8), 64
    start = -raw.ctypes.data % alignment
    return raw[start : start + count].view(dtype).reshape(shape)


@functools.cache
def pool(count: int) -> Threads:
    """The threads that all layers share."""
    return Threads(count)


@functools.cache
def _call(kernel: int) -> Callable[[int, int, int], None]:
    return KERNEL(kernel)


@functools.cache
def _runner_kernel() -> int:
    """arguments: number of steps, 0, then address and arguments of each."""

    def emit(k: Builder) -> None:
        with k.loop(0, k.integer(0)) as step:
            at = k.arguments + (step + 1) * 16
            k.call_address(k.load_pointer(at), [k.load_pointer(at + 8), k.thread, k.threads])

    return compile_kernel("run_program", emit)


@functools.cache
def _barrier_kernel(sleeps: bool) -> int:
    """arguments: int64 how many arrived, int64 round and how many are asleep, what `_pause` gave.

    Who waits longer than a short step sleeps, and is woken by the last to arrive. A thread that merely lets others run
    gets the processor back when the system next looks round, milliseconds later: with some hundred barriers in a
    token, one other busy program made everything tens of times slower.
    """

    def emit(k: Builder) -> None:
        arrived, round_, call, number = k.pointer(0), k.pointer(1), k.pointer(2), k.integer(3)
        asleep, zero = round_ + 8, k.value(0, I64())

        def futex(operation: int, value: Value) -> None:
            k.call_address(call, [number, round_, k.value(operation, I64()), value, zero, zero, zero])

        now = k.load_shared(round_)
        last = (k.fetch_add(arrived, 1) + 1).equals(k.threads)
        with k.when(last):
            k.store_shared(zero, arrived)
            k.store_shared(now + 1, round_)
            if sleeps:
                with k.when(k.fetch_add(asleep, 0) > 0):
                    futex(_WAKE, k.threads)
        looks = k.variable(zero)
        with k.while_(lambda: k.load_shared(round_).equals(now)):
            looks.value = looks.value + 1
            k.pause()
            with k.when(looks.value > _SPINS):
                if sleeps:
                    k.fetch_add(asleep, 1)
                    futex(_WAIT, now)  # comes back at once where the round, its low 32 bits, is another by now
                    k.fetch_add(asleep, -1)
                else:
                    k.call_address(call, [])

    return compile_kernel("barrier", emit)


@functools.cache
def _pause() -> tuple[int, int]:
    """The address of `syscall` and the number of its futex; elsewhere of what lets other threads run, and 0."""
    if sys.platform == "win32":
        return ctypes.cast(ctypes.windll.kernel32.SwitchToThread, ctypes.c_void_p).value or 0, 0
    library = ctypes.CDLL(None)
    number = _FUTEX.get(platform.machine(), 0) if sys.platform == "linux" else 0
    function = library.syscall if number else library.sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0, number
