"""Which types of tensor each device has a kernel for. The others run on `nkat.kernels.reference`, and a run says so.

A device's name is that of torch.device.type. The tables themselves are `nkat.kernels.cpu.formats.BLOCK_LAYOUTS` with
`nkat.kernels.cpu.matmul.FLOAT_TYPES`, and `nkat.kernels.cuda.planes.FORMATS`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from gguf.constants import GGMLQuantizationType

from nkat.host.console import note

DEVICES = ("cpu", "cuda")


def kernel_types(device: str) -> frozenset[GGMLQuantizationType]:
    """The types whose tensors this device's kernels read."""
    if device == "cuda":
        from nkat.kernels.cuda.planes import FORMATS

        return frozenset(FORMATS)
    from nkat.kernels.cpu.formats import BLOCK_LAYOUTS  # LLVM is loaded only where it is used
    from nkat.kernels.cpu.matmul import FLOAT_TYPES

    return frozenset((*BLOCK_LAYOUTS, *FLOAT_TYPES))


def say_fallbacks(device: str, types: Iterable[GGMLQuantizationType]) -> None:
    """A note, once in a process, where some tensors have no kernel on this device. types: one for each tensor."""
    there = kernel_types(device)
    missing = [qtype for qtype in types if qtype not in there]
    if missing:
        names = ", ".join(qtype.name for qtype in sorted(set(missing)))
        subject = "1 tensor runs" if len(missing) == 1 else f"{len(missing)} tensors run"
        _say(
            f"no {device.upper()} kernel for {names}: {subject} on the reference, unpacked anew at every use, "
            "which is slower"
        )


@functools.cache  # a run that loads the model twice says it once
def _say(text: str) -> None:
    note(text)
