"""The forward pass of a dense model of any of `nkat.lm.architectures`, and its KV cache.

Shapes: B sequences, T new tokens, S tokens seen so far, H heads of D elements. The residual stream, norms and RoPE are
computed in float32 (float64 in a float64 model), the linear layers and attention in the layers' dtype. The arithmetic
follows llama.cpp's graphs (https://github.com/ggml-org/llama.cpp, src/models/). Nothing here reads files, and nothing
turns gradients off: callers that only evaluate use `torch.inference_mode()`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nkat.errors import NKATError
from nkat.gguf.formats import dequantise_rows
from nkat.lm.architectures import BLOCK_LINEARS
from nkat.lm.config import ModelConfig, Rope
from nkat.lm.linear import PackedModule, StarLinear
from nkat.theta.algebra import Theta

if TYPE_CHECKING:
    from nkat.kernels.cuda.planes import PackedWeight

_TILE_ELEMENTS = 1 << 22  # logits, or weights, of one vocabulary tile: 16 MB in float32


FIRST_ROOM = 2048  # tokens: most prompts and answers together, so that most caches never grow


def next_room(room: int, needed: int, capacity: int) -> int:
    """Tokens that a cache grows to: twice as many, so that a token is moved once on average."""
    return min(capacity, max(needed, 2 * room))


@contextmanager
def cache_memory(tokens: int) -> Iterator[None]:
    """Says in one line that the memory for so many tokens is not there."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise NKATError(
            f"the KV cache for {tokens} tokens does not fit into the GPU's memory: give fewer (--max-tokens, --seq-len)"
        ) from None
    except (MemoryError, OverflowError, RuntimeError, ValueError):  # no memory, or more bytes than can be counted
        raise NKATError(
            f"there is no memory for a KV cache of {tokens} tokens: give fewer (--max-tokens, --seq-len)"
        ) from None


class KVCache:
    """Keys (after RoPE) and values of every block: [B, H_kv, room, D] each.

    `length` tokens of it are filled. Setting `length` to a smaller value forgets the tokens after it.
    room: tokens that there is memory for: `capacity`, or with `growing` as many as were needed so far, or some more
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        growing: bool = False,
    ) -> None:
        self.batch, self.capacity = batch, capacity
        self.room = min(capacity, FIRST_ROOM) if growing else capacity
        self.length = 0
        shape = (batch, config.kv_head_count, self.room, config.head_dim)
        with cache_memory(self.room):
            self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.block_count)]
            self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.block_count)]

    def check_room(self, batch: int, tokens: int) -> None:
        if batch != self.batch:
            raise NKATError(f"the KV cache was made for {self.batch} sequences, not {batch}")
        if self.length + tokens > self.capacity:
            raise NKATError(
                f"the KV cache holds {self.capacity} tokens; {self.length} are in it and {tokens} more do not fit"
            )
        if self.length + tokens > self.room:
            self._grow(next_room(self.room, self.length + tokens, self.capacity))

    def _grow(self, room: int) -> None:
        """Memory for more tokens, an array at a time, so that no more than one is there twice."""
        with cache_memory(room):
            for arrays in (self.keys, self.values):
                for i, old in enumerate(arrays):
                    arrays[i] = old.new_zeros(*old.shape[:2], room, old.shape[3])
                    arrays[i][:, :, : self.length] = old[:, :, : self.length]
        self.room = room

    def extend(self, block: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes one block's new keys and values behind `length`; returns all of that block's, [B, H_kv, S, D]."""
        end = self.length + k.shape[2]
        self.keys[block][:, :, self.length : end] = k
        self.values[block][:, :, self.length : end] = v
        return self.keys[block][:, :, :end], self.values[block][:, :, :end]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))


