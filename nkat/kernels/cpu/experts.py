"""A mixture of experts for the CPU kernels: which expert gets which token, and the products of each.

Rows are the (token, expert) pairs, an expert's behind one another and padded to whole panels, so that a weight is taken
apart once for all tokens that go to it. The products themselves are those of `nkat.kernels.cpu.matmul` and
`nkat.kernels.cpu.batch`, called for one expert after another; an expert that no token goes to is not touched.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from nkat.kernels.cpu.batch import ClampedRows, batch_kernel
from nkat.kernels.cpu.blocks import own_tokens, width_of
from nkat.kernels.cpu.formats import BLOCK_LAYOUTS, padded_rows, unit_bytes
from nkat.kernels.cpu.jit import compile_kernel
from nkat.kernels.cpu.layout import ROWS
from nkat.kernels.cpu.linear import Panels
from nkat.kernels.cpu.llvm import F32, I8, I16, I32, I64, Builder, Value
from nkat.kernels.cpu.matmul import FLOAT_TYPES, arguments, layer_rounding, matmul_kernel, share
from nkat.kernels.cpu.program import Program, aligned


@functools.cache
def route_kernel(experts: int, used: int, tokens: int) -> int:
    """The experts with the largest logits, best first, and the softmax over their logits, times a scale of each.

    arguments: logits, bytes of a row, scales float32 [experts], chosen int64 [token, used], weights float32 [token,
    used], state
    """

    def emit(k: Builder) -> None:
        logits, stride, scales, chosen, weights, state = arguments(k, "pip pp p")
        left = k.local(4 * experts)  # `nkat.lm.config.MAX_EXPERTS` bounds it
        lowest = k.value(float("-inf"), F32())
        with own_tokens(k, state, tokens) as token:
            row, own = logits + token * stride, weights + token * (4 * used)
            with k.loop(0, 4 * experts, 4) as i:
                k.store(k.load(F32(), row + i), left + i)
            with k.loop(0, used) as slot:
                best, place = k.variable(lowest), k.variable(k.value(0, I64()))
                best.value, place.value = lowest, k.value(0, I64())
                with k.loop(0, experts) as expert:
                    value = k.load(F32(), left + expert * 4)
                    better = value > best.value
                    best.value = k.select(better, value, best.value)
                    place.value = k.select(better, expert, place.value)
                k.store(best.value, own + slot * 4)
                k.store(place.value, chosen + (token * used + slot) * 8)
                k.store(lowest, left + place.value * 4)
            top, total = k.load(F32(), own), k.variable(k.value(0.0, F32()))
            total.value = k.value(0.0, F32())
            with k.loop(0, 4 * used, 4) as i:
                weight = k.exp(k.load(F32(), own + i) - top)
                total.value = total.value + weight
                k.store(weight, own + i)
            with k.loop(0, used) as slot:
                scale = k.load(F32(), scales + k.load(I64(), chosen + (token * used + slot) * 8) * 4)
                k.store(k.load(F32(), own + slot * 4) / total.value * scale, own + slot * 4)

    return compile_kernel(f"route_{experts}_{used}_{tokens}", emit)


@functools.cache
def group_kernel(experts: int, used: int, tokens: int) -> int:
    """Gives every (token, expert) pair its row. The first thread does it all: a few operations a pair.

    arguments: chosen int64 [token, used], row of each pair int64 [token, used], token of each row int64 [row], first
    panel of each expert int64 [experts + 1], state, state of the rows
    """

    def emit(k: Builder) -> None:
        chosen, row_of, token_of, first, state, row_state = arguments(k, "pppp pp")
        pairs = k.load(I64(), state) * used
        free = k.local(8 * experts)  # the next row of each expert
        zero = k.value(0, I64())
        with k.when(k.thread.equals(0)):
            with k.loop(0, 8 * (experts + 1), 8) as i:
                k.store(zero, first + i)
            with k.loop(0, pairs) as pair:
                count = first + (k.load(I64(), chosen + pair * 8) + 1) * 8
                k.store(k.load(I64(), count) + 1, count)
            with k.loop(0, 8 * experts, 8) as i:
                before = k.load(I64(), first + i)
                count = k.load(I64(), first + i + 8)
                k.store(before * tokens, free + i)
                k.store(before + (count + (tokens - 1)) // tokens, first + i + 8)
            with k.loop(0, pairs) as pair:
                own = free + k.load(I64(), chosen + pair * 8) * 8
                row = k.load(I64(), own)
                k.store(row, row_of + pair * 8)
                k.store(pair // used, token_of + row * 8)
                k.store(row + 1, own)
            with k.loop(0, 8 * experts, 8) as i:  # rows that only fill a panel repeat the expert's first
                start, stop = k.load(I64(), first + i) * tokens, k.load(I64(), first + i + 8) * tokens
                with k.loop(k.load(I64(), free + i), stop) as row:
                    k.store(k.load(I64(), token_of + start * 8), token_of + row * 8)
            k.store(k.load(I64(), first + 8 * experts) * tokens, row_state)

    return compile_kernel(f"group_{experts}_{used}_{tokens}", emit)


@functools.cache
def gather_kernel(columns: int, tokens: int) -> int:
    """out[row] = x[token of the row]. arguments: x, out, token of each row, state of the rows"""

    def emit(k: Builder) -> None:
        x, out, token_of, row_state = arguments(k, "ppp p")
        lanes = width_of(columns)
        with own_tokens(k, row_state, tokens) as row:
            source, to = x + k.load(I64(), token_of + row * 8) * (4 * columns), out + row * (4 * columns)
            with k.loop(0, 4 * columns, 4 * lanes) as i:
                k.store(k.load(F32(lanes), source + i), to + i)

    return compile_kernel(f"gather_{columns}_{tokens}", emit)


@functools.cache
def combine_kernel(columns: int, used: int, tokens: int) -> int:
    """out[token] = the sum of its rows of y by their weights. arguments: y, bytes of a row, row of each pair, weights,
    out, bytes of a row, state
    """

    def emit(k: Builder) -> None:
        y, stride, row_of, weights, out, out_stride, state = arguments(k, "pi pp pi p")
        lanes = width_of(columns)
        with own_tokens(k, state, tokens) as token, k.loop(0, 4 * columns, 4 * lanes) as i:
            total = k.value(0.0, F32(lanes))
            for slot in range(used):
                pair = token * used + slot
                row = y + k.load(I64(), row_of + pair * 8) * stride
                weight = k.value(k.load(F32(), weights + pair * 4), F32(lanes))
                total = k.fma(k.load(F32(lanes), row + i), weight, total)
            k.store(total, out + token * out_stride + i)

    return compile_kernel(f"combine_{columns}_{used}_{tokens}", emit)


@functools.cache
def _each_kernel(words: int, state_word: int, tokens: int, lazy: GGMLQuantizationType | None) -> int:
    """Calls a product's kernel for each expert that has panels, with that expert's part of every argument.

    arguments: the kernel, its arguments for the first expert's first panel, what to add to each for every expert before
    and for every panel before (bytes), experts, first panel of each [experts + 1]; and of a weight in tiles: the file's
    bytes, bytes of an expert there, of a row, of a tile, units, tiles, rows, uint8 [expert, tile]: which are there
    state_word: which argument is a state, whose count of tokens becomes that of the expert's rows; -1: none is
    lazy: the type of a weight whose tiles are made when they are first needed, each by the thread that needs it
    """

    def emit(k: Builder) -> None:
        kernel, start, by_expert, by_panel, experts, first = arguments(k, "pppp ip")
        own, own_state = k.local(8 * words), k.local(64)
        with k.loop(0, experts) as expert:
            panel, stop = k.load(I64(), first + expert * 8), k.load(I64(), first + expert * 8 + 8)
            with k.when(stop > panel):
                if lazy is not None:
                    _make_tiles(k, lazy, expert, k.load_pointer(start))
                with k.loop(0, 8 * words, 8) as i:
                    moved = expert * k.load(I64(), by_expert + i) + panel * k.load(I64(), by_panel + i)
                    k.store(k.load(I64(), start + i) + moved, own + i)
                if state_word >= 0:
                    state = k.load_pointer(start + 8 * state_word)
                    with k.loop(8, 64, 8) as i:
                        k.store(k.load(I64(), state + i), own_state + i)
                    k.store((stop - panel) * tokens, own_state)
                    k.store(own_state, own + 8 * state_word)
                k.call_address(kernel, [own, k.thread, k.threads])

    return compile_kernel(f"each_{words}_{state_word}_{tokens}_{lazy.name if lazy is not None else ''}", emit)


def _make_tiles(k: Builder, qtype: GGMLQuantizationType, expert: Value, weight: Value) -> None:
    """Repacks those of this thread's tiles of an expert that are not there yet."""
    packed, expert_bytes, row_bytes, tile_bytes, units, tiles, rows, there = arguments(k, "pppp ip piiiiiip")[6:]
    first, last = share(k, tiles)
    with k.loop(first, last) as tile:
        number = expert * tiles + tile
        with k.when(k.load(I8(), there + number).equals(0)):
            source = packed + expert * expert_bytes + tile * row_bytes * ROWS
            offsets = [k.minimum(rows - tile * ROWS - 1, row) * row_bytes for row in range(ROWS)]
            out = weight + number * tile_bytes
            width = GGML_QUANT_SIZES[qtype][1]
            with k.loop(0, units) as unit:
                if qtype in FLOAT_TYPES:
                    kind = I16() if width == 2 else I32()
                    words = [k.load(kind, source + offset + unit * width) for offset in offsets]
                    k.store(k.vector(words), out + unit * (ROWS * width))
                else:
                    to = out + unit * unit_bytes(qtype)
                    BLOCK_LAYOUTS[qtype].interleave(ClampedRows(k, offsets, source + unit * width, to))
            k.store(k.value(1, I8()), there + number)


