"""Float32 → the bytes of a block format, by libgguf; a whole file in other types.

The quantisers are libgguf's: C code for every block format, K-quants and IQ4 included, bit-equal to llama-quantize's
output. gguf-py's own know neither K-quants nor IQ4. It is no fixed requirement, because its wheels are for Linux,
macOS and Windows on the usual processors only.

Limits: no importance matrix; types that `nkat.gguf.formats` cannot unpack cannot be written.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from nkat.errors import NKATError
from nkat.gguf.file import GGUFFile, TensorInfo
from nkat.gguf.split import open_gguf
from nkat.gguf.weights import read_weight
from nkat.gguf.writer import (
    BaseView,
    NewTensor,
    gguf_parts,
    write_gguf,
)

_MANTISSA_BITS = {GGMLQuantizationType.F32: 23, GGMLQuantizationType.F16: 10, GGMLQuantizationType.BF16: 7}
_STEP_GROUP = 16  # every block format has one scale for each 16, 32 or 256 weights


def check_quantiser() -> None:
    """Raises NKATError where libgguf is missing: to be known before time is spent."""
    _libgguf()


def quantise(weight: torch.Tensor, qtype: GGMLQuantizationType) -> np.ndarray:
    """Float32 weights [m, n] packed in a type, as llama-quantize does without an importance matrix: uint8 [nbytes].

    The types that llama-quantize makes with an importance matrix only (IQ1_S, IQ2_XXS, IQ2_XS) get each column's sum of
    squares in its place, which is libgguf's choice. Raises NKATError where libgguf is missing or lacks the type.
    """
    if qtype == GGMLQuantizationType.F32:
        return weight.contiguous().numpy().view(np.uint8).reshape(-1)
    try:
        rows: np.ndarray = _libgguf().quantize_rows(weight.contiguous().numpy(), int(qtype))
    except ValueError as error:
        raise NKATError(f"libgguf does not quantise weights {tuple(weight.shape)} to {qtype.name}: {error}") from None
    return rows.view(np.uint8).reshape(-1)


def requantise(
    base_path: Path, out_path: Path, type_for: Callable[[TensorInfo], GGMLQuantizationType], force: bool = False
) -> None:
    """Writes a copy of a GGUF with its tensors in other types: `llama-quantize --allow-requantize` for one's own rule.

    type_for gives a tensor's new type; a tensor whose type stays is copied byte for byte. Metadata stays as it is, and
    so `general.file_type` is still the base's. The re-quantised tensors are held in memory.
    """
    with open_gguf(base_path) as file:
        tensors = [
            NewTensor(name, type_for(info), _in_type(file, info, type_for(info)), info.shape)
            for name, info in file.tensors.items()
        ]
        metadata_only = BaseView(file, file.version, len(file.metadata), file.metadata_span[1], 0, file.data_start)
        write_gguf(out_path, gguf_parts({}, tensors, metadata_only), force, file.files)


def quantisation_steps(weight: torch.Tensor, qtype: GGMLQuantizationType) -> torch.Tensor:
    """The distance to the next number the type could hold there, for each of the weights W [m, n] stored in it.

    Float types: the unit in the last place. Block types: the smallest gap between two different weights among 16 that
    share a scale; in weights that came from fewer bits that is the coarser step they came from. Infinite where the step
    is unknown: a zero in a float type, or 16 equal weights.
    """
    if qtype in _MANTISSA_BITS:
        exponent = torch.frexp(weight).exponent
        unit = torch.ldexp(torch.ones_like(weight), exponent - 1 - _MANTISSA_BITS[qtype])
        return torch.where(weight == 0, math.inf, unit)
    gaps = weight.reshape(-1, _STEP_GROUP).sort(dim=1).values.diff(dim=1)
    smallest = torch.where(gaps > 0, gaps, math.inf).amin(dim=1, keepdim=True)
    return smallest.expand(-1, _STEP_GROUP).reshape(weight.shape)


def _in_type(file: GGUFFile, info: TensorInfo, qtype: GGMLQuantizationType) -> np.ndarray:
    return file.raw(info.name) if qtype == info.type else quantise(read_weight(file, info.name), qtype)


def _libgguf() -> ModuleType:
    try:
        return importlib.import_module("libgguf")
    except ImportError:
        raise NKATError("merging needs the quantisers of libgguf, which is not here: pip install libgguf") from None
