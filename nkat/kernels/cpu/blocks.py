"""The CPU kernels between the linear layers: norms, gates, RoPE into the KV cache, attention.

Everything is float32 except the KV cache, which may be float16 as llama.cpp's is. For each block and KV head it holds
values as [position, D] and keys, so that sixteen scores are one vector, as [position / 16, D, 16].

Tensors of activations are [token, columns], rows one after another. Kernels that work token by token give thread i the
tokens of the panels that `nkat.kernels.cpu.matmul.round_kernel` gives it, so that no barrier is needed between them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass

from nkat.kernels.cpu.agreed import KEYS
from nkat.kernels.cpu.jit import compile_kernel
from nkat.kernels.cpu.llvm import F16, F32, I32, I64, Builder, Value


def width_of(columns: int) -> int:
    """Lanes that divide the columns."""
    return math.gcd(columns, 16)


@contextmanager
def own_tokens(k: Builder, state: Value, tokens: int) -> Iterator[Value]:
    """for each token of this thread's panels of so many"""
    count = k.load(I64(), state)
    with (
        k.loop(k.thread * tokens, count, k.threads * tokens) as first,
        k.loop(first, k.minimum(first + tokens, count)) as token,
    ):
        yield token


def _capped(k: Builder, x: Value, cap: Value) -> Value:
    """c·tanh(x/c) = c − 2c/(exp(2x/c) + 1)"""
    return cap - (cap + cap) / (k.exp(x * (k.value(2.0, cap.kind) / cap)) + 1.0)


def normalised(k: Builder, row: Value, weight: Value, epsilon: Value, columns: int, out: Value) -> None:
    """RMS norm of a row of float32; `out` may be the row itself."""
    lanes = width_of(columns)
    squares = k.variable(k.value(0.0, F32(lanes)))
    with k.loop(0, 4 * columns, 4 * lanes) as i:
        x = k.load(F32(lanes), row + i)
        squares.value = k.fma(x, x, squares.value)
    mean = squares.value.total() * (1.0 / columns)
    factor = k.value(1.0, F32()) / k.sqrt(mean + epsilon)
    with k.loop(0, 4 * columns, 4 * lanes) as i:
        k.store(k.load(F32(lanes), row + i) * factor * k.load(F32(lanes), weight + i), out + i)


@functools.cache
def norm_kernel(columns: int, tokens: int) -> int:
    """out = RMS norm of x. arguments: x, weight, epsilon float32 [1], out, state"""

    def emit(k: Builder) -> None:
        x, weight, epsilon, out, state = (k.pointer(i) for i in range(5))
        with own_tokens(k, state, tokens) as token:
            at = token * (4 * columns)
            normalised(k, x + at, weight, k.load(F32(), epsilon), columns, out + at)

    return compile_kernel(f"norm_{columns}_{tokens}", emit)


@functools.cache
def wide_norm_kernel(columns: int, tokens: int) -> int:
    """x = its RMS norm, in the first columns of its rows. arguments: x, bytes of a row, weight, epsilon, state"""

    def emit(k: Builder) -> None:
        x, stride = k.pointer(0), k.integer(1)
        weight, epsilon, state = (k.pointer(i) for i in (2, 3, 4))
        with own_tokens(k, state, tokens) as token:
            row = x + token * stride
            normalised(k, row, weight, k.load(F32(), epsilon), columns, row)

    return compile_kernel(f"wide_norm_{columns}_{tokens}", emit)


@functools.cache
def add_kernel(columns: int, tokens: int, normalise: bool) -> int:
    """x += y, or its RMS norm, which then replaces y.

    arguments: x, bytes of a row, y, bytes of a row, weight, epsilon, state
    """

    def emit(k: Builder) -> None:
        x, x_stride, y, stride = k.pointer(0), k.integer(1), k.pointer(2), k.integer(3)
        weight, epsilon, state = (k.pointer(i) for i in (4, 5, 6))
        lanes = width_of(columns)
        with own_tokens(k, state, tokens) as token:
            to, row = x + token * x_stride, y + token * stride
            if normalise:
                normalised(k, row, weight, k.load(F32(), epsilon), columns, row)
            with k.loop(0, 4 * columns, 4 * lanes) as i:
                k.store(k.load(F32(lanes), to + i) + k.load(F32(lanes), row + i), to + i)

    return compile_kernel(f"add_{columns}_{tokens}_{normalise}", emit)


