"""The CPU kernels of a model that gradients go through: norms, gates, RoPE, attention's weights, the vocabulary's loss.

Each is one pass over what torch's own operations read and write several times. Numbers are float32 or bfloat16 in
memory (`Number`) and float32 in between. Tensors are rows, one after another, of which thread i takes the i-th part, so
that results do not depend on how many threads there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum

import torch

from nkat.kernels.cpu.blocks import width_of
from nkat.kernels.cpu.jit import compile_kernel
from nkat.kernels.cpu.llvm import F32, I16, I32, I64, Builder, Value

LANES = 16
_TANH = 2 * 0.7978845608  # GELU's tanh form is x · logistic(_TANH · (x + _CUBE · x³))
_CUBE = 0.044715


class Number(Enum):
    """How a tensor's numbers lie in memory: the value is how many bytes each takes."""

    FLOAT32 = 4
    BFLOAT16 = 2

    def load(self, k: Builder, lanes: int, address: Value) -> Value:
        """As float32."""
        if self is Number.FLOAT32:
            return k.load(F32(lanes), address)
        return (k.load(I16(lanes), address).unsigned(I32()) << 16).bits(F32(lanes))

    def store(self, k: Builder, x: Value, address: Value) -> None:
        """float32, rounded to the nearest, ties to even; NaN stays NaN."""
        if self is Number.FLOAT32:
            k.store(x, address)
            return
        bits = x.bits(I32(x.lanes))
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        k.store(k.select(x.equals(x), rounded, 0x7FC0).narrow(I16()), address)

    @property
    def pieces(self) -> int:
        """Numbers of this kind whose sum is a float32."""
        return 1 if self is Number.FLOAT32 else 3


def number(tensor: torch.Tensor) -> Number:
    """How its numbers lie in memory; raises KeyError for another dtype."""
    return {torch.float32: Number.FLOAT32, torch.bfloat16: Number.BFLOAT16}[tensor.dtype]


@contextmanager
def own_part(k: Builder, count: Value) -> Iterator[Value]:
    """for each row of this thread's part of so many"""
    share = (count + k.threads - 1) // k.threads
    first = k.thread * share
    with k.loop(first, k.minimum(first + share, count)) as row:
        yield row


def _each(k: Builder, count: Value, emit: Callable[[Value, int], None]) -> None:
    """emit(index, lanes) for so many numbers, whole vectors first."""
    whole = count // LANES * LANES
    with k.loop(0, whole, LANES) as i:
        emit(i, LANES)
    with k.loop(whole, count) as i:
        emit(i, 1)


@functools.cache
def norm_kernel(columns: int, epsilon: float, x_kind: Number, out_kind: Number) -> int:
    """out = RMS norm of x. arguments: x, weight float32, out, factors float32 (1 / root mean square of a row), rows"""

    def emit(k: Builder) -> None:
        x, weight, out, factors, count = (*(k.pointer(i) for i in range(4)), k.integer(4))
        lanes = width_of(columns)
        with own_part(k, count) as row:
            at, to = x + row * (columns * x_kind.value), out + row * (columns * out_kind.value)
            squares = k.variable(k.value(0.0, F32(lanes)))
            with k.loop(0, columns, lanes) as i:
                number = x_kind.load(k, lanes, at + i * x_kind.value)
                squares.value = k.fma(number, number, squares.value)
            factor = k.value(1.0, F32()) / k.sqrt(squares.value.total() * (1.0 / columns) + epsilon)
            k.store(factor, factors + row * 4)
            with k.loop(0, columns, lanes) as i:
                number = x_kind.load(k, lanes, at + i * x_kind.value) * factor
                out_kind.store(k, number * k.load(F32(lanes), weight + i * 4), to + i * out_kind.value)

    return compile_kernel(f"norm_{columns}_{x_kind.name}_{out_kind.name}", emit)


