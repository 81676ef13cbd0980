"""What the machine has, read from what the system and the drivers say."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import types
from pathlib import Path

import psutil
import pytest
import torch

from nkat.host import hardware, vulkan

GIB = 1 << 30


def test_features_need_all_their_parts() -> None:
    flags = "fpu sse avx avx2 fma f16c avx512f avx512bw avx512vl avx512dq"
    assert hardware.features_from_flags(flags) == {"avx", "avx2", "avx512"}
    assert hardware.features_from_flags(flags.replace("f16c ", "")) == {"avx", "avx512"}
    assert hardware.features_from_flags("fpu sse") == frozenset()


@pytest.mark.skipif(
    not hardware.is_x86() or not sys.platform.startswith("linux"), reason="compares x86 Linux with torch"
)
def test_features_agree_with_torch() -> None:
    if "ATEN_CPU_CAPABILITY" in os.environ:
        pytest.skip("torch is held back by ATEN_CPU_CAPABILITY")
    level = torch.backends.cpu.get_cpu_capability()
    assert ("avx2" in hardware.cpu_features()) == (level in ("AVX2", "AVX512"))


def test_cores_and_memory_are_possible(tmp_path: Path) -> None:
    assert 1 <= hardware.physical_cores() <= (psutil.cpu_count() or 1)
    total, available = hardware.total_and_free_memory()
    assert 0 < available <= total
    assert hardware.disk_free(tmp_path / "not" / "yet") == pytest.approx(psutil.disk_usage(str(tmp_path)).free, rel=0.1)


def test_nvidia_smi_lines() -> None:
    table = (
        "0, NVIDIA GeForce RTX 3080, 10240, 9121\n1, Tesla, T4, 15360, 15001\n2, Jetson Orin, [N/A], [N/A]\nfailed\n"
    )
    gpus = hardware.smi_gpus(table)
    assert [(g.index, g.name, g.total, g.free) for g in gpus] == [
        (0, "NVIDIA GeForce RTX 3080", 10 * GIB, 9121 << 20),
        (1, "Tesla, T4", 15 * GIB, 15001 << 20),
    ]


class FakeNVML(types.ModuleType):
    """nvidia-ml-py's functions that are used, with one card of 8 GiB; `broken` has no driver."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, broken: bool) -> None:
        super().__init__("pynvml")
        self.broken, self.open = broken, 0

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"GeForce"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(total=8 * GIB, free=7 * GIB, used=GIB)


def test_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    module = FakeNVML(broken=False)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    gpus, problem = hardware.nvidia_gpus()
    assert problem is None
    assert gpus == [hardware.Gpu("cuda", 0, "GeForce", "discrete", 8 * GIB, 7 * GIB, "NVML")]
    assert module.open == 0
    monkeypatch.setitem(sys.modules, "pynvml", FakeNVML(broken=True))
    gpus, problem = hardware.nvidia_gpus()
    assert gpus == []
    assert "Driver Not Loaded" in problem


def test_without_nvml_nvidia_smi_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # its import raises ModuleNotFoundError
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.nvidia_gpus()[0] == []
    if sys.platform == "win32":
        return
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, GeForce, 8192, 7168'\n")
    program.chmod(0o755)
    gpus, problem = hardware.nvidia_gpus()
    assert (gpus[0].name, gpus[0].free, gpus[0].source, problem) == ("GeForce", 7 * GIB, "nvidia-smi", None)
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2\nexit 9\n")
    gpus, problem = hardware.nvidia_gpus()
    assert (gpus, problem) == ([], "nvidia-smi: NVIDIA-SMI has failed")


class FakeVulkan:
    """libvulkan's functions that are used; structures are written here by the specification's offsets, not by ours."""

    def __init__(self, budget: bool, result: int = 0) -> None:
        self.budget, self.result = budget, result

    def vkCreateInstance(self, create: object, allocator: None, instance: object) -> int:
        return self.result

    def vkDestroyInstance(self, instance: object, allocator: None) -> None:
        return None

    def vkEnumeratePhysicalDevices(self, instance: object, count: object, items: object) -> int:
        count._obj.value = 2
        if items is not None:
            items[0], items[1] = 100, 101
        return 0

    def vkGetPhysicalDeviceProperties(self, device: ctypes.c_void_p, buffer: ctypes.Array) -> None:
        kind = 2 if device.value == 100 else 4
        name = "Radeon RX 6800" if device.value == 100 else "llvmpipe"
        struct.pack_into("<IIIII256s", buffer, 0, 1 << 22, 1, 0x1002, 0x73BF, kind, name.encode())

    def vkEnumerateDeviceExtensionProperties(self, device: object, layer: None, count: object, items: object) -> int:
        names = [b"VK_KHR_swapchain", b"VK_EXT_memory_budget"][: 2 if self.budget else 1]
        count._obj.value = len(names)
        for index, name in enumerate(names if items is not None else []):
            items[index].raw = name.ljust(256, b"\0") + struct.pack("<I", 1)
        return 0

    def vkGetPhysicalDeviceMemoryProperties2(self, device: object, memory: object) -> None:
        address = ctypes.addressof(memory._obj)
        # 16 bytes of sType and pNext; memoryTypeCount, 32 types of 8 bytes; memoryHeapCount, 16 heaps of 16 bytes
        properties = struct.pack("<I256xI", 0, 3) + struct.pack("<QI4xQI4xQI4x", 32 * GIB, 0, 256 << 20, 1, 16 * GIB, 1)
        ctypes.memmove(address + 16, properties, len(properties))
        following = ctypes.c_void_p.from_address(address + 8).value
        if following:
            values = [30 * GIB, 200 << 20, 15 * GIB, *[0] * 13, 0, 0, GIB, *[0] * 13]
            ctypes.memmove(following + 16, struct.pack("<32Q", *values), 256)


def test_vulkan_structures() -> None:
    first, second = vulkan.devices(FakeVulkan(budget=True))
    assert first == {"index": 0, "name": "Radeon RX 6800", "kind": "discrete", "total": 16 * GIB, "free": 14 * GIB}
    assert (second["index"], second["kind"]) == (1, "software")
    assert vulkan.devices(FakeVulkan(budget=False))[0]["free"] is None
    with pytest.raises(OSError, match="error -9"):
        vulkan.devices(FakeVulkan(budget=True, result=-9))


def test_vulkan_is_asked_in_its_own_process() -> None:
    gpus, problem = hardware.vulkan_gpus()
    assert bool(gpus) == (problem is None)
    assert all(gpu.interface == "vulkan" and gpu.kind in vulkan.KINDS and gpu.total > 0 for gpu in gpus)
    assert "ctypes" in sys.modules
    assert "\n" not in (problem or "")
