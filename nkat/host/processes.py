"""Processes told apart for good: a number alone is given again to another process."""

from __future__ import annotations

import functools
import os

import psutil

_TOLERANCE = 2  # seconds; the system's start times move a little when its clock is set right


@functools.lru_cache(maxsize=2)
def _start(pid: int) -> int:
    return int(psutil.Process(pid).create_time())


def identity() -> str:
    """This process: its number and when it was started."""
    return f"{os.getpid()}-{_start(os.getpid())}"


def is_alive(process: str) -> bool:
    """Whether a process, by its `identity` or its number alone, still runs. A zombie does not."""
    pid, _, start = process.partition("-")
    try:
        found = psutil.Process(int(pid))
        same = not start or abs(found.create_time() - int(start)) <= _TOLERANCE
        return same and found.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except (psutil.NoSuchProcess, ValueError):  # which a psutil.ZombieProcess is too
        return False
    except psutil.AccessDenied:  # somebody else's, so it is there
        return True