@functools.cache
def norm_backward_kernel(columns: int, x_kind: Number, out_kind: Number, readers: int) -> int:
    """The gradient by x, as x is, from those that so many readers of the norm have of it.

    arguments: x, weight float32, factors (of `norm_kernel`), gradient by x, rows, gradient of each reader
    """

    def emit(k: Builder) -> None:
        x, weight, factors, out, count = (*(k.pointer(i) for i in range(4)), k.integer(4))
        given = [k.pointer(5 + i) for i in range(readers)]
        lanes = width_of(columns)
        with own_part(k, count) as row:
            at, to = x + row * (columns * x_kind.value), out + row * (columns * x_kind.value)
            gradients = [g + row * (columns * out_kind.value) for g in given]

            def weighted(i: Value) -> Value:
                total = out_kind.load(k, lanes, gradients[0] + i * out_kind.value)
                for gradient in gradients[1:]:
                    total = total + out_kind.load(k, lanes, gradient + i * out_kind.value)
                return total * k.load(F32(lanes), weight + i * 4)

            products = k.variable(k.value(0.0, F32(lanes)))
            with k.loop(0, columns, lanes) as i:
                products.value = k.fma(weighted(i), x_kind.load(k, lanes, at + i * x_kind.value), products.value)
            factor = k.load(F32(), factors + row * 4)
            along = factor * factor * factor * products.value.total() * (-1.0 / columns)
            with k.loop(0, columns, lanes) as i:
                number = x_kind.load(k, lanes, at + i * x_kind.value)
                x_kind.store(k, k.fma(number, along, weighted(i) * factor), to + i * x_kind.value)

    return compile_kernel(f"norm_backward_{columns}_{x_kind.name}_{out_kind.name}_{readers}", emit)


@functools.cache
def add_kernel(columns: int, y_kind: Number) -> int:
    """out = x + y. arguments: x float32, y, out float32, rows"""

    def emit(k: Builder) -> None:
        x, y, out, count = (*(k.pointer(i) for i in range(3)), k.integer(3))
        lanes = width_of(columns)
        with own_part(k, count) as row, k.loop(row * columns, (row + 1) * columns, lanes) as i:
            k.store(k.load(F32(lanes), x + i * 4) + y_kind.load(k, lanes, y + i * y_kind.value), out + i * 4)

    return compile_kernel(f"learned_add_{columns}_{y_kind.name}", emit)


def _gate(
    k: Builder, gate: Value, up: Value, gelu: bool, clamp: tuple[float, float] | None
) -> tuple[Value, Value, Value]:
    """activation(gate), its slope, and what it is multiplied by. See `nkat.kernels.cpu.blocks.gate_kernel`."""
    limit, slope = clamp or (0.0, 1.0)
    steepness = k.value(slope, gate.kind)
    if clamp is not None:
        gate = k.select(gate > limit, k.value(limit, gate.kind), gate)
        up = k.select(up > limit, k.value(limit, up.kind), up)
        up = k.select(up < -limit, k.value(-limit, up.kind), up) + 1.0
    exponent = gate * slope
    if gelu:
        exponent = gate * k.fma(gate * gate, _TANH * _CUBE, k.value(_TANH, gate.kind))
        steepness = k.fma(gate * gate, 3 * _TANH * _CUBE, k.value(_TANH, gate.kind))
    logistic = k.value(1.0, gate.kind) / (k.exp(exponent * -1.0) + 1.0)
    active = gate * logistic
    return active, k.fma((active - active * logistic), steepness, logistic), up


@functools.cache
def gate_kernel(columns: int, kind: Number, gelu: bool, clamp: tuple[float, float] | None) -> int:
    """out = activation(gate) · up. arguments: gate, up, bytes of a row of each, out, rows"""

    def emit(k: Builder) -> None:
        gate, up, gate_stride, up_stride, out, count = (
            k.pointer(0), k.pointer(1), k.integer(2), k.integer(3), k.pointer(4), k.integer(5)
        )  # fmt: skip
        lanes = width_of(columns)
        with own_part(k, count) as row, k.loop(0, columns, lanes) as i:
            g = kind.load(k, lanes, gate + row * gate_stride + i * kind.value)
            u = kind.load(k, lanes, up + row * up_stride + i * kind.value)
            active, _, factor = _gate(k, g, u, gelu, clamp)
            kind.store(k, active * factor, out + (row * columns + i) * kind.value)

    return compile_kernel(f"learned_gate_{columns}_{kind.name}_{gelu}_{clamp is not None}", emit)


