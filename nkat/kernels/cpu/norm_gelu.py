"""BatchNorm and GELU behind a convolution as two passes over its output forward and two backward.

Rows are pictures' points with their channels side by side, as channels_last has them; x is the convolution's output.
Numbers are float32 or bfloat16 in memory (`Number`) and float32 in between.

    z = scale · x + bias, out = z Φ(z)       scale and bias of each channel, from its mean and variance
    slope = Φ(z) + z φ(z)                    kept for the gradient by z, in place of z: there is no second exponential

Φ(−u) = φ(u) M(u) for u ≥ 0, with Mills' ratio M as a polynomial: no division, and one exponential for both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from nkat.kernels.cpu.jit import compile_kernel
from nkat.kernels.cpu.learning import LANES, Number, own_part
from nkat.kernels.cpu.llvm import F32, I32, Builder, Value

_BLOCK = 64  # rows whose sums are made in registers, channels by channels, before the next
_END = 5.0  # beyond, Φ(−u) < 3e-7 is as if M stayed what it is there
# √(2π) M(u) in powers of 2u/_END − 1, by Chebyshev's minimax of the relative error (6e-7) over 0 ≤ u ≤ _END.
_MILLS = (
    0.141331303, -0.114033966, 0.0853031284, -0.059888516, 0.0397365085, -0.024915144, 0.0152310184,
    -0.00962957539, 0.00510029708, -0.00144919965, 0.00104940019, -0.00162379747, 0.00070788718,
)  # fmt: skip
_DENSITY = 0.3989422804014327  # φ(0)
_LEAST = -126.0  # of 2's powers that float32 has
# 2^r for |r| <= 1/2, by least squares weighted to the minimax (relative error 1.2e-7 in float32).
_POWER = (1, 0.693147206, 0.240226469, 0.0555032878, 0.00961848896, 0.00133999315, 0.000153458118)  # fmt: skip


def _bell(k: Builder, z: Value) -> Value:
    """e^(−z²/2), at least 2^_LEAST; NaN stays NaN."""
    exponent = z * z * (-0.5 * 1.4426950408889634)
    exponent = k.select(exponent < _LEAST, k.value(_LEAST, z.kind), exponent)
    whole = k.nearest(exponent)
    rest = exponent - whole
    power = k.value(_POWER[-1], z.kind)
    for coefficient in reversed(_POWER[:-1]):
        power = k.fma(power, rest, k.value(coefficient, z.kind))
    return (power.bits(I32(z.lanes)) + (whole.truncated() << 23)).bits(z.kind)


def _normal(k: Builder, z: Value) -> tuple[Value, Value]:
    """Φ(z), and φ(z) · √(2π)."""
    bell = _bell(k, z)
    size = k.minimum(k.absolute(z), _END) * (2 / _END) - 1.0
    tail = k.value(_MILLS[-1], z.kind)
    for coefficient in reversed(_MILLS[:-1]):
        tail = k.fma(tail, size, k.value(coefficient, z.kind))
    tail = tail * bell
    return k.select(z > 0.0, k.value(1.0, z.kind) - tail, tail), bell


def _sums(
    k: Builder, channels: int, rows: Value, partial: Value, terms: Callable[[Value, Value], tuple[Value, Value]]
) -> None:
    """Two sums of each channel over this thread's rows, into its own part of partial [threads, 2, channels].

    terms(index of the first number of a vector in the tensor, of its first channel): what is added to either
    """
    vectors = next(n for n in (4, 2, 1) if channels % (n * LANES) == 0)
    own = partial + k.thread * (8 * channels)
    with k.loop(0, 2 * channels, LANES) as i:
        k.store(k.value(0.0, F32(LANES)), own + i * 4)
    share = (rows + k.threads - 1) // k.threads
    first = k.thread * share
    last = k.minimum(first + share, rows)
    with k.loop(first, last, _BLOCK) as block, k.loop(0, channels, vectors * LANES) as group:
        zero = k.value(0.0, F32(LANES))
        sums = [[k.variable(zero) for _ in range(vectors)] for _ in range(2)]
        with k.loop(block, k.minimum(block + _BLOCK, last)) as row:
            for v in range(vectors):
                channel = group + v * LANES
                for one, term in zip(sums, terms(row * channels + channel, channel), strict=True):
                    one[v].value = one[v].value + term
        for which, one in enumerate(sums):
            for v, total in enumerate(one):
                place = own + (group + (which * channels + v * LANES)) * 4
                k.store(k.load(F32(LANES), place) + total.value, place)


@functools.cache
def moments_kernel(channels: int, kind: Number) -> int:
    """Sums of x − shift and of its squares. arguments: x, shift [c], partial [threads, 2, c], rows"""

    def emit(k: Builder) -> None:
        x, shift, partial, rows = (*(k.pointer(i) for i in range(3)), k.integer(3))

        def terms(at: Value, channel: Value) -> tuple[Value, Value]:
            moved = kind.load(k, LANES, x + at * kind.value) - k.load(F32(LANES), shift + channel * 4)
            return moved, moved * moved

        _sums(k, channels, rows, partial, terms)

    return compile_kernel(f"moments_{channels}_{kind.name}", emit)


@functools.cache
def forward_kernel(channels: int, kind: Number) -> int:
    """arguments: x, scale [c], bias [c], out, slope, rows"""

    def emit(k: Builder) -> None:
        x, scale, bias, out, slope, rows = (*(k.pointer(i) for i in range(5)), k.integer(5))
        with own_part(k, rows) as row, k.loop(0, channels, LANES) as channel:
            at = (row * channels + channel) * kind.value
            factor, constant = (k.load(F32(LANES), p + channel * 4) for p in (scale, bias))
            z = k.fma(kind.load(k, LANES, x + at), factor, constant)
            below, bell = _normal(k, z)
            kind.store(k, z * below, out + at)
            kind.store(k, k.fma(bell * _DENSITY, z, below), slope + at)

    return compile_kernel(f"norm_gelu_{channels}_{kind.name}", emit)


@functools.cache
def gradient_sums_kernel(channels: int, kind: Number) -> int:
    """Sums of the gradient by z, and of it times x − mean.

    arguments: gradient by out, slope, x, mean [c], partial [threads, 2, c], rows
    """

    def emit(k: Builder) -> None:
        given, slope, x, mean, partial, rows = (*(k.pointer(i) for i in range(5)), k.integer(5))

        def terms(at: Value, channel: Value) -> tuple[Value, Value]:
            by_out, steepness, number = (kind.load(k, LANES, p + at * kind.value) for p in (given, slope, x))
            gradient = by_out * steepness
            return gradient, gradient * (number - k.load(F32(LANES), mean + channel * 4))

        _sums(k, channels, rows, partial, terms)

    return compile_kernel(f"norm_gelu_gradient_sums_{channels}_{kind.name}", emit)


@functools.cache
def backward_kernel(channels: int, kind: Number) -> int:
    """The gradient by x: scale · the gradient by z + along · (x − mean) + constant.

    arguments: gradient by out, slope, x, mean [c], scale [c], along [c], constant [c], gradient by x, rows
    """

    def emit(k: Builder) -> None:
        given, slope, x, mean, scale, along, constant, out, rows = (*(k.pointer(i) for i in range(8)), k.integer(8))
        with own_part(k, rows) as row, k.loop(0, channels, LANES) as channel:
            at = (row * channels + channel) * kind.value
            by_out, steepness, number = (kind.load(k, LANES, p + at) for p in (given, slope, x))
            middle, factor, tilt, rest = (k.load(F32(LANES), p + channel * 4) for p in (mean, scale, along, constant))
            gradient = k.fma(by_out * steepness, factor, k.fma(number - middle, tilt, rest))
            kind.store(k, gradient, out + at)

    return compile_kernel(f"norm_gelu_backward_{channels}_{kind.name}", emit)
