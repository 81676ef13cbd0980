"""Packed weight × many tokens: a weight is taken apart once for all of them.

What `nkat.kernels.cpu.matmul` does for a few tokens, with the same rounding and the same star term. There the work of
taking a weight apart is repeated for each panel; here a block of rows and columns is unpacked into a thread's own
scratch, which stays in its L2 cache while all panels go over it. Bytes come straight from the file, or from the tiles
of a repacked weight.

In scratch, weights are float32 [column, 16 rows] where inputs are not rounded. Where they are, steps of 32 columns
follow one another: their bytes q [8, 16 rows, 4], then s and m of each group of columns, float32 [16 rows]. Inputs of
several bytes go over them again for each.
"""

from __future__ import annotations

import functools

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from llvmlite import ir

from nkat.kernels.cpu.formats import BLOCK_LAYOUTS, unit_bytes
from nkat.kernels.cpu.jit import best_isa, compile_kernel
from nkat.kernels.cpu.layout import ROWS, BlockLayout, Interleaver
from nkat.kernels.cpu.llvm import F32, I32, I64, Builder, Operand, Value, Variable
from nkat.kernels.cpu.matmul import (
    EXACT,
    FLOAT_TYPES,
    Rounding,
    add_bias_and_star,
    arguments,
    as_float32,
    panels,
    share,
    weights,
)
from nkat.kernels.cpu.program import aligned

_TILES = 8  # that are unpacked together
_INPUT_BYTES = 2048  # of a token, in the columns of an unpacked block: a panel of them fits the L1 cache
_VECTOR = 4 * ROWS  # bytes


def batch_tokens(isa: str | None = None) -> int:
    """Tokens of a panel: as many as the registers hold sums of."""
    return 12 if (isa or best_isa()) == "avx512-vnni" else 4


def _block_columns(rounding: Rounding) -> int:
    """Of a weight that are unpacked together."""
    return _INPUT_BYTES // {1: 1, 3: 2}[rounding.digits] if rounding != EXACT else _INPUT_BYTES // 4


def _step_bytes(group: int) -> int:
    """Of 32 columns in scratch."""
    return 8 * _VECTOR + 32 // group * 2 * _VECTOR


class ClampedRows(Interleaver):
    """The rows of a tile as the file has them; where fewer are left than a tile has, the last stands for the rest."""

    def __init__(self, k: Builder, offsets: list[Value], block: Value, out: Value) -> None:
        super().__init__(k, block, k.value(0, I64()), out)
        self.offsets = offsets

    def vector(self, kind: ir.Type, byte: Operand) -> Value:
        at = self.block + byte
        return self.k.vector([self.k.load(kind, at + offset) for offset in self.offsets])