class CpuExperts:
    """W x + bias of the experts' packed weights [experts, m, n] that lie behind one another, each for its own rows."""

    def __init__(
        self,
        packed: torch.Tensor,
        qtype: GGMLQuantizationType,
        shape: tuple[int, int, int],
        bias: torch.Tensor | None = None,
        *,
        exact: bool = False,
        in_place: bool = False,
    ) -> None:
        """exact, in_place: as for `nkat.kernels.cpu.linear.CpuLinear`. Without in_place there is room for tiles of all
        experts, but only those are made, and take memory, that a token went to.
        """
        count, m, n = shape
        self.qtype, self.shape, self.exact, self.in_place = qtype, shape, exact, in_place
        self.rounding = layer_rounding(qtype, exact, in_place)
        self.packed = packed.numpy().reshape(count, m, -1)
        self.units = n if qtype in FLOAT_TYPES else n // BLOCK_LAYOUTS[qtype].columns
        unit = ROWS * GGML_QUANT_SIZES[qtype][1] if qtype in FLOAT_TYPES else unit_bytes(qtype)
        self.tiles = np.zeros((0, 0, 0), np.uint8)
        if not in_place:
            self.tiles = aligned((count, padded_rows(m) // ROWS, self.units * unit), np.uint8)
        self.there = np.zeros(self.tiles.shape[:2], np.uint8)
        self.bias: np.ndarray | None = None
        if bias is not None:
            self.bias = np.zeros((count, padded_rows(m)), np.float32)
            self.bias[:, :m] = bias.float().numpy()

    @property
    def nbytes(self) -> int:
        """Bytes of the tiles that are there."""
        return int(self.there.sum()) * self.tiles.shape[2]

    def multiply(
        self,
        program: Program,
        panels: Panels,
        first: np.ndarray,
        y: np.ndarray,
        scratch: np.ndarray,
        state: np.ndarray,
        common: bool = False,
    ) -> None:
        """Adds the products' step: y [row, padded m].

        panels: the rows' inputs; common: of the one token, which all its experts share
        first: first panel of each expert, int64 [experts + 1]; state: of the rows
        """
        count, m, _ = self.shape
        inputs = [(panels.q, panels.q), (panels.d, panels.d), (panels.sums, panels.sums)]
        moving = [0 if common or len(a) != len(panels.q) else a.strides[0] for a, _ in inputs]
        weight = self.packed if self.in_place else self.tiles
        end = 0 if self.bias is None else self.bias
        by_bias = 0 if self.bias is None else self.bias.strides[0]
        by_row = panels.tokens * y.strides[0]
        tiles = padded_rows(m) // ROWS
        one = panels.tokens == 1
        # arguments of the product's kernel, by how much each moves for an expert and for a panel
        words: list[tuple[np.ndarray | int, int, int]] = [
            (weight, weight.strides[0], 0), (weight.strides[1], 0, 0), (self.units, 0, 0), (tiles, 0, 0),
            *([] if one else [(m, 0, 0)]),
            (panels.q, 0, moving[0]), (panels.d, 0, moving[1]), (panels.sums, 0, moving[2]),
            (y, 0, by_row), *([] if one else [(y.strides[0], 0, 0)]),
            (end, by_bias, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0),
            *([] if one else [(scratch, 0, 0), (scratch.shape[1], 0, 0), (state, 0, 0)]),
        ]  # fmt: skip
        if one:
            assert not self.in_place
            kernel = matmul_kernel(self.qtype, self.exact)
        else:
            kernel = batch_kernel(self.qtype, panels.tokens, self.rounding, not self.in_place)
        start = np.array([a.ctypes.data if isinstance(a, np.ndarray) else a for a, _, _ in words], np.int64)
        by_expert, by_panel = (np.array([word[i] for word in words], np.int64) for i in (1, 2))
        lazy = None if self.in_place else self.qtype
        each = _each_kernel(len(words), -1 if one else len(words) - 1, panels.tokens, lazy)
        program.add(
            each,
            (
                *(kernel, start, by_expert, by_panel, count, first),
                *(self.packed, self.packed.strides[0], self.packed.strides[1], self.tiles.shape[2]),
                *(self.units, tiles, m, self.there),
            ),
        )
        program.keep(*(a for a, _, _ in words if isinstance(a, np.ndarray)))