@functools.cache
def gate_backward_kernel(columns: int, kind: Number, gelu: bool, clamp: tuple[float, float] | None) -> int:
    """arguments: gate, up, bytes of a row of each, gradient, gradient by gate, gradient by up, rows"""

    def emit(k: Builder) -> None:
        gate, up, gate_stride, up_stride = k.pointer(0), k.pointer(1), k.integer(2), k.integer(3)
        gradient, of_gate, of_up, count = k.pointer(4), k.pointer(5), k.pointer(6), k.integer(7)
        lanes = width_of(columns)
        with own_part(k, count) as row, k.loop(0, columns, lanes) as i:
            at = (row * columns + i) * kind.value
            g = kind.load(k, lanes, gate + row * gate_stride + i * kind.value)
            u = kind.load(k, lanes, up + row * up_stride + i * kind.value)
            active, slope, factor = _gate(k, g, u, gelu, clamp)
            given = kind.load(k, lanes, gradient + at)
            by_gate, by_up = given * factor * slope, given * active
            if clamp is not None:  # beyond its bounds nothing changes
                zero, limit = k.value(0.0, g.kind), clamp[0]
                by_gate = k.select(g > limit, zero, by_gate)
                by_up = k.select((u > limit) | (u < -limit), zero, by_up)
            kind.store(k, by_gate, of_gate + at)
            kind.store(k, by_up, of_up + at)

    return compile_kernel(f"learned_gate_backward_{columns}_{kind.name}_{gelu}_{clamp is not None}", emit)