@functools.cache
def batch_kernel(
    qtype: GGMLQuantizationType, tokens: int, rounding: Rounding, repacked: bool, isa: str | None = None
) -> int:
    """y = W x + bias + up·u. Each thread takes a part of the tiles.

    arguments: weight, bytes of a tile (of a row in the file's order), units (columns of a float weight), tiles, rows,
    q, d, sums (of the panels), y, bytes of a row of y, bias [m] or 0, up int8 [tile, term, 16], bytes of a tile of
    it, terms (0: no star term), u [panel, terms, token], scratch, its bytes for one thread, state
    repacked: the weight is in tiles; otherwise as the file has it
    """
    floats = qtype in FLOAT_TYPES
    exact = rounding == EXACT
    layout = None if floats else BLOCK_LAYOUTS[qtype]
    columns = 1 if layout is None else layout.columns
    block_units = _block_columns(rounding) // columns
    unit_scratch = columns * _VECTOR if exact or layout is None else columns // 32 * _step_bytes(layout.group)
    tile_scratch = block_units * unit_scratch
    inputs = "_exact" if exact else f"_{rounding.digits}"
    name = f"batch_{qtype.name}_{tokens}{inputs}{'_tiles' if repacked else ''}"

    def emit(k: Builder) -> None:
        (
            weight, stride, units, tiles, rows, q, d, sums, y, y_stride, bias, up, up_bytes, terms, u, scratch, room,
            state,
        ) = arguments(k, "piiii ppp pi p piip pi p")  # fmt: skip
        count = panels(k, state, tokens)
        own = scratch + k.thread * room
        spare = k.local(unit_bytes(qtype)) if layout is not None and not repacked else own
        first, last = share(k, tiles)
        with (
            k.loop(first, last, _TILES) as block,
            k.loop(0, units, block_units) as start,
        ):
            end, stop = k.minimum(block + _TILES, last), k.minimum(start + block_units, units)
            with k.loop(block, end) as tile:
                to = own + (tile - block) * tile_scratch
                source = _Source(k, qtype, repacked, weight, stride, tile, rows, spare)
                with k.loop(start, stop) as unit:
                    source.unpack(unit, to + (unit - start) * unit_scratch, exact)
            with k.loop(0, count) as panel, k.loop(block, end) as tile:
                here = own + (tile - block) * tile_scratch
                outputs = [y + (panel * tokens + t) * y_stride + tile * _VECTOR for t in range(tokens)]
                totals = [k.variable(k.value(0.0, F32(ROWS))) for _ in range(tokens)]
                with k.when(start > 0):
                    for total, out in zip(totals, outputs, strict=True):
                        total.value = k.load(F32(ROWS), out)
                if exact or layout is None:
                    at = q + (panel * units + start) * (columns * tokens * 4)
                    _float_products(k, here, at, (stop - start) * columns, totals, 1 if floats else 4)
                else:
                    number = panel * units + start
                    at = q + number * (columns // 32 * rounding.step_bytes(tokens))
                    given = at, d + number * (columns // 32 * tokens * 4)
                    unit_sums = sums + number * (columns // layout.group * tokens * 4)
                    steps = (stop - start) * (columns // 32)
                    _byte_products(k, layout, rounding, here, steps, *given, unit_sums, totals)
                with k.when(stop >= units):
                    add_bias_and_star(k, tile, panel, bias, up + tile * up_bytes, terms, u, totals)
                for total, out in zip(totals, outputs, strict=True):
                    k.store(total.value, out)

    return compile_kernel(name, emit, isa)


class _Source:
    """Where a tile's weights come from: its rows in the file, or the repacked tile."""

    def __init__(
        self,
        k: Builder,
        qtype: GGMLQuantizationType,
        repacked: bool,
        weight: Value,
        stride: Value,
        tile: Value,
        rows: Value,
        spare: Value,
    ) -> None:
        self.k, self.qtype, self.repacked, self.spare = k, qtype, repacked, spare
        self.offsets: list[Value] = []
        if repacked:
            self.tile = weight + tile * stride
        else:
            self.tile = weight + tile * ROWS * stride
            left = rows - tile * ROWS - 1
            self.offsets = [k.minimum(left, row) * stride for row in range(ROWS)]

    def unpack(self, unit: Value, out: Value, exact: bool) -> None:
        k, qtype = self.k, self.qtype
        block_bytes = GGML_QUANT_SIZES[qtype][1]
        if qtype in FLOAT_TYPES:
            if self.repacked:
                k.store(as_float32(k, qtype, ROWS, self.tile + unit * (ROWS * block_bytes)), out)
                return
            at = self.tile + unit * block_bytes
            k.store(k.vector([as_float32(k, qtype, 1, at + offset) for offset in self.offsets]), out)
            return
        layout = BLOCK_LAYOUTS[qtype]
        if self.repacked:
            at = self.tile + unit * unit_bytes(qtype)
        else:
            at = self.spare
            layout.interleave(ClampedRows(k, self.offsets, self.tile + unit * block_bytes, at))
        if exact:
            for column, w in enumerate(weights(k, layout, at)):
                k.store(w, out + column * _VECTOR)
            return
        groups = 32 // layout.group
        for step in range(layout.columns // 32):
            to = out + step * _step_bytes(layout.group)
            for quad in range(8):
                k.store(layout.quad(k, at, 8 * step + quad), to + quad * _VECTOR)
            for group in range(groups):
                for i, value in enumerate(layout.scales(k, at, step * groups + group)):
                    k.store(value, to + (8 + 2 * group + i) * _VECTOR)


def _float_products(k: Builder, at: Value, x: Value, columns: Value, totals: list[Variable], unroll: int) -> None:
    tokens = len(totals)
    with k.loop(0, columns, unroll) as first:
        for column in range(unroll):
            w = k.load(F32(ROWS), at + (first + column) * _VECTOR)
            for t, total in enumerate(totals):
                total.value = k.fma(w, k.load(F32(), x + ((first + column) * tokens + t) * 4), total.value)


def _byte_products(
    k: Builder,
    layout: type[BlockLayout],
    rounding: Rounding,
    at: Value,
    steps: Value,
    q: Value,
    d: Value,
    sums: Value,
    totals: list[Variable],
) -> None:
    tokens, groups = len(totals), 32 // layout.group
    quads = 8 // groups

    def add(step: Value, group: int, digits: tuple[int, ...], unit: float) -> None:
        """Adds s · Σ q·x̂ of a group, x̂ being these digits of the inputs, which count units of their scale."""
        here, x = at + step * _step_bytes(layout.group), q + step * rounding.step_bytes(tokens)
        dots = [k.value(0, I32(ROWS)) for _ in range(tokens)]
        for digit in digits:
            if digit != digits[0]:
                dots = [dot << 8 for dot in dots]
            for quad in range(quads * group, quads * (group + 1)):
                four = k.load(I32(ROWS), here + quad * _VECTOR)
                for t in range(tokens):
                    byte = k.load(I32(), x + ((digit * tokens + t) * 32 + quad * 4)).spread(ROWS)
                    dots[t] = k.dot4(dots[t], four, byte, seven_bit=layout.seven_bit)
        s = k.load(F32(ROWS), here + (8 + 2 * group) * _VECTOR)
        for t, total in enumerate(totals):
            scale = k.load(F32(), d + (step * tokens + t) * 4) * unit
            total.value = k.fma(dots[t].float32() * scale, s, total.value)

    with k.loop(0, steps) as step:
        for group in range(groups):
            add(step, group, *rounding.parts[0])
            m = k.load(F32(ROWS), at + step * _step_bytes(layout.group) + (9 + 2 * group) * _VECTOR)
            for t, total in enumerate(totals):
                sum_at = sums + ((step * groups + group) * tokens + t) * 4
                total.value = k.fma(m, k.load(F32(), sum_at), total.value)
    for part in rounding.parts[1:]:  # by itself: among the others it would cost the loop above its registers
        with (
            k.loop(0, steps) as step,
            k.when(k.load(I64(), q + step * rounding.step_bytes(tokens) + 3 * tokens * 32) > 0),
        ):
            for group in range(groups):
                add(step, group, *part)


def make_scratch(threads: int, tokens: int) -> np.ndarray:
    """Scratch for every thread, whatever the types: uint8 [threads, bytes]; next to none for panels of one token."""
    if tokens == 1:
        return np.zeros((threads, 1), np.uint8)
    one_byte = Rounding(32, 16)
    nbytes = _TILES * max(_block_columns(EXACT) * _VECTOR, _block_columns(one_byte) // 32 * _step_bytes(one_byte.group))
    return aligned((threads, nbytes), np.uint8)
