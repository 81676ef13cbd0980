"""Unpacking against gguf-py bit by bit, each format's bit layout, row look-up, and every refusal.

"Equal" is equality of float32 bits, -0 and infinities included; a NaN equals any NaN.
"""

from __future__ import annotations

import re
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as QType
from hypothesis import given, settings
from hypothesis import strategies as st

from nkat.errors import NKATError
from nkat.gguf import formats, grid_formats, integer_formats, level_formats
from nkat.gguf.blocks import BlockFormat
from nkat.gguf.file import GGUFFile
from nkat.gguf.formats import (
    BLOCK_FORMATS,
    QuantError,
    UnsupportedTypeError,
    dequantise,
    dequantise_rows,
    packed_nbytes,
)

pytestmark = pytest.mark.isa

FLOATS = (QType.F32, QType.F16, QType.BF16)
# type: the bytes at which a block's float16 numbers start
HALVES = {
    QType.Q4_0: (0,),
    QType.Q4_1: (0, 2),
    QType.Q5_0: (0,),
    QType.Q5_1: (0, 2),
    QType.Q8_0: (0,),
    QType.Q2_K: (80, 82),
    QType.Q3_K: (108,),
    QType.Q4_K: (0, 2),
    QType.Q5_K: (0, 2),
    QType.Q6_K: (208,),
    QType.IQ4_NL: (0,),
    QType.IQ4_XS: (0,),
    QType.MXFP4: (),
    QType.NVFP4: (),
    QType.TQ1_0: (52,),
    QType.TQ2_0: (64,),
    QType.IQ1_S: (0,),
    QType.IQ1_M: (),
    QType.IQ2_XXS: (0,),
    QType.IQ2_XS: (0,),
    QType.IQ2_S: (0,),
    QType.IQ3_XXS: (0,),
    QType.IQ3_S: (0,),
}
GRIDS = [qtype for qtype in HALVES if qtype.name[:3] in ("IQ1", "IQ2", "IQ3")]
ALL = (*FLOATS, *HALVES)

every_type = pytest.mark.parametrize("qtype", ALL, ids=lambda qtype: qtype.name)
every_block_type = pytest.mark.parametrize("qtype", HALVES, ids=lambda qtype: qtype.name)


def oracle(data: np.ndarray, qtype: QType) -> np.ndarray:
    """gguf-py's weights of rows of packed bytes (..., bytes a row)."""
    with np.errstate(all="ignore"):  # infinite and NaN scales
        return gguf.quants.dequantize(data, qtype)