@functools.cache
def turn_kernel(
    size: int, half: int, interleaved: bool, token_kind: Number, head_kind: Number, backward: bool = False
) -> int:
    """RoPE of heads [B, T, H, D] into [B, H, T, D], times a factor of each position; backward: its transpose.

    arguments: heads by token, bytes of a token, heads by head, cosines, sines float32 [T, half], factors float32 [T],
    tokens B · T, T, H. Forward reads the first and writes the second, backward the other way round.
    """
    lanes = width_of(half) if half else 1
    even, odd = [list(range(start, 2 * lanes, 2)) for start in (0, 1)]
    woven = [i for pair in zip(range(lanes), range(lanes, 2 * lanes), strict=True) for i in pair]
    source_kind, target_kind = (head_kind, token_kind) if backward else (token_kind, head_kind)

    def load(k: Builder, at: Value, i: Value) -> tuple[Value, Value]:
        kind = source_kind
        if not interleaved:
            return kind.load(k, lanes, at + i * kind.value), kind.load(k, lanes, at + (i + half) * kind.value)
        if lanes == 1:
            return kind.load(k, 1, at + i * (2 * kind.value)), kind.load(k, 1, at + (i * 2 + 1) * kind.value)
        both = kind.load(k, 2 * lanes, at + i * (2 * kind.value))
        return both.pick(even), both.pick(odd)

    def store(k: Builder, a: Value, b: Value, to: Value, i: Value) -> None:
        kind = target_kind
        if not interleaved:
            kind.store(k, a, to + i * kind.value)
            kind.store(k, b, to + (i + half) * kind.value)
        elif lanes == 1:
            kind.store(k, a, to + i * (2 * kind.value))
            kind.store(k, b, to + (i * 2 + 1) * kind.value)
        else:
            kind.store(k, a.pick(woven, b), to + i * (2 * kind.value))

    def emit(k: Builder) -> None:
        by_token, token_bytes, by_head = k.pointer(0), k.integer(1), k.pointer(2)
        cosines, sines, factors = (k.pointer(i) for i in (3, 4, 5))
        count, length, heads = (k.integer(i) for i in (6, 7, 8))
        with own_part(k, count) as token, k.loop(0, heads) as head:
            position = token % length
            row = by_token + token * token_bytes + head * (size * token_kind.value)
            other = by_head + ((token // length * heads + head) * length + position) * (size * head_kind.value)
            at, to = (other, row) if backward else (row, other)
            factor, angles = k.load(F32(), factors + position * 4), position * (4 * half)
            with k.loop(0, half, lanes) as i:
                a, b = load(k, at, i)
                cosine = k.load(F32(lanes), cosines + angles + i * 4) * factor
                sine = k.load(F32(lanes), sines + angles + i * 4) * (factor * -1.0 if backward else factor)
                store(k, a * cosine - b * sine, b * cosine + a * sine, to, i)
            with k.loop(2 * half, size) as i:
                number = source_kind.load(k, 1, at + i * source_kind.value) * factor
                target_kind.store(k, number, to + i * target_kind.value)

    kinds = f"{token_kind.name}_{head_kind.name}_{backward}"
    return compile_kernel(f"turn_{size}_{half}_{interleaved}_{kinds}", emit)


@functools.cache
def widen_kernel(size: int, width: int, kind: Number) -> int:
    """Rows of D numbers → rows of `width`: behind them a float32 in pieces, then zeros.

    With −1 behind the rows of the other factor, a product of such rows has that float32 subtracted, and is rounded
    after that. Twice, for rows [B, H, T] of queries and of the gradient by attention's result:

    arguments: q, logsumexp float32 [B, H, T], q widened, gradient, result, gradient widened (with the sum of its
    products with the result), rows B · H · T, H, T, bytes from one sequence, head and token to the next in the gradient
    and in the result
    """

    def emit(k: Builder) -> None:
        q, log_sums, wide_q, gradient, result, wide_gradient = (k.pointer(i) for i in range(6))
        count, heads, length = (k.integer(i) for i in (6, 7, 8))
        strides = [[k.integer(9 + 3 * t + i) for i in range(3)] for t in range(2)]
        lanes = width_of(size)

        def put_pieces(number: Value, to: Value) -> None:
            for piece in range(width - size):
                at = to + (size + piece) * kind.value
                if piece < kind.pieces:
                    kind.store(k, number, at)
                    number = number - kind.load(k, 1, at)
                else:
                    kind.store(k, k.value(0.0, F32()), at)

        with own_part(k, count) as row:
            to, other = (wide + row * (width * kind.value) for wide in (wide_q, wide_gradient))
            token, head, sequence = row % length, row // length % heads, row // length // heads
            offsets = [sequence * s + head * h + token * t for s, h, t in strides]
            total = k.variable(k.value(0.0, F32(lanes)))
            with k.loop(0, size, lanes) as i:
                kind.store(k, kind.load(k, lanes, q + (row * size + i) * kind.value), to + i * kind.value)
                g = kind.load(k, lanes, gradient + offsets[0] + i * kind.value)
                kind.store(k, g, other + i * kind.value)
                total.value = k.fma(g, kind.load(k, lanes, result + offsets[1] + i * kind.value), total.value)
            put_pieces(k.load(F32(), log_sums + row * 4), to)
            put_pieces(total.value.total(), other)

    return compile_kernel(f"widen_{size}_{width}_{kind.name}", emit)


@functools.cache
def weights_kernel(kind: Number, scale: float) -> int:
    """Attention's weights and the gradient by q·k, causal, in place of what they are made from.

    arguments: q·k − logsumexp / scale, gradient by the weights − Σ weight · it (both [rows, T]), rows, T. Row i is of
    token i mod T, which sees tokens up to itself.
    """

    def emit(k: Builder) -> None:
        scores, gradient, count, length = k.pointer(0), k.pointer(1), k.integer(2), k.integer(3)
        lane = {LANES: k.constant(I32(LANES), list(range(LANES))), 1: k.value(0, I32())}
        with own_part(k, count) as row:
            token, start = row % length, row * length * kind.value

            def weigh(i: Value, lanes: int) -> None:
                at, other = scores + start + i * kind.value, gradient + start + i * kind.value
                seen = lane[lanes] < (token - i + 1).narrow(I32())
                # a weight is at most 1, whatever the rounding of very large scores says
                weight = k.exp(k.minimum(kind.load(k, lanes, at) * scale, 0.0))
                product = weight * kind.load(k, lanes, other) * scale
                for value, to in ((weight, at), (product, other)):
                    kind.store(k, k.select(seen, value, k.value(0.0, value.kind)), to)

            def clear(i: Value, lanes: int) -> None:
                for tensor in (scores, gradient):
                    kind.store(k, k.value(0.0, F32(lanes)), tensor + start + i * kind.value)

            whole = length // LANES * LANES
            end = k.minimum((token + LANES) // LANES * LANES, whole)
            with k.loop(0, end, LANES) as i:
                weigh(i, LANES)
            with k.loop(end, whole, LANES) as i:
                clear(i, LANES)
            with k.loop(whole, length) as i:
                weigh(i, 1)

    return compile_kernel(f"attention_weights_{kind.name}", emit)


@functools.cache
def log_sum_kernel(kind: Number) -> int:
    """arguments: logits, columns, float32 [rows, 2]: the largest of a row and Σ exp(logit − it), rows"""

    def emit(k: Builder) -> None:
        logits, columns, out, count = k.pointer(0), k.integer(1), k.pointer(2), k.integer(3)
        with own_part(k, count) as row:
            start = logits + row * columns * kind.value
            top, tops = k.variable(k.value(-1e30, F32())), k.variable(k.value(-1e30, F32(LANES)))
            total, totals = k.variable(k.value(0.0, F32())), k.variable(k.value(0.0, F32(LANES)))

            def compare(i: Value, lanes: int) -> None:
                best = tops if lanes > 1 else top
                best.value = k.maximum(best.value, kind.load(k, lanes, start + i * kind.value))

            def add(i: Value, lanes: int) -> None:
                into = totals if lanes > 1 else total
                into.value = into.value + k.exp(kind.load(k, lanes, start + i * kind.value) - highest)

            _each(k, columns, compare)
            highest = k.maximum(top.value, tops.value.largest())
            _each(k, columns, add)
            k.store(highest, out + row * 8)
            k.store(total.value + totals.value.total(), out + row * 8 + 4)

    return compile_kernel(f"log_sum_{kind.name}", emit)


@functools.cache
def loss_kernel(kind: Number, text: bool, teacher: bool) -> int:
    """The gradient of the vocabulary's loss by the logits, in their place: p − (1 − share) · text − share · teacher.

    arguments: logits, log-sums float32 [rows], columns, rows, share float32 [1], targets int64 [rows] (where text),
    teacher's logits, their log-sums, divergences from the teacher float32 [rows] (where teacher)
    """

    def emit(k: Builder) -> None:
        logits, log_sums, columns, count = k.pointer(0), k.pointer(1), k.integer(2), k.integer(3)
        share = k.load(F32(), k.pointer(4))
        with own_part(k, count) as row:
            start, log_sum = logits + row * columns * kind.value, k.load(F32(), log_sums + row * 4)
            divergence, divergences = k.variable(k.value(0.0, F32())), k.variable(k.value(0.0, F32(LANES)))

            def gradient(i: Value, lanes: int) -> tuple[Value, Value]:
                """And what this adds to the divergence."""
                log_p = kind.load(k, lanes, start + i * kind.value) - log_sum
                p = k.exp(log_p)
                if not teacher:
                    return p, k.value(0.0, p.kind)
                log_t = kind.load(k, lanes, k.pointer(6) + (row * columns + i) * kind.value)
                log_t = log_t - k.load(F32(), k.pointer(7) + row * 4)
                t = k.exp(log_t)
                return p - t * share, t * (log_t - log_p)

            def put(i: Value, lanes: int) -> None:
                found, part = gradient(i, lanes)
                kind.store(k, found, start + i * kind.value)
                into = divergences if lanes > 1 else divergence
                into.value = into.value + part

            if text:
                target = k.load(I64(), k.pointer(5) + row * 8)
                of_target = gradient(target, 1)[0] + (share - 1.0)
            _each(k, columns, put)
            if text:
                kind.store(k, of_target, start + target * kind.value)
            if teacher:
                k.store(divergence.value + divergences.value.total(), k.pointer(8) + row * 4)

    return compile_kernel(f"loss_{kind.name}_{text}_{teacher}", emit)


@functools.cache
def product_sums_kernel(columns: int, kind: Number, weight_kind: Number) -> int:
    """arguments: gradient, weight, float32 [rows, 2]: a row's Σ gradient · weight and Σ gradient, rows"""

    def emit(k: Builder) -> None:
        gradient, weight, out, count = (*(k.pointer(i) for i in range(3)), k.integer(3))
        lanes = width_of(columns)
        with own_part(k, count) as row:
            products, sums = (k.variable(k.value(0.0, F32(lanes))) for _ in range(2))
            with k.loop(row * columns, (row + 1) * columns, lanes) as i:
                g = kind.load(k, lanes, gradient + i * kind.value)
                products.value = k.fma(g, weight_kind.load(k, lanes, weight + i * weight_kind.value), products.value)
                sums.value = sums.value + g
            k.store(products.value.total(), out + row * 8)
            k.store(sums.value.total(), out + row * 8 + 4)

    return compile_kernel(f"product_sums_{columns}_{kind.name}_{weight_kind.name}", emit)
