"""From a file's bytes to a weight for the CUDA kernels, where those for its format do what they should."""

from __future__ import annotations

import functools

import torch
from gguf.constants import GGMLQuantizationType as QType
from torch import Tensor

from nkat.errors import NKATError
from nkat.kernels.cuda import first_use, linear, planes
from nkat.kernels.cuda.planes import CHUNK, FORMATS, FileWeight, PackedWeight, PlaneWeight
from nkat.kernels.cuda.step import slices
from nkat.kernels.cuda.triton import require_triton

_CAPABILITY = (8, 0)  # the first with bfloat16 tensor cores
_MOST_ROWS = 2048  # of a check: as many rows in a program as for any larger weight
_MOST_INPUTS = 4096
_TOKENS = 80  # of a check: they fill no block of the largest kind
_COLUMNS = 8  # of a check's Θ: rank 4, the usual one
_VECTOR_TOLERANCE = 1e-5  # of Σ|w||x|, for sums in float32
_MATRIX_TOLERANCE = 2**-7  # for weights, inputs and results in bfloat16
_ROWS_TOLERANCE = 1e-6  # of the largest weight: a scale times an integer need not fit float32


def pack(packed: Tensor, qtype: QType, shape: tuple[int, int], has_bias: bool = False) -> PackedWeight:
    """A weight for the kernels, from the file's bytes (uint8 [nbytes]) on the device where they are.

    has_bias: whether a bias will be added to what it is multiplied by
    Where the kernels for its format fail their check the bytes stay as they are, for the reference. Raises NKATError
    where there is no Triton or the GPU is too old for bfloat16.
    """
    if packed.is_cuda:
        require_triton()
        _check_capability(packed.device)
        if qtype in FORMATS and not _format_works(qtype, packed.device, shape, has_bias):
            return FileWeight(qtype, shape, packed)
    return planes.pack(packed, qtype, shape)


def _format_works(qtype: QType, device: torch.device, shape: tuple[int, int], has_bias: bool) -> bool:
    with_bias = " with a bias" if has_bias else ""
    return first_use.works(
        f"products {qtype.name}{with_bias}",
        f"the CUDA kernels for {qtype.name}{with_bias}",
        device,
        lambda: check_products(qtype, shape, device, has_bias),
    )


def check_products(
    qtype: QType,
    shape: tuple[int, int],
    device: torch.device,
    has_bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> str | None:
    """How the kernels of a format differ from torch in float64 on random planes, if they do: few inputs, many, rows.

    Nearly all of its time goes into compiling, so it launches what a model with Θ of rank 4 launches anyway.
    shape: of a weight that is there; dtype: of the many inputs
    """
    m, n = min(shape[0], _MOST_ROWS), min(shape[1], _MOST_INPUTS)
    generator = torch.Generator(device).manual_seed(0)
    weight = random_weight(qtype, (m, n), generator)
    values = weight.dequantise().double()

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator)

    ids = torch.tensor([m - 1, 0, m // 2], device=device)
    found = linear.rows(weight, ids)
    said = first_use.difference("a row", found, values[ids], _ROWS_TOLERANCE * float(values.abs().max()))
    if said:
        return said

    step = m // 3 // 16 * 16  # which Triton knows of nearly every layer's
    segments = (step, 2 * step) if step else ()
    ends = (0, *segments, m)
    x, up = random(1, n), random(m, _COLUMNS).to(dtype)
    bias = random(m).to(dtype) if has_bias else None
    added = torch.zeros(m, device=device, dtype=torch.float64) if bias is None else bias.double()
    inner = random(len(ends) - 1, 1, slices(n), _COLUMNS)
    kappa = torch.tensor([0.5, 0.0, -0.25], device=device)[: len(ends) - 1]
    strengths = kappa.double().repeat_interleave(torch.tensor(ends, device=device).diff())
    sums = inner[:, 0].sum(dim=1).double().repeat_interleave(torch.tensor(ends, device=device).diff(), dim=0)
    term = strengths * (up.double() * sums).sum(dim=1)
    bound = values.abs() @ x[0].double().abs() + strengths.abs() * (up.double().abs() * sums.abs()).sum(dim=1)
    bound += added.abs()
    found = linear.vector(weight, linear.permute(x), bias, linear.Star(up, inner, kappa), segments=segments)
    expected = values @ x[0].double() + added + term
    said = first_use.difference("a product with one input", found[0], expected, _VECTOR_TOLERANCE * bound)
    if said:
        return said

    x, inner = random(_TOKENS, n).to(dtype), random(_TOKENS, _COLUMNS)
    kappa = kappa[:1]
    found = linear.matrix(weight, x, bias, linear.Star(up, inner, kappa))
    expected = x.double() @ values.T + added + kappa.double() * inner.double() @ up.double().T
    bound = x.double().abs() @ values.abs().T + inner.double().abs() @ up.double().abs().T + added.abs()
    return first_use.difference("a product with many inputs", found, expected, _MATRIX_TOLERANCE * bound)


def random_weight(qtype: QType, shape: tuple[int, int], generator: torch.Generator) -> PlaneWeight:
    """A weight of random integers with scales of a model's size, on the generator's device."""
    layout, device, chunks = FORMATS[qtype], generator.device, shape[0] * shape[1] // CHUNK

    def raw(count: int) -> Tensor:
        return torch.randint(256, (count,), dtype=torch.uint8, device=device, generator=generator)

    low, *high = (raw(4 * width * chunks).view(torch.int32) for width in layout.planes)
    pairs = 2 if layout.scales in ("pair", "k32", "k16") else 1
    with_s = layout.scales not in ("half", "pair")
    d = 0.005 + 0.015 * torch.rand(chunks * pairs // (8 if with_s else 1), device=device, generator=generator)
    s = None
    if with_s:
        s = raw(chunks).view(torch.int8) if layout.scales == "s32" else raw(2 * chunks).view(torch.int16)
    return PlaneWeight(qtype, shape, low, high[0] if high else None, d.half(), s, plane_rows=shape[0])


@functools.cache
def _check_capability(device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        has, needed = (".".join(map(str, version)) for version in (capability, _CAPABILITY))
        raise NKATError(
            f"{torch.cuda.get_device_name(device)} has compute capability {has}, but the CUDA kernels need {needed} "
            "(RTX 30 series or newer); add --no-cuda to use the processor"
        )