class Embedding(PackedModule):
    """Rows of a packed [V, d] table, unpacked one look-up at a time."""

    def repack(self, shared: PackedWeight | None) -> None:
        """Into the layout of the GPU kernels; `shared`: it is the output layer's weight, which is there already."""
        from nkat.kernels.cuda import linear as cuda  # Triton is loaded only where it is used

        self.move_to_kernels(cuda.pack(self.file_bytes, self.qtype, self.shape) if shared is None else shared)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] → float32 [B, T, d]."""
        if self.device_weight is not None:
            from nkat.kernels.cuda import linear as cuda

            return cuda.rows(self.device_weight, tokens.reshape(-1)).view(*tokens.shape, self.shape[1]).float()
        rows = dequantise_rows(self.file_bytes, self.qtype, self.shape, tokens.reshape(-1))
        return rows.view(*tokens.shape, self.shape[1])


def rope_frequencies(rope: Rope, factors: torch.Tensor | None = None) -> torch.Tensor:
    """Radians a position by which each pair turns, float64 [dimensions / 2].

    factors: one divisor a pair (`rope_freqs.weight`, Llama 3.1). YaRN (Peng et al., 2023, arXiv 2309.00071) leaves the
    pairs that turn more than 32 times within the original context as they are, scales those that turn less than once,
    and blends in between.
    """
    half = rope.dimensions // 2
    index = torch.arange(half, dtype=torch.float64)
    frequencies = rope.base ** (-index / half)
    if factors is not None:
        frequencies = frequencies / factors.double().cpu()
    if not rope.yarn:
        return frequencies * rope.scale

    def pair_turning(times: float) -> float:
        return half * math.log(rope.original_context / (times * 2 * math.pi)) / math.log(rope.base)

    low = max(0.0, math.floor(pair_turning(32.0)))
    high = min(rope.dimensions - 1.0, math.ceil(pair_turning(1.0)))
    unscaled = 1.0 - ((index - low) / max(0.001, high - low)).clamp(0.0, 1.0)
    return frequencies * (unscaled + rope.scale * (1.0 - unscaled))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """RoPE of x [B, T, H, D] by cos, sin [T, dimensions / 2]; elements beyond `dimensions` pass unchanged."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    turning, passing = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turning.unflatten(-1, (half, 2)).unbind(-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turning.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return turned if passing.shape[-1] == 0 else torch.cat((turned, passing), dim=-1)


@dataclass(frozen=True, slots=True)
class View:
    """What the blocks of one kind (with or without a sliding window) share in one forward pass.

    cos, sin: [T, dimensions / 2] for the new tokens
    first_key: the first of the S keys that any new token can see
    causal: new token i sees new tokens up to i and there is nothing before them; then mask is None
    mask: bool [T, S - first_key], True where token sees key; None otherwise: everything is seen
    """

    cos: torch.Tensor
    sin: torch.Tensor
    first_key: int
    causal: bool
    mask: torch.Tensor | None


def make_view(
    frequencies: torch.Tensor, magnitude: float, start: int, count: int, window: int, like: torch.Tensor
) -> View:
    """View of `count` tokens at positions start, start + 1, ...; window 0: none. `like` sets dtype and device."""
    positions = torch.arange(start, start + count, device=like.device)
    angles = positions[:, None].double() * frequencies
    cos, sin = (magnitude * angles.cos()).to(like.dtype), (magnitude * angles.sin()).to(like.dtype)
    first_key = max(0, start - window + 1) if window else 0
    if count == 1:
        return View(cos, sin, first_key, False, None)
    if start == 0 and (window == 0 or count <= window):
        return View(cos, sin, first_key, True, None)
    distance = positions[:, None] - torch.arange(first_key, start + count, device=like.device)
    mask = distance >= 0
    if window:
        mask &= distance < window
    return View(cos, sin, first_key, False, mask)


