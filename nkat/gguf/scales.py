"""The float16 scales that block formats store: read as numbers, and put back with every other byte as it was."""

from __future__ import annotations

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from nkat.gguf.file import GGUFFile
from nkat.gguf.formats import BLOCK_FORMATS
from nkat.gguf.writer import BaseView

_LARGEST = torch.finfo(torch.float16).max


def has_scales(qtype: GGMLQuantizationType) -> bool:
    """Whether blocks of this type hold float16 scales."""
    return qtype in BLOCK_FORMATS and bool(BLOCK_FORMATS[qtype].halves)


def stored_scales(packed: torch.Tensor, qtype: GGMLQuantizationType) -> torch.Tensor:
    """float32 [blocks, k] of packed bytes (uint8 [nbytes]): d of each block, then dmin or m where the type has one."""
    block = BLOCK_FORMATS[qtype]
    places = [byte for half in block.halves for byte in (half, half + 1)]
    return packed.view(-1, block.block_bytes)[:, places].view(torch.float16).float()


def put_scales(packed: torch.Tensor, qtype: GGMLQuantizationType, values: torch.Tensor) -> None:
    """Writes scales [blocks, k], rounded to float16, into packed bytes; what `stored_scales` gave changes no byte.

    packed: uint8 [nbytes], to be written to and at an even address, as any memory of its own is
    """
    block = BLOCK_FORMATS[qtype]
    halves = packed.view(torch.float16).view(-1, block.block_bytes // 2)
    rounded = values.clamp(-_LARGEST, _LARGEST).to(torch.float16)
    for column, byte in enumerate(block.halves):
        halves[:, byte // 2] = rounded[:, column]


def differ_in_scales_only(base: BaseView, other: GGUFFile) -> bool:
    """Whether a file has the metadata and tensors of a model, but for the scales of tensors in block formats."""
    file = base.file
    metadata = file.read(file.metadata_span[0], base.metadata_end), other.read(*other.metadata_span)
    if not np.array_equal(*metadata) or list(base.tensors) != list(other.tensors):
        return False
    for name, info in base.tensors.items():
        there = other.tensors[name]
        if (there.type, there.shape) != (info.type, info.shape):
            return False
        if not _same_but_scales(file.raw(name), other.raw(name), info.type):
            return False
        file.release(name)
        other.release(name)
    return True


def _same_but_scales(a: np.ndarray, b: np.ndarray, qtype: GGMLQuantizationType) -> bool:
    if not has_scales(qtype):
        return np.array_equal(a, b)
    block = BLOCK_FORMATS[qtype]
    others = np.ones(block.block_bytes, dtype=bool)
    for half in block.halves:
        others[half : half + 2] = False
    a, b = (values.reshape(-1, block.block_bytes) for values in (a, b))
    return all(np.array_equal(a[:, byte], b[:, byte]) for byte in np.flatnonzero(others))
