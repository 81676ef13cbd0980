"""Runs an attack in several processes and counts what became of its cases.

read      opened, loaded and run        refused   one line, as a user would see it
uncaught  another exception             crash     the process died        hang   no answer in time
"""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

OUTCOMES = ("read", "refused", "uncaught", "crash", "hang")
FAULTS = OUTCOMES[2:]
SECONDS = 30.0  # for one case, the start of its process included
_ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Result:
    """counts: by outcome; faults: case and what happened, of the first of each"""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, case: int, said: str) -> None:
        kind = said.split(" ", 1)[0]
        self.counts[kind] += 1
        if kind in FAULTS and len(self.faults) < 100:
            self.faults.append(f"case {case}: {said}")

    @property
    def clean(self) -> bool:
        return not any(self.counts[kind] for kind in FAULTS)

    def record(self) -> dict[str, int]:
        return {kind: self.counts[kind] for kind in OUTCOMES}


def attack(
    count: int,
    *,
    first: int = 0,
    processes: int = 2,
    fault: str = "none",
    seconds: float = SECONDS,
    on_case: Callable[[], object] = lambda: None,
) -> Result:
    """Tries `count` cases. fault: planted on purpose, one of FAULTS."""
    result, lock = Result(), threading.Lock()

    def add(case: int, said: str) -> None:
        with lock:
            result.add(case, said)
            on_case()

    def share(start: int) -> None:
        while start < first + count:
            start = _until_it_ends(start, first + count, processes, fault, seconds, add)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(share, range(first, first + processes)))
    return result


def _until_it_ends(
    start: int, stop: int, step: int, fault: str, seconds: float, add: Callable[[int, str], None]
) -> int:
    """One process: tries cases until the last, or until one ends it; returns the next case."""
    command = [sys.executable, "-m", "tests.attack.worker", str(start), str(stop), str(step), fault]
    process = subprocess.Popen(
        command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()

    def read(stream: object = process.stdout) -> None:
        for line in stream:  # type: ignore[attr-defined]
            lines.put(line.strip())
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    case, begun = start, False
    try:
        while True:
            try:
                line = lines.get(timeout=seconds)
            except queue.Empty:
                add(case, "hang")
                return case + step
            if not line and not begun:
                raise RuntimeError(f"{' '.join(command)} ended with status {process.wait()} before its first case")
            if not line:  # the process has ended: after its last case, or within one
                if process.wait() != 0 or case < stop:
                    add(case, f"crash status {process.returncode}")
                return case + step
            if line.startswith("case "):
                case, begun = int(line.split()[1]), True
            else:
                add(case, line)
                case += step
    finally:
        process.kill()
        process.wait()