class Block(nn.Module):
    """One transformer block: attention, then the gated feed-forward network, each added to the residual stream."""

    def __init__(
        self, config: ModelConfig, index: int, linears: Mapping[str, StarLinear], norms: Mapping[str, torch.Tensor]
    ) -> None:
        """linears: by name, all of BLOCK_LINEARS; norms: RMS norm weights by GGUF name, its architecture's."""
        super().__init__()
        self.config, self.index = config, index
        self.local = config.local_blocks[index]
        self.linears = nn.ModuleDict({name: linears[name] for name in BLOCK_LINEARS})  # or what stands in for them
        self.norms = nn.ParameterDict({k: nn.Parameter(v, requires_grad=False) for k, v in norms.items()})

    def linear(self, name: str) -> StarLinear:
        """One of BLOCK_LINEARS, not to be asked for while another module stands in for it (`nkat.sources.fit`)."""
        layer = self.linears[name]
        if not isinstance(layer, StarLinear):
            raise TypeError(f"{name} of block {self.index} is a {type(layer).__name__} just now")
        return layer

    def forward(self, x: torch.Tensor, view: View, cache: KVCache | None) -> torch.Tensor:
        """Residual stream [B, T, d] → [B, T, d]."""
        post_norm = self.config.architecture.post_norm
        attended = self._attention(self._norm(x, "attn_norm"), view, cache).to(x.dtype)
        if post_norm:
            attended = self._norm(attended, "post_attention_norm")
        x = x + attended
        fed = self._feed_forward(self._norm(x, "ffn_norm")).to(x.dtype)
        if post_norm:
            fed = self._norm(fed, "post_ffw_norm")
        return x + fed

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.norms[name]
        return F.rms_norm(x, weight.shape, weight, self.config.rms_epsilon)

    def _attention(self, x: torch.Tensor, view: View, cache: KVCache | None) -> torch.Tensor:
        config, linears = self.config, self.linears
        heads = (*x.shape[:2], -1, config.head_dim)
        q, k, v = (linears[name](x).view(heads) for name in ("attn_q", "attn_k", "attn_v"))
        compute_dtype = v.dtype
        q, k = q.to(x.dtype), k.to(x.dtype)
        if config.architecture.qk_norm:
            q, k = self._norm(q, "attn_q_norm"), self._norm(k, "attn_k_norm")
        interleaved = config.rope.interleaved
        q, k = (rotate(t, view.cos, view.sin, interleaved).to(compute_dtype) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.extend(self.index, k, v)
        mixed = F.scaled_dot_product_attention(
            q,
            k[:, :, view.first_key :],
            v[:, :, view.first_key :],
            attn_mask=view.mask,
            is_causal=view.causal,
            scale=config.attention_scale,
            enable_gqa=config.kv_head_count != config.head_count,
        )
        return linears["attn_output"](mixed.transpose(1, 2).flatten(2))

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.linears["ffn_gate"](x), self.linears["ffn_up"](x)
        active = F.gelu(gate, approximate="tanh") if self.config.architecture.gelu else F.silu(gate)
        return self.linears["ffn_down"](active * up)


class Transformer(nn.Module):
    """Token ids → logits. Made by `nkat.lm.load`."""

    blocks: Sequence[Block]  # an nn.ModuleList, whose own type does not say what is in it
    output_norm: torch.Tensor
    frequencies: torch.Tensor
    local_frequencies: torch.Tensor

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        blocks: Iterable[Block],
        output_norm: torch.Tensor,
        output: StarLinear,
        rope_factors: torch.Tensor | None = None,
    ) -> None:
        """output_norm: RMS norm weight [d], in the residual stream's dtype; rope_factors: see rope_frequencies."""
        super().__init__()
        self.config = config
        self.gamma: float | None = None
        self.theta_changes = 0  # how often Θ was replaced: what was made from the old one is then stale
        self.embedding, self.output = embedding, output
        self.add_module("blocks", nn.ModuleList(blocks))
        self.register_buffer("output_norm", output_norm, persistent=False)
        self.register_buffer("frequencies", rope_frequencies(config.rope, rope_factors).to(output_norm.device), False)
        self.register_buffer("local_frequencies", rope_frequencies(config.local_rope).to(output_norm.device), False)

    @property
    def device(self) -> torch.device:
        return self.output_norm.device

    def star_linears(self) -> dict[str, StarLinear]:
        """Every layer that can carry a Θ, by the name of its weight in the file."""
        layers = {
            f"blk.{block.index}.{name}.weight": block.linear(name) for block in self.blocks for name in BLOCK_LINEARS
        }
        return {**layers, "output.weight": self.output}

    def set_gamma(self, gamma: float | None) -> None:
        """Strength of Θ in all layers; None or 1 turns it off. The weights are shared by both arms."""
        self.gamma = gamma
        for layer in self.star_linears().values():
            layer.set_gamma(gamma)

    def set_thetas(self, thetas: Mapping[str, Theta]) -> None:
        """Puts these Θ, by weight name, in place of all that are there. Raises NKATError for a name of no layer.

        The very same ones leave all as it is, so that what was made for them is not stale.
        """
        layers = self.star_linears()
        for name in thetas:
            if name not in layers:
                raise NKATError(f"Θ for {name!r}, but the model has no such linear layer")
        if all(layer.theta is thetas.get(name) for name, layer in layers.items()):
            return
        self.theta_changes += 1
        for name, layer in layers.items():
            layer.set_theta(thetas.get(name))

    def new_cache(self, batch: int, capacity: int, growing: bool = False) -> KVCache:
        """An empty KV cache for `batch` sequences of up to `capacity` tokens, on the model's device.

        growing: it takes memory as the tokens come, and is at another place then
        """
        return KVCache(self.config, batch, capacity, self.output.dtype, self.device, growing)

    def forward(
        self,
        tokens: torch.Tensor,
        cache: KVCache | None = None,
        *,
        logits: Literal["all", "last"] | slice = "all",
        trace: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Token ids [B, T] → logits [B, T', V] in float32 (float64 of a float64 model).

        cache: the tokens continue what is in it, and are added to it
        logits: for which of the T positions
        trace: gets every block's output as "blk.{i}" [B, T, d] and the normalised last one as "output_norm"
        """
        hidden = self.hidden(tokens, cache, trace=trace)
        wanted = {"all": slice(None), "last": slice(-1, None)}[logits] if isinstance(logits, str) else logits
        return self.output(hidden[:, wanted]).to(hidden.dtype)

    def hidden(
        self,
        tokens: torch.Tensor,
        cache: KVCache | None = None,
        *,
        trace: dict[str, torch.Tensor] | None = None,
        recompute: bool = False,
    ) -> torch.Tensor:
        """Token ids [B, T] → normalised output of the last block [B, T, d]: what the output layer multiplies.

        recompute: keep only each block's input for the backward pass, and compute the rest again then (Chen et al.,
        2016, arXiv 1604.06174)
        """
        config = self.config
        batch, count = tokens.shape
        start = 0
        if cache is not None:
            cache.check_room(batch, count)
            start = cache.length
        x = self.embedding(tokens).to(self.output_norm.dtype) * config.embedding_scale
        view = make_view(self.frequencies, config.rope.magnitude, start, count, 0, x)
        local = view
        if any(config.local_blocks):
            local_rope = config.local_rope
            local = make_view(self.local_frequencies, local_rope.magnitude, start, count, config.sliding_window, x)
        for block in self.blocks:
            seen = local if block.local else view
            x = checkpoint(block, x, seen, cache, use_reentrant=False) if recompute else block(x, seen, cache)
            if trace is not None:
                trace[f"blk.{block.index}"] = x
        if cache is not None:
            cache.length += count
        x = F.rms_norm(x, self.output_norm.shape, self.output_norm, config.rms_epsilon)
        if trace is not None:
            trace["output_norm"] = x
        return x

    def nll(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """−ln p(target) in nats for hidden [N, d] and token ids [N]; float32 [N] (float64 of a float64 model).

        The logits are made and reduced in tiles of the vocabulary, so memory does not grow with N·V.
        """
        vocabulary, d = self.output.shape
        tile = max(256, _TILE_ELEMENTS // max(d, len(targets)) // 16 * 16)  # see StarLinear.rows
        total = hidden.new_full(targets.shape, -math.inf)
        chosen = torch.zeros_like(total)
        for start in range(0, vocabulary, tile):
            stop = min(start + tile, vocabulary)
            logits = self.output.rows(hidden, start, stop).to(hidden.dtype)
            total = torch.logaddexp(total, logits.logsumexp(dim=-1))
            inside = (targets >= start) & (targets < stop)
            column = (targets - start).clamp(0, stop - start - 1)
            chosen = torch.where(inside, logits.gather(1, column[:, None])[:, 0], chosen)
        return total - chosen
