"""Triton kernels of a decode step besides the multiplications: norms, attention with RoPE and cache, activation.

One token, one sequence, float32 between the kernels. What a step waits for is launches and memory, so a kernel does all
that fits between two multiplications. Those that make a multiplication's input write it twice, in natural and in
`permuted` order, and with Θ also `down @ x` of the part that they made: one row of `inner` a program.
"""

from __future__ import annotations

from nkat.kernels.cuda.matmul import permuted
from nkat.kernels.cuda.triton import jit, tl


@jit
def _write(
    x,
    k,
    mask,
    part,
    parts,
    size,
    natural_ptr,
    permuted_ptr,
    down_ptr,
    inner_ptr,
    columns: tl.constexpr,
    padded_columns: tl.constexpr,
    rank: tl.constexpr,
):
    """x at k of the next multiplication's input of `size`; down: [columns, size], columns = segments·rank or 0."""
    tl.store(natural_ptr + k, x, mask=mask)
    # Only weights in blocks of 32 are multiplied in that order; a broken block has no place in it.
    tl.store(permuted_ptr + permuted(k, size // 32), x, mask=mask & (k < size // 32 * 32))
    if columns > 0:
        column = tl.arange(0, padded_columns)
        down_mask = (column[:, None] < columns) & mask[None, :]
        down = tl.load(down_ptr + column[:, None] * size + k[None, :], mask=down_mask, other=0.0).to(tl.float32)
        inner = tl.sum(down * tl.where(mask, x, 0.0)[None, :], axis=1)
        at = (column // rank * parts + part) * rank + column % rank
        tl.store(inner_ptr + at, inner, mask=column < columns)


@jit
def norm_kernel(
    x_ptr,
    branch_ptr,
    branch_weight_ptr,
    weight_ptr,
    sum_ptr,
    natural_ptr,
    permuted_ptr,
    down_ptr,
    inner_ptr,
    size,
    epsilon,
    has_branch: tl.constexpr,
    branch_norm: tl.constexpr,
    has_norm: tl.constexpr,
    width: tl.constexpr,
    slice_width: tl.constexpr,
    columns: tl.constexpr,
    padded_columns: tl.constexpr,
    rank: tl.constexpr,
):
    """sum = x + branch, or x + the branch's RMS norm; then the RMS norm of that, or itself. All [size], width >= size.

    Every program needs the sum of all squares and finds it itself; it writes only its slice.
    """
    k = tl.arange(0, width)
    x = tl.load(x_ptr + k, mask=k < size, other=0.0)
    own = tl.program_id(0) * slice_width + tl.arange(0, slice_width)
    mask = own < size
    x_own = tl.load(x_ptr + own, mask=mask, other=0.0)
    if has_branch:
        branch = tl.load(branch_ptr + k, mask=k < size, other=0.0)
        branch_own = tl.load(branch_ptr + own, mask=mask, other=0.0)
        if branch_norm:
            inverse = tl.rsqrt(tl.sum(branch * branch, axis=0) / size + epsilon)
            branch *= inverse * tl.load(branch_weight_ptr + k, mask=k < size, other=0.0)
            branch_own *= inverse * tl.load(branch_weight_ptr + own, mask=mask, other=0.0)
        x += branch
        x_own += branch_own
        tl.store(sum_ptr + own, x_own, mask=mask)
    y = x_own
    if has_norm:
        inverse = tl.rsqrt(tl.sum(x * x, axis=0) / size + epsilon)
        y = x_own * inverse * tl.load(weight_ptr + own, mask=mask, other=0.0)
    _write(
        y,
        own,
        mask,
        tl.program_id(0),
        tl.num_programs(0),
        size,
        natural_ptr,
        permuted_ptr,
        down_ptr,
        inner_ptr,
        columns,
        padded_columns,
        rank,
    )


@jit
def activation_kernel(
    gate_up_ptr,
    natural_ptr,
    permuted_ptr,
    down_ptr,
    inner_ptr,
    size,
    gelu: tl.constexpr,
    slice_width: tl.constexpr,
    columns: tl.constexpr,
    padded_columns: tl.constexpr,
    rank: tl.constexpr,
):
    """activation(gate) · up for gate_up [2·size]: SiLU or tanh GELU."""
    own = tl.program_id(0) * slice_width + tl.arange(0, slice_width)
    mask = own < size
    gate = tl.load(gate_up_ptr + own, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + size + own, mask=mask, other=0.0)
    # ½(1 + tanh z) = 1/(1 + exp(-2z))
    exponent = -1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if gelu else -gate
    y = gate / (1.0 + tl.exp(exponent)) * up
    _write(
        y,
        own,
        mask,
        tl.program_id(0),
        tl.num_programs(0),
        size,
        natural_ptr,
        permuted_ptr,
        down_ptr,
        inner_ptr,
        columns,
        padded_columns,
        rank,
    )


@jit
def _rotated(
    head_ptr,
    d,
    mask,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    epsilon,
    head_dim: tl.constexpr,
    half: tl.constexpr,
    interleaved: tl.constexpr,
    has_norm: tl.constexpr,
):
    """Heads [heads, d] after their norm and RoPE; head_ptr [heads, 1] points at them, cos_ptr at this position's."""
    if interleaved:
        pair, partner, first = d // 2, d ^ 1, d % 2 == 0
    else:
        pair, partner, first = d % half, tl.where(d < half, d + half, d - half), d < half
    turning = d < 2 * half
    partner = tl.where(turning, partner, d)
    x = tl.load(head_ptr + d, mask=mask, other=0.0)
    other = tl.load(head_ptr + partner, mask=mask, other=0.0)
    if has_norm:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / head_dim + epsilon)
        x *= inverse * tl.load(weight_ptr + d, mask=d < head_dim, other=0.0)
        other *= inverse * tl.load(weight_ptr + partner, mask=d < head_dim, other=0.0)
    cos = tl.load(cos_ptr + pair, mask=turning, other=1.0)
    sin = tl.load(sin_ptr + pair, mask=turning, other=0.0)
    return x * cos + tl.where(first, -other, other) * sin


@jit
def _capped(x, cap):
    """c·tanh(x/c) = c − 2c/(exp(2x/c) + 1)"""
    return cap - 2.0 * cap / (tl.exp(2.0 * x / cap) + 1.0)


@jit
def attention_kernel(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    warmth_ptr,
    keys_ptr,
    values_ptr,
    position_ptr,
    mixed_ptr,
    peak_ptr,
    mass_ptr,
    capacity,
    window,
    scale,
    epsilon,
    cap,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,
    interleaved: tl.constexpr,
    has_norm: tl.constexpr,
    has_cap: tl.constexpr,
    has_warmth: tl.constexpr,
    splits: tl.constexpr,
    padded_group: tl.constexpr,
    padded_dim: tl.constexpr,
    block_keys: tl.constexpr,
):
    """One key head and the query heads that use it, over one of `splits` parts of the keys before the new one.

    qkv: float32 [(heads + 2·kv_heads)·head_dim] before norm and RoPE. The first part also takes the new key and value
    and writes them at `position` (int64 [1]) of keys and values [kv_heads, capacity, head_dim].
    cos, sin: [capacity, half]; window 0: none; warmth: [capacity], multiplies the queries; scores within ±cap
    mixed [splits, heads, head_dim], peak and mass [splits, heads]: Σ exp(score − peak)·value, the largest score and
    Σ exp(score − peak); a part without keys has peak −inf and mass 0.
    """
    kv, split = tl.program_id(0), tl.program_id(1)
    group: tl.constexpr = heads // kv_heads
    position = tl.load(position_ptr).to(tl.int32)
    d = tl.arange(0, padded_dim)[None, :]
    d_mask = d < head_dim
    g = tl.arange(0, padded_group)[:, None]
    cos_ptr += position * half
    sin_ptr += position * half
    q = _rotated(
        qkv_ptr + (kv * group + g) * head_dim,
        d,
        (g < group) & d_mask,
        q_norm_ptr,
        cos_ptr,
        sin_ptr,
        epsilon,
        head_dim,
        half,
        interleaved,
        has_norm,
    )
    if has_warmth:
        q *= tl.load(warmth_ptr + position)
    one = tl.arange(0, 1)[:, None]
    new_k = _rotated(
        qkv_ptr + (heads + kv + one) * head_dim,
        d,
        d_mask,
        k_norm_ptr,
        cos_ptr,
        sin_ptr,
        epsilon,
        head_dim,
        half,
        interleaved,
        has_norm,
    )
    new_v = tl.load(qkv_ptr + (heads + kv_heads + kv) * head_dim + d, mask=d_mask, other=0.0)
    kind = keys_ptr.dtype.element_ty
    q, new_k, new_v = q.to(kind), new_k.to(kind), new_v.to(kind)

    cache = kv.to(tl.int64) * capacity * head_dim  # 32 heads of 128 pass 2³¹ elements at 524288 tokens
    if split == 0:
        tl.store(keys_ptr + cache + position * head_dim + d, new_k, mask=d_mask)
        tl.store(values_ptr + cache + position * head_dim + d, new_v, mask=d_mask)
    own_score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), axis=1) * scale
    if has_cap:
        own_score = _capped(own_score, cap)
    peak = tl.where(split == 0, own_score, float("-inf"))
    mass = tl.where(split == 0, tl.full([padded_group], 1.0, tl.float32), 0.0)
    mixed = tl.where(split == 0, new_v.to(tl.float32) + tl.zeros([padded_group, padded_dim], tl.float32), 0.0)

    first = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
    share = tl.cdiv(tl.cdiv(position - first, splits), block_keys) * block_keys
    begin = first + split * share
    end = tl.minimum(begin + share, position)
    for start in range(begin, end, block_keys):
        key = start + tl.arange(0, block_keys)
        at = cache + key[:, None] * head_dim + d
        mask = (key[:, None] < end) & d_mask
        k = tl.load(keys_ptr + at, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if has_cap:
            scores = _capped(scores, cap)
        scores = tl.where(key[None, :] < end, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        shrink = tl.exp(peak - higher)
        weights = tl.exp(scores - higher[:, None])
        v = tl.load(values_ptr + at, mask=mask, other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(kind), v, input_precision="ieee")
        mass = mass * shrink + tl.sum(weights, axis=1)
        peak = higher

    head = split * heads + kv * group + tl.arange(0, padded_group)
    head_mask = tl.arange(0, padded_group) < group
    tl.store(peak_ptr + head, peak, mask=head_mask)
    tl.store(mass_ptr + head, mass, mask=head_mask)
    tl.store(mixed_ptr + head[:, None] * head_dim + d, mixed, mask=head_mask[:, None] & d_mask)


@jit
def combine_kernel(
    mixed_ptr,
    peak_ptr,
    mass_ptr,
    natural_ptr,
    permuted_ptr,
    down_ptr,
    inner_ptr,
    size,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    splits: tl.constexpr,
    padded_splits: tl.constexpr,
    padded_dim: tl.constexpr,
    columns: tl.constexpr,
    padded_columns: tl.constexpr,
    rank: tl.constexpr,
):
    """One head of the attention's result from its parts."""
    head = tl.program_id(0)
    split = tl.arange(0, padded_splits)
    d = tl.arange(0, padded_dim)
    present = split < splits
    peak = tl.load(peak_ptr + split * heads + head, mask=present, other=float("-inf"))
    weight = tl.exp(peak - tl.max(peak, axis=0))
    mass = tl.sum(weight * tl.load(mass_ptr + split * heads + head, mask=present, other=0.0), axis=0)
    mask = present[:, None] & (d < head_dim)[None, :]
    mixed = tl.load(mixed_ptr + (split * heads + head)[:, None] * head_dim + d[None, :], mask=mask, other=0.0)
    y = tl.sum(weight[:, None] * mixed, axis=0) / mass
    _write(
        y,
        head * head_dim + d,
        d < head_dim,
        head,
        heads,
        size,
        natural_ptr,
        permuted_ptr,
        down_ptr,
        inner_ptr,
        columns,
        padded_columns,
        rank,
    )
