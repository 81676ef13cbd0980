"""Packed weight × x and the star term on a GPU, by Triton: `linear` for a layer, `rows` for an embedding.

Up to 8 inputs go through a kernel that reads each weight once and computes in float32; more go through tensor cores,
where weights and inputs are rounded to bfloat16 (float16 if x is that) and sums are float32. Types without a kernel are
dequantised on every call; `nkat.kernels.registry` has the note that says so when a model is loaded. Θ's strength may be
a number in the GPU's memory, so that a recorded CUDA graph follows it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nkat.errors import NKATError
from nkat.gguf import formats, level_formats
from nkat.kernels import reference
from nkat.kernels.cuda import matmul as cuda_matmul
from nkat.kernels.cuda.planes import CHUNK, FileWeight, Format, PackedWeight, PlaneWeight
from nkat.kernels.cuda.triton import require_triton

VECTOR_BATCH = 8  # most inputs for the kernel that reads each weight once
MAX_BLOCK_ROWS = 8  # of that kernel; segments of a fused weight start at multiples of it
_REGISTERS = 128  # a thread of the kernel for one input: four programs then fit a multiprocessor at once
_PROGRAMS = 256  # about two for each of an H100's 132 multiprocessors


class Star(NamedTuple):
    """The star term κ up inner of a product whose inputs have met `down` already.

    up: [m, R]; R is any number
    inner: float32, down @ x; how it lies is up to each function
    kappa: float32 [1], or [segments] for `vector`
    """

    up: Tensor
    inner: Tensor
    kappa: Tensor


@contextmanager
def out_of_memory_hint() -> Iterator[None]:
    """Turns running out of GPU memory, in torch or in CUDA itself, into an NKATError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0].strip()
        known = ("out of memory", "ALLOC_FAILED")
        if not isinstance(error, torch.cuda.OutOfMemoryError) and not any(word in first_line for word in known):
            raise
        what = ". ".join(first_line.split(". ")[:3]).rstrip(".")  # how much was asked for, and how much there is
        raise NKATError(
            f"the GPU's memory is full ({what}): close other programs that use it, take a smaller model or a "
            "shorter context, or add --no-cuda to use the processor"
        ) from error


