"""The CPU kernels of a linear layer: x rounded to INT8, packed weight × x, and the star term in its epilogue.

As in llama.cpp, the inputs of a quantised layer are rounded to INT8 (`reference.round_activations` is the definition),
so that products are sums of bytes. For one group of columns of a row (see `nkat.kernels.cpu.formats`)

    Σ w·x = s · d · Σ q·x̂  +  m · d · Σ x̂              w = s·q + m, x ≈ d·x̂

and the star term is κ·up·(down·x) with Θ's INT8 factors as they are (`nkat.theta.algebra.low_rank_form`). Tokens
lie in *panels*, padded; the rows of the panel that no token fills are computed and ignored. `matmul_kernel` is for one
token, as in decoding; for more there is `nkat.kernels.cpu.batch`.

Float weights (F32, F16, BF16) are multiplied in float32 without rounding, and so are all when *exact* is asked for;
but where many tokens are judged and the processor sums products of bytes in one instruction (`wide_rounding`), exact
inputs are whole numbers of two bytes and, in blocks with outliers, of a third: x ≈ d·(256·h + l + t/256). So they have
sixteen bits of the largest of 32, or twenty-four, at one and a half to almost two times the speed of float32.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from nkat.kernels.cpu.formats import BLOCK_LAYOUTS, unit_bytes
from nkat.kernels.cpu.jit import best_isa, compile_kernel
from nkat.kernels.cpu.layout import ROWS, BlockLayout, Interleaver
from nkat.kernels.cpu.llvm import DOT4, F16, F32, I8, I16, I32, I64, Builder, Value, Variable
from nkat.kernels.reference import activation_block

FLOAT_TYPES = {
    GGMLQuantizationType.F32: F32,
    GGMLQuantizationType.F16: F16,
    GGMLQuantizationType.BF16: I16,
}
# Bytes by which decoding asks for a weight before it needs it, by the cache that it shall come into
_AHEAD = {2: 3072, 1: 512}
_OUTLIER = 8.0  # times the mean of a block's inputs, without their signs
_FLAG = 64
STAR_ROWS = 8  # rows of `down` in one tile: 2 lanes each


@dataclass(frozen=True, slots=True)
class Rounding:
    """How the inputs of a weight are rounded: columns that share a scale, and columns that share a sum.

    block 1: not at all
    digits: bytes of an input, 1 or 3, the highest first; of three the last is 0 unless its block has an outlier
    """

    block: int
    group: int
    digits: int = 1

    @property
    def largest(self) -> float:
        """The whole number that the largest input of a block becomes: its bytes are -128 to 127."""
        return 127.0 if self.digits == 1 else 127.0 * 256 + 127

    @property
    def parts(self) -> tuple[tuple[tuple[int, ...], float], ...]:
        """The digits that make one whole number, the highest first, and the units that it counts.

        First those of all inputs, then what the blocks with outliers have besides.
        """
        return (((0,), 1.0),) if self.digits == 1 else (((0, 1), 1.0), ((2,), 1 / 256))

    def step_bytes(self, tokens: int) -> int:
        """Of a panel's inputs in 32 columns: its digits, and behind three of them whether any has the third, int64."""
        return self.digits * tokens * 32 + (_FLAG if self.digits == 3 else 0)


EXACT = Rounding(1, 1)


def rounding_of(qtype: GGMLQuantizationType, exact: bool) -> Rounding:
    """How llama.cpp rounds the inputs of such a weight; exact: not at all."""
    if exact or qtype in FLOAT_TYPES:
        return EXACT
    return Rounding(activation_block(qtype), BLOCK_LAYOUTS[qtype].group)


def wide_rounding(qtype: GGMLQuantizationType, isa: str | None = None) -> Rounding:
    """How exact inputs of many tokens are multiplied fastest: in three bytes where products of bytes are that fast."""
    if qtype in FLOAT_TYPES or (isa or best_isa()) not in DOT4:
        return EXACT
    return Rounding(32, BLOCK_LAYOUTS[qtype].group, digits=3)


def layer_rounding(qtype: GGMLQuantizationType, exact: bool, in_place: bool) -> Rounding:
    """Of a layer's inputs. in_place: its weight stays as the file has it, and multiplies many tokens only"""
    return wide_rounding(qtype) if exact and in_place else rounding_of(qtype, exact)


# Every kernel gets `state`, int64: [0] how many tokens there are, [3] the first of them that feels Θ


def panels(k: Builder, state: Value, tokens: int) -> Value:
    return (k.load(I64(), state) + (tokens - 1)) // tokens


