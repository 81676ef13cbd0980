"""One tensor of a GGUF as numbers."""

from __future__ import annotations

import torch

from nkat.gguf.file import GGUFFile
from nkat.gguf.formats import dequantise, packed_tensor


def read_weight(file: GGUFFile, name: str) -> torch.Tensor:
    """A tensor as float32 of its shape. Raises UnsupportedTypeError naming the tensor for types we cannot read."""
    info = file.tensors[name]
    return dequantise(packed_tensor(file.raw(name)), info.type, info.shape, name=name)
