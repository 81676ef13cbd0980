"""A transformer as a decode step sees it: operands in a fixed place, the same operations on the same shapes every time.

`decode_step` is the whole step for one token. What runs its operations is `StepOps`: `nkat.kernels.cuda.step.TritonOps`
on a GPU, `TorchOps` here, which is the oracle and runs anywhere. The position is a tensor: Python decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nkat.errors import NKATError
from nkat.kernels.cuda import linear as cuda
from nkat.kernels.cuda import planes
from nkat.kernels.cuda.packing import pack
from nkat.kernels.cuda.planes import PackedWeight, PlaneWeight
from nkat.kernels.cuda.step import Attention, Group, Input, Siblings
from nkat.lm.architectures import QK_NORMS
from nkat.lm.attention import View, attend, capped, query_scales, rotate
from nkat.lm.cache import KVCache
from nkat.lm.config import Turning
from nkat.lm.linear import PackedModule, StarLinear
from nkat.lm.transformer import Block, Embedding, Transformer


class StepOps(Protocol):
    """The operations of a step; `TritonOps` says what each takes and gives."""

    star: bool

    def embed(self, weight: PackedWeight, token: Tensor, scale: float) -> Tensor: ...

    def norm(
        self,
        x: Tensor,
        branch: Tensor | None,
        branch_weight: Tensor | None,
        weight: Tensor | None,
        epsilon: float,
        readers: Siblings,
    ) -> tuple[Tensor, Input]: ...

    def linear(self, siblings: Siblings, x: Input) -> Tensor: ...

    def attend(self, qkv: Tensor, attention: Attention, position: Tensor, readers: Siblings) -> Input: ...

    def activate(self, gate_up: Tensor, gelu: bool, readers: Siblings) -> Input: ...


@dataclass(frozen=True, slots=True, eq=False)
class BlockPlan:
    """Operands of one block; norms that the model does not have are None.

    wide_norms: of the first outputs of `qkv`: of q and of k, all heads together
    """

    attention_norm: Tensor | None
    qkv: Siblings
    wide_norms: tuple[Tensor, ...]
    attention: Attention
    attention_output: Siblings
    post_attention_norm: Tensor | None
    feed_forward_norm: Tensor | None
    gate_up: Siblings
    feed_forward_down: Siblings
    post_feed_forward_norm: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class StarPlace:
    """Where a step reads a layer's Θ: parts of its siblings' `down`, [R, n], and of its group's `up`, [m, R]."""

    layer: StarLinear
    down: Tensor
    up: Tensor

    def fill(self) -> None:
        """Puts in what the layer has now."""
        for place, factor in ((self.down, self.layer.down), (self.up, self.layer.up)):
            place.zero_()
            if factor is not None:
                place[: factor.shape[0], : factor.shape[1]] = factor


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Operands of a step. kappas: float32, the strength of Θ in every layer; siblings hold parts of it."""

    embedding: PackedWeight
    embedding_scale: float
    blocks: tuple[BlockPlan, ...]
    output_norm: Tensor
    output: Siblings
    epsilon: float
    gelu: bool
    logit_cap: float
    kappas: Tensor
    places: tuple[StarPlace, ...]

    @property
    def has_theta(self) -> bool:
        """Whether there is room for any."""
        return bool(self.places)

    def can_follow(self, model: Transformer) -> bool:
        """Whether the Θ that the model has now has a place here."""
        rooms = dict.fromkeys(map(id, _layers(model)), 0)
        return model.fits(rooms | {id(place.layer): place.down.shape[0] // 2 for place in self.places})

    def follow(self, model: Transformer, replaced: bool) -> None:
        """Takes the strength that Θ has now and, where it was replaced, Θ. Raises NKATError for one without a place."""
        if replaced:
            if not self.can_follow(model):
                raise NKATError("Θ was replaced after this decoder was made; make a new one")
            for place in self.places:
                place.fill()
        self.kappas.copy_(strengths(model))


@torch.no_grad()
def make_plan(model: Transformer, cache: KVCache) -> Plan:
    """The plan for one sequence in `cache`. Layers with neighbours of their format are multiplied as one weight.

    Takes the Θ that the layers have now, and their strength. A layer with a `device_weight` gets a part of the joint
    one in its place, so that the weight is in memory once.
    """
    config, architecture = model.config, model.config.architecture
    if not config.has_gpu_step:
        raise NKATError(f"a {architecture.name} model has blocks that a recorded step does not know of")
    kappas = strengths(model).to(model.device)
    numbers = {id(layer): i for i, layer in enumerate(_layers(model))}
    places: list[StarPlace] = []

    def siblings(*members: StarLinear) -> Siblings:
        first = numbers[id(members[0])]
        together = _siblings(members, kappas[first : first + len(members)])
        places.extend(_places(members, together))
        return together

    tables = {turning: _rope_tables(*model.turns(turning, cache.capacity), cache) for turning in Turning}

    warmth = query_scales(config, 0, cache.capacity)
    if warmth is not None:
        warmth = warmth.to(tables[Turning.SEES_ALL][0])

    def plan_block(block: Block) -> BlockPlan:
        norms = {name: weight.data for name, weight in block.norms.items()}
        qk_norms = tuple(norms[name] for name in QK_NORMS if name in norms)
        q_norm, k_norm = qk_norms if architecture.qk_norm else (None, None)
        cos, sin = tables[block.turning]
        attention = Attention(
            heads=config.head_count,
            scale=config.attention_scale,
            window=config.sliding_window if block.local else 0,
            interleaved=config.rope.interleaved,
            epsilon=config.rms_epsilon,
            q_norm=q_norm,
            k_norm=k_norm,
            cos=cos,
            sin=sin,
            keys=cache.keys[block.index][0],
            values=cache.values[block.index][0],
            cap=config.attention_cap,
            warmth=warmth,
        )
        return BlockPlan(
            attention_norm=norms.get("attn_norm"),
            qkv=siblings(*(block.linear(name) for name in block.qkv)),
            wide_norms=qk_norms if architecture.wide_qk_norm else (),
            attention=attention,
            attention_output=siblings(block.linear("attn_output")),
            post_attention_norm=norms.get("post_attention_norm"),
            feed_forward_norm=norms.get("ffn_norm"),
            gate_up=siblings(*(block.linear(name) for name in block.feed_forward[:-1])),
            feed_forward_down=siblings(block.linear("ffn_down")),
            post_feed_forward_norm=norms.get("post_ffw_norm"),
        )

    output = siblings(model.output)
    blocks = tuple(plan_block(block) for block in model.blocks)
    return Plan(
        embedding=_embedding(model.embedding, model.output, output),
        embedding_scale=config.embedding_scale,
        blocks=blocks,
        output_norm=model.output_norm,
        output=output,
        epsilon=config.rms_epsilon,
        gelu=architecture.gelu,
        logit_cap=config.logit_cap,
        kappas=kappas,
        places=tuple(places),
    )


def decode_step(plan: Plan, ops: StepOps, token: Tensor, position: Tensor) -> Tensor:
    """Logits [V] after one token; its key and value go into the cache. token, position: int64 [1]."""
    x = ops.embed(plan.embedding, token, plan.embedding_scale).to(plan.output_norm.dtype)
    branch = branch_norm = None
    for block in plan.blocks:
        x, inputs = ops.norm(x, branch, branch_norm, block.attention_norm, plan.epsilon, block.qkv)
        qkv = _normalised(ops.linear(block.qkv, inputs), block.wide_norms, plan.epsilon)
        mixed = ops.attend(qkv, block.attention, position, block.attention_output)
        attended = ops.linear(block.attention_output, mixed)
        x, inputs = ops.norm(
            x, attended, block.post_attention_norm, block.feed_forward_norm, plan.epsilon, block.gate_up
        )
        active = ops.activate(ops.linear(block.gate_up, inputs), plan.gelu, block.feed_forward_down)
        branch, branch_norm = ops.linear(block.feed_forward_down, active), block.post_feed_forward_norm
    _, inputs = ops.norm(x, branch, branch_norm, plan.output_norm, plan.epsilon, plan.output)
    return capped(ops.linear(plan.output, inputs), plan.logit_cap)


def _normalised(qkv: Tensor, weights: Sequence[Tensor], epsilon: float) -> Tensor:
    """With an RMS norm of each weight's length, one after another; what is left at the end as it is."""
    if not weights:
        return qkv
    lengths = [len(weight) for weight in weights]
    parts = list(qkv.split([*lengths, len(qkv) - sum(lengths)]))
    for i, weight in enumerate(weights):
        parts[i] = F.rms_norm(parts[i], weight.shape, weight, epsilon)
    return torch.cat(parts)