def share(k: Builder, count: Value) -> tuple[Value, Value]:
    """This thread's part of 0 .. count - 1, neighbours together."""
    return count * k.thread // k.threads, count * (k.thread + 1) // k.threads


@functools.cache
def round_kernel(rounding: Rounding, tokens: int, isa: str | None = None) -> int:
    """Rows of float32 → panels. Thread i takes every panel whose number is i modulo the number of threads.

    arguments: x, bytes of a row, columns, q [panel, columns / 32, `Rounding.step_bytes`] int8, of which the first are
    [digit, token, 32], d [panel, columns / 32, token], sums d·Σq [panel, columns / group, token] float32, state
    EXACT: q gets [panel, columns, token] float32, d and sums nothing
    """

    def emit(k: Builder) -> None:
        x, stride, columns, q, d, sums, state = arguments(k, "pii ppp p")
        count = k.load(I64(), state)
        with (
            k.loop(k.thread, panels(k, state, tokens), k.threads) as panel,
            k.loop(panel * tokens, k.minimum(panel * tokens + tokens, count)) as token,
        ):
            row, place = x + token * stride, token - panel * tokens
            if rounding == EXACT:
                with k.loop(0, columns) as c:
                    k.store(k.load(F32(), row + c * 4), q + ((panel * columns + c) * tokens + place) * 4)
            else:
                with k.loop(0, columns // rounding.block) as block:
                    number = panel * (columns // 32) + block * (rounding.block // 32)
                    _round_block(k, rounding, row + block * (4 * rounding.block), number, tokens, place, q, d, sums)

    return compile_kernel(f"round_{_name(rounding)}_{tokens}", emit, isa)


def _name(rounding: Rounding) -> str:
    return f"{rounding.block}_{rounding.group}_{rounding.digits}"


def _round_block(
    k: Builder,
    rounding: Rounding,
    row: Value,
    number: Value,
    tokens: int,
    place: Value,
    q: Value,
    d: Value,
    sums: Value,
) -> None:
    """Rounds one block of a row into group `number` of 32 columns and those after it."""
    parts = [k.load(F32(16), row + 64 * i) for i in range(rounding.block // 16)]
    largest = k.absolute(parts[0])
    for part in parts[1:]:
        largest = k.maximum(largest, k.absolute(part))
    top = largest.largest()
    nothing = functools.reduce(lambda sum_, part: k.fma(part, 0.0, sum_), parts, k.value(0.0, F32(16)))
    scale = top / rounding.largest + nothing.total()  # a NaN, which `maximum` passes over, makes it NaN
    stored = scale.float16().float32() if rounding.digits == 1 and rounding.block == 32 else scale
    inverse = k.select(top > 0.0, k.value(rounding.largest, F32()) / top, 0.0)
    for i in range(rounding.block // 32):
        at = (number + i) * tokens + place
        to = q + (number + i) * rounding.step_bytes(tokens)
        both = parts[2 * i : 2 * i + 2]
        whole = [k.nearest(part * inverse).truncated() for part in both]
        sums_of = [w.float32() for w in whole]
        digits = [whole]
        if rounding.digits == 3:
            outlier = top * 32.0 > (k.absolute(both[0]) + k.absolute(both[1])).total() * _OUTLIER
            finer = k.select(outlier, k.value(256.0, F32()), 0.0)
            rest = [k.minimum(k.nearest((p * inverse - w) * finer), 127.0) for p, w in zip(both, sums_of, strict=True)]
            sums_of = [k.fma(r, 1 / 256, w) for r, w in zip(rest, sums_of, strict=True)]
            digits = [[(w + 128).shift_signed(8) for w in whole], whole, [r.truncated() for r in rest]]
            flag = to + 3 * tokens * 32
            before = k.select(place > 0, k.load(I64(), flag), 0)
            k.store(k.select(outlier, k.value(1, I64()), before), flag)
        for number_of, digit in enumerate(digits):
            for j in range(2):
                k.store(digit[j].narrow(I8()), to + (place + number_of * tokens) * 32 + 16 * j)
        k.store(stored, d + at * 4)
        if rounding.group == 32:
            k.store((sums_of[0] + sums_of[1]).total() * stored, sums + at * 4)
        else:
            for j in range(2):
                k.store(sums_of[j].total() * stored, sums + (((number + i) * 2 + j) * tokens + place) * 4)


@functools.cache
def matmul_kernel(qtype: GGMLQuantizationType, exact: bool, isa: str | None = None) -> int:
    """y = W x + bias + up·u of one token. Each thread takes a part of the tiles.

    arguments: weight, bytes of a tile, units (columns of a float weight), tiles, q, d, sums (of the panel), y, bias [m]
    or 0, up int8 [tile, term, 16], bytes of a tile of it, terms (0: no star term), u [terms]
    """
    name = f"matmul_{qtype.name}{'_exact' if exact else ''}"

    def emit(k: Builder) -> None:
        weight, tile_bytes, units, tiles, q, d, sums, y, bias, up, up_bytes, terms, u = arguments(
            k, "piii ppp p p piip"
        )
        first, last = share(k, tiles)
        with k.loop(first, last) as tile:
            total = k.variable(k.value(0.0, F32(ROWS)))
            at = weight + tile * tile_bytes
            if qtype in FLOAT_TYPES:
                _float_tile(k, qtype, at, units, q, total)
            else:
                layout = BLOCK_LAYOUTS[qtype]
                with k.loop(0, units) as unit:
                    here = at + unit * unit_bytes(qtype)
                    if exact:
                        _exact_unit(k, layout, here, q + unit * (layout.columns * 4), total)
                    else:
                        scales = d + unit * (layout.columns // 32 * 4)
                        unit_sums = sums + unit * (layout.columns // layout.group * 4)
                        _unit(k, layout, here, q + unit * layout.columns, scales, unit_sums, total)
            add_bias_and_star(k, tile, k.value(0, I64()), bias, up + tile * up_bytes, terms, u, [total])
            k.store(total.value, y + tile * (4 * ROWS))

    return compile_kernel(name, emit, isa)


def add_bias_and_star(
    k: Builder, tile: Value, panel: Value, bias: Value, up: Value, terms: Value, u: Value, totals: list[Variable]
) -> None:
    """The end of a product: its rows' bias, where there is one, and up·u for each token of the panel."""
    with k.when(k.is_set(bias)):
        offset = k.load(F32(ROWS), bias + tile * (4 * ROWS))
        for total in totals:
            total.value = total.value + offset
    with k.loop(0, terms) as term:
        factor = k.load(I8(ROWS), up + term * ROWS).signed(I32()).float32()
        for t, total in enumerate(totals):
            strength = k.load(F32(), u + ((panel * terms + term) * len(totals) + t) * 4)
            total.value = k.fma(factor, strength, total.value)


def _unit(k: Builder, layout: type[BlockLayout], at: Value, q: Value, d: Value, sums: Value, total: Variable) -> None:
    """Adds one unit's product to the total.

    Taking the weight apart is all the work, and memory the limit: each word is read once, fields stay where they are in
    their bytes if sums of products have room for that (their sum is moved down instead), and the weights to come are
    asked for line by line between the products.
    """
    order = layout.order()
    last = {quad * 4 // layout.group: i for i, quad in enumerate(order)}
    lines = unit_bytes(layout.block.qtype) // 64
    one_d = activation_block(layout.block.qtype) == layout.columns
    dots: dict[int, dict[int, Value]] = {}  # of a group, by how many bits too high they are
    unit: tuple[Value, Value] | None = None  # of the groups so far: Σ q·x̂ and Σ x̂, with the group's own factors
    for i, quad in enumerate(order):
        for line in range(i * lines // len(order), (i + 1) * lines // len(order)):
            _ask(k, at + 64 * line)
        group = quad * 4 // layout.group
        four, above, seven_bit = _quad(k, layout, at, quad)
        of_group = dots.setdefault(group, {})
        x = k.load(I32(), q + quad * 4).spread(ROWS)
        of_group[above] = k.dot4(of_group.get(above, k.value(0, I32(ROWS))), four, x, seven_bit=seven_bit)
        if last[group] == i:
            own_d = None if one_d else k.load(F32(), d + quad // 8 * 4)
            unit = _add_group(k, layout, at, group, dots.pop(group), own_d, sums, unit)
    assert unit is not None
    s, m = layout.factors(k, at)
    if m is None:
        m = s * -float(layout.zero)
    total.value = k.fma(unit[1], m, k.fma(unit[0], s * k.load(F32(), d) if one_d else s, total.value))


def _ask(k: Builder, line: Value) -> None:
    """Asks for the lines that are so far behind this one."""
    for level, ahead in _AHEAD.items():
        k.prefetch(line + ahead, level)


def _quad(k: Builder, layout: type[BlockLayout], at: Value, quad: int) -> tuple[Value, int, bool]:
    """q of four columns, how many bits too high they are, and whether they have seven bits at most."""
    word, below, mask = layout.field(k, at, quad)
    mask <<= below
    if k.has_dot4 and below > 0 and mask < 0xFF:
        return word & int.from_bytes(bytes([mask] * 4), "little", signed=True), below, False
    return layout.quad(k, at, quad), 0, layout.seven_bit


def _add_group(
    k: Builder,
    layout: type[BlockLayout],
    at: Value,
    group: int,
    dots: dict[int, Value],
    d: Value | None,
    sums: Value,
    unit: tuple[Value, Value] | None,
) -> tuple[Value, Value]:
    """Adds a group's Σ q·x̂ and Σ x̂ to those of the unit: all but the unit's own factors. d: where it has several"""
    parts = [dot.shift_signed(above) if above else dot for above, dot in dots.items()]
    dot = functools.reduce(operator.add, parts).float32()
    if d is not None:
        dot = dot * d
    total_x = k.value(k.load(F32(), sums + group * 4), F32(ROWS))
    step = layout.steps(k, at, group)
    if step is None:  # the unit is one group
        return dot, total_x
    s, m = step[0], step[0] if step[1] is None else step[1]
    if unit is None:
        return dot * s, m * total_x
    return k.fma(dot, s, unit[0]), k.fma(m, total_x, unit[1])


def _exact_unit(k: Builder, layout: type[BlockLayout], at: Value, x: Value, total: Variable) -> None:
    """Adds one unit's product with float32 inputs, each weight in float32, to the total."""
    for column, w in enumerate(weights(k, layout, at)):
        total.value = k.fma(w, k.load(F32(), x + column * 4), total.value)


def weights(k: Builder, layout: type[BlockLayout], at: Value) -> Iterator[Value]:
    """The weights of a unit, column by column, 16 rows each, in float32."""
    for group in range(layout.columns // layout.group):
        s, m = layout.scales(k, at, group)
        for quad in range(group * layout.group // 4, (group + 1) * layout.group // 4):
            four = layout.quad(k, at, quad)
            for byte in range(4):
                q = (four >> 8 * byte) & 0xFF if byte < 3 else four >> 24
                yield k.fma(q.float32(), s, m)


def as_float32(k: Builder, qtype: GGMLQuantizationType, lanes: int, at: Value) -> Value:
    """Numbers of a float type."""
    loaded = k.load(FLOAT_TYPES[qtype](lanes), at)
    if qtype == GGMLQuantizationType.BF16:
        return (loaded.unsigned(I32()) << 16).bits(F32(lanes))
    return loaded.float32()


def _float_tile(k: Builder, qtype: GGMLQuantizationType, at: Value, columns: Value, x: Value, total: Variable) -> None:
    width = GGML_QUANT_SIZES[qtype][1]
    with k.loop(0, columns) as c:
        w = as_float32(k, qtype, ROWS, at + c * (ROWS * width))
        _ask(k, at + c * (ROWS * width))
        total.value = k.fma(w, k.load(F32(), x + c * 4), total.value)


@functools.cache
def embedding_kernel(qtype: GGMLQuantizationType, tokens: int) -> int:
    """Rows of a packed table, as the file has it, times a factor. Thread i takes the panels of `round_kernel`.

    arguments: packed table, bytes of a packed row, units (columns of a float table), ids int64 [token], factor float32
    [1], out float32, bytes of a row of out, state
    """

    def emit(k: Builder) -> None:
        table, row_bytes, units, ids, factor, out, stride, state = arguments(k, "pii pppi p")
        factor = k.load(F32(), factor)
        unit_at = k.local(1 if qtype in FLOAT_TYPES else unit_bytes(qtype))
        with (
            k.loop(k.thread, panels(k, state, tokens), k.threads) as panel,
            k.loop(panel * tokens, k.minimum(panel * tokens + tokens, k.load(I64(), state))) as token,
        ):
            row, to = table + k.load(I64(), ids + token * 8) * row_bytes, out + token * stride
            if qtype in FLOAT_TYPES:
                width = GGML_QUANT_SIZES[qtype][1]
                with k.loop(0, units) as c:
                    k.store(as_float32(k, qtype, 1, row + c * width) * factor, to + c * 4)
            else:
                layout = BLOCK_LAYOUTS[qtype]
                with k.loop(0, units) as unit:
                    block = row + unit * GGML_QUANT_SIZES[qtype][1]
                    # a tile whose 16 rows are all this one
                    layout.interleave(Interleaver(k, block, k.value(0, I64()), unit_at))
                    for column, w in enumerate(weights(k, layout, unit_at)):
                        k.store(w.lane(0) * factor, to + (unit * layout.columns + column) * 4)

    return compile_kernel(f"embedding_{qtype.name}_{tokens}", emit)


@functools.cache
def down_kernel(rounding: Rounding, tokens: int, isa: str | None = None) -> int:
    """u = scale · (down x): what the star term's epilogue multiplies, zero for tokens that shall not feel Θ. Thread i
    takes the panels of `round_kernel`.

    arguments: down, groups of 32 columns (columns of float inputs), terms, q, d, sums (of the panels), scale float32
    [terms], u [panel, terms, token], state
    down: int8 + 128 [tile of 8 rows, columns / 8, row, 8]; for float inputs int8 [tile of 16 rows, column, row]
    """

    rows = ROWS if rounding == EXACT else STAR_ROWS

    def emit(k: Builder) -> None:
        down, groups, terms, q, d, sums, scale, u, state = arguments(k, "pii ppp pp p")
        felt = k.load(I64(), state + 24)
        with (
            k.loop(k.thread, panels(k, state, tokens), k.threads) as panel,
            k.loop(0, (terms + (rows - 1)) // rows) as tile,
        ):
            if rounding == EXACT:
                totals = _down_float(k, down + tile * groups * ROWS, groups, q + panel * groups * (tokens * 4), tokens)
            else:
                place = panel * groups * tokens
                at = down + tile * groups * (STAR_ROWS * 32)
                first_sum = sums + place * (32 // rounding.group * 4)
                first_byte = q + panel * groups * rounding.step_bytes(tokens)
                totals = _down_rounded(k, rounding, at, groups, first_byte, d + place * 4, first_sum, tokens)
            for t in range(tokens):
                for row in range(rows):
                    term = tile * rows + row
                    with k.when(term < terms):
                        strength = totals[t].lane(row) * k.load(F32(), scale + term * 4)
                        strength = k.select(panel * tokens + t >= felt, strength, 0.0)
                        k.store(strength, u + ((panel * terms + term) * tokens + t) * 4)

    return compile_kernel(f"down_{_name(rounding)}_{tokens}", emit, isa)


def _down_float(k: Builder, down: Value, columns: Value, x: Value, tokens: int) -> list[Value]:
    """Products of 16 rows with each token of a panel."""
    totals = [k.variable(k.value(0.0, F32(ROWS))) for _ in range(tokens)]
    with k.loop(0, columns) as c:
        w = k.load(I8(ROWS), down + c * ROWS).signed(I32()).float32()
        for t, total in enumerate(totals):
            total.value = k.fma(w, k.load(F32(), x + (c * tokens + t) * 4), total.value)
    return [total.value for total in totals]


def _down_rounded(
    k: Builder, rounding: Rounding, down: Value, groups: Value, q: Value, d: Value, sums: Value, tokens: int
) -> list[Value]:
    """Products of 8 rows with each token of a panel."""
    totals = [k.variable(k.value(0.0, F32(ROWS))) for _ in range(tokens)]
    shifts = [k.variable(k.value(0.0, F32())) for _ in range(tokens)]  # Σ d·x̂, for the 128 that is added to `down`
    with k.loop(0, groups) as group:
        for digits, unit in rounding.parts:
            dots = [k.value(0, I32(ROWS)) for _ in range(tokens)]
            for digit in digits:
                if digit != digits[0]:
                    dots = [dot << 8 for dot in dots]
                x = q + group * rounding.step_bytes(tokens) + digit * tokens * 32
                for eight in range(4):
                    w = k.load(I32(ROWS), down + group * (STAR_ROWS * 32) + eight * (STAR_ROWS * 8))
                    for t in range(tokens):
                        eight_x = k.load(I64(), x + (t * 32 + eight * 8)).spread(ROWS // 2).bits(I32(ROWS))
                        dots[t] = k.dot4(dots[t], w, eight_x, seven_bit=False)
            for t in range(tokens):
                scale = k.load(F32(), d + (group * tokens + t) * 4) * unit
                totals[t].value = k.fma(dots[t].float32(), scale, totals[t].value)
        for t in range(tokens):
            for i in range(32 // rounding.group):
                at = (group * (32 // rounding.group) + i) * tokens + t
                shifts[t].value = shifts[t].value + k.load(F32(), sums + at * 4)
    even, odd = list(range(0, ROWS, 2)), list(range(1, ROWS, 2))
    pairs = [total.value.pick(even) + total.value.pick(odd) for total in totals]
    return [pair - shift.value * 128.0 for pair, shift in zip(pairs, shifts, strict=True)]


def arguments(k: Builder, kinds: str) -> list[Value]:
    """The kernel's arguments: p a pointer, i an integer."""
    return [k.pointer(i) if kind == "p" else k.integer(i) for i, kind in enumerate(kinds.replace(" ", ""))]