def linear(
    weight: PackedWeight,
    x: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    kappa: float | Tensor = 0.0,
) -> Tensor:
    """W x + bias + κ up (down x) for x [..., n] and W [m, n]: [..., m] in the dtype of x.

    down [2r, n], up [m, 2r]: Θ as by `nkat.theta.algebra.low_rank_form`, or None
    kappa: a number, or a float32 tensor of one element on the device, read when the kernel runs. 0 gives bit by bit
           what no Θ gives.
    Where a gradient is asked for, torch multiplies the dequantised weight.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, down, up)):
        y = F.linear(x, weight.dequantise().to(x.dtype), None if bias is None else bias.to(x.dtype))
        return y if down is None or up is None else y + reference.star_term(x, down, up, kappa)
    flat = x.reshape(-1, x.shape[-1])
    star = None
    if down is not None and up is not None and (isinstance(kappa, Tensor) or kappa != 0.0):
        strength = kappa if isinstance(kappa, Tensor) else torch.full((1,), kappa, dtype=torch.float32, device=x.device)
        star = Star(up, F.linear(flat.to(down.dtype), down).float(), strength)
    if isinstance(weight, FileWeight):
        y = dequantised(weight, flat, bias, star)
    elif len(flat) <= VECTOR_BATCH:
        parts = None if star is None else Star(star.up, star.inner[:, None], star.kappa)  # one part
        y = vector(weight, permute(flat.float()), bias, parts).to(x.dtype)
    else:
        y = matrix(weight, flat, bias, star)
    return y.view(*x.shape[:-1], weight.shape[0])


def permute(x: Tensor) -> Tensor:
    """x [batch, n] in the order that `vector` takes; see `nkat.kernels.cuda.matmul.permuted`."""
    batch, n = x.shape
    return x.view(batch, n // CHUNK, 2, 4, 4).permute(0, 2, 4, 1, 3).reshape(batch, n)


def vector(
    weight: PlaneWeight,
    x: Tensor,
    bias: Tensor | None = None,
    star: Star | None = None,
    *,
    segments: Sequence[int] = (),
    out: Tensor | None = None,
) -> Tensor:
    """W x + bias + κ up inner for up to 8 permuted x, float32 [batch, n] → float32 [batch, m].

    star: its inner is [(segments,) batch, parts, R], in parts to be added up
    segments: first rows of the second and the third segment, each with its own inner and κ; multiples of MAX_BLOCK_ROWS
    out: where to write y
    """
    layout, m, chunks, batch = weight.format, weight.shape[0], weight.shape[1] // CHUNK, len(x)
    padded = 1 << (batch - 1).bit_length()
    if padded != batch:
        x = F.pad(x, (0, 0, 0, padded - batch))
        if star is not None:
            star = star._replace(inner=F.pad(star.inner, (0, 0, 0, 0, 0, padded - batch)))
    y = torch.empty(padded, m, device=x.device) if out is None or padded != batch else out
    rank, parts = (0, 0) if star is None else (star.up.shape[1], star.inner.shape[-2])
    block_rows = _block_rows(m, padded)
    block_chunks = min(128, 1 << (chunks - 1).bit_length())
    bounds = (*segments, m, m)
    require_triton()
    cuda_matmul.vector_kernel[(-(-m // block_rows),)](
        y,
        x,
        *_planes(weight),
        bias if bias is not None else y,
        *((y, y, y) if star is None else star),  # without one, any memory will do
        m,
        chunks,
        weight.first_row,
        bounds[0],
        bounds[1],
        **_constants(layout),
        batch=padded,
        block_rows=block_rows,
        block_chunks=block_chunks,
        even=chunks % block_chunks == 0,
        has_bias=bias is not None,
        rank=rank,
        parts=parts,
        star_columns=1 << max(0, rank * parts - 1).bit_length(),
        num_warps=4,
        maxnreg=_REGISTERS if padded == 1 else None,
        enable_fp_fusion=True,
    )
    if padded == batch:
        return y
    return y[:batch] if out is None else out.copy_(y[:batch])


def matrix(weight: PlaneWeight, x: Tensor, bias: Tensor | None = None, star: Star | None = None) -> Tensor:
    """W x + bias + κ up inner for many x [tokens, n] → [tokens, m] in the dtype of x; inner is [tokens, R]."""
    layout, m, chunks, tokens = weight.format, weight.shape[0], weight.shape[1] // CHUNK, len(x)
    half = (x if x.dtype == torch.float16 else x.bfloat16()).contiguous()
    y = torch.empty(tokens, m, dtype=x.dtype, device=x.device)
    rank = 0 if star is None else star.up.shape[1]
    block_rows, block_tokens, block_chunks = 128, 128 if tokens > 64 else 64 if tokens > 32 else 32, 4
    require_triton()
    cuda_matmul.matrix_kernel[(-(-m // block_rows), -(-tokens // block_tokens))](
        y,
        half,
        *_planes(weight),
        bias if bias is not None else y,
        *((y, y, y) if star is None else star),  # without one, any memory will do
        m,
        chunks,
        weight.first_row,
        tokens,
        **_constants(layout),
        block_rows=block_rows,
        block_tokens=block_tokens,
        block_chunks=block_chunks,
        even=chunks % block_chunks == 0,
        has_bias=bias is not None,
        rank=rank,
        padded_rank=max(16, 1 << max(0, rank - 1).bit_length()),
        num_warps=8 if block_tokens == 128 else 4,
        num_stages=2,  # three do not fit the shared memory of consumer cards
        enable_fp_fusion=True,
    )
    return y


def dequantised(weight: FileWeight, x: Tensor, bias: Tensor | None = None, star: Star | None = None) -> Tensor:
    """The same for types without a kernel, by torch; inner is [batch, R]."""
    y = reference.linear(weight.raw, weight.qtype, weight.shape, x, None if bias is None else bias.to(x.dtype))
    if star is None:
        return y
    term = star.kappa * F.linear(star.inner, star.up.float())
    return torch.where(star.kappa == 0.0, y, (y + term).to(x.dtype))


def rows(weight: PackedWeight, ids: Tensor) -> Tensor:
    """Rows of the weight, float32 [ids, n], for int64 ids [ids]. Ids out of range read other memory: check before."""
    m, n = weight.shape
    if isinstance(weight, FileWeight):
        picked = weight.raw.view(m, -1).index_select(0, ids).view(-1)
        return formats.dequantise(picked, weight.qtype, (len(ids), n))
    chunks, block_chunks = n // CHUNK, 32
    out = torch.empty(len(ids), n, device=ids.device)
    require_triton()
    cuda_matmul.rows_kernel[(len(ids), -(-chunks // block_chunks))](
        out,
        ids,
        *_planes(weight),
        chunks,
        weight.first_row,
        **_constants(weight.format),
        block_chunks=block_chunks,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return out


def _planes(weight: PlaneWeight) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """low, high, d, s and IQ4's table, as the kernels take them; a plane that the format lacks is some other one.

    What a chunk has two words or two float16 of is one number, so that it is loaded at once.
    """
    layout, low, high = weight.format, weight.low, weight.high
    d = weight.d.view(torch.int32) if layout.scales in ("pair", "k32", "k16") else weight.d
    if high is None:
        high = low
    elif layout.planes[1] == 2:
        high = high.view(torch.int64)
    low = low.view(torch.int64) if layout.planes[0] == 2 else low
    s = weight.low if weight.s is None else weight.s
    return low, high, d, s, _levels(weight.device) if layout.levels else weight.low


def _constants(layout: Format) -> dict[str, int | str | bool]:
    return {"bits": layout.bits, "zero": layout.zero, "scales": layout.scales, "levels": layout.levels}


def _block_rows(m: int, batch: int) -> int:
    """Rows a program does. More share the loads of x; but the GPU must be full, and the sums must fit its registers."""
    most = {1: MAX_BLOCK_ROWS, 2: 4}.get(batch, 2)
    while most > 2 and m // most < _PROGRAMS:
        most //= 2
    return most


@functools.cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(level_formats.IQ4_LEVELS, dtype=torch.float32, device=device)
