"""Triton kernels over the planes of `nkat.kernels.cuda.planes`: packed weight × x with bias and star term, and rows.

An integer q in place in a 32-bit word *is* a float32: q·2^(p − 149) for q at bit p, as long as its bits are below 24.
So a weight costs one AND and one fused multiply-add, the power of two goes into x, and nothing is rounded. These
numbers are subnormal: GPUs multiply those at full speed, and a test reads the compiler's output to see that it does not
flush them to zero.

`part` counts slices of x: what `down @ x` leaves is one partial sum a slice, added up here, where the loads are free.
Nothing here checks its arguments; `nkat.kernels.cuda.linear` launches.
"""

from __future__ import annotations

from nkat.kernels.cuda.triton import jit, tl


@jit
def permuted(k, chunks):
    """Where the vector kernel expects x[k]: [f, b, chunk, j], so that a warp's loads of x are contiguous."""
    return ((k // 16 % 2 * 4 + k % 4) * chunks + k // 32) * 4 + k // 4 % 4


@jit
def _load(pointers, mask):
    """Zero where masked: what lies there must not turn 0·x into NaN."""
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0)


@jit
def _load_low(low_ptr, row, w, chunk, f: tl.constexpr, mask, w_mask, bits: tl.constexpr, shape: tl.constexpr):
    """The words with the low bits of field f, in `shape` [..., chunk, j], or [..., chunk, 1] of the plane of 2 bits.

    row: the rows' first chunks, [..., 1]; w = 4·chunk + j counts from there, [..., 4·chunks], so that what a thread
    loads is in one dimension: Triton versions differ in how they spread threads over several.
    """
    if bits == 8:
        words = tl.reshape(_load(low_ptr + row * 8 + (w // 4 * 8 + f * 4 + w % 4), w_mask), shape)
    elif bits >= 4:
        words = tl.reshape(_load(low_ptr + row * 4 + w, w_mask), shape)
    else:
        words = (_load(low_ptr + chunk, mask) >> (32 * f)).to(tl.int32)
    return words


@jit
def _load_high(high_ptr, chunk, mask, bits: tl.constexpr):
    """The words with the bits above those of the first plane; for formats of one plane some number."""
    return _load(high_ptr + chunk, mask) if bits == 3 or bits == 5 or bits == 6 else 0


@jit
def _quads(low, high, f: tl.constexpr, j, bits: tl.constexpr):
    """Four q in the bytes of a word: those of field f, from the planes' words.

    Of 4 bits both fields stay where they are: `_value` picks.
    """
    if bits == 8 or bits == 4:
        quads = low
    elif bits > 4:
        quads = (low >> (4 * f)) & 0x0F0F0F0F
    else:
        quads = (low >> (2 * j)) & 0x03030303
    if bits == 3:
        quads |= ((high >> (4 * f + j)) & 0x01010101) << 2
    elif bits == 5:
        quads |= ((high >> (4 * f + j)) & 0x01010101) << 4
    elif bits == 6:
        quads |= (((high >> (32 * f)).to(tl.int32) >> (2 * j)) & 0x03030303) << 4
    return quads


@jit
def _load_factors(d_ptr, s_ptr, chunk, mask, scales: tl.constexpr):
    """d (two float16 in 32 bits for the kinds with two) and s of each chunk."""
    if scales == "half" or scales == "pair":
        d, s = _load(d_ptr + chunk, mask), 0
    else:
        d, s = _load(d_ptr + chunk // 8, mask), _load(s_ptr + chunk, mask).to(tl.int32)
    return d, s


@jit
def _float16(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def _scale(d, s, f: tl.constexpr, scales: tl.constexpr):
    """Scale of field f, float32."""
    if scales == "half":
        scale = d.to(tl.float32)
    elif scales == "pair":
        scale = _float16(d & 0xFFFF)
    elif scales == "k32":
        scale = _float16(d & 0xFFFF) * (s & 0xFF).to(tl.float32)
    elif scales == "k16":
        scale = _float16(d & 0xFFFF) * ((s >> (8 * f)) & 0x0F).to(tl.float32)
    elif scales == "s16":
        scale = d.to(tl.float32) * ((s << (24 - 8 * f)) >> 24).to(tl.float32)
    else:
        scale = d.to(tl.float32) * s.to(tl.float32)
    return scale


@jit
def _offset(d, s, scale, f: tl.constexpr, scales: tl.constexpr, zero: tl.constexpr):
    """Offset of field f, float32."""
    if scales == "pair":
        offset = _float16(d >> 16)
    elif scales == "k32":
        offset = -_float16(d >> 16) * ((s >> 8) & 0xFF).to(tl.float32)
    elif scales == "k16":
        offset = -_float16(d >> 16) * ((s >> (8 * f + 4)) & 0x0F).to(tl.float32)
    else:
        offset = scale * -zero
    return offset


@jit
def _lift(b: tl.constexpr, f: tl.constexpr, bits: tl.constexpr, levels: tl.constexpr):
    """What a `_value` has to be multiplied by, and by `_rest` besides: together 2^149 less its place in the word."""
    return 1.0 if levels else 2.0 ** (80 - 8 * min(b, 2) - (4 * f if bits == 4 else 0))


@jit
def _rest(levels: tl.constexpr):
    return 1.0 if levels else 2.0**69


@jit
def _value(quads, b: tl.constexpr, f: tl.constexpr, levels_ptr, bits: tl.constexpr, levels: tl.constexpr):
    """The q of field f in byte b of each word as float32: times a tiny power of two, or its entry in the table."""
    mask = 0x0F << (4 * f) if bits == 4 else 0xFF
    if levels:
        value = tl.load(levels_ptr + ((quads >> (8 * b + 4 * f)) & 0x0F))
    elif b == 3:  # bits 24 and up would be the exponent
        value = ((quads >> 8) & (mask << 16)).to(tl.float32, bitcast=True)
    else:
        value = (quads & (mask << (8 * b))).to(tl.float32, bitcast=True)
    return value


@jit
def vector_kernel(
    y_ptr,
    x_ptr,
    low_ptr,
    high_ptr,
    d_ptr,
    s_ptr,
    levels_ptr,
    bias_ptr,
    up_ptr,
    inner_ptr,
    kappa_ptr,
    rows,
    chunks,
    first_row,
    second_segment,
    third_segment,
    bits: tl.constexpr,
    zero: tl.constexpr,
    scales: tl.constexpr,
    levels: tl.constexpr,
    batch: tl.constexpr,
    block_rows: tl.constexpr,
    block_chunks: tl.constexpr,
    even: tl.constexpr,
    has_bias: tl.constexpr,
    rank: tl.constexpr,
    parts: tl.constexpr,
    star_columns: tl.constexpr,
):
    """y [batch, rows] = W x + bias + κ up inner for few x: every weight is read once and used `batch` times.

    x: float32 [batch, 32·chunks], each row in the order of `permuted`
    up: [rows, rank]; inner: float32 [segments, batch, parts, rank]; rank 0: no star term
    kappa: float32 [segments]; rows from second_segment and third_segment on are of the next one. Where it is 0, y is
           what it would be without a star term.
    block_rows divides the segments; star_columns: parts·rank, rounded up to a power of two
    """
    own = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    row = tl.minimum(own, rows - 1)
    if rank > 0:  # loaded first, used last
        start = tl.program_id(0) * block_rows
        segment = (start >= second_segment).to(tl.int32) + (start >= third_segment).to(tl.int32)
        kappa = tl.load(kappa_ptr + segment)
        column = tl.arange(0, star_columns)
        present = column < parts * rank
        inner_at = (segment * batch + tl.arange(0, batch)[:, None, None]) * (parts * rank) + column[None, None, :]
        inner = tl.load(inner_ptr + inner_at, mask=present[None, None, :], other=0.0)
        up_at = row[None, :, None] * rank + (column % rank)[None, None, :]
        up = tl.load(up_ptr + up_at, mask=present[None, None, :], other=0.0).to(tl.float32)

    # [batch, row, chunk, j]: a thread holds whole chunks, of several rows, so that it loads an x once for all of them
    i = tl.arange(0, batch)[:, None, None]
    j = tl.arange(0, 4)[None, None, None, :]
    first = (first_row + row) * chunks
    total = tl.zeros([batch, block_rows, block_chunks, 1], tl.float32)
    for start in range(0, chunks, block_chunks):
        c = (start + tl.arange(0, block_chunks))[None, None, :, None]
        w = (start * 4 + tl.arange(0, block_chunks * 4))[None, None, :]
        mask = None if even else c < chunks
        w_mask = None if even else w < chunks * 4
        # What there is one of a chunk is loaded by the thread that holds the chunk. If Triton took the addresses for
        # aligned, it would load several at once and pass them around through shared memory.
        chunk = tl.multiple_of(first[None, :, None, None] + c, [1, 1, 1, 1])
        d, s = _load_factors(d_ptr, s_ptr, chunk, mask, scales)
        high = _load_high(high_ptr, chunk, mask, bits)
        for f in tl.static_range(2):
            if f == 0 or bits < 4 or bits == 8:
                low = _load_low(
                    low_ptr, first[None, :, None], w, chunk, f, mask, w_mask, bits, [1, block_rows, block_chunks, 4]
                )
            quads = _quads(low, high, f, j, bits)
            products = tl.zeros([batch, block_rows, block_chunks, 4], tl.float32)
            sums = tl.zeros([batch, 1, block_chunks, 4], tl.float32)
            for b in tl.static_range(4):
                x = _load(x_ptr + i * (chunks * 32) + (f * 4 + b) * chunks * 4 + w, w_mask)
                x = tl.reshape(x, [batch, 1, block_chunks, 4])
                products += _value(quads, b, f, levels_ptr, bits, levels) * (x * _lift(b, f, bits, levels))
                sums += x
            scale = _scale(d, s, f, scales)
            offset = _offset(d, s, scale, f, scales, zero)
            total += (scale * _rest(levels)) * tl.sum(products, axis=3, keep_dims=True)
            total += offset * tl.sum(sums, axis=3, keep_dims=True)
    y = tl.sum(tl.sum(total, axis=3), axis=2)
    if has_bias:
        y += tl.load(bias_ptr + row)[None, :].to(tl.float32)
    if rank > 0 and kappa != 0.0:
        y += kappa * tl.sum(up * inner, axis=2)
    tl.store(y_ptr + tl.arange(0, batch)[:, None] * rows + own[None, :], y, mask=(own < rows)[None, :])


@jit
def matrix_kernel(
    y_ptr,
    x_ptr,
    low_ptr,
    high_ptr,
    d_ptr,
    s_ptr,
    levels_ptr,
    bias_ptr,
    up_ptr,
    inner_ptr,
    kappa_ptr,
    rows,
    chunks,
    first_row,
    tokens,
    bits: tl.constexpr,
    zero: tl.constexpr,
    scales: tl.constexpr,
    levels: tl.constexpr,
    block_rows: tl.constexpr,
    block_tokens: tl.constexpr,
    block_chunks: tl.constexpr,
    even: tl.constexpr,
    has_bias: tl.constexpr,
    rank: tl.constexpr,
    padded_rank: tl.constexpr,
):
    """y [tokens, rows] = x Wᵀ + bias + κ inner upᵀ on tensor cores: x's type (bfloat16 or float16) in, float32 sums.

    x: [tokens, 32·chunks] in its natural order; up [rows, rank], inner float32 [tokens, rank], kappa float32 [1]
    """
    own = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    row = tl.minimum(own, rows - 1)
    token = (tl.program_id(1) * block_tokens + tl.arange(0, block_tokens)).to(tl.int64)  # tokens·rows can be large
    j = tl.arange(0, 4)[None, None, :]
    inside = tl.arange(0, block_chunks * 16)  # the weights of one field of all chunks
    first = (first_row + row) * chunks
    total = tl.zeros([block_rows, block_tokens], tl.float32)
    for start in range(0, chunks, block_chunks):
        c = (start + tl.arange(0, block_chunks))[None, :, None]
        w = (start * 4 + tl.arange(0, block_chunks * 4))[None, :]
        mask = None if even else c < chunks
        w_mask = None if even else w < chunks * 4
        chunk = first[:, None, None] + c
        d, s = _load_factors(d_ptr, s_ptr, chunk, mask, scales)
        high = _load_high(high_ptr, chunk, mask, bits)
        for f in tl.static_range(2):
            if f == 0 or bits < 4 or bits == 8:
                low = _load_low(low_ptr, first[:, None], w, chunk, f, mask, w_mask, bits, [block_rows, block_chunks, 4])
            quads = _quads(low, high, f, j, bits)
            scale = _scale(d, s, f, scales)
            weight = _weights(quads, scale, _offset(d, s, scale, f, scales, zero), f, levels_ptr, bits, levels)
            weight = tl.reshape(weight.to(x_ptr.dtype.element_ty), [block_rows, block_chunks * 16])
            k = start * 32 + inside // 16 * 32 + f * 16 + inside % 16
            x_mask = token[:, None] < tokens if even else (token[:, None] < tokens) & (k[None, :] < chunks * 32)
            x = tl.load(x_ptr + token[:, None] * (chunks * 32) + k[None, :], mask=x_mask, other=0.0)
            total = tl.dot(weight, tl.trans(x), total)
    if has_bias:
        total += tl.load(bias_ptr + row)[:, None].to(tl.float32)
    if rank > 0:
        kappa = tl.load(kappa_ptr)
        if kappa != 0.0:
            r = tl.arange(0, padded_rank)
            up = tl.load(up_ptr + row[:, None] * rank + r[None, :], mask=r[None, :] < rank, other=0.0)
            inner_mask = (token[:, None] < tokens) & (r[None, :] < rank)
            inner = tl.load(inner_ptr + token[:, None] * rank + r[None, :], mask=inner_mask, other=0.0)
            total += kappa * tl.dot(up.to(tl.float32), tl.trans(inner))
    y_mask = (own[:, None] < rows) & (token[None, :] < tokens)
    tl.store(y_ptr + token[None, :] * rows + own[:, None], total.to(y_ptr.dtype.element_ty), mask=y_mask)


@jit
def _weights(quads, scale, offset, f: tl.constexpr, levels_ptr, bits: tl.constexpr, levels: tl.constexpr):
    """The weights of field f, float32 [..., j, 2, 2]: the last two dimensions are b."""
    scale = scale * _rest(levels)
    w0 = _value(quads, 0, f, levels_ptr, bits, levels) * _lift(0, f, bits, levels) * scale + offset
    w1 = _value(quads, 1, f, levels_ptr, bits, levels) * _lift(1, f, bits, levels) * scale + offset
    w2 = _value(quads, 2, f, levels_ptr, bits, levels) * _lift(2, f, bits, levels) * scale + offset
    w3 = _value(quads, 3, f, levels_ptr, bits, levels) * _lift(3, f, bits, levels) * scale + offset
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@jit
def rows_kernel(
    out_ptr,
    ids_ptr,
    low_ptr,
    high_ptr,
    d_ptr,
    s_ptr,
    levels_ptr,
    chunks,
    first_row,
    bits: tl.constexpr,
    zero: tl.constexpr,
    scales: tl.constexpr,
    levels: tl.constexpr,
    block_chunks: tl.constexpr,
):
    """out float32 [ids, 32·chunks]: the rows of W that `ids` (int64) names. A program does some chunks of one row."""
    first = (first_row + tl.load(ids_ptr + tl.program_id(0)).to(tl.int32)) * chunks
    start = tl.program_id(1) * block_chunks
    c = (start + tl.arange(0, block_chunks))[:, None]
    w = start * 4 + tl.arange(0, block_chunks * 4)
    j = tl.arange(0, 4)[None, :]
    mask = c < chunks
    chunk = first + c
    d, s = _load_factors(d_ptr, s_ptr, chunk, mask, scales)
    high = _load_high(high_ptr, chunk, mask, bits)
    for f in tl.static_range(2):
        low = _load_low(low_ptr, first, w, chunk, f, mask, w < chunks * 4, bits, [block_chunks, 4])
        scale = _scale(d, s, f, scales)
        offset = _offset(d, s, scale, f, scales, zero)
        weight = _weights(_quads(low, high, f, j, bits), scale, offset, f, levels_ptr, bits, levels)
        at = tl.program_id(0).to(tl.int64) * chunks * 32 + c * 32 + f * 16 + tl.arange(0, 16)[None, :]
        tl.store(out_ptr + at, tl.reshape(weight, [block_chunks, 16]), mask=mask)
