"""The graphics devices that the system's Vulkan library knows, through ctypes: no SDK, no package.

    python -I nkat/host/vulkan.py        one JSON array on the last line of stdout

`nkat.host.hardware` runs it as a process of its own, because a broken graphics driver takes the process that loads it
down, or writes to its stdout. The structures are those of the Vulkan 1.1 specification
(https://registry.khronos.org/vulkan/specs/1.3/html/). Free memory needs the extension VK_EXT_memory_budget. Limits:
the standard library only; not on macOS, where the devices are behind a portability layer.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys
from collections.abc import Callable
from typing import Any

KINDS = ("other", "integrated", "discrete", "virtual", "software")  # VkPhysicalDeviceType in order
_API_1_1 = 1 << 22 | 1 << 12
_DEVICE_LOCAL = 1
_BUDGET_EXTENSION = b"VK_EXT_memory_budget"
_LIBRARIES = {"win32": ("vulkan-1.dll",), "linux": ("libvulkan.so.1", "libvulkan.so")}


class _ApplicationInfo(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("version", ctypes.c_uint32),
        ("engine", ctypes.c_char_p),
        ("engine_version", ctypes.c_uint32),
        ("api", ctypes.c_uint32),
    ]


class _InstanceCreateInfo(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("application", ctypes.POINTER(_ApplicationInfo)),
        ("layer_count", ctypes.c_uint32),
        ("layers", ctypes.c_void_p),
        ("extension_count", ctypes.c_uint32),
        ("extensions", ctypes.c_void_p),
    ]


class _Heap(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint64), ("flags", ctypes.c_uint32)]


class _MemoryProperties(ctypes.Structure):
    _fields_ = [
        ("type_count", ctypes.c_uint32),
        ("types", ctypes.c_uint32 * 2 * 32),
        ("heap_count", ctypes.c_uint32),
        ("heaps", _Heap * 16),
    ]


class _MemoryProperties2(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("next", ctypes.c_void_p), ("properties", _MemoryProperties)]


class _MemoryBudget(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("budget", ctypes.c_uint64 * 16),
        ("usage", ctypes.c_uint64 * 16),
    ]


def load_library() -> ctypes.CDLL:
    """The Vulkan loader. Raises OSError where there is none."""
    names = _LIBRARIES.get(sys.platform, ())
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"no Vulkan library ({' or '.join(names) or 'not looked for on this system'})")


def devices(library: ctypes.CDLL) -> list[dict[str, Any]]:
    """Index, name, kind (one of KINDS), and bytes of device memory, total and free (None: not told) of each device.

    The index is that of vkEnumeratePhysicalDevices, by which KoboldCpp's --usevulkan picks one.
    """
    application = _ApplicationInfo(type=0, api=_API_1_1)
    create = _InstanceCreateInfo(type=1, application=ctypes.pointer(application))
    instance = ctypes.c_void_p()
    _check(library.vkCreateInstance(ctypes.byref(create), None, ctypes.byref(instance)), "vkCreateInstance")
    try:
        handles = _enumerate(
            lambda count, items: library.vkEnumeratePhysicalDevices(instance, count, items), ctypes.c_void_p
        )
        return [_describe(library, ctypes.c_void_p(handle), index) for index, handle in enumerate(handles)]
    finally:
        library.vkDestroyInstance(instance, None)


def _describe(library: ctypes.CDLL, device: ctypes.c_void_p, index: int) -> dict[str, Any]:
    # VkPhysicalDeviceProperties is 824 bytes; only its head is of interest: five uint32, then the name.
    buffer = ctypes.create_string_buffer(4096)
    library.vkGetPhysicalDeviceProperties(device, buffer)
    kind, name = struct.unpack_from("<16xI256s", buffer.raw)
    total, free = _memory(library, device)
    return {
        "index": index,
        "name": name.partition(b"\0")[0].decode("utf-8", "replace"),
        "kind": KINDS[kind] if kind < len(KINDS) else KINDS[0],
        "total": total,
        "free": free,
    }


def _memory(library: ctypes.CDLL, device: ctypes.c_void_p) -> tuple[int, int | None]:
    """Total and free bytes of the largest device-local heap."""
    budget = _MemoryBudget(type=1000237000)
    memory = _MemoryProperties2(type=1000059006)
    told = _has_budget(library, device)
    if told:
        memory.next = ctypes.cast(ctypes.pointer(budget), ctypes.c_void_p)
    library.vkGetPhysicalDeviceMemoryProperties2(device, ctypes.byref(memory))
    found = memory.properties
    local = [i for i in range(found.heap_count) if found.heaps[i].flags & _DEVICE_LOCAL]
    if not local:
        return 0, None
    heap = max(local, key=lambda i: found.heaps[i].size)
    free = max(0, budget.budget[heap] - budget.usage[heap]) if told else None
    return found.heaps[heap].size, free


def _has_budget(library: ctypes.CDLL, device: ctypes.c_void_p) -> bool:
    extension = ctypes.c_char * 260  # VkExtensionProperties: name of 256 bytes, version
    found = _enumerate(
        lambda count, items: library.vkEnumerateDeviceExtensionProperties(device, None, count, items), extension
    )
    return any(item.raw.partition(b"\0")[0] == _BUDGET_EXTENSION for item in found)


def _enumerate(call: Callable[[Any, Any], int], kind: Any) -> list[Any]:
    """Vulkan's two-step lists: first how many, then the items."""
    count = ctypes.c_uint32()
    _check(call(ctypes.byref(count), None), "counting")
    items = (kind * count.value)()
    _check(call(ctypes.byref(count), items), "listing")
    return list(items[: count.value])


def _check(result: int, what: str) -> None:
    if result not in (0, 5):  # VK_SUCCESS; VK_INCOMPLETE: one was plugged in meanwhile
        raise OSError(f"Vulkan: {what} gave error {result}")


if __name__ == "__main__":
    try:
        print(json.dumps(devices(load_library())))
    except (OSError, AttributeError) as error:  # no library, no driver, or a Vulkan before 1.1
        sys.exit(f"{error}")