def flat(data: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(data).view(-1)


def same(result: torch.Tensor, expected: np.ndarray) -> bool:
    got = result.numpy()
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    equal = got.view(np.int32) == expected.view(np.int32)
    return bool((equal | (np.isnan(got) & np.isnan(expected))).all())


def random_rows(qtype: QType, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bytes (*shape[:-1], bytes a row) for weights of `shape`."""
    row_bytes = packed_nbytes(qtype, shape[-1:])
    return np.random.default_rng(seed).integers(0, 256, (*shape[:-1], row_bytes), dtype=np.uint8)


def finite(data: np.ndarray, qtype: QType) -> np.ndarray:
    """A copy whose block scales are neither infinite nor NaN; they may be zero, negative or subnormal."""
    blocks = data.reshape(-1, GGML_QUANT_SIZES[qtype][1]).copy()
    for start in HALVES[qtype]:
        blocks[:, start + 1] &= 0xBF  # the exponent's top bit
    if qtype == QType.MXFP4:
        blocks[:, 0] &= 0x7F
    if qtype == QType.IQ1_M:
        blocks[:, 55] &= 0xBF  # whose float16 lies in four pieces
    return blocks.reshape(data.shape)


def row_length(qtype: QType, blocks: int) -> int:
    return blocks * GGML_QUANT_SIZES[qtype][0]


def test_the_supported_types_are_the_documented_ones():
    assert set(ALL) == formats.SUPPORTED_TYPES


def drawn_bytes(block: type[BlockFormat]) -> list[int]:
    """The bytes that a format's drawing speaks of, in its order."""
    ranges = re.findall(r"^ +(?:bytes? +)?(\d+)(?:-(\d+))? ", block.__doc__ or "", flags=re.MULTILINE)
    return [byte for first, last in ranges for byte in range(int(first), int(last or first) + 1)]


@every_block_type
def test_the_drawing_has_every_byte_once(qtype):
    block = BLOCK_FORMATS[qtype]
    assert drawn_bytes(block) == list(range(block.block_bytes))
    assert f"{block.block_size} weights in {block.block_bytes} bytes" in block.__doc__
    assert (block.qtype, block.__name__) == (qtype, qtype.name)


@every_type
def test_random_bytes_unpack_as_in_gguf_py(qtype):
    shape = (37, row_length(qtype, 5))
    data = random_rows(qtype, shape)
    assert same(dequantise(flat(data), qtype, shape), oracle(data, qtype))


@every_block_type
def test_random_bytes_with_finite_scales_unpack_to_numbers(qtype):
    shape = (37, row_length(qtype, 5))
    data = finite(random_rows(qtype, shape), qtype)
    result = dequantise(flat(data), qtype, shape)
    assert bool(result.isfinite().all())
    assert np.array_equal(result.numpy().view(np.int32), oracle(data, qtype).view(np.int32))


@every_block_type
def test_every_value_of_every_byte_unpacks_as_in_gguf_py(qtype):
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    values = np.arange(256, dtype=np.uint8)[:, None].repeat(type_size, axis=1)
    rng = np.random.default_rng(1)
    data = np.concatenate([rng.permuted(values, axis=0) for _ in range(8)])  # each value eight times, among others
    assert same(dequantise(flat(data), qtype, (8 * 256, block_size)), oracle(data, qtype))


@pytest.mark.parametrize("qtype", [QType.F16, QType.BF16], ids=lambda qtype: qtype.name)
def test_every_16_bit_float_unpacks_as_in_gguf_py(qtype):
    data = np.arange(1 << 16, dtype="<u2").view(np.uint8)
    assert same(dequantise(flat(data), qtype, (1 << 16,)), oracle(data, qtype))


@pytest.mark.parametrize("qtype", [q for q, halves in HALVES.items() if halves], ids=lambda qtype: qtype.name)
@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -0.0])
def test_nan_infinite_and_zero_scales_stay_what_they_are(qtype, scale):
    shape = (1, row_length(qtype, 3))
    data = finite(random_rows(qtype, shape), qtype)
    blocks = data.reshape(3, -1)
    for start in HALVES[qtype]:
        blocks[1, start : start + 2] = np.array([scale], dtype="<f2").view(np.uint8)
    result = dequantise(flat(data), qtype, shape)
    assert same(result, oracle(data, qtype))
    hit = result.view(3, -1)
    assert bool(hit[[0, 2]].isfinite().all())  # the neighbours are unhurt
    assert bool((hit[1] == 0).all()) if scale == 0 else not bool(hit[1].isfinite().any())


QUANTISABLE = (QType.F16, QType.BF16, QType.Q4_0, QType.Q4_1, QType.Q5_0, QType.Q5_1, QType.Q8_0)
# Largest error over the largest weight of a block: half a step of the type's grid, and the rounding of its float16
# scale. Q4_0 and Q5_0 have one step more below zero than above, so that the far end of a block may lose a whole one.
ROUNDING = {
    QType.F16: 2**-11,
    QType.BF16: 2**-8,
    QType.Q4_0: 1 / 8,
    QType.Q4_1: 1 / 15 + 2**-9,
    QType.Q5_0: 1 / 16,
    QType.Q5_1: 1 / 31 + 2**-9,
    QType.Q8_0: 0.5 / 127 + 2**-10,
}


@pytest.mark.parametrize("qtype", QUANTISABLE, ids=lambda qtype: qtype.name)
def test_quantised_weights_come_back(qtype):
    """Weights as layers have them, a bell curve with a few far outliers. The second oracle is the weights."""
    rng = np.random.default_rng(2)
    weights = (rng.standard_normal((19, 256)) * 0.02).astype(np.float32)
    weights[rng.random(weights.shape) < 0.01] *= 8
    data = gguf.quants.quantize(weights, qtype).view(np.uint8)
    result = dequantise(flat(data), qtype, weights.shape)
    assert same(result, oracle(data, qtype))
    largest = np.abs(weights.reshape(-1, 32)).max(axis=1, keepdims=True)
    error = np.abs(result.numpy() - weights).reshape(-1, 32)
    assert (error <= ROUNDING[qtype] * largest * (1 + 1e-6)).all()
    neighbours = np.abs(result.numpy() - np.roll(weights, 1, axis=1)).reshape(-1, 32)
    assert not (neighbours <= ROUNDING[qtype] * largest).all()  # weights out of order would be noticed


