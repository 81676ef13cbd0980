"""Data parallel work under torchrun: who this process is, and how the processes agree."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nkat.host.hardware import pick_device


@dataclass(frozen=True, slots=True)
class World:
    """This process among `size`, and the device that is its own; the first one prints, judges and writes."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces each tensor by its sum over all processes, in one message."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def is_first() -> bool:
    """Whether this process is the one that writes, before or after it has joined the others."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def join_world(allow_cuda: bool) -> Iterator[World]:
    """The world that torchrun's environment describes (NCCL on GPUs, gloo without), or a world of one."""
    device = pick_device(allow_cuda)
    if "WORLD_SIZE" not in os.environ:
        yield World(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
