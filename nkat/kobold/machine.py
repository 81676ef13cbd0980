"""What of this machine matters to KoboldCpp."""

from __future__ import annotations

from dataclasses import dataclass

from nkat.host import hardware
from nkat.host.hardware import Gpu

_UNTOLD_SHARE = 0.8  # of a GPU's memory, where the driver does not tell how much of it is free


@dataclass(frozen=True, slots=True)
class Machine:
    """What of the machine matters here.

    old_cpu: an x86 processor without AVX2, which KoboldCpp's default libraries need
    no_cuda, no_vulkan: why there is no such device
    """

    old_cpu: bool
    features: frozenset[str]
    cores: int
    memory: int
    available: int
    gpus: tuple[Gpu, ...]
    no_cuda: str | None
    no_vulkan: str | None

    def gpus_by(self, interface: str) -> list[Gpu]:
        """The GPUs as one programming interface sees them."""
        return [gpu for gpu in self.gpus if gpu.interface == interface]


def look_at_machine() -> Machine:
    """Asks the hardware."""
    features = hardware.cpu_features()
    cuda, no_cuda = hardware.nvidia_gpus()
    vulkan, no_vulkan = hardware.vulkan_gpus()
    total, available = hardware.total_and_free_memory()
    old_cpu = hardware.is_x86() and "avx2" not in features
    cores = hardware.physical_cores()
    return Machine(old_cpu, features, cores, total, available, (*cuda, *vulkan), no_cuda, no_vulkan)


def free_bytes(gpu: Gpu) -> int:
    """What a model may use: what is free, or a share of everything where the driver does not tell."""
    return int(gpu.total * _UNTOLD_SHARE) if gpu.free is None else gpu.free