def test_the_comparison_notices_the_wrong_type():
    shape = (3, 64)
    data = finite(random_rows(QType.Q4_0, shape), QType.Q4_0)  # Q4_0 and IQ4_NL blocks have the same size
    assert same(dequantise(flat(data), QType.Q4_0, shape), oracle(data, QType.Q4_0))
    assert not same(dequantise(flat(data), QType.Q4_0, shape), oracle(data, QType.IQ4_NL))
    assert not same(dequantise(flat(data), QType.IQ4_NL, shape), oracle(data, QType.Q4_0))


def span(start: int, stop: int) -> list[int]:
    return list(range(start, stop))


# type: (byte, bit, the weights of the block that depend on it), written from the layouts in ggml-quants.c
# fmt: off
LAYOUT = {
    QType.Q4_0: [(0, 0, span(0, 32)), (5, 1, [3]), (5, 6, [19]), (17, 7, [31])],
    QType.Q4_1: [(0, 0, span(0, 32)), (2, 0, span(0, 32)), (4, 0, [0]), (4, 4, [16]), (19, 7, [31])],
    QType.Q5_0: [(1, 2, span(0, 32)), (2, 0, [0]), (5, 7, [31]), (6, 3, [0]), (21, 4, [31])],
    QType.Q5_1: [(3, 1, span(0, 32)), (4, 0, [0]), (5, 2, [10]), (8, 0, [0]), (23, 7, [31])],
    QType.Q8_0: [(0, 0, span(0, 32)), (2, 0, [0]), (12, 4, [10]), (33, 7, [31])],
    QType.Q2_K: [(3, 1, span(48, 64)), (3, 6, span(48, 64)), (16, 0, [0]), (21, 7, [101]), (48, 2, [160]),
                 (80, 0, span(0, 256)), (82, 0, span(0, 256))],
    QType.Q3_K: [(0, 3, [96]), (31, 7, [255]), (32, 1, [0]), (73, 6, [233]), (98, 0, span(32, 48)),
                 (98, 5, span(160, 176)), (105, 2, span(80, 96)), (107, 7, span(240, 256)), (108, 0, span(0, 256))],
    QType.Q4_K: [(0, 0, span(0, 256)), (2, 0, span(0, 256)), (5, 5, span(32, 64)), (5, 6, span(160, 192)),
                 (10, 0, span(64, 96)), (10, 7, span(192, 224)), (15, 1, span(224, 256)), (15, 4, span(224, 256)),
                 (16, 0, [0]), (17, 4, [33]), (48, 3, [64]), (143, 7, [255])],
    QType.Q5_K: [(0, 0, span(0, 256)), (2, 0, span(0, 256)), (4, 0, span(0, 32)), (8, 6, span(128, 160)),
                 (20, 6, [196]), (47, 0, [31]), (48, 0, [0]), (81, 5, [97]), (175, 7, [255])],
    QType.Q6_K: [(7, 0, [7]), (7, 4, [71]), (65, 2, [129]), (127, 7, [255]), (130, 0, [2]), (130, 7, [98]),
                 (162, 3, [162]), (192, 0, span(0, 16)), (207, 7, span(240, 256)), (208, 0, span(0, 256))],
    QType.IQ4_NL: [(0, 0, span(0, 32)), (2, 0, [0]), (9, 5, [23]), (17, 7, [31])],
    QType.IQ4_XS: [(0, 0, span(0, 256)), (2, 1, span(0, 32)), (3, 7, span(224, 256)), (4, 4, span(32, 64)),
                   (7, 0, span(192, 224)), (8, 0, [0]), (8, 4, [16]), (24, 4, [48]), (135, 7, [255])],
    QType.MXFP4: [(0, 0, span(0, 32)), (0, 7, span(0, 32)), (1, 0, [0]), (8, 5, [23]), (16, 7, [31])],
    QType.NVFP4: [(0, 0, span(0, 16)), (1, 3, span(16, 32)), (3, 6, span(48, 64)), (4, 0, [0]), (4, 4, [8]),
                  (11, 7, [15]), (12, 0, [16]), (35, 7, [63])],
    QType.TQ1_0: [(0, 7, [0, 32, 64, 96, 128]), (0, 4, [64, 96]), (47, 7, [175, 191, 207, 223, 239]),
                  (48, 7, [240, 244, 248, 252]), (51, 4, [251, 255]), (52, 0, span(0, 256))],
    QType.TQ2_0: [(0, 0, [0]), (5, 3, [37]), (32, 0, [128]), (63, 7, [255]), (64, 0, span(0, 256))],
    QType.IQ1_S: [(0, 0, span(0, 256)), (35, 4, span(0, 32)), (35, 7, span(0, 32)), (49, 7, span(224, 256))],
    QType.IQ1_M: [(32, 3, span(0, 8)), (32, 7, span(8, 16)), (47, 7, span(248, 256)), (48, 0, span(0, 16)),
                  (48, 3, span(16, 32)), (49, 3, span(48, 64)), (55, 3, span(240, 256)), (49, 4, span(0, 256)),
                  (55, 7, span(0, 256))],
    QType.IQ2_XXS: [(0, 0, span(0, 256)), (6, 0, [0, 7]), (6, 7, [8, 15]), (8, 5, [24, 31]), (9, 3, [30, 31]),
                    (9, 4, span(0, 32)), (14, 0, [32, 39]), (65, 7, span(224, 256))],
    QType.IQ2_XS: [(0, 0, span(0, 256)), (3, 1, [0, 7]), (3, 7, [6, 7]), (65, 1, [248, 255]), (66, 0, span(0, 16)),
                   (66, 4, span(16, 32)), (73, 7, span(240, 256))],
    QType.IQ2_S: [(0, 0, span(0, 256)), (34, 0, [0]), (40, 3, [51]), (65, 7, [255]), (74, 0, span(0, 16)),
                  (81, 4, span(240, 256))],
    QType.IQ3_XXS: [(0, 0, span(0, 256)), (66, 0, [0, 7]), (69, 3, [30, 31]), (69, 4, span(0, 32)), (70, 0, [32, 39]),
                    (97, 7, span(224, 256))],
    QType.IQ3_S: [(0, 0, span(0, 256)), (74, 0, [0]), (105, 7, [255]), (106, 0, span(0, 32)), (106, 4, span(32, 64)),
                  (109, 7, span(224, 256))],
}
# type: (byte, bit, the neighbours that the number of a grid's entry stands for, of which some must change)
ENTRIES = {
    QType.IQ1_S: [(2, 0, span(0, 8)), (33, 7, span(248, 256)), (34, 0, span(0, 8)), (49, 3, span(248, 256))],
    QType.IQ1_M: [(0, 0, span(0, 8)), (31, 7, span(248, 256)), (32, 0, span(0, 8)), (47, 6, span(248, 256))],
    QType.IQ2_XXS: [(2, 0, span(0, 8)), (5, 7, span(24, 32)), (61, 3, span(248, 256))],
    QType.IQ2_XS: [(2, 0, span(0, 8)), (3, 0, span(0, 8)), (64, 7, span(248, 256))],
    QType.IQ2_S: [(2, 0, span(0, 8)), (33, 7, span(248, 256)), (66, 1, span(0, 8)), (73, 7, span(248, 256))],
    QType.IQ3_XXS: [(2, 0, span(0, 4)), (65, 7, span(252, 256))],
    QType.IQ3_S: [(2, 0, span(0, 4)), (65, 7, span(252, 256)), (66, 1, span(4, 8)), (73, 7, span(252, 256))],
}
# fmt: on


