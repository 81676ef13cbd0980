"""The forward pass of a model of any of `nkat.lm.architectures`, and its KV cache.

Shapes: B sequences, T new tokens, S tokens seen so far, H heads of D elements. The residual stream, norms and RoPE are
computed in float32 (float64 in a float64 model), the linear layers and attention in the layers' dtype. The arithmetic
follows llama.cpp's graphs (https://github.com/ggml-org/llama.cpp, src/models/). Nothing here reads files, and nothing
turns gradients off: callers that only evaluate use `torch.inference_mode()`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from gguf.constants import GGMLQuantizationType
from torch import nn
from torch.utils.checkpoint import checkpoint

from nkat.errors import NKATError
from nkat.gguf.formats import dequantise_rows
from nkat.lm.architectures import DELTA_LINEARS, FEED_FORWARD, FUSED_QKV, QKV, ROUTER, SHARED_EXPERT
from nkat.lm.attention import View, capped, make_view, query_scales, rope_frequencies
from nkat.lm.cache import KeysValues, KVCache
from nkat.lm.config import ModelConfig, Turning
from nkat.lm.delta_net import DeltaNet
from nkat.lm.experts import Experts, ExpertStack
from nkat.lm.linear import PackedModule, StarLinear
from nkat.lm.operations import Operations
from nkat.theta.algebra import Term

if TYPE_CHECKING:
    from nkat.kernels.cuda.planes import PackedWeight

_PLAIN = Operations()
_TILE_ELEMENTS = 1 << 22  # logits, or weights, of one vocabulary tile: 16 MB in float32


class Embedding(PackedModule):
    """Rows of a packed [V, d] table, unpacked one look-up at a time."""

    def repack(self, shared: PackedWeight | None) -> None:
        """Into the layout of the GPU kernels; `shared`: it is the output layer's weight, which is there already."""
        from nkat.kernels.cuda.packing import pack  # Triton is loaded only where it is used

        self.move_to_kernels(pack(self.file_bytes, self.qtype, self.shape) if shared is None else shared)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] → float32 [B, T, d]."""
        if self.device_weight is not None:
            from nkat.kernels.cuda import linear as cuda

            return cuda.rows(self.device_weight, tokens.reshape(-1)).view(*tokens.shape, self.shape[1]).float()
        rows = dequantise_rows(self.file_bytes, self.qtype, self.shape, tokens.reshape(-1))
        return rows.view(*tokens.shape, self.shape[1])


class LayerInputs(nn.Module):
    """What every block adds of its own about each token (Gemma 4's per-layer embeddings): p numbers for each block.

    table: rows of all blocks' numbers, [V, blocks · p];  projection: [blocks · p, d], of the embedding;  norm: of p
    """

    norm: torch.Tensor

    def __init__(self, config: ModelConfig, table: Embedding, projection: StarLinear, norm: torch.Tensor) -> None:
        super().__init__()
        self.config, self.table, self.projection = config, table, projection
        self.register_buffer("norm", norm, persistent=False)

    def forward(self, tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] and their embeddings [B, T, d], scaled → [blocks, B, T, p]."""
        config = self.config
        shape = (config.block_count, config.layer_input_length)
        own = self.table(tokens).to(x.dtype).unflatten(-1, shape) * shape[1] ** 0.5
        projected = self.projection(x).to(x.dtype).unflatten(-1, shape) * config.embedding_length**-0.5
        projected = F.rms_norm(projected, self.norm.shape, self.norm, config.rms_epsilon)
        return ((projected + own) * 0.5**0.5).movedim(-2, 0)


class Block(nn.Module):
    """One transformer block: attention or a gated delta net, then the gated feed-forward network or a mixture of them,
    each added to the residual stream."""

    shared_gate: torch.Tensor | None
    sinks: torch.Tensor | None
    scale: torch.Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        linears: Mapping[str, StarLinear],
        norms: Mapping[str, torch.Tensor],
        scale: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        experts: Experts | None = None,
        shared_gate: torch.Tensor | None = None,
        delta_net: DeltaNet | None = None,
    ) -> None:
        """linears: by name, those of `config.linears`; norms: RMS norm weights, those of `config.norms`, and ROUTER's
        where it has a norm of its own.

        scale: of what leaves the block, [1]; sinks: [H], see `nkat.lm.attention.attend`; experts: where
        `config.mixture` says so; shared_gate: [d], of the expert that is every token's; delta_net: in attention's place
        """
        super().__init__()
        self.config, self.index = config, index
        self.local, self.turning = config.local_blocks[index], config.turning(index)
        self.linears = nn.ModuleDict({name: linears[name] for name in config.linears(index)})  # or their stand-ins
        self.dtype = next(iter(linears.values())).dtype
        own = config.has_own_kv(index) or delta_net is not None
        self.qkv = [name for name in self.linears if name in ((*QKV, FUSED_QKV) if own else QKV[:1])]  # of what is read
        self.feed_forward = [name for name in self.linears if name in FEED_FORWARD]  # two or three, or none
        self.shared_expert = [name for name in self.linears if name in SHARED_EXPERT]
        self.experts, self.delta_net = experts, delta_net
        self.register_buffer("shared_gate", shared_gate, persistent=False)
        self.register_buffer("sinks", sinks, persistent=False)
        self.norms = nn.ParameterDict({k: nn.Parameter(v, requires_grad=False) for k, v in norms.items()})
        self.register_buffer("scale", scale, persistent=False)

    def linear(self, name: str) -> StarLinear:
        """A linear layer, not to be asked for while another module stands in for it (`nkat.sources.fit`)."""
        layer = self.linears[name]
        if not isinstance(layer, StarLinear):
            raise TypeError(f"{name} of block {self.index} is a {type(layer).__name__} just now")
        return layer

    def forward(
        self,
        x: torch.Tensor,
        view: View,
        cache: KVCache | None,
        given: KeysValues | None = None,
        layer_input: torch.Tensor | None = None,
        by: Operations = _PLAIN,
    ) -> tuple[torch.Tensor, KeysValues | None]:
        """Residual stream [B, T, d] → [B, T, d], and the keys and values that its queries met, where it has queries.

        given: those of an earlier block, for a block without its own;  layer_input: see `LayerInputs`, [B, T, p]
        by: what computes all that lies between the linear layers
        """
        attended, met = self._attention(by, x, view, cache, given)
        x = x + self._norm(by, attended.to(x.dtype), "post_attention_norm")
        x = x + self._norm(by, self._fed(by, x).to(x.dtype), "post_ffw_norm")
        if layer_input is not None:
            gated = F.gelu(self.linears["inp_gate"](x), approximate="tanh").to(x.dtype) * layer_input
            x = x + self._norm(by, self.linears["proj"](gated).to(x.dtype), "post_norm")
        return (x if self.scale is None else x * self.scale), met

    def _norm(self, by: Operations, x: torch.Tensor, name: str) -> torch.Tensor:
        """x itself where the model has no such norm."""
        if name not in self.norms:
            return x
        return by.normed(x, self.norms[name], self.config.rms_epsilon, x.dtype)[0]

    def _read(self, by: Operations, x: torch.Tensor, norm: str, names: Sequence[str]) -> list[torch.Tensor]:
        """What the linear layers of these names make of the normalised x."""
        reads: Sequence[torch.Tensor] = [x] * len(names)
        if norm in self.norms:
            reads = by.normed(x, self.norms[norm], self.config.rms_epsilon, self.dtype, len(names))
        return [self.linears[name](read) for name, read in zip(names, reads, strict=True)]

    def _attention(
        self, by: Operations, x: torch.Tensor, view: View, cache: KVCache | None, given: KeysValues | None
    ) -> tuple[torch.Tensor, KeysValues | None]:
        if self.delta_net is not None:
            return self._recurred(by, self.delta_net, x, cache), None
        config = self.config
        outputs = self._read(by, x, "attn_norm", self.qkv)
        parts = outputs[0].split(config.qkv_rows(self.index), dim=-1) if self.qkv == [FUSED_QKV] else outputs
        q, *own = parts
        gate = None
        if config.architecture.gated_attention:
            q, gate = (t.flatten(2) for t in q.unflatten(-1, (config.head_count, 2, -1)).unbind(-2))
        q = self._turned(by, q, "attn_q_norm", view, view.warmth)
        if own:
            k, v = self._turned(by, own[0], "attn_k_norm", view), self._heads(own[-1])
            if config.architecture.value_norm:
                v = F.rms_norm(v.to(x.dtype), v.shape[-1:], eps=config.rms_epsilon).to(self.dtype)
            v = v.transpose(1, 2)
            given = (k, v) if cache is None else cache.extend(self.index, k, v)
        if given is None:
            raise TypeError(f"block {self.index} has no keys of its own and was given none")
        mixed = by.attended(q, *given, view, config.attention_scale, config.attention_cap, self.sinks)
        mixed = mixed.transpose(1, 2).flatten(2)
        if gate is not None:
            mixed = mixed.to(x.dtype) * gate.to(x.dtype).sigmoid()
        return self.linears["attn_output"](mixed), given

    def _recurred(self, by: Operations, delta_net: DeltaNet, x: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        """What a gated delta net makes of the new tokens, in attention's place."""
        outputs = [output.to(x.dtype) for output in self._read(by, x, "attn_norm", [*delta_net.sizes.inputs])]
        state = None if cache is None else cache.state(self.index)
        mixed, state = delta_net(outputs, state)
        if cache is not None:
            cache.put_state(self.index, state)
        return self.linears[DELTA_LINEARS[-1]](mixed)

    def _heads(self, outputs: torch.Tensor) -> torch.Tensor:
        """[B, T, H·D] → [B, T, H, D]"""
        return outputs.unflatten(-1, (-1, self.config.of(self.index).head_dim))

    def _turned(
        self, by: Operations, outputs: torch.Tensor, norm: str, view: View, factor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Queries or keys [B, T, H·D] after their norm and RoPE, times a factor of each position: [B, H, T, D]."""
        architecture = self.config.architecture
        if architecture.wide_qk_norm:
            outputs = self._norm(by, outputs.to(view.cos.dtype), norm)
        heads = self._heads(outputs)
        if architecture.qk_norm:
            heads = self._norm(by, heads.to(view.cos.dtype), norm)
        return by.turned(heads, view, self.config.rope.interleaved, self.dtype, factor)

    def _fed(self, by: Operations, x: torch.Tensor) -> torch.Tensor:
        """What the feed-forward network, or the experts, or both make of the residual stream."""
        if self.experts is None:
            return self._feed_forward(by, x, self.feed_forward)
        read = self._norm(by, x, "ffn_norm")
        if self.shared_expert:
            shared = self._feed_forward(by, x, self.shared_expert).to(x.dtype)
            if self.shared_gate is not None:
                shared = shared * (read @ self.shared_gate).sigmoid()[..., None]
            return self.experts(read) + shared
        if not self.feed_forward:
            return self.experts(read)
        fed = self._norm(by, self._feed_forward(by, x, self.feed_forward).to(x.dtype), "post_ffw_norm_1")
        mixed = self.experts(self._norm(by, x, "pre_ffw_norm_2"), self._norm(by, x, ROUTER))
        return fed + self._norm(by, mixed, "post_ffw_norm_2")

    def _feed_forward(self, by: Operations, x: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """names: of its layers; gate and up may be one."""
        *gate_up, down = names
        outputs = self._read(by, x, "ffn_norm", gate_up)
        gate, up = outputs[0].chunk(2, dim=-1) if len(outputs) == 1 else outputs
        return self.linears[down](by.gated(self.config.architecture, gate, up))


class Transformer(nn.Module):
    """Token ids → logits. Made by `nkat.lm.load`."""

    blocks: Sequence[Block]  # an nn.ModuleList, whose own type does not say what is in it
    output_norm: torch.Tensor
    frequencies: torch.Tensor
    long_frequencies: torch.Tensor
    local_frequencies: torch.Tensor

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        blocks: Iterable[Block],
        output_norm: torch.Tensor,
        output: StarLinear,
        rope_factors: torch.Tensor | None = None,
        long_rope_factors: torch.Tensor | None = None,
        layer_inputs: LayerInputs | None = None,
    ) -> None:
        """output_norm: RMS norm weight [d], in the residual stream's dtype.

        rope_factors, long_rope_factors: see `rope_frequencies` and `frequencies_for`
        """
        super().__init__()
        self.config = config
        self.gamma: float | None = None
        self.theta_changes = 0  # how often Θ was replaced: what reads it elsewhere has then to follow
        self.embedding, self.output, self.layer_inputs = embedding, output, layer_inputs
        self.add_module("blocks", nn.ModuleList(blocks))
        self.register_buffer("output_norm", output_norm, persistent=False)
        device = output_norm.device
        self.register_buffer("frequencies", rope_frequencies(config.rope, rope_factors).to(device), False)
        self.register_buffer("long_frequencies", rope_frequencies(config.rope, long_rope_factors).to(device), False)
        self.register_buffer("local_frequencies", rope_frequencies(config.local_rope).to(device), False)

    @property
    def device(self) -> torch.device:
        return self.output_norm.device

    def star_linears(self) -> dict[str, StarLinear]:
        """Every layer that can carry a Θ, by the name of its weight in the file."""
        layers = {
            f"blk.{block.index}.{name}.weight": block.linear(name) for block in self.blocks for name in block.linears
        }
        return {**layers, "output.weight": self.output}

    def all_linears(self) -> dict[str, StarLinear]:
        """Every linear layer by the name of its weight in the file, with those that no Θ acts on."""
        inputs = self.layer_inputs
        return self.star_linears() | ({} if inputs is None else {"per_layer_model_proj.weight": inputs.projection})

    def multipliers(self) -> dict[str, StarLinear | ExpertStack]:
        """Everything that multiplies by a weight, by the weight's name: `all_linears`, routers and experts."""
        found: dict[str, StarLinear | ExpertStack] = {**self.all_linears()}
        for block in self.blocks:
            if block.experts is not None:
                found[f"blk.{block.index}.{ROUTER}.weight"] = block.experts.router
                found |= {f"blk.{block.index}.{name}.weight": block.experts.stack(name) for name in block.experts.names}
        return found

    def tables(self) -> list[Embedding]:
        """What token ids are looked up in."""
        return [self.embedding] if self.layer_inputs is None else [self.embedding, self.layer_inputs.table]

    def packed_types(self) -> list[GGMLQuantizationType]:
        """The types of the weights that are multiplied by, and of the embedding: one for each tensor."""
        types = [layer.qtype for layer in self.multipliers().values()]
        return types if self.embedding.packed is self.output.packed else [self.embedding.qtype, *types]

    def frequencies_for(self, room: int) -> torch.Tensor:
        """Of blocks that see everything, where there is room for so many tokens: llama.cpp, too, chooses the factors of
        longrope once for a context, by its size.
        """
        return self.long_frequencies if room > self.config.rope.original_context else self.frequencies

    def turns(self, turning: Turning, room: int) -> tuple[torch.Tensor, float]:
        """Radians a position by which a block's pairs turn, float64, and what sine and cosine are multiplied by."""
        if turning is Turning.NONE:
            return torch.zeros_like(self.frequencies), 1.0
        if turning is Turning.WINDOW:
            return self.local_frequencies, self.config.local_rope.magnitude
        return self.frequencies_for(room), self.config.rope.magnitude

    def set_gamma(self, gamma: float | None) -> None:
        """Strength of Θ in all layers; None or 1 turns it off. The weights are shared by both arms."""
        self.gamma = gamma
        for layer in self._carriers().values():
            layer.set_gamma(gamma)

    def _carriers(self) -> dict[str, StarLinear | ExpertStack]:
        """Whatever a Θ can be put on."""
        stacks = {
            f"blk.{block.index}.{name}.weight": block.experts.stack(name)
            for block in self.blocks
            if block.experts is not None
            for name in block.experts.names
        }
        return {**self.star_linears(), **stacks}

    def set_thetas(self, thetas: Mapping[str, Term]) -> None:
        """Puts these Θ or other terms, by weight name, in place of all that are there.

        The very same ones leave all as it is, so that what was made for them is not stale. Raises NKATError for a name
        of no layer.
        """
        layers = self._carriers()
        self.check_thetas(thetas)
        if all(layer.theta is thetas.get(name) for name, layer in layers.items()):
            return
        self.theta_changes += 1
        for name, layer in layers.items():
            layer.set_theta(thetas.get(name))

    def check_thetas(self, thetas: Mapping[str, Term]) -> None:
        """Raises NKATError for a Θ of a name that no layer has, or that is larger than the layer."""
        layers = self._carriers()
        for name, theta in thetas.items():
            if name not in layers:
                raise NKATError(f"Θ for {name!r}, but the model has no such linear layer")
            layers[name].check_theta(theta)

    def reserve_thetas(self, columns: Mapping[str, int]) -> None:
        """Room for Θ of so many columns, by weight name, beyond what there is: what is made for decoding from now on
        follows `set_thetas` within that."""
        layers = self._carriers()
        for name, room in columns.items():
            layers[name].reserve(room)

    def fits(self, rooms: Mapping[int, int]) -> bool:
        """Whether the Θ that the layers have now fit what was made for an earlier one.

        rooms: columns that there is room for, by `id` of the layer; one that is not there does not matter
        """
        layers = [layer for layer in self._carriers().values() if id(layer) in rooms]
        return all(layer.theta is None or layer.theta.columns <= rooms[id(layer)] for layer in layers)

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
        return capped(self.output(hidden[:, wanted]).to(hidden.dtype), self.config.logit_cap)

    def hidden(
        self,
        tokens: torch.Tensor,
        cache: KVCache | None = None,
        *,
        trace: dict[str, torch.Tensor] | None = None,
        learning: bool = False,
        recompute: bool = False,
    ) -> torch.Tensor:
        """Token ids [B, T] → normalised output of the last block [B, T, d]: what the output layer multiplies.

        learning: by kernels with gradients where there are any (`nkat.lm.learning`); rounded otherwise than without
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
        room = count if cache is None else cache.capacity
        warmth = query_scales(config, start, count)
        by = _PLAIN
        if learning:
            from nkat.lm.learning import operations_for  # LLVM is loaded only where it is used

            by = operations_for(x, self.output.dtype)
        views: dict[tuple[bool, Turning], View] = {}
        for local, turning in {(block.local, block.turning): None for block in self.blocks}:
            window = config.sliding_window if local else 0
            views[local, turning] = make_view(*self.turns(turning, room), start, count, window, x, warmth)
        inputs = None if self.layer_inputs is None else self.layer_inputs(tokens, x)
        met: dict[int, KeysValues] = {}  # of the blocks whose keys and values others use
        for block in self.blocks:
            i = block.index
            arguments = (
                *(x, views[block.local, block.turning], cache),
                *(met.get(config.of(i).kv_block), None if inputs is None else inputs[i], by),
            )
            x, own = checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
            if i in config.shared_blocks and own is not None:
                met[i] = own
            if trace is not None:
                trace[f"blk.{block.index}"] = x
        if cache is not None:
            cache.advance(count)
        (x,) = by.normed(x, self.output_norm, config.rms_epsilon, x.dtype)
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
            logits = capped(self.output.rows(hidden, start, stop).to(hidden.dtype), self.config.logit_cap)
            total = torch.logaddexp(total, logits.logsumexp(dim=-1))
            inside = (targets >= start) & (targets < stop)
            column = (targets - start).clamp(0, stop - start - 1)
            chosen = torch.where(inside, logits.gather(1, column[:, None])[:, 0], chosen)
        return total - chosen
