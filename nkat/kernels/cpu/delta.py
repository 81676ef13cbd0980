"""The CPU kernels of a gated delta net, between its linear layers; what they compute is in `nkat.lm.delta_net`.

Everything is float32. A block keeps of each sequence the last tokens' inputs of the convolution [kernel − 1, channels]
and each value head's memory, keys by values. A pass that begins at position 0 does not look at what is in them.

The memory is worked on a few columns at a time, which stay in the first cache over some tokens, and so do these tokens'
queries and keys: what a token does to a column depends on no other. So that columns that are worked on together lie
together, a memory is kept as [D / width, D, width].
"""

from __future__ import annotations

import functools
import math
from dataclasses import astuple, dataclass

from nkat.kernels.cpu.blocks import normalised, own_tokens, width_of
from nkat.kernels.cpu.jit import compile_kernel
from nkat.kernels.cpu.llvm import F32, I32, I64, Builder, Value, Variable

_TOKENS = 32  # that go through a memory's columns before the next columns are taken


@dataclass(frozen=True, slots=True)
class DeltaShape:
    """Heads of keys and of values, elements of each, tokens that the convolution sees.

    grouped: the value heads of a key head are neighbours (`nkat.lm.architectures.Recurrent`)
    fused: queries, keys, values and gates lie by key head in one row (`nkat.lm.recurrence.Recurrence`)
    """

    key_heads: int
    value_heads: int
    size: int
    kernel: int
    grouped: bool
    fused: bool = False

    def mixed_column(self, k: Builder, head: Value) -> Value:
        """Where a head of the convolution's channels is in a row of what is convolved, in bytes."""
        if not self.fused:
            return head * (4 * self.size)
        keys, ratio = self.key_heads, self.value_heads // self.key_heads
        value = k.maximum(head - 2 * keys, 0)
        key_head = k.select(head < 2 * keys, head % keys, value // ratio)
        query, key = (k.value(part, I64()) for part in (0, 1))
        part = k.select(head < keys, query, k.select(head < 2 * keys, key, value % ratio + 2))
        return (key_head * (2 + 2 * ratio) + part) * (4 * self.size)

    def gate_column(self, head: Value) -> Value:
        """The same of a value head's gate."""
        if not self.fused:
            return head * (4 * self.size)
        ratio = self.value_heads // self.key_heads
        return (head // ratio * (2 + 2 * ratio) + head % ratio + (2 + ratio)) * (4 * self.size)

    @property
    def heads(self) -> int:
        """Of the convolution's channels: queries, keys, values."""
        return 2 * self.key_heads + self.value_heads

    @property
    def width(self) -> int:
        """Columns of a memory that are worked on together."""
        lanes = width_of(self.size)
        return 2 * lanes if self.size % (2 * lanes) == 0 else lanes

    @property
    def label(self) -> str:
        return "_".join(str(int(x)) for x in astuple(self))


def _total(sums: list[list[Variable]], column: int) -> Value:
    first, *others = (row[column].value for row in sums)
    for value in others:
        first = first + value
    return first


def _gated(k: Builder, x: Value, gate: Value) -> Value:
    """x · logistic(gate); of x by itself that is SiLU."""
    return x / (k.exp(gate * -1.0) + 1.0)


@functools.cache
def convolve_kernel(shape: DeltaShape) -> int:
    """out = SiLU of each channel's sum over the last tokens; q and k then of length 1, and q divided by √D.

    Each thread takes some of the (token, head) pairs.

    arguments: mixed, bytes of a row, earlier inputs [sequence, kernel − 1, channels], weights [kernel, channels], out,
    bytes of a row, epsilon float32 [1], state (`nkat.kernels.cpu.linear.token_state`)
    """
    size, lanes, row_bytes = shape.size, width_of(shape.size), 4 * shape.heads * shape.size
    before = shape.kernel - 1

    def emit(k: Builder) -> None:
        mixed, stride, earlier, weights, out, out_stride = (
            k.pointer(0), k.integer(1), k.pointer(2), k.pointer(3), k.pointer(4), k.integer(5)
        )  # fmt: skip
        epsilon, state = k.load(F32(), k.pointer(6)), k.pointer(7)
        count, start, length = (k.load(I64(), state + 8 * i) for i in range(3))
        nothing = k.value(0.0, F32(lanes))
        with k.loop(k.thread, count * shape.heads, k.threads) as item:
            token, head = item // shape.heads, item % shape.heads
            sequence, place = token // length, token % length
            column, source = head * (4 * size), shape.mixed_column(k, head)
            rows, there = [], []
            for n in range(shape.kernel):  # the last one is the token's own
                back = before - n
                inside = place >= back
                old = earlier + (sequence * before + (place + n)) * row_bytes
                rows.append(k.select(inside, mixed + ((token - back) * stride + source), old + column))
                there.append(inside | (start > 0))
            to = out + token * out_stride + column
            squares = k.variable(nothing)
            with k.loop(0, 4 * size, 4 * lanes) as j:
                total = nothing
                for n, (row, valid) in enumerate(zip(rows, there, strict=True)):
                    x = k.select(valid, k.load(F32(lanes), row + j), nothing)
                    total = k.fma(x, k.load(F32(lanes), weights + n * row_bytes + column + j), total)
                active = _gated(k, total, total)
                squares.value = k.fma(active, active, squares.value)
                k.store(active, to + j)
            with k.when(head < 2 * shape.key_heads):
                factor = k.value(1.0, F32()) / k.sqrt(squares.value.total() + epsilon)
                factor = k.select(head < shape.key_heads, factor * (1.0 / math.sqrt(size)), factor)
                with k.loop(0, 4 * size, 4 * lanes) as j:
                    k.store(k.load(F32(lanes), to + j) * factor, to + j)

    return compile_kernel(f"convolve_{shape.label}", emit)


@functools.cache
def delta_kernel(shape: DeltaShape) -> int:
    """The delta rule, token by token, and the inputs that later tokens' convolution needs.

    Each thread takes some of the (sequence, value head) pairs.

    arguments: convolved (see `convolve_kernel`), bytes of a row; what β and g come from, bytes of a row of each, twice
    the same where they are one weight's; biases and factors of g float32 [H]; memories float32 [sequence, H, ...]; out,
    bytes of a row; mixed, bytes of a row, earlier inputs (as of `convolve_kernel`); state
    """
    size, lanes, width = shape.size, width_of(shape.size), shape.width
    chunks, unroll = width // lanes, math.gcd(size, 2)
    ratio, before = shape.value_heads // shape.key_heads, shape.kernel - 1
    row_bytes = 4 * shape.heads * size

    def columns_of(head: Value) -> tuple[Value, Value, Value]:
        """A value head's key head, and the columns of what its β and g come from."""
        if not shape.grouped:
            return head % shape.key_heads, head, head
        key_head = head // ratio
        beta = key_head * (2 * ratio) + head % ratio
        return key_head, beta, beta + ratio

    def learn(
        k: Builder, memory: Value, q: Value, key: Value, v: Value, strength: Value, kept: Value, to: Value
    ) -> None:
        """One token, some columns."""
        nothing = k.value(0.0, F32(lanes))
        # several sums of each column, for the processor to work on side by side
        sums = [[k.variable(nothing) for _ in range(chunks)] for _ in range(unroll)]
        with k.loop(0, size, unroll) as i:
            for u in range(unroll):
                key_i, row = k.load(F32(), key + (i + u) * 4), memory + (i + u) * (4 * width)
                for j in range(chunks):
                    sums[u][j].value = k.fma(k.load(F32(lanes), row + 4 * lanes * j), key_i, sums[u][j].value)
        change = [(k.load(F32(lanes), v + 4 * lanes * j) - _total(sums, j) * kept) * strength for j in range(chunks)]
        read = [[k.variable(nothing) for _ in range(chunks)] for _ in range(unroll)]
        with k.loop(0, size, unroll) as i:
            for u in range(unroll):
                key_i, q_i = k.load(F32(), key + (i + u) * 4), k.load(F32(), q + (i + u) * 4)
                for j in range(chunks):
                    at = memory + (i + u) * (4 * width) + 4 * lanes * j
                    new = k.fma(change[j], key_i, k.load(F32(lanes), at) * kept)
                    k.store(new, at)
                    read[u][j].value = k.fma(new, q_i, read[u][j].value)
        for j in range(chunks):
            k.store(_total(read, j), to + 4 * lanes * j)

    def emit(k: Builder) -> None:
        convolved, stride, betas, beta_stride, alphas, alpha_stride = (
            k.pointer(0), k.integer(1), k.pointer(2), k.integer(3), k.pointer(4), k.integer(5)
        )  # fmt: skip
        biases, factors, memories, out, out_stride = (
            k.pointer(6), k.pointer(7), k.pointer(8), k.pointer(9), k.integer(10)
        )  # fmt: skip
        mixed, mixed_stride, earlier, state = k.pointer(11), k.integer(12), k.pointer(13), k.pointer(14)
        count, start, length = (k.load(I64(), state + 8 * i) for i in range(3))
        tokens = k.minimum(count, length)  # of one sequence
        sequences = (count + (length - 1)) // length
        nothing = k.value(0.0, F32(lanes))
        strengths, decays = k.local(4 * _TOKENS), k.local(4 * _TOKENS)
        with k.loop(k.thread, sequences * shape.value_heads, k.threads) as item:
            head, sequence = item % shape.value_heads, item // shape.value_heads
            key_head, beta_column, alpha_column = columns_of(head)
            whole = memories + item * (4 * size * size)
            with k.when(start < 1), k.loop(0, 4 * size * size, 4 * lanes) as i:
                k.store(nothing, whole + i)
            bias, factor = (k.load(F32(), at + head * 4) for at in (biases, factors))
            with k.loop(0, tokens, _TOKENS) as first:
                some = k.minimum(tokens - first, _TOKENS)
                begin = sequence * length + first
                with k.loop(0, some) as place:
                    beta = k.load(F32(), betas + (begin + place) * beta_stride + beta_column * 4)
                    k.store(_gated(k, k.value(1.0, F32()), beta), strengths + place * 4)
                    alpha = k.load(F32(), alphas + (begin + place) * alpha_stride + alpha_column * 4)
                    k.store(k.exp(softplus(k, alpha + bias) * factor), decays + place * 4)
                with k.loop(0, 4 * size, 4 * width) as column, k.loop(0, some) as place:
                    row = convolved + (begin + place) * stride
                    q = row + key_head * (4 * size)
                    v = row + (head + 2 * shape.key_heads) * (4 * size) + column
                    to = out + (begin + place) * out_stride + head * (4 * size) + column
                    strength, kept = (k.load(F32(), at + place * 4) for at in (strengths, decays))
                    key = q + 4 * shape.key_heads * size
                    learn(k, whole + column * size, q, key, v, strength, kept, to)
        # those of the last tokens; from the first on, so that none is overwritten before it was moved
        with k.loop(k.thread, sequences * shape.heads, k.threads) as item:
            sequence, head = item // shape.heads, item % shape.heads
            column, source = head * (4 * size), shape.mixed_column(k, head)
            for n in range(before):
                place = tokens - (before - n)  # where it is among the new tokens, or how far before them
                new = mixed + ((sequence * length + place) * mixed_stride + source)
                old = earlier + (sequence * before + (place + before)) * row_bytes
                row = k.select(place >= 0, new, old + column)
                valid = (place >= 0) | (start > 0)
                to = earlier + (sequence * before + n) * row_bytes + column
                with k.loop(0, 4 * size, 4 * lanes) as i:
                    k.store(k.select(valid, k.load(F32(lanes), row + i), nothing), to + i)

    return compile_kernel(f"delta_{shape.label}", emit)


@functools.cache
def gated_norm_kernel(shape: DeltaShape, tokens: int) -> int:
    """Each head of x = its RMS norm times SiLU(gate).

    arguments: x, bytes of a row, gate, bytes of a row, weight [D], epsilon float32 [1], state
    """
    size, lanes = shape.size, width_of(shape.size)

    def emit(k: Builder) -> None:
        x, stride, gate, gate_stride = k.pointer(0), k.integer(1), k.pointer(2), k.integer(3)
        weight, epsilon, state = k.pointer(4), k.load(F32(), k.pointer(5)), k.pointer(6)
        with own_tokens(k, state, tokens) as token, k.loop(0, shape.value_heads) as head:
            row, gates = x + token * stride + head * (4 * size), gate + token * gate_stride + shape.gate_column(head)
            normalised(k, row, weight, epsilon, size, row)
            with k.loop(0, 4 * size, 4 * lanes) as i:
                g = k.load(F32(lanes), gates + i)
                k.store(k.load(F32(lanes), row + i) * _gated(k, g, g), row + i)

    return compile_kernel(f"gated_norm_{shape.label}_{tokens}", emit)


@functools.cache
def part_kernel(heads: int, size: int, tokens: int) -> int:
    """Heads' queries and gates, which lie in turns, each by themselves.

    arguments: both [token, heads · 2 · size], bytes of a row; queries, gates, bytes of a row of each; state
    """
    lanes = width_of(size)

    def emit(k: Builder) -> None:
        both, stride, queries, gates, q_stride, state = (
            k.pointer(0), k.integer(1), k.pointer(2), k.pointer(3), k.integer(4), k.pointer(5)
        )  # fmt: skip
        with (
            own_tokens(k, state, tokens) as token,
            k.loop(0, heads) as head,
            k.loop(0, 4 * size, 4 * lanes) as i,
        ):
            row, to = both + token * stride + head * (8 * size) + i, token * q_stride + head * (4 * size) + i
            k.store(k.load(F32(lanes), row), queries + to)
            k.store(k.load(F32(lanes), row + 4 * size), gates + to)

    return compile_kernel(f"part_{heads}_{size}_{tokens}", emit)


@functools.cache
def logistic_kernel(columns: int, tokens: int) -> int:
    """x *= logistic(gate). arguments: x, bytes of a row, gate, bytes of a row, state"""
    lanes = width_of(columns)

    def emit(k: Builder) -> None:
        x, stride, gate, gate_stride, state = k.pointer(0), k.integer(1), k.pointer(2), k.integer(3), k.pointer(4)
        with own_tokens(k, state, tokens) as token, k.loop(0, 4 * columns, 4 * lanes) as i:
            at = x + token * stride + i
            g = k.load(F32(lanes), gate + token * gate_stride + i)
            k.store(_gated(k, k.load(F32(lanes), at), g), at)

    return compile_kernel(f"logistic_{columns}_{tokens}", emit)


@functools.cache
def shared_kernel(columns: int, tokens: int) -> int:
    """x += y · logistic(read · gate), the product being one number of a token.

    arguments: x, bytes of a row, y, bytes of a row, read, bytes of a row, gate [columns], state
    """
    lanes = width_of(columns)

    def emit(k: Builder) -> None:
        x, stride, y, y_stride, read, read_stride, gate, state = (
            k.pointer(0), k.integer(1), k.pointer(2), k.integer(3), k.pointer(4), k.integer(5), k.pointer(6),
            k.pointer(7),
        )  # fmt: skip
        with own_tokens(k, state, tokens) as token:
            to, row, inputs = x + token * stride, y + token * y_stride, read + token * read_stride
            sums = k.variable(k.value(0.0, F32(lanes)))
            with k.loop(0, 4 * columns, 4 * lanes) as i:
                sums.value = k.fma(k.load(F32(lanes), inputs + i), k.load(F32(lanes), gate + i), sums.value)
            share = _gated(k, k.value(1.0, F32()), sums.value.total())
            with k.loop(0, 4 * columns, 4 * lanes) as i:
                k.store(k.fma(k.load(F32(lanes), row + i), share, k.load(F32(lanes), to + i)), to + i)

    return compile_kernel(f"shared_{columns}_{tokens}", emit)


def softplus(k: Builder, x: Value) -> Value:
    """ln(1 + eˣ) of a float32, exact to some units in the last place where it is small, too (Kahan's ln(1 + y))."""
    power = k.exp(x)
    whole = power + 1.0
    lost = k.select(whole > 1.0, power / (whole - 1.0), 1.0)  # what rounding took from or gave to 1 + y
    found = k.select(whole > 1.0, _ln(k, whole) * lost, power)
    return k.select(x > 20.0, x, found + (power - power))  # NaN stays NaN


def _ln(k: Builder, x: Value) -> Value:
    """Of a normal float32 above 0 (Cephes' polynomial)."""
    bits = x.bits(I32())
    exponent = (bits >> 23) - 126
    part = ((bits & 0x7FFFFF) | 0x3F000000).bits(F32())  # 0.5 to 1
    low = part < 0.70710678
    exponent = k.select(low, exponent - 1, exponent)
    m = k.select(low, part + part, part) - 1.0
    p = k.value(7.0376836292e-2, F32())
    for c in (
        *(-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
        *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
    ):
        p = k.fma(p, m, k.value(c, F32()))
    e, square = exponent.float32(), m * m
    tail = k.fma(p, m * square, e * -2.12194440e-4)
    return e * 0.693359375 + (m + k.fma(square, -0.5, tail))