class TorchOps:
    """The operations in plain torch, in the dtype of the residual stream: what `TritonOps` is tested against."""

    def __init__(self, star: bool) -> None:
        self.star = star

    def embed(self, weight: PackedWeight, token: Tensor, scale: float) -> Tensor:
        return weight.dequantise()[token[0]].double() * scale  # rounded once, by whoever reads it

    def norm(
        self,
        x: Tensor,
        branch: Tensor | None,
        branch_weight: Tensor | None,
        weight: Tensor | None,
        epsilon: float,
        readers: Siblings,
    ) -> tuple[Tensor, Input]:
        if branch is not None and branch_weight is not None:
            branch = F.rms_norm(branch, branch.shape, branch_weight, epsilon)
        x = x if branch is None else x + branch
        return x, self._input(x if weight is None else F.rms_norm(x, x.shape, weight, epsilon), readers)

    def linear(self, siblings: Siblings, x: Input) -> Tensor:
        parts = []
        for group in siblings.groups:
            bias = None if group.bias is None else group.bias.to(x.natural.dtype)
            y = F.linear(x.natural, group.weight.dequantise().to(x.natural.dtype), bias)
            if self.star and group.up is not None and x.inner is not None:
                ends = (0, *group.segments, len(y))
                for i, (start, stop) in enumerate(pairwise(ends)):
                    segment = group.first_segment + i
                    inner = x.inner[segment, 0].sum(dim=0)
                    term = siblings.kappas[segment] * F.linear(inner, group.up[start:stop].to(inner.dtype))
                    y[start:stop] = torch.where(siblings.kappas[segment] == 0.0, y[start:stop], y[start:stop] + term)
            parts.append(y)
        return torch.cat(parts)

    def attend(self, qkv: Tensor, attention: Attention, position: Tensor, readers: Siblings) -> Input:
        kv_heads, capacity, head_dim = attention.keys.shape
        q, k, v = qkv.view(-1, head_dim).split((attention.heads, kv_heads, kv_heads))
        if attention.q_norm is not None:
            q = F.rms_norm(q, (head_dim,), attention.q_norm, attention.epsilon)
            k = F.rms_norm(k, (head_dim,), attention.k_norm, attention.epsilon)
        cos, sin = attention.cos[position].to(q.dtype), attention.sin[position].to(q.dtype)
        q, k = (rotate(t[None, None], cos, sin, attention.interleaved)[0, 0] for t in (q, k))
        if attention.warmth is not None:
            q = q * attention.warmth[position].to(q.dtype)
        attention.keys.index_copy_(1, position, k[:, None].to(attention.keys.dtype))
        attention.values.index_copy_(1, position, v[:, None].to(attention.values.dtype))
        distance = position - torch.arange(capacity, device=q.device)
        seen = distance >= 0
        if attention.window:
            seen &= distance < attention.window
        mixed = attend(
            q.to(attention.keys.dtype)[None, :, None],
            attention.keys[None],
            attention.values[None],
            View(cos, sin, 0, False, seen[None]),
            attention.scale,
            attention.cap,
        )
        return self._input(mixed.reshape(-1).to(qkv.dtype), readers)

    def activate(self, gate_up: Tensor, gelu: bool, readers: Siblings) -> Input:
        gate, up = gate_up.chunk(2)
        return self._input((F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up, readers)

    def _input(self, x: Tensor, readers: Siblings) -> Input:
        inner = None
        if self.star and readers.down is not None:
            inner = F.linear(x, readers.down.to(x.dtype)).view(-1, 1, 1, readers.rank)
        return Input(x, x, inner)


def strengths(model: Transformer) -> Tensor:
    """κ of every layer in the order of `Plan.kappas`, 0 of those without Θ, float32, on the CPU."""
    kappas = [0.0 if layer.down is None else layer.kappa for layer in _layers(model)]
    return torch.tensor(kappas, dtype=torch.float32)


def _layers(model: Transformer) -> list[StarLinear]:
    return list(model.star_linears().values())


def _rope_tables(frequencies: Tensor, magnitude: float, cache: KVCache) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position in the cache, [capacity, pairs]; float32, float64 for a float64 cache."""
    angles = torch.arange(cache.capacity, device=frequencies.device)[:, None].double() * frequencies
    dtype = torch.float64 if cache.keys[0].dtype == torch.float64 else torch.float32
    return (magnitude * angles.cos()).to(dtype), (magnitude * angles.sin()).to(dtype)


def _weight(module: PackedModule) -> PackedWeight:
    on_device = module.device_weight
    return pack(module.file_bytes, module.qtype, module.shape) if on_device is None else on_device


def _embedding(embedding: Embedding, output: StarLinear, packed_output: Siblings) -> PackedWeight:
    """The output layer's weight where the embedding is the same."""
    if embedding.device_weight is None and embedding.file_bytes.data_ptr() == output.file_bytes.data_ptr():
        return packed_output.groups[0].weight
    return _weight(embedding)


def _siblings(layers: Sequence[StarLinear], kappas: Tensor) -> Siblings:
    weights = [_weight(layer) for layer in layers]
    rank = max(layer.terms for layer in layers)
    groups, first = [], 0
    while first < len(layers):
        count, joint = _joined(weights[first:])
        groups.append(_group(layers[first : first + count], joint, rank, first))
        first += count
    return Siblings(
        groups=tuple(groups),
        inputs=layers[0].shape[1],
        outputs=sum(layer.shape[0] for layer in layers),
        rank=rank,
        down=torch.zeros(len(layers) * rank, layers[0].shape[1], dtype=layers[0].dtype, device=kappas.device)
        if rank
        else None,
        kappas=kappas,
    )


def _joined(weights: Sequence[PackedWeight]) -> tuple[int, PackedWeight]:
    """How many of the weights, from the first on, the kernel can do as segments of one; and that one."""
    together: list[PlaneWeight] = []
    rows = 0
    for weight in weights:
        if not isinstance(weight, PlaneWeight) or weight.qtype != weights[0].qtype or rows % cuda.MAX_BLOCK_ROWS:
            break
        together.append(weight)
        rows += weight.shape[0]
    return (len(together), planes.concatenate(together)) if len(together) > 1 else (1, weights[0])


def _group(layers: Sequence[StarLinear], joint: PackedWeight, rank: int, first: int) -> Group:
    rows = [layer.shape[0] for layer in layers]
    ends = [sum(rows[: i + 1]) for i in range(len(rows))]
    for layer, start, stop in zip(layers, [0, *ends], ends, strict=False):
        if layer.device_weight is not None:
            layer.device_weight = joint.rows(start, stop)
    device = joint.device
    bias = None
    if any(layer.bias is not None for layer in layers):
        biases = [torch.zeros(layer.shape[0]) if layer.bias is None else layer.bias for layer in layers]
        bias = torch.cat([bias.to(device, layers[0].dtype) for bias in biases])
    up = torch.zeros(ends[-1], rank, dtype=layers[0].dtype, device=device) if rank else None
    return Group(joint, bias, up, first, tuple(ends[:-1]))


def _places(layers: Sequence[StarLinear], siblings: Siblings) -> Iterator[StarPlace]:
    """Where each of the siblings' Θ is read, with what it has now put in."""
    if siblings.down is None:
        return
    downs = iter(siblings.down.split(siblings.rank))
    ups = [part for group in siblings.groups for part in _parts(group)]
    for layer, down, up in zip(layers, downs, ups, strict=True):
        place = StarPlace(layer, down, up)
        place.fill()
        yield place


def _parts(group: Group) -> Sequence[Tensor]:
    """`up` of each of a group's layers."""
    assert group.up is not None
    return group.up.tensor_split(group.segments)