@functools.cache
def gate_kernel(columns: int, tokens: int, gelu: bool, clamp: tuple[float, float] | None = None) -> int:
    """gate = activation(gate) * up: SiLU, or GELU by its tanh form.

    arguments: gate, up, bytes of a row of each, state
    clamp: what the two are kept below and how steep the logistic function is, of an activation that adds 1 to `up`
    """
    limit, slope = clamp or (0.0, 1.0)

    def emit(k: Builder) -> None:
        gate, up, gate_stride, up_stride, state = (
            k.pointer(0), k.pointer(1), k.integer(2), k.integer(3), k.pointer(4)
        )  # fmt: skip
        lanes = width_of(columns)
        with own_tokens(k, state, tokens) as token:
            to, row = gate + token * gate_stride, up + token * up_stride
            with k.loop(0, 4 * columns, 4 * lanes) as i:
                g, u = k.load(F32(lanes), to + i), k.load(F32(lanes), row + i)
                if clamp is not None:
                    g, u = _below(k, g, limit), _below(k, _below(k, u, limit) * -1.0, limit) * -1.0 + 1.0
                # both are g times a logistic function: tanh(z) = 2·logistic(2z) − 1
                z = g * k.fma(g * g, 2 * 0.7978845608 * 0.044715, k.value(2 * 0.7978845608, g.kind)) if gelu else g
                active = g / (k.exp(z * -slope) + 1.0)
                k.store(active * u, to + i)

    return compile_kernel(f"gate_{columns}_{tokens}_{gelu}_{clamp is not None}", emit)


def _below(k: Builder, x: Value, limit: float) -> Value:
    """The smaller of the two; NaN stays NaN."""
    return k.select(x > limit, k.value(limit, x.kind), x)


@functools.cache
def scale_kernel(columns: int, tokens: int) -> int:
    """x *= factor. arguments: x, factor float32 [1], state"""

    def emit(k: Builder) -> None:
        x, factor, state = k.pointer(0), k.load(F32(), k.pointer(1)), k.pointer(2)
        lanes = width_of(columns)
        with own_tokens(k, state, tokens) as token, k.loop(0, 4 * columns, 4 * lanes) as i:
            at = x + token * (4 * columns) + i
            k.store(k.load(F32(lanes), at) * factor, at)

    return compile_kernel(f"scale_{columns}_{tokens}", emit)


@functools.cache
def layer_input_kernel(length: int, blocks: int, tokens: int) -> int:
    """own = (own + RMS norm of projected) / √2, for each block's `length` numbers by themselves; projected is used up.

    arguments: own, bytes of a row, projected, bytes of a row, weight, epsilon float32 [1], state
    """

    def emit(k: Builder) -> None:
        own, own_stride, projected, stride = k.pointer(0), k.integer(1), k.pointer(2), k.integer(3)
        weight, epsilon, state = k.pointer(4), k.load(F32(), k.pointer(5)), k.pointer(6)
        lanes = width_of(length)
        with own_tokens(k, state, tokens) as token, k.loop(0, 4 * length * blocks, 4 * length) as start:
            to, row = own + token * own_stride + start, projected + token * stride + start
            normalised(k, row, weight, epsilon, length, row)
            with k.loop(0, 4 * length, 4 * lanes) as i:
                k.store((k.load(F32(lanes), to + i) + k.load(F32(lanes), row + i)) * math.sqrt(0.5), to + i)

    return compile_kernel(f"layer_input_{length}_{blocks}_{tokens}", emit)


