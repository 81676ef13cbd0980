"""What this machine has. The only file that asks."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from nkat.errors import NKATError


def set_threads(count: int | None) -> int:
    """Sets how many threads computations use (None: leave torch's choice) and returns the number in force."""
    if count is not None:
        if count < 1:
            raise NKATError(f"--threads must be at least 1, got {count}")
        torch.set_num_threads(count)
    return torch.get_num_threads()


def pick_device(allow_cuda: bool) -> torch.device:
    """CUDA when there is one and it is allowed, else the CPU."""
    return torch.device("cuda:0" if allow_cuda and torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> dict[str, str | int]:
    """Machine and versions for a report: processor, cores, threads, device, operating system, Python, torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": str(device),
        "device_name": name,
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
