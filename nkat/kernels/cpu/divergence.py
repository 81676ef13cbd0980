"""The CPU kernels that compare two predictions of the same tokens, and those that make one small enough for a file.

As `nkat.kernels.cpu.blocks.likelihood_kernel` they take the vocabulary a block at a time, so that nothing of the size
of tokens × vocabulary is made; see there for what a running log-likelihood is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from nkat.kernels.cpu.agreed import STORED_FLOOR
from nkat.kernels.cpu.blocks import own_tokens
from nkat.kernels.cpu.jit import compile_kernel
from nkat.kernels.cpu.llvm import F32, I16, I32, I64, Builder, Value

LANES = 16
RUNNING = 8  # float32 of each token, see `divergence_kernel`
STORED_HEAD = 8  # bytes before a stored row's numbers: its step and its lowest, float32
_NONE = -(2**31) + 1  # below every negative id


@functools.cache
def divergence_kernel(tokens: int, stored: bool) -> int:
    """Takes a block of the vocabulary into what tells two predictions of each token apart: a, the base's, and b.

    arguments: a (logits of the block; stored: whole rows of log-probabilities as uint16), bytes of a row, logits of the
    block b, bytes of a row, how many they are, id of the first, targets int64 [token], running float32 [token, 8], best
    int64 [token, 2], state
    running: top, sum and target of a, the same of b (see `likelihood_kernel`), Σ exp(a − top of a)·(a − b), nothing;
    from (−1e30, 0, 0, −1e30, 0, 0, 0, 0) on. best: the first id that has the largest logit, of a and of b
    stored: the sums are of exp(a) itself, over the a above `STORED_FLOOR`
    """

    def emit(k: Builder) -> None:
        a, a_stride, b, b_stride, columns, first = (
            k.pointer(0), k.integer(1), k.pointer(2), k.integer(3), k.integer(4), k.integer(5)
        )  # fmt: skip
        targets, running, best, state = (k.pointer(i) for i in range(6, 10))
        lane, whole = k.constant(I32(LANES), list(range(LANES))), columns // LANES * LANES

        with own_tokens(k, state, tokens) as token:
            a_row, b_row = a + token * a_stride, b + token * b_stride
            load_a = _stored_loader(k, a_row, first) if stored else _loader(k, a_row)
            load_b = _loader(k, b_row)
            own, ids = running + token * (4 * RUNNING), best + token * 16

            def part(load: Callable[[Value, int], Value], at: Value) -> Value:
                """The last numbers of a row; those behind them are as good as none. A row has room for them."""
                there = lane < (columns - at).narrow(I32())
                return k.select(there, load(at, LANES), k.value(-1e30, F32(LANES)))

            loads, tops = (load_a, load_b), [k.variable(k.value(-1e30, F32(LANES))) for _ in range(2)]
            with k.loop(0, whole, LANES) as i:
                for load, top in zip(loads, tops, strict=True):
                    top.value = k.maximum(top.value, load(i, LANES))
            with k.loop(whole, columns, LANES) as i:
                for load, top in zip(loads, tops, strict=True):
                    top.value = k.maximum(top.value, part(load, i))
            here = [top.value.largest() for top in tops]
            before = [k.load(F32(), own), k.load(F32(), own + 12)]
            top_a, top_b = (k.maximum(old, new) for old, new in zip(before, here, strict=True))

            sums = [k.variable(k.value(0.0, F32(LANES))) for _ in range(3)]
            places = [k.variable(k.value(_NONE, I32(LANES))) for _ in range(2)]

            def add(x: Value, y: Value, at: Value) -> None:
                weight = k.exp(x if stored else x - top_a)  # NaN where a logit is
                if stored:
                    weight = k.select(x > STORED_FLOOR, weight, 0.0)
                sums[0].value = sums[0].value + weight
                sums[1].value = sums[1].value + k.exp(y - top_b)
                sums[2].value = k.fma(weight, x - y, sums[2].value)
                for place, numbers, top in zip(places, (x, y), here, strict=True):
                    negative = (lane + at.narrow(I32())) * -1
                    found = k.select(numbers.equals(top), negative, k.value(_NONE, I32(LANES)))
                    place.value = k.maximum(place.value, found)

            with k.loop(0, whole, LANES) as i:
                add(load_a(i, LANES), load_b(i, LANES), i)
            with k.loop(whole, columns, LANES) as i:
                add(part(load_a, i), part(load_b, i), i)

            totals = [value.value.total() for value in sums]
            shrink_a = k.value(1.0, F32()) if stored else k.exp(before[0] - top_a)
            shrinks = (shrink_a, k.exp(before[1] - top_b), shrink_a)
            for at, total, shrink in zip((4, 16, 24), totals, shrinks, strict=True):
                k.store(k.fma(k.load(F32(), own + at), shrink, total), own + at)
            k.store(top_a, own)
            k.store(top_b, own + 12)
            for number, place in enumerate(places):
                with k.when(here[number] > before[number]):
                    k.store(first - place.value.largest().signed(I64()), ids + 8 * number)
            target = k.load(I64(), targets + token * 8) - first
            with k.when(target >= 0), k.when(target < columns):
                for at, load in ((8, load_a), (20, load_b)):
                    k.store(load(target, 1), own + at)

    return compile_kernel(f"divergence_{tokens}_{stored}", emit)


def _loader(k: Builder, row: Value) -> Callable[[Value, int], Value]:
    return lambda at, lanes: k.load(F32(lanes), row + at * 4)


def _stored_loader(k: Builder, row: Value, first: Value) -> Callable[[Value, int], Value]:
    """Log-probabilities of a stored row, from the block's first id on."""
    step, lowest = k.load(F32(), row), k.load(F32(), row + 4)

    def load(at: Value, lanes: int) -> Value:
        numbers = k.load(I16(lanes), row + STORED_HEAD + (first + at) * 2).unsigned(I32()).float32()
        return numbers * step + lowest

    return load


