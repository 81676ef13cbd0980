"""One tensor of a GGUF as numbers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from nkat.gguf.file import GGUFFile
from nkat.gguf.formats import dequantise, packed_tensor


def read_weight(file: GGUFFile, name: str) -> torch.Tensor:
    """A tensor as float32 of its shape. Raises UnsupportedTypeError naming the tensor for types we cannot read."""
    info = file.tensors[name]
    return dequantise(packed_tensor(file.raw(name)), info.type, info.shape, name=name)


def scale_beside(file: GGUFFile, name: str) -> float:
    """What the products of a matrix `X.weight` are multiplied by: the one number of `X.scale`, as NVFP4 files have it;
    1 without one, and for a mixture's experts, which have one each.
    """
    beside = name.removesuffix("weight") + "scale"
    if beside not in file.tensors or len(file.tensors[name].shape) != 2:
        return 1.0
    return float(read_weight(file, beside).reshape(-1)[0])


def read_scaled_weight(file: GGUFFile, name: str) -> torch.Tensor:
    """The matrix that a model multiplies by: with `scale_beside` in it."""
    weight, scale = read_weight(file, name), scale_beside(file, name)
    return weight if scale == 1.0 else weight * scale


def same_weights(a: GGUFFile, b: GGUFFile, names: Iterable[str]) -> bool:
    """Whether both files have the same bytes in all named tensors, whatever else is in them."""
    for name in names:
        one, other = a.tensors.get(name), b.tensors.get(name)
        if one is None or other is None or one.type != other.type or not np.array_equal(a.raw(name), b.raw(name)):
            return False
        a.release(name)
        b.release(name)
    return True
