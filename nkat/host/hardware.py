"""What this machine has: processor, memory, graphics devices, disk. The only file that asks."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from nkat.errors import NKATError
from nkat.host.programs import find_program
from nkat.host.record import parse_json
from nkat.host.threads import most_threads

_ASKING_SECONDS = 20  # for a driver to answer; a cold one on Windows takes some seconds


@dataclass(frozen=True, slots=True)
class Gpu:
    """A graphics device as one programming interface sees it; the same card can appear under both.

    interface: "cuda" or "vulkan"
    index: its number there: PCI order for cuda, the order of enumeration for vulkan
    kind: "discrete", "integrated", "virtual", "software" (a processor in disguise) or "other"
    total, free: bytes of its memory; free is None where the driver does not tell
    source: who told
    """

    interface: str
    index: int
    name: str
    kind: str
    total: int
    free: int | None
    source: str


def set_threads(count: int | None) -> int:
    """Sets how many threads computations use (None: leave torch's choice) and returns the number in force."""
    if count is not None:
        if not 1 <= count <= most_threads():
            raise NKATError(f"--threads must be within 1..{most_threads()} on this machine, got {count}")
        torch.set_num_threads(count)
    if torch.get_num_threads() > most_threads():  # OMP_NUM_THREADS says so
        torch.set_num_threads(most_threads())
    return torch.get_num_threads()


def pick_device(allow_cuda: bool) -> torch.device:
    """CUDA when there is one and it is allowed, else the CPU."""
    return torch.device("cuda:0" if allow_cuda and torch.cuda.is_available() else "cpu")


def computes_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are computed as such, and not by way of float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return not _flags().isdisjoint({"avx512_bf16", "amx_bf16"})


def has_tiles() -> bool:
    """Whether the processor multiplies bfloat16 in tiles: AMX."""
    return "amx_bf16" in _flags()


@functools.cache
def _flags() -> frozenset[str]:
    """What Linux says that the processor can do; empty elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    return frozenset(cpuinfo.read_text().split()) if cpuinfo.exists() else frozenset()


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


def describe_cuda(device: torch.device) -> dict[str, str | int]:
    """`describe`, and what else a figure taken on a GPU, or the trust in a kernel, depends on."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "none"
    properties = torch.cuda.get_device_properties(device)
    return {
        **describe(device),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "driver": _nvidia_driver(),
        "cuda": torch.version.cuda or "none",
        "triton": triton_version,
    }


def _nvidia_driver() -> str:
    """The driver's version: from the kernel module on Linux, else from nvidia-smi."""
    told = Path("/proc/driver/nvidia/version")
    if told.exists():
        found = re.search(r"Kernel Module[^0-9]*(?:for \S+\s+)?([0-9]+(?:\.[0-9]+)+)", told.read_text())
        if found:
            return found[1]
    program = find_program("nvidia-smi")
    out, problem = (
        ("", "") if program is None else _ask([program, "--query-gpu=driver_version", "--format=csv,noheader"])
    )
    return "unknown" if problem or not out else out.splitlines()[0].strip()


def is_x86() -> bool:
    """Whether the processor is of the family that has AVX or not."""
    return platform.machine().lower() in ("x86_64", "amd64", "i686", "x86")


def cpu_features() -> frozenset[str]:
    """Which of "avx", "avx2" and "avx512" the processor has; avx2 means FMA and F16C too, as its programs use them.

    From the kernel's list on Linux; elsewhere from torch, which tells AVX2 and AVX-512 only.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        line = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
        return features_from_flags(line.partition(":")[2])
    level = torch.backends.cpu.get_cpu_capability()
    levels = {"AVX2": {"avx", "avx2"}, "AVX512": {"avx", "avx2", "avx512"}}
    return frozenset(levels.get(level, set()))


def features_from_flags(flags: str) -> frozenset[str]:
    """`cpu_features` from the `flags` of /proc/cpuinfo."""
    needed = {
        "avx": {"avx"},
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    }
    have = set(flags.split())
    return frozenset(name for name, parts in needed.items() if parts <= have)


def physical_cores() -> int:
    """Cores without hyper-threading, and no more than this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def total_and_free_memory() -> tuple[int, int]:
    """Bytes of main memory: all of it, and what programs could still get."""
    found = psutil.virtual_memory()
    return found.total, found.available


def disk_free(folder: Path) -> int:
    """Free bytes where `folder` is, or where it would be made."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def nvidia_gpus() -> tuple[list[Gpu], str | None]:
    """NVIDIA's devices in PCI order, and why there are none.

    By NVML where the package nvidia-ml-py is installed, else by the driver's own nvidia-smi.
    """
    try:
        import pynvml
    except ModuleNotFoundError:
        return _nvidia_smi()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"no NVIDIA driver (NVML: {error})"
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gpus = []
        for index, handle in enumerate(handles):
            name, found = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle)
            text = name.decode() if isinstance(name, bytes) else name  # bytes until nvidia-ml-py 11.5
            gpus.append(Gpu("cuda", index, text, "discrete", found.total, found.free, "NVML"))
        return gpus, None if gpus else "NVML knows no device"
    except pynvml.NVMLError as error:
        return [], f"NVML: {error}"
    finally:
        pynvml.nvmlShutdown()


def vulkan_gpus() -> tuple[list[Gpu], str | None]:
    """The devices of the system's Vulkan library, and why there are none. Asked in a process of its own."""
    command = [sys.executable, "-I", str(Path(__file__).with_name("vulkan.py"))]
    out, problem = _ask(command)
    if problem is not None:
        return [], problem
    try:
        found: list[dict[str, Any]] = parse_json(out.splitlines()[-1])
    except (ValueError, LookupError):  # a driver that prints, too
        return [], f"the Vulkan library's answer is not understood: {out!r:.80}"
    gpus = [Gpu("vulkan", d["index"], d["name"], d["kind"], d["total"], d["free"], "Vulkan") for d in found]
    return gpus, None if gpus else "the Vulkan library knows no device"


def _nvidia_smi() -> tuple[list[Gpu], str | None]:
    program = find_program("nvidia-smi")
    if program is None:
        return [], "no NVIDIA driver (neither the package nvidia-ml-py nor nvidia-smi is there)"
    fields = "--query-gpu=index,name,memory.total,memory.free"
    out, problem = _ask([program, fields, "--format=csv,noheader,nounits"])
    if problem is not None:
        return [], f"nvidia-smi: {problem}"
    gpus = smi_gpus(out)
    return gpus, None if gpus else "nvidia-smi knows no device"


def smi_gpus(table: str) -> list[Gpu]:
    """From nvidia-smi's lines `index, name, MiB in all, MiB free`; a line without numbers ("[N/A]") is left out."""
    gpus = []
    for line in table.splitlines():
        index, _, rest = line.partition(",")
        name, *sizes = (part.strip() for part in rest.rsplit(",", 2))
        if index.strip().isdigit() and len(sizes) == 2 and all(size.isdigit() for size in sizes):
            total, free = (int(size) << 20 for size in sizes)
            gpus.append(Gpu("cuda", int(index), name, "discrete", total, free, "nvidia-smi"))
    return gpus


def _ask(command: list[str]) -> tuple[str, str | None]:
    """A program's stdout, and what went wrong in one line."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ASKING_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    if done.returncode != 0 or not done.stdout.strip():
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode} and said nothing"]
        return "", lines[-1]
    return done.stdout, None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
