"""What this process holds in memory, split into its own pages and pages of mapped files.

A memory-mapped model's pages are resident but belong to the page cache: the system takes them back when it needs them,
and other processes share them. Linux tells them apart (/proc/self/smaps); elsewhere only the total is known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_PROC = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of this process; None where the system does not tell.

    resident: all of its pages in memory; peak: the most it ever had
    anonymous: its own, which no file backs
    model_file: resident pages of the mapped model
    gpu_peak: the most that tensors ever took on the GPU; None without CUDA
    """

    resident: int
    peak: int | None
    anonymous: int | None
    model_file: int | None
    gpu_peak: int | None


def memory(*model: Path) -> Memory:
    """The state now; `model`: the mapped file, or files, whose pages are counted apart."""
    resident = psutil.Process().memory_info().rss
    rollup = _PROC / "smaps_rollup"
    return Memory(
        resident=resident,
        peak=_peak(),
        anonymous=_kilobytes(rollup.read_text(), "Anonymous:") if rollup.exists() else None,
        model_file=_mapped(model) if model else None,
        gpu_peak=torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None,
    )


def _peak() -> int | None:
    status = _PROC / "status"
    if status.exists():  # not getrusage: its maximum counts the parent's memory between fork and exec
        return _kilobytes(status.read_text(), "VmHWM:")
    return getattr(psutil.Process().memory_info(), "peak_wset", None)  # Windows has it, macOS does not


def _mapped(paths: Iterable[Path]) -> int | None:
    """Resident bytes of the files' mappings; None where the system does not list them."""
    smaps = _PROC / "smaps"
    if not smaps.exists():
        return None
    said = smaps.read_text()
    return sum(resident_of(said, str(path.resolve())) for path in paths)


def resident_of(smaps: str, path: str) -> int:
    """Bytes resident of all mappings of `path` in the text of a Linux smaps file."""
    total = 0
    inside = False
    for line in smaps.splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):  # "7f00-7f10 r--s 00000000 08:01 123  /the/file" starts a mapping
            fields = line.split(maxsplit=5)
            inside = len(fields) == 6 and fields[5] == path
        elif inside and first == "Rss:":
            total += _kilobytes(line, "Rss:") or 0
    return total


def _kilobytes(text: str, key: str) -> int | None:
    for line in text.splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return None