@functools.cache
def lowest_kernel(tokens: int) -> int:
    """lowest = the smallest logit so far. arguments: logits, bytes of a row, columns, lowest float32 [token], state"""

    def emit(k: Builder) -> None:
        logits, stride, columns, lowest, state = k.pointer(0), k.integer(1), k.integer(2), k.pointer(3), k.pointer(4)
        whole = columns // LANES * LANES
        with own_tokens(k, state, tokens) as token:
            row, own = logits + token * stride, lowest + token * 4
            highest = k.variable(k.value(-1e30, F32(LANES)))  # of the negative logits
            with k.loop(0, whole, LANES) as i:
                highest.value = k.maximum(highest.value, k.load(F32(LANES), row + i * 4) * -1.0)
            found = k.variable(k.minimum(k.load(F32(), own), highest.value.largest() * -1.0))
            with k.loop(whole, columns) as i:
                found.value = k.minimum(found.value, k.load(F32(), row + i * 4))
            k.store(found.value, own)

    return compile_kernel(f"lowest_{tokens}", emit)


@functools.cache
def store_kernel(tokens: int) -> int:
    """Logits as uint16 in a row's grid: the nearest step above its lowest, 0 for what is not above it.

    arguments: logits of a block, bytes of a row, columns, id of the first, grid float32 [token, 2] (the lowest logit,
    steps per nat), stored rows, bytes of one, state
    """

    def emit(k: Builder) -> None:
        logits, stride, columns, first = k.pointer(0), k.integer(1), k.integer(2), k.integer(3)
        grid, stored, stored_stride, state = k.pointer(4), k.pointer(5), k.integer(6), k.pointer(7)
        whole = columns // LANES * LANES
        with own_tokens(k, state, tokens) as token:
            row, out = logits + token * stride, stored + token * stored_stride + STORED_HEAD + first * 2
            lowest, steps = (k.load(F32(), grid + token * 8 + at) for at in (0, 4))

            def put(at: Value, lanes: int) -> None:
                x = k.load(F32(lanes), row + at * 4)
                number = k.nearest((x - lowest.spread(lanes)) * steps)
                number = k.select(x > lowest.spread(lanes), number, k.value(0.0, x.kind)).truncated()
                k.store(number.narrow(I16()), out + at * 2)

            with k.loop(0, whole, LANES) as i:
                put(i, LANES)
            with k.loop(whole, columns) as i:  # the next row begins where this one ends
                put(i, 1)

    return compile_kernel(f"store_log_probs_{tokens}", emit)