def changed_by(qtype: QType, byte: int, bit: int) -> list[list[int]]:
    """[block, weight] of those that a flipped bit in the second of three blocks changes."""
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    # bytes that make no integer and no scale zero, so that every change shows
    fill = 0x00 if qtype in (QType.TQ1_0, QType.TQ2_0) else 0x65
    blocks = np.full((3, type_size), fill, dtype=np.uint8)
    for start in HALVES[qtype]:
        blocks[:, start : start + 2] = np.array([1.0], dtype="<f2").view(np.uint8)
    before = dequantise(flat(blocks), qtype, (3, block_size)).view(torch.int32)
    blocks[1, byte] ^= 1 << bit
    after = dequantise(flat(blocks), qtype, (3, block_size)).view(torch.int32)
    return (before != after).nonzero().tolist()


@pytest.mark.parametrize(
    ("qtype", "byte", "bit", "weights"),
    [pytest.param(qtype, *case, id=f"{qtype.name}-{case[0]}.{case[1]}") for qtype in LAYOUT for case in LAYOUT[qtype]],
)
def test_a_flipped_bit_changes_exactly_the_weights_that_hold_it(qtype, byte, bit, weights):
    assert changed_by(qtype, byte, bit) == [[1, weight] for weight in weights]


@pytest.mark.parametrize(
    ("qtype", "byte", "bit", "weights"),
    [
        pytest.param(qtype, *case, id=f"{qtype.name}-{case[0]}.{case[1]}")
        for qtype in ENTRIES
        for case in ENTRIES[qtype]
    ],
)
def test_a_flipped_bit_of_an_entry_s_number_changes_weights_of_that_entry(qtype, byte, bit, weights):
    changed = changed_by(qtype, byte, bit)
    assert changed
    assert all(block == 1 and weight in weights for block, weight in changed)


