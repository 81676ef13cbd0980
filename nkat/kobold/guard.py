"""No orphan: ends a child process and everything it started when the process that started it is gone.

A killed process cannot clean up after itself, so something else has to: on Windows a job object, which the system
closes with its last handle; elsewhere a second, tiny process that holds one end of a pipe. When the pipe closes without
a word, it ends the child's process group, politely first. The one-file KoboldCpp is two processes, hence the group.

This file is also that second process's program, so it imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import TracebackType
from typing import Any

_GRACE_SECONDS = 5.0
_DONE = b"done\n"
_KILL_ON_JOB_CLOSE = 0x2000
_EXTENDED_LIMITS = 9  # JobObjectExtendedLimitInformation


class Guard:
    """Watches a child as long as this process lives. Make it before the child is started; then `watch` the child.

    with Guard() as guard:
        child = subprocess.Popen(..., **guard.popen_options)
        guard.watch(child)
    """

    def __init__(self) -> None:
        self._watcher: _Watcher | None = None
        self._job: int | None = None
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def popen_options(self) -> dict[str, Any]:
        """How the child has to be started: in a process group of its own, where there are such."""
        return {} if os.name == "nt" else {"start_new_session": True}

    def __enter__(self) -> Guard:
        if os.name == "nt":
            self._job = _new_job()
            return self
        self._watcher = _Watcher()
        return self

    def watch(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        if self._job is not None:
            _add_to_job(self._job, child)
        if self._watcher is not None:
            self._watcher.tell(f"{child.pid}\n".encode())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The child has ended; whatever it left behind is ended too."""
        if self._child is not None:
            kill_group(self._child)
        if self._job is not None:
            close = _kernel32().CloseHandle
            close.argtypes = [ctypes.c_void_p]
            close(self._job)
        if self._watcher is not None:
            self._watcher.tell(_DONE)
            self._watcher.end()


class _Watcher:
    """The second process, and the end of the pipe that this one holds."""

    def __init__(self) -> None:
        theirs, self._pipe = os.pipe()  # not inherited, so that it closes with this process
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", __file__, str(_GRACE_SECONDS)],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            os.close(theirs)

    def tell(self, line: bytes) -> None:
        # A broken pipe: somebody killed it; this process still ends its child itself.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, line)

    def end(self) -> None:
        os.close(self._pipe)
        self._process.wait()


def signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to the child and everything in its group; on Windows, to the child alone."""
    if os.name == "nt":
        child.send_signal(number)
    else:
        _send(child.pid, number)


def kill_group(child: subprocess.Popen[bytes]) -> None:
    """Ends the child and its group at once."""
    if os.name == "nt":
        child.kill()
    else:
        signal_group(child, signal.SIGKILL)


def _kernel32() -> Any:
    return ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore] # on Windows alone


def _windows_error() -> OSError:
    """The last one."""
    return ctypes.WinError()  # type: ignore[attr-defined,unused-ignore,no-any-return] # on Windows alone


def _new_job() -> int:
    """A Windows job that dies, with all in it, when its last handle is closed."""
    kernel = _kernel32()
    kernel.CreateJobObjectW.restype = ctypes.c_void_p
    job = kernel.CreateJobObjectW(None, None)
    # JOBOBJECT_EXTENDED_LIMIT_INFORMATION: 144 bytes on 64-bit Windows; LimitFlags stands at byte 16.
    limits = ctypes.create_string_buffer(144)
    ctypes.c_uint32.from_buffer(limits, 16).value = _KILL_ON_JOB_CLOSE
    kernel.SetInformationJobObject.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32]
    if not job or not kernel.SetInformationJobObject(job, _EXTENDED_LIMITS, limits, len(limits)):
        raise _windows_error()
    return job


def _add_to_job(job: int, child: subprocess.Popen[bytes]) -> None:
    kernel = _kernel32()
    kernel.AssignProcessToJobObject.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    if not kernel.AssignProcessToJobObject(job, int(child._handle)):  # type: ignore[attr-defined]
        raise _windows_error()


def _watch_pipe(grace: float) -> None:
    """The watcher: a line with the group's number, then either "done" or the end of the pipe.

    grace: seconds between the polite end and the end by force
    """
    first = sys.stdin.buffer.readline()
    if not first or first == _DONE:
        return
    if sys.stdin.buffer.readline() == _DONE:
        return
    group = int(first)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not _send(group, number):
            return
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and _send(group, 0):
            time.sleep(0.1)


def _send(group: int, number: int) -> bool:
    """Whether there was anybody to receive it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # macOS says "not permitted" for a dead group
        return False
    return True


if __name__ == "__main__":
    _watch_pipe(float(sys.argv[1]))