@functools.cache
def cap_kernel() -> int:
    """x = c·tanh(x/c), in place. arguments: x, bytes of a row, columns (whole vectors of 16), c float32 [1], state"""

    def emit(k: Builder) -> None:
        x, stride, columns, cap, state = k.pointer(0), k.integer(1), k.integer(2), k.pointer(3), k.pointer(4)
        count, c = k.load(I64(), state), k.load(F32(), cap).spread(16)
        with k.loop(0, count) as token, k.loop(k.thread * 16, columns, k.threads * 16) as i:
            at = x + token * stride + i * 4
            k.store(_capped(k, k.load(F32(16), at), c), at)

    return compile_kernel("cap", emit)


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of the attention: query heads, KV heads, elements D of a head, and of RoPE.

    rotated: leading elements that RoPE turns; interleaved: its pairs are neighbours
    norm: q and k heads have an RMS norm
    half: the KV cache is float16, otherwise float32
    capped: scores are kept within bounds, by tanh
    sinks: each query head has a score that stands for nothing and takes part in the softmax
    own: the new tokens have keys and values, which go into the cache; otherwise another block put them there
    value_norm: v heads have an RMS norm, whose weights are all the same
    """

    queries: int
    kv: int
    size: int
    rotated: int
    interleaved: bool
    norm: bool
    half: bool
    capped: bool = False
    sinks: bool = False
    own: bool = True
    value_norm: bool = False

    @property
    def cache_bytes(self) -> int:
        """Of one number in the KV cache."""
        return 2 if self.half else 4

    def load(self, k: Builder, lanes: int, address: Value) -> Value:
        """Numbers of the cache as float32."""
        return k.load((F16 if self.half else F32)(lanes), address).float32()

    def store(self, k: Builder, x: Value, address: Value) -> None:
        """float32 into the cache."""
        k.store(x.float16() if self.half else x, address)

    @property
    def label(self) -> str:
        return "_".join(str(int(x)) for x in astuple(self))


@functools.cache
def rope_kernel(heads: Heads, tree: bool = False) -> int:
    """Norm and RoPE of q in place, scaled; of k, into the key cache; v into the value cache.

    Interleaved pairs come out with all first elements before all second ones, in q and k alike, which leaves their
    product as it is. Each thread takes some of the (token, head) pairs.

    arguments: q, k, v, bytes of a row of each, cosines and sines [position, rotated / 2], weights of the norms of q and
    k, epsilon, scale float32 [position], key cache, value cache, bytes of a KV head in them, state, ones float32 [size]
    (where heads.value_norm), places (where tree); v may be k, whose norm and RoPE it does not get
    state: of `nkat.kernels.cpu.linear.token_state`; each further sequence starts at the
    same position and has heads of its own in the cache, behind those of the one before
    places: int64 [token, 2], its position and its place in the cache, where there are no such sequences; see
    `nkat.kernels.cpu.tree`
    """
    size, half, width = heads.size, heads.rotated // 2, heads.cache_bytes
    lanes = width_of(half) if half else 1
    every_other = [list(range(start, 2 * lanes, 2)) for start in (0, 1)]

    def pairs(k: Builder, row: Value, i: Value) -> tuple[Value, Value]:
        if not heads.interleaved:
            return k.load(F32(lanes), row + i), k.load(F32(lanes), row + i + 4 * half)
        if lanes == 1:
            return k.load(F32(), row + i * 2), k.load(F32(), row + i * 2 + 4)
        both = k.load(F32(2 * lanes), row + i * 2)
        return both.pick(every_other[0]), both.pick(every_other[1])

    def rotate(k: Builder, row: Value, cosines: Value, sines: Value, out: Value) -> None:
        """From `row` to `out`, which is another place: pairs move."""
        with k.loop(0, 4 * half, 4 * lanes) as i:
            a, b = pairs(k, row, i)
            cosine, sine = k.load(F32(lanes), cosines + i), k.load(F32(lanes), sines + i)
            k.store(a * cosine - b * sine, out + i)
            k.store(b * cosine + a * sine, out + i + 4 * half)
        with k.loop(8 * half, 4 * size, 4) as i:
            k.store(k.load(F32(), row + i), out + i)

    def emit(k: Builder) -> None:
        q, key, v = (k.pointer(i) for i in range(3))
        q_stride, k_stride, v_stride = (k.integer(i) for i in range(3, 6))
        cosines, sines, q_norm, k_norm, epsilon, scale, keys, values = (k.pointer(i) for i in range(6, 14))
        head_bytes, state = k.integer(14), k.pointer(15)
        epsilon = k.load(F32(), epsilon)
        turned = k.local(4 * size)  # `nkat.lm.config.MAX_HEAD` bounds it
        count, start, length = (k.load(I64(), state + 8 * i) for i in range(3))
        every = heads.queries + (heads.kv if heads.own else 0)
        with k.loop(k.thread, count * every, k.threads) as item:
            token, head = item // every, item % every
            if tree:
                at = k.pointer(17) + token * 16
                sequence, position, place = k.value(0, I64()), k.load(I64(), at), k.load(I64(), at + 8)
            else:
                sequence, position = token // length, start + token % length
                place = position
            angle = position * (4 * half)
            with k.when(head < heads.queries):
                row = q + token * q_stride + head * (4 * size)
                if heads.norm:
                    normalised(k, row, q_norm, epsilon, size, row)
                rotate(k, row, cosines + angle, sines + angle, turned)
                factor = k.load(F32(), scale + position * 4)
                with k.loop(0, 4 * size, 4 * width_of(size)) as i:
                    k.store(k.load(F32(width_of(size)), turned + i) * factor, row + i)
            with k.when(head >= heads.queries):
                kv = head - heads.queries
                row = v + token * v_stride + kv * (4 * size)
                cached = (sequence * heads.kv + kv) * head_bytes
                if heads.value_norm:
                    normalised(k, row, k.pointer(16), epsilon, size, turned)
                    row = turned
                to = values + cached + place * (width * size)
                with k.loop(0, size, width_of(size)) as i:
                    heads.store(k, k.load(F32(width_of(size)), row + i * 4), to + i * width)
                row = key + token * k_stride + kv * (4 * size)
                if heads.norm:
                    normalised(k, row, k_norm, epsilon, size, row)
                rotate(k, row, cosines + angle, sines + angle, turned)
                block, lane = place // KEYS, place % KEYS
                to = keys + cached + (block * (KEYS * size) + lane) * width
                with k.loop(0, size) as i:
                    heads.store(k, k.load(F32(), turned + i * 4), to + i * (width * KEYS))

    return compile_kernel(f"rope_{heads.label}_{tree}", emit)


@functools.cache
def attention_kernel(heads: Heads, rows: int) -> int:
    """Softmax attention of the new tokens over the cache, their own keys included; `rows` queries at a time.

    The queries of one KV head that go together are neighbours in (token, head of its group). Each thread takes some of
    the (KV head, group of rows) pairs.

    arguments: q, bytes of a row, key cache, value cache, bytes of a KV head in them, out, bytes of a row, scratch for
    scores, its bytes for one thread, bytes of one row of scores, sliding window (as many as ever where there is none),
    state (see `rope_kernel`), bounds of the scores float32 [1] (where heads.capped), sinks float32
    [query head] (where heads.sinks)
    """
    size, group = heads.size, heads.queries // heads.kv
    chunk = width_of(size)
    chunks = next(n for n in (4, 2, 1) if size % (n * chunk) == 0 and n * rows <= 16)

    def emit(k: Builder) -> None:
        q, q_stride, keys, values, head_bytes, out, out_stride = (
            k.pointer(0), k.integer(1), k.pointer(2), k.pointer(3), k.integer(4), k.pointer(5), k.integer(6)
        )  # fmt: skip
        scores, thread_bytes, score_stride, window, state = (
            k.pointer(7) + k.thread * k.integer(8), k.integer(8), k.integer(9), k.integer(10), k.pointer(11)
        )  # fmt: skip
        del thread_bytes
        count, start, length = (k.load(I64(), state + 8 * i) for i in range(3))
        cap = k.load(F32(), k.pointer(12)).spread(KEYS) if heads.capped else None
        queries = k.minimum(count, length) * group  # of one sequence
        groups = (queries + (rows - 1)) // rows
        sequences = (count + (length - 1)) // length
        with k.loop(k.thread, sequences * groups * heads.kv, k.threads) as item:
            kv, number = item % heads.kv, item // heads.kv
            sequence, first_row = number // groups, number % groups * rows
            row = [k.minimum(first_row + r, queries - 1) for r in range(rows)]
            seen = [i // group for i in row]  # how many tokens of its sequence are before each
            place = [sequence * length + t for t in seen]
            column = [(kv * group + i % group) * (4 * size) for i in row]
            query = [q + t * q_stride + c for t, c in zip(place, column, strict=True)]
            last = [start + t for t in seen]  # the last position that each sees
            first = [k.maximum(end - window + 1, 0) for end in last]
            first_block, end_block = first[0] // KEYS, last[-1] // KEYS + 1
            cached = (sequence * heads.kv + kv) * head_bytes
            block_bytes = heads.cache_bytes * KEYS * size
            tops = attention_scores(
                *(k, heads, query, first, last, first_block, end_block),
                lambda block: (keys + cached + block * block_bytes, block * KEYS, None),
                *(scores, score_stride, cap),
            )
            sinks = [k.load(F32(), k.pointer(13) + (kv * group + i % group) * 4) for i in row] if heads.sinks else []
            score_bytes = (end_block - first_block) * (4 * KEYS)
            inverse = [
                softmax_weights(k, scores + score_stride * r, score_bytes, tops[r], sinks[r : r + 1])
                for r in range(rows)
            ]
            value = values + cached
            begin, stop = first_block * KEYS, last[-1] + 1
            with k.loop(0, size, chunk * chunks) as c:
                sums = [[k.variable(k.value(0.0, F32(chunk))) for _ in range(chunks)] for _ in range(rows)]
                with k.loop(begin, stop) as position:
                    at = value + (position * size + c) * heads.cache_bytes
                    v = [heads.load(k, chunk, at + j * chunk * heads.cache_bytes) for j in range(chunks)]
                    for r in range(rows):
                        weight = k.load(F32(), scores + score_stride * r + (position - begin) * 4)
                        for j in range(chunks):
                            sums[r][j].value = k.fma(v[j], weight, sums[r][j].value)
                for r in range(rows):
                    to = out + place[r] * out_stride + column[r] + c * 4
                    for j in range(chunks):
                        k.store(sums[r][j].value * inverse[r], to + j * chunk * 4)

    return compile_kernel(f"attention_{heads.label}_{rows}", emit)


def attention_scores(
    k: Builder,
    heads: Heads,
    query: list[Value],
    first: list[Value],
    last: list[Value],
    first_block: Value,
    end_block: Value,
    find: Callable[[Value], tuple[Value, Value, Value | None]],
    scores: Value,
    score_stride: Value,
    cap: Value | None,
) -> list[Value]:
    """Writes each query's scores, sixteen positions at a time; returns the largest of each.

    first, last: positions that each query sees
    find: of a block of keys: where it is, the position of its first key, how many count (None: all)
    """
    rows, unroll = len(query), math.gcd(heads.size, 4)
    tops = [k.variable(k.value(-1e30, F32(KEYS))) for _ in range(rows)]
    lane = k.constant(I32(KEYS), list(range(KEYS)))
    with k.loop(first_block, end_block) as block:
        at, start, count = find(block)
        sums = [k.variable(k.value(0.0, F32(KEYS))) for _ in range(rows)]
        with k.loop(0, heads.size, unroll) as i:
            for j in range(unroll):
                key = heads.load(k, KEYS, at + (i + j) * (heads.cache_bytes * KEYS))
                for r in range(rows):
                    sums[r].value = k.fma(key, k.load(F32(), query[r] + (i + j) * 4), sums[r].value)
        for r in range(rows):
            too_early = lane < (first[r] - start).narrow(I32())
            end = last[r] - start if count is None else k.minimum(last[r] - start, count - 1)
            too_late = lane > end.narrow(I32())
            score = sums[r].value if cap is None else _capped(k, sums[r].value, cap)
            score = k.select(too_early | too_late, k.value(-1e30, F32(KEYS)), score)
            tops[r].value = k.maximum(tops[r].value, score)
            k.store(score, scores + score_stride * r + (block - first_block) * (4 * KEYS))
    return [top.value.largest() for top in tops]


def softmax_weights(k: Builder, scores: Value, count: Value, top: Value, sinks: Sequence[Value]) -> Value:
    """Scores (so many bytes of them) → e to the power of their distance from the top; returns 1 / their sum, of which
    the sinks are a part."""
    for sink in sinks:
        top = k.maximum(top, sink)
    total = k.variable(k.value(0.0, F32(KEYS)))
    with k.loop(0, count, 4 * KEYS) as i:
        weight = k.exp(k.load(F32(KEYS), scores + i) - top)
        total.value = total.value + weight
        k.store(weight, scores + i)
    whole = total.value.total()
    for sink in sinks:
        whole = whole + k.exp(sink - top)
    return k.value(1.0, F32()) / whole


@functools.cache
def likelihood_kernel(tokens: int) -> int:
    """Takes a block of the vocabulary into each token's running log-likelihood: its rows of logits are read once.

    arguments: logits of the block, bytes of a row, how many they are, id of the first, targets int64 [token], running
    float32 [token, 3], state
    running: the largest logit so far, Σ exp(logit − it), the target's logit; from (−1e30, 0, 0) on. −ln p of the target
    is then largest + ln Σ − the target's logit
    """

    def emit(k: Builder) -> None:
        logits, stride, columns, first = k.pointer(0), k.integer(1), k.integer(2), k.integer(3)
        targets, running, state = (k.pointer(i) for i in range(4, 7))
        lane, whole = k.constant(I32(KEYS), list(range(KEYS))), columns // KEYS * KEYS

        def part(row: Value, at: Value) -> Value:
            """Sixteen logits; those behind the last are as good as none. A row has room for them."""
            there = lane < (columns - at).narrow(I32())
            return k.select(there, k.load(F32(KEYS), row + at * 4), k.value(-1e30, F32(KEYS)))

        with own_tokens(k, state, tokens) as token:
            row, own = logits + token * stride, running + token * 12
            before = k.load(F32(), own)
            tops = k.variable(k.value(-1e30, F32(KEYS)))
            with k.loop(0, whole, KEYS) as i:
                tops.value = k.maximum(tops.value, k.load(F32(KEYS), row + i * 4))
            with k.loop(whole, columns, KEYS) as i:
                tops.value = k.maximum(tops.value, part(row, i))
            top = k.maximum(before, tops.value.largest())
            sums = k.variable(k.value(0.0, F32(KEYS)))
            with k.loop(0, whole, KEYS) as i:
                sums.value = sums.value + k.exp(k.load(F32(KEYS), row + i * 4) - top)  # NaN where a logit is
            with k.loop(whole, columns, KEYS) as i:
                sums.value = sums.value + k.exp(part(row, i) - top)
            k.store(top, own)
            k.store(k.fma(k.load(F32(), own + 4), k.exp(before - top), sums.value.total()), own + 4)
            place = k.load(I64(), targets + token * 8) - first
            with k.when(place >= 0), k.when(place < columns):
                k.store(k.load(F32(), row + place * 4), own + 8)

    return compile_kernel(f"likelihood_{tokens}", emit)
