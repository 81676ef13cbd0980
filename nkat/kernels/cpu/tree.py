"""Attention over a tree of token sequences, which has their common beginnings once.

The tokens of one pass are the tree's segments, one behind another: runs of tokens that the same sequences share. A
token sees the segments that lead to its own, and its own up to itself. Keys and values lie in the cache in blocks of
sixteen, and a segment begins with a block of its own, so that the last block of a segment may be filled in part.
"""

from __future__ import annotations

import functools

from nkat.kernels.cpu.agreed import KEYS
from nkat.kernels.cpu.blocks import Heads, attention_scores, softmax_weights, width_of
from nkat.kernels.cpu.jit import compile_kernel
from nkat.kernels.cpu.llvm import F32, I64, Builder, Value

TILE_FIELDS, BLOCK_FIELDS = 6, 3


@functools.cache
def tree_attention_kernel(heads: Heads, rows: int) -> int:
    """Softmax attention of all tokens of a tree; `rows` queries of a tile at a time. Each thread takes some of the
    (tile, KV head) pairs.

    arguments: as of `nkat.kernels.cpu.blocks.attention_kernel`, with the tiles in place of the state, and the blocks of
    keys behind the sinks
    tiles: int64 [1 + tiles, 6], of which the first row says how many there are: some tokens of one segment each; first
    token of the segment, first and end of the tile in it, position of the segment's first token, the first of the
    blocks that it sees, how many of them belong to the segments before
    blocks: int64 [block, 3]: where it is in the cache, position of its first key, how many keys are in it; of the
    segment's own blocks, behind those before it, a token sees what is not behind itself
    """
    size, group = heads.size, heads.queries // heads.kv
    chunk = width_of(size)
    chunks = next(n for n in (4, 2, 1) if size % (n * chunk) == 0 and n * rows <= 16)
    width = heads.cache_bytes
    block_bytes = width * KEYS * size

    def emit(k: Builder) -> None:
        q, q_stride, keys, values, head_bytes, out, out_stride = (
            k.pointer(0), k.integer(1), k.pointer(2), k.pointer(3), k.integer(4), k.pointer(5), k.integer(6)
        )  # fmt: skip
        scores, score_stride, window = k.pointer(7) + k.thread * k.integer(8), k.integer(9), k.integer(10)
        tiles, blocks = k.pointer(11), k.pointer(14)
        cap = k.load(F32(), k.pointer(12)).spread(KEYS) if heads.capped else None
        with k.loop(k.thread, k.load(I64(), tiles) * heads.kv, k.threads) as item:
            kv, tile = item % heads.kv, tiles + (item // heads.kv + 1) * (8 * TILE_FIELDS)
            token, begin, end, position, first_block, before = (k.load(I64(), tile + 8 * i) for i in range(TILE_FIELDS))
            listed, cached = blocks + first_block * (8 * BLOCK_FIELDS), kv * head_bytes

            def block_of(number: Value) -> tuple[Value, Value, Value]:
                """Where it is among a head's blocks, the position of its first key, how many keys are in it."""
                at = listed + number * (8 * BLOCK_FIELDS)
                return k.load(I64(), at), k.load(I64(), at + 8), k.load(I64(), at + 16)

            def keys_of(number: Value) -> tuple[Value, Value, Value]:
                place, start, count = block_of(number)
                return keys + cached + place * block_bytes, start, count

            with k.loop(begin * group, end * group, rows) as first_row:
                row = [k.minimum(first_row + r, end * group - 1) for r in range(rows)]
                seen = [i // group for i in row]  # how many tokens of its segment are before each
                place = [token + t for t in seen]
                column = [(kv * group + i % group) * (4 * size) for i in row]
                query = [q + t * q_stride + c for t, c in zip(place, column, strict=True)]
                last = [position + t for t in seen]  # the last position that each sees
                first = [k.maximum(at - window + 1, 0) for at in last]
                count = before + seen[-1] // KEYS + 1
                tops = attention_scores(
                    k, heads, query, first, last, k.value(0, I64()), count, keys_of, scores, score_stride, cap
                )
                sinks = (
                    [k.load(F32(), k.pointer(13) + (kv * group + i % group) * 4) for i in row] if heads.sinks else []
                )
                inverse = [
                    softmax_weights(k, scores + score_stride * r, count * (4 * KEYS), tops[r], sinks[r : r + 1])
                    for r in range(rows)
                ]
                with k.loop(0, size, chunk * chunks) as c:
                    sums = [[k.variable(k.value(0.0, F32(chunk))) for _ in range(chunks)] for _ in range(rows)]
                    with k.loop(0, count) as number:
                        where, start, there = block_of(number)
                        value = values + cached + where * block_bytes + c * width
                        with k.loop(0, k.minimum(there, last[-1] - start + 1)) as i:
                            at = value + i * (size * width)
                            v = [heads.load(k, chunk, at + j * chunk * width) for j in range(chunks)]
                            for r in range(rows):
                                weight = k.load(F32(), scores + score_stride * r + (number * KEYS + i) * 4)
                                for j in range(chunks):
                                    sums[r][j].value = k.fma(v[j], weight, sums[r][j].value)
                    for r in range(rows):
                        to = out + place[r] * out_stride + column[r] + c * 4
                        for j in range(chunks):
                            k.store(sums[r][j].value * inverse[r], to + j * chunk * 4)

    return compile_kernel(f"tree_attention_{heads.label}_{rows}", emit)