@pytest.mark.parametrize("qtype", GRIDS, ids=lambda qtype: qtype.name)
def test_every_entry_with_every_pattern_of_signs_unpacks_as_in_gguf_py(qtype):
    shape = (1400, row_length(qtype, 1))
    data = finite(random_rows(qtype, shape, seed=9), qtype)
    assert same(dequantise(flat(data), qtype, shape), oracle(data, qtype))
    count, neighbours = getattr(gguf.quants, qtype.name).grid_shape
    q = BLOCK_FORMATS[qtype].quants(flat(data).view(1400, -1))
    shifted = qtype.name.startswith("IQ1")  # in place of signs
    entries = (q.float() / 8).round() if shifted else q.abs()
    assert len(entries.view(-1, neighbours).unique(dim=0)) == count  # the control: all were there
    signs = (q.float() / 8 - entries).view(-1, neighbours)[:, 0] if shifted else (q < 0).view(-1, 8)
    seven = qtype in (QType.IQ2_XXS, QType.IQ2_XS, QType.IQ3_XXS)
    assert len(signs.unique(dim=0)) == (2 if shifted else 128 if seven else 256)


def test_the_grids_numbers_fit_their_bytes():
    """gguf-py keeps grids as float32; a newer one's that did not fit would be cut off without a word."""
    for qtype in GRIDS:
        codebook = getattr(gguf.quants, qtype.name)
        codebook.init_grid()
        table = grid_formats._table(qtype.name, 1, torch.device("cpu")).view(torch.int8)
        assert np.array_equal(table.view(codebook.grid_shape).numpy(), codebook.grid[0, 0])


@every_type
@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 1, 3)], ids=str)
def test_shapes_and_incomplete_tiles(qtype, leading, monkeypatch):
    monkeypatch.setattr("nkat.gguf.blocks._CPU_TILE", 256)  # one to eight blocks: most shapes end inside a tile
    shape = (*leading, row_length(qtype, 3))
    data = random_rows(qtype, shape, seed=3)
    assert same(dequantise(flat(data), qtype, shape), oracle(data, qtype))


@given(
    qtype=st.sampled_from(ALL),
    leading=st.lists(st.integers(1, 5), max_size=3),
    blocks=st.integers(1, 6),
    tile=st.sampled_from([256, 768, 1 << 19]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_tile_and_rows(qtype, leading, blocks, tile, seed, data):
    shape = (*leading, row_length(qtype, blocks))
    packed = random_rows(qtype, shape, seed)
    expected = oracle(packed, qtype)
    count = expected.size // shape[-1]
    rows = data.draw(st.lists(st.integers(0, count - 1), max_size=8))
    with mock.patch("nkat.gguf.blocks._CPU_TILE", tile):
        assert same(dequantise(flat(packed), qtype, shape), expected)
        picked = dequantise_rows(flat(packed), qtype, shape, torch.tensor(rows, dtype=torch.int64))
    assert same(picked, expected.reshape(count, shape[-1])[rows])


@every_type
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_rows_are_those_of_the_whole_tensor(qtype, index):
    shape = (11, row_length(qtype, 2))
    packed = flat(random_rows(qtype, shape, seed=4))
    rows = torch.tensor([10, 0, 3, 3, 7], dtype=index)
    expected = dequantise(packed, qtype, shape)[rows].numpy()
    assert same(dequantise_rows(packed, qtype, shape, rows), expected)
    assert dequantise_rows(packed, qtype, shape, rows[:0]).shape == (0, shape[1])
    packed.view(11, -1)[[1, 2, 4, 5, 6, 8, 9]] ^= 0xFF
    assert same(dequantise_rows(packed, qtype, shape, rows), expected)  # only the named rows are read
    packed.view(11, -1)[3] ^= 0x11
    assert not same(dequantise_rows(packed, qtype, shape, rows), expected)


@every_type
def test_results_do_not_depend_on_the_call_or_the_threads(qtype):
    shape = (130, row_length(qtype, 40))
    packed = flat(random_rows(qtype, shape, seed=5))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = dequantise(packed, qtype, shape)
        again = dequantise(packed, qtype, shape)
        torch.set_num_threads(2)
        threaded = dequantise(packed, qtype, shape)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first.view(torch.int32), again.view(torch.int32))
    assert torch.equal(first.view(torch.int32), threaded.view(torch.int32))


@every_type
def test_unaligned_and_strided_bytes(qtype):
    shape = (3, row_length(qtype, 2))
    data = random_rows(qtype, shape, seed=6)
    expected = oracle(data, qtype)
    storage = torch.zeros(data.size + 3, dtype=torch.uint8)
    for offset in (1, 2, 3):
        view = storage[offset : offset + data.size]
        view.copy_(flat(data))
        assert same(dequantise(view, qtype, shape), expected)
    moved = np.zeros(data.size + 1, dtype=np.uint8)[1:]  # an odd address without a storage offset
    moved[:] = data.reshape(-1)
    assert same(dequantise(torch.from_numpy(moved), qtype, shape), expected)
    strided = flat(data).repeat_interleave(2)[::2]
    assert same(dequantise(strided, qtype, shape), expected)


@every_type
def test_packed_bytes_are_not_written(qtype):
    shape = (5, row_length(qtype, 2))
    data = random_rows(qtype, shape, seed=7)
    packed = flat(data.copy())
    dequantise(packed, qtype, shape)
    dequantise_rows(packed, qtype, shape, torch.tensor([4, 1]))
    assert np.array_equal(packed.numpy(), data.reshape(-1))


def test_f32_is_a_view_and_everything_else_is_new_memory():
    f32 = flat(random_rows(QType.F32, (4, 8)))
    assert dequantise(f32, QType.F32, (4, 8)).data_ptr() == f32.data_ptr()
    q8 = flat(random_rows(QType.Q8_0, (4, 32)))
    first, second = dequantise(q8, QType.Q8_0, (4, 32)), dequantise(q8, QType.Q8_0, (4, 32))
    assert first.data_ptr() != second.data_ptr()


def test_inference_mode_leaves_nothing_behind():
    """Look-up tables are made on first use and kept; made under inference mode they must serve outside it as well."""
    for module in (integer_formats, level_formats, grid_formats):
        for made in vars(module).values():
            if hasattr(made, "cache_clear"):
                made.cache_clear()
    for qtype in (QType.IQ4_NL, QType.Q5_0, QType.NVFP4, QType.TQ1_0, QType.IQ2_XXS, QType.IQ3_S):
        shape = (2, row_length(qtype, 1))
        data = random_rows(qtype, shape)
        with torch.inference_mode():
            dequantise(flat(data), qtype, shape)
        assert same(dequantise(flat(data), qtype, shape), oracle(data, qtype))


@pytest.mark.parametrize("model", ["smollm2", "gemma3", "qwen"])
def test_tensors_of_real_models_unpack_as_in_gguf_py(model, request):
    path = request.getfixturevalue(model)
    with GGUFFile.open(path) as file:
        smallest, largest = {}, {}
        for info in sorted(file.tensors.values(), key=lambda info: info.nbytes):
            smallest.setdefault(info.type, info)
            largest[info.type] = info
        assert len(largest) > 1
        for info in (*smallest.values(), *largest.values()):
            # a copy: torch warns about read-only arrays. Of the largest tensors the first and the last rows.
            rows = file.raw(info.name).reshape(np.prod(info.shape[:-1], dtype=int), -1)
            data = np.concatenate([rows[:64], rows[-64:]]) if rows.shape[0] > 512 else rows.copy()
            shape = (len(data), info.shape[-1])
            expected = oracle(data, info.type)
            assert np.isfinite(expected).all()
            assert same(dequantise(flat(data), info.type, shape, name=info.name), expected), info


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_type
def test_cuda_unpacks_the_same_bits(qtype):
    shape = (37, row_length(qtype, 5))
    data = random_rows(qtype, shape, seed=8)
    packed, rows = flat(data).cuda(), torch.tensor([36, 0, 5], device="cuda")
    expected = oracle(data, qtype)
    assert same(dequantise(packed, qtype, shape).cpu(), expected)
    assert same(dequantise_rows(packed, qtype, shape, rows).cpu(), expected[rows.cpu().numpy()])


@every_type
def test_packed_size_is_that_of_gguf_py(qtype):
    shape = (3, 5, row_length(qtype, 7))
    assert packed_nbytes(qtype, shape) == np.prod(gguf.quants.quant_shape_to_byte_shape(shape, qtype))


def refused(call, kind: type[NKATError] = QuantError) -> str:
    """The one-line message with which `call` is refused."""
    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    return message


def test_an_unsupported_type_is_named_with_its_tensor_and_the_supported_ones():
    packed = torch.zeros(66, dtype=torch.uint8)
    name = "blk.0.ffn_up.weight"
    message = refused(lambda: dequantise(packed, QType.Q8_K, (256,), name=name), UnsupportedTypeError)
    assert message.startswith("tensor 'blk.0.ffn_up.weight': type Q8_K is not supported (supported: F32, F16, ")
    assert all(qtype.name in message for qtype in ALL)
    rows = torch.tensor([0])
    assert refused(lambda: dequantise_rows(packed, QType.I8, (66,), rows), UnsupportedTypeError).startswith("type I8 ")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((), "shape () needs 1 to 4 dimensions"),
        ((1, 1, 1, 1, 256), "needs 1 to 4 dimensions"),
        ((0, 256), "each at least 1"),
        ((-1, -256), "each at least 1"),
        ((2, 128), "rows of 128 weights are not whole Q4_K blocks of 256"),
        ((2, 384), "rows of 384 weights"),
        ((2, 256), "takes 288 bytes of 1-D uint8, not torch.uint8 of shape (144,)"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(shape, words):
    packed = torch.zeros(144, dtype=torch.uint8)
    message = refused(lambda: dequantise(packed, QType.Q4_K, shape, name="output.weight"))
    assert message.startswith("tensor 'output.weight': ")
    assert "Q4_K" in message
    assert words in message
    assert refused(lambda: dequantise_rows(packed, QType.Q4_K, shape, torch.tensor([0]))) == message.partition(": ")[2]
    dequantise(packed, QType.Q4_K, (1, 256))  # the same bytes are fine as what they are


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(17, dtype=torch.uint8),
        torch.zeros(19, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
        torch.zeros(18, dtype=torch.int8),
        torch.zeros(1, 18, dtype=torch.uint8),
    ],
    ids=lambda packed: f"{packed.dtype}{list(packed.shape)}",
)
def test_bytes_that_do_not_fit_are_refused(packed):
    message = refused(lambda: dequantise(packed, QType.Q4_0, (32,)))
    assert message == (
        f"Q4_0 of shape (32,) takes 18 bytes of 1-D uint8, not {packed.dtype} of shape {tuple(packed.shape)}"
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (torch.tensor([0, 3]), "row 3 is outside the 3 rows of a Q4_0 tensor"),
        (torch.tensor([2, -1]), "row -1 is outside the 3 rows of a Q4_0 tensor"),
        (torch.tensor([[0]]), "must be 1-D int32 or int64, not torch.int64 of shape (1, 1)"),
        (torch.tensor([0.0]), "must be 1-D int32 or int64, not torch.float32"),
        (torch.tensor([True]), "must be 1-D int32 or int64, not torch.bool"),
    ],
    ids=["too high", "negative", "two dimensions", "float", "bool"],
)
def test_rows_that_do_not_exist_are_refused(rows, words):
    packed = flat(random_rows(QType.Q4_0, (3, 32)))
    message = refused(lambda: dequantise_rows(packed, QType.Q4_0, (3, 32), rows, name="token_embd.weight"))
    assert message.startswith("tensor 'token_embd.weight': ")
    assert words in message
