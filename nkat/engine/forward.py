"""A forward pass on the CPU as one compiled program: the steps, and the arrays that they work on.

The same arithmetic as `nkat.lm.transformer`. One token at a time is decoding; with more, a weight is unpacked once for
all of them (`nkat.kernels.cpu.batch`), and they may be of several sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES

from nkat.engine.expert_rows import ExpertRows
from nkat.engine.kernel_cache import Cache
from nkat.engine.recurrent import DeltaRows
from nkat.engine.tree import TokenTree
from nkat.errors import NKATError
from nkat.gguf.formats import packed_nbytes
from nkat.kernels.cpu.batch import make_scratch
from nkat.kernels.cpu.blocks import (
    KEYS,
    add_kernel,
    attention_kernel,
    cap_kernel,
    gate_kernel,
    layer_input_kernel,
    norm_kernel,
    rope_kernel,
    scale_kernel,
    wide_norm_kernel,
)
from nkat.kernels.cpu.delta import logistic_kernel, part_kernel, shared_kernel
from nkat.kernels.cpu.experts import CpuExperts
from nkat.kernels.cpu.formats import padded_rows
from nkat.kernels.cpu.linear import CpuLinear, Panels, StarStep, token_state
from nkat.kernels.cpu.matmul import Rounding, embedding_kernel
from nkat.kernels.cpu.program import Program, Threads, aligned
from nkat.kernels.cpu.tree import tree_attention_kernel
from nkat.lm.activation import kernel_clamp
from nkat.lm.architectures import DELTA_LINEARS, FUSED_QKV, QK_NORMS, ROUTER
from nkat.lm.attention import query_scales
from nkat.lm.config import Turning
from nkat.lm.delta_net import DeltaNet
from nkat.lm.experts import ExpertStack
from nkat.lm.linear import StarLinear
from nkat.lm.transformer import Block, Embedding, LayerInputs, Transformer


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """A layer whose inputs are rounded, and multiplied by the smaller factor of its Θ (u), when a step gets to it."""

    layer: StarLinear
    linear: CpuLinear
    panels: Panels
    u: np.ndarray | None


class ForwardPass:
    """The program for up to `capacity` tokens, `tokens` to a panel, up to what the last block adds to `x` [token, d].

    linear, experts: what multiplies for a layer, and for the experts of a name
    reach: tokens that a sequence may come to
    length: tokens of one sequence, of which the capacity may hold several
    tree: the tokens are a tree of sequences, which `use_tree` tells of
    """

    def __init__(
        self,
        model: Transformer,
        linear: Callable[[StarLinear], CpuLinear],
        experts: Callable[[ExpertStack], CpuExperts],
        threads: Threads,
        cache: Cache,
        capacity: int,
        tokens: int,
        reach: int,
        length: int = 1 << 40,
        tree: bool = False,
    ) -> None:
        config = model.config
        self.model, self.linear, self.experts = model, linear, experts
        self.threads, self.cache, self.tokens, self.reach, self.tree = threads, cache, tokens, reach, tree
        self.capacity = -(-capacity // tokens) * tokens
        self.state = token_state(0)
        self.state[2] = length
        self.epsilon = np.array([config.rms_epsilon], np.float32)
        self.attention_cap = np.array([config.attention_cap], np.float32)
        self.logit_cap = np.array([config.logit_cap], np.float32)
        self.d = config.embedding_length
        self.x, self.normed = self._rows(self.d), self._rows(self.d)
        self.ids = np.zeros(self.capacity, np.int64)
        self.panels: dict[tuple[str, object], Panels] = {}
        self.stars: list[tuple[StarLinear, StarStep]] = []
        self.rooms: dict[int, int] = {}  # columns of Θ, by `id` of a layer that is in the programs by now
        self.follows = model.theta_changes, model.gamma  # which Θ, at which strength, the programs are set to
        self.scratch = make_scratch(threads.count, tokens)
        self.program = Program()
        self._look_up(model.embedding, config.embedding_scale, self.x)

        outputs: dict[str, int] = {}
        for block in model.blocks:
            for name, (rows, _) in config.linears(block.index).items():
                outputs[name] = max(rows, outputs.get(name, 0))
        self.y = {name: self._rows(padded_rows(rows)) for name, rows in outputs.items()}
        self.expert_rows: ExpertRows | None = None
        if config.mixture is not None:
            self.expert_rows = ExpertRows(config, self.capacity, tokens, self.state, self.scratch)
            self.router_logits = self._rows(padded_rows(config.mixture.count))
            self.routed = self._rows(self.d) if config.mixture.beside else self.normed
        mixed = [heads.queries * heads.size for heads in cache.heads]
        if config.architecture.gated_attention:
            self.queries, self.gates = self._rows(max(mixed)), self._rows(max(mixed))
        self.delta_rows: DeltaRows | None = None
        if config.recurrence is not None:
            if tree:
                raise ValueError("a tree of sequences through recurrent blocks, which have a state for each sequence")
            self.delta_rows = DeltaRows(config.recurrence, self.capacity, tokens, self.state, self.epsilon)
            mixed.append(config.recurrence.values)
        self.mixed = self._rows(max(mixed))
        self.ones = np.ones(max(heads.size for heads in cache.heads), np.float32)
        self.layer_inputs = None if model.layer_inputs is None else self._layer_inputs(model.layer_inputs)
        self.rows = 8 if tokens > 1 else max(r for r in (1, 2, 4) if r == 1 or r < 2 * config.head_count)
        self.readers: list[tuple[Block, np.ndarray, np.ndarray]] = []  # arguments of kernels that read the cache
        for block in model.blocks:
            self._block(block)
        self.program.barrier()
        self.use_cache(self.scores_for(cache.room), PositionTables.of(model, cache.room, reach))

    def scores_for(self, room: int) -> np.ndarray:
        """Scratch for the attention over so many tokens: [thread, row, bytes]."""
        return np.zeros((self.threads.count, self.rows, 4 * (room + KEYS)), np.uint8)

    def use_cache(self, scores: np.ndarray, tables: PositionTables) -> None:
        """Tells the steps where the cache is, which moves when it grows."""
        self.scores, self.tables = scores, tables
        cache, score_bytes = self.cache, scores.shape[2]
        for block, rope, attention in self.readers:
            keys, values = (a.ctypes.data for a in cache.of(block.index))
            cosines, sines = (table.ctypes.data for table in tables.angles[block.turning])
            rope[6], rope[7], rope[11] = cosines, sines, tables.scales.ctypes.data
            rope[12], rope[13], rope[14] = keys, values, cache.head_bytes(block.index)
            attention[2], attention[3], attention[4] = keys, values, cache.head_bytes(block.index)
            attention[7], attention[8], attention[9] = scores.ctypes.data, self.rows * score_bytes, score_bytes

    def use_tree(self, tree: TokenTree) -> None:
        """Tells the steps where the tokens of the next pass belong."""
        self.token_tree = tree  # the steps know its arrays by their addresses
        for _, rope, attention in self.readers:
            rope[17] = tree.places.ctypes.data
            attention[11], attention[14] = tree.tiles.ctypes.data, tree.blocks.ctypes.data

    def _rows(self, columns: int) -> np.ndarray:
        return aligned((self.capacity, columns), np.float32)

    def forward(self, tokens: np.ndarray, position: int) -> None:
        """Token ids, int64 [count] → `x`; their keys and values into the cache from `position` on."""
        count, vocabulary = len(tokens), self.model.config.vocab_size
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocabulary:
            raise NKATError(f"token id {low} or {high} lies outside the vocabulary of {vocabulary}")
        self.ids[:count] = tokens
        self.state[:2] = count, position
        self._follow_theta()
        self.program.run(self.threads)

    def can_follow(self) -> bool:
        """Whether the Θ that the model has now has a place in the programs."""
        return self.model.fits(self.rooms)

    def _follow_theta(self) -> None:
        """Sets the programs to the Θ that the model has now, and to its strength. Raises NKATError for one that has no
        place in them."""
        now = self.model.theta_changes, self.model.gamma
        if self.follows == now:
            return
        if self.follows[0] != now[0] and not self.can_follow():
            raise NKATError("Θ was replaced after this decoder was made; make a new one")
        for layer, step in self.stars:
            step.star.put(layer.theta)
            step.star.set_kappa(layer.kappa)
            step.switch(layer.kappa != 0.0)
        self.follows = now

    def _star_step(self, layer: StarLinear, step: StarStep) -> None:
        """A step's part in Θ: on while the layer has a strength."""
        step.switch(layer.kappa != 0.0)
        self.stars.append((layer, step))

    def prepare(self, program: Program, layers: Sequence[StarLinear], x: np.ndarray, state: np.ndarray) -> list[Ready]:
        """Steps that round the layers' common input, once for each way of rounding; a barrier ends them."""
        tokens = self.tokens if len(x) > 1 else 1
        filled: dict[Rounding, Panels] = {}
        ready = []
        for layer in layers:
            linear = self.linear(layer)
            if linear.rounding not in filled:
                filled[linear.rounding] = self._fill(program, linear.rounding, linear.shape[1], x, state)
            panels = filled[linear.rounding]
            self.rooms[id(layer)] = 0 if linear.star is None else linear.star.room
            u = None
            if linear.star is not None:
                linear.star.set_kappa(layer.kappa)
                u = np.zeros((len(panels.q), 2 * linear.star.room, tokens), np.float32)
            ready.append(Ready(layer, linear, panels, u))
        for step in ready:
            if step.u is not None:
                self._star_step(step.layer, step.linear.down(program, step.panels, step.u))
        program.barrier()
        return ready

    def _fill(self, program: Program, rounding: Rounding, columns: int, x: np.ndarray, state: np.ndarray) -> Panels:
        """The step that rounds rows into panels of their own or of others of that kind that are no longer needed."""
        tokens = self.tokens if len(x) > 1 else 1
        key = (f"{columns} {len(x)} {tokens} {state.ctypes.data}", rounding)
        if key not in self.panels:
            self.panels[key] = Panels(rounding, columns, len(x), tokens, state)
        self.panels[key].fill(program, x, x.strides[0])
        return self.panels[key]

    def multiply(
        self, program: Program, step: Ready, y: np.ndarray, first_tile: int = 0, tiles: int | None = None
    ) -> None:
        """The step of a layer's product with the inputs that `prepare` made ready, over some of its tiles."""
        star = step.linear.multiply(program, step.panels, y, y.strides[0], self.scratch, step.u, first_tile, tiles)
        if star is not None:
            self._star_step(step.layer, star)

    def _linears(self, layers: Mapping[str, StarLinear], x: np.ndarray) -> None:
        """Layers with the same input, into the `y` of their names."""
        ready = self.prepare(self.program, list(layers.values()), x, self.state)
        for name, step in zip(layers, ready, strict=True):
            self.multiply(self.program, step, self.y[name])
        self.program.barrier()

    def norm(self, program: Program, x: np.ndarray, weight: torch.Tensor, out: np.ndarray, state: np.ndarray) -> None:
        tokens = self.tokens if len(x) > 1 else 1
        program.add(norm_kernel(self.d, tokens), (x, _numpy(weight), self.epsilon, out, state))

    def _read(self, block: Block, norm: str) -> np.ndarray:
        """What layers read from the residual stream: its norm, or the stream where the model has none there."""
        if norm not in block.norms:
            return self.x
        self.norm(self.program, self.x, block.norms[norm], self.normed, self.state)
        return self.normed

    def cap_logits(self, program: Program, logits: np.ndarray, columns: int, state: np.ndarray) -> None:
        """Whole vectors of a product's outputs; a barrier must have ended it, and ends this."""
        if self.model.config.logit_cap:
            columns = -(-columns // 16) * 16
            program.add(cap_kernel(), (logits, logits.strides[0], columns, self.logit_cap, state))
            program.barrier()

    def _add(self, y: np.ndarray, block: Block, post_norm: str) -> None:
        """Residual stream += y, through a norm where the model has one there."""
        normalise = post_norm in block.norms
        weight = _numpy(block.norms[post_norm]) if normalise else 0
        kernel = add_kernel(self.d, self.tokens, normalise)
        x = self.x
        self.program.add(kernel, (x, x.strides[0], y, y.strides[0], weight, self.epsilon, self.state))

    def _look_up(self, table: Embedding, factor: float, out: np.ndarray) -> None:
        """Token ids → rows times a factor, from the table as the file has it."""
        width = table.shape[1]
        units, row_bytes = width // GGML_QUANT_SIZES[table.qtype][0], packed_nbytes(table.qtype, (width,))
        scale, packed = np.array([factor], np.float32), table.file_bytes.numpy()
        kernel = embedding_kernel(table.qtype, self.tokens)
        self.program.add(kernel, (packed, row_bytes, units, self.ids, scale, out, out.strides[0], self.state))

    def _layer_inputs(self, inputs: LayerInputs) -> np.ndarray:
        """What the blocks add about each token, [token, blocks · p]; see `nkat.lm.transformer.LayerInputs`."""
        config = self.model.config
        length, blocks = config.layer_input_length, config.block_count
        own, projected = self._rows(length * blocks), self._rows(padded_rows(length * blocks))
        self._look_up(inputs.table, length**0.5, own)
        self.multiply(self.program, self.prepare(self.program, [inputs.projection], self.x, self.state)[0], projected)
        self.program.barrier()
        # what is divided by √d, before a norm, leaves its mark on that norm's epsilon only
        epsilon = np.array([config.rms_epsilon * self.d], np.float32)
        self.program.add(
            layer_input_kernel(length, blocks, self.tokens),
            (own, own.strides[0], projected, projected.strides[0], _numpy(inputs.norm), epsilon, self.state),
        )
        return own

    def _block(self, block: Block) -> None:
        read = self._read(block, "attn_norm")
        net = block.delta_net
        attended = self._attention(block, read) if net is None else self._recurred(block, net, read)
        self._add(attended, block, "post_attention_norm")
        self._add(self._fed(block), block, "post_ffw_norm")
        if self.layer_inputs is not None:
            self._add_layer_input(block, self.layer_inputs)
        if block.scale is not None:
            kernel = scale_kernel(self.d, self.tokens)
            self.program.add(kernel, (self.x, _numpy(block.scale), self.state))

    def _recurred(self, block: Block, net: DeltaNet, x: np.ndarray) -> np.ndarray:
        """As `_attention`, of a block that has a gated delta net in its place."""
        assert self.delta_rows is not None
        self._linears({name: block.linear(name) for name in net.sizes.inputs}, x)
        self.delta_rows.add(self.program, self.y, net, self.cache.states.by_block[block.index], self.mixed)
        return self._linear(block, DELTA_LINEARS[-1], self.mixed)

    def _attention(self, block: Block, x: np.ndarray) -> np.ndarray:
        """Returns where the output is."""
        program, state, norms, config = self.program, self.state, block.norms, self.model.config
        heads = self.cache.heads[block.index]
        self._linears({name: block.linear(name) for name in block.qkv}, x)
        q, k, v = self._qkv(block)
        if config.architecture.gated_attention:
            parts = (q, q.strides[0], self.queries, self.gates, self.queries.strides[0], state)
            program.add(part_kernel(heads.queries, heads.size, self.tokens), parts)
            program.barrier()
            q = self.queries
        if config.architecture.wide_qk_norm:
            for x, name, rows in zip((q, k), QK_NORMS, config.qkv_rows(block.index), strict=False):
                kernel = wide_norm_kernel(rows, self.tokens)
                program.add(kernel, (x, x.strides[0], _numpy(norms[name]), self.epsilon, state))
            program.barrier()
        q_norm, k_norm = (_numpy(norms[name]) if heads.norm and name in norms else 0 for name in QK_NORMS)
        later = 0  # `use_cache` puts it in
        rope = program.add(
            rope_kernel(heads, self.tree),
            (
                *(q, k, v, q.strides[0], k.strides[0], v.strides[0], later, later, q_norm, k_norm, self.epsilon),
                *(later, later, later, later, state, self.ones, later),
            ),
        )
        program.barrier()
        window = config.sliding_window if block.local else 1 << 40
        attend = tree_attention_kernel if self.tree else attention_kernel
        attention = program.add(
            attend(heads, self.rows),
            (
                *(q, q.strides[0], later, later, later),
                *(self.mixed, self.mixed.strides[0], later, later, later),
                *(window, state, self.attention_cap, 0 if block.sinks is None else _numpy(block.sinks), later),
            ),
        )
        self.readers.append((block, rope, attention))
        program.barrier()
        if config.architecture.gated_attention:
            kernel, gates = logistic_kernel(heads.queries * heads.size, self.tokens), self.gates
            program.add(kernel, (self.mixed, self.mixed.strides[0], gates, gates.strides[0], state))
        return self._linear(block, "attn_output", self.mixed)

    def _linear(self, block: Block, name: str, x: np.ndarray) -> np.ndarray:
        """A single layer; returns where its output is."""
        self._linears({name: block.linear(name)}, x)
        return self.y[name]

    def _fed(self, block: Block) -> np.ndarray:
        """What the feed-forward network, or the experts, or both make of the residual stream; returns where that is."""
        rows, norms, read = self.expert_rows, block.norms, self._read(block, "ffn_norm")
        if rows is None:
            return self._feed_forward(block, block.feed_forward, read)
        if block.shared_expert:
            return self._with_shared_expert(block, read, rows)
        if not block.feed_forward:
            return self._experts(block, read, read, rows)
        fed = self._feed_forward(block, block.feed_forward, read)
        stride, state = fed.strides[0], self.state
        weight = _numpy(norms["post_ffw_norm_1"])
        self.program.add(wide_norm_kernel(self.d, self.tokens), (fed, stride, weight, self.epsilon, state))
        self.norm(self.program, self.x, norms[ROUTER], self.routed, state)
        mixed = self._experts(block, self._read(block, "pre_ffw_norm_2"), self.routed, rows)
        weight = _numpy(norms["post_ffw_norm_2"])
        kernel = add_kernel(self.d, self.tokens, True)
        self.program.add(kernel, (fed, stride, mixed, mixed.strides[0], weight, self.epsilon, state))
        return fed

    def _with_shared_expert(self, block: Block, x: np.ndarray, rows: ExpertRows) -> np.ndarray:
        """The same where all tokens go to one expert besides."""
        fed = self._feed_forward(block, block.shared_expert, x)
        mixed = self._experts(block, x, x, rows)
        parts = (mixed, mixed.strides[0], fed, fed.strides[0])
        if block.shared_gate is None:
            kernel = add_kernel(self.d, self.tokens, False)
            self.program.add(kernel, (*parts, 0, self.epsilon, self.state))
        else:
            kernel = shared_kernel(self.d, self.tokens)
            self.program.add(kernel, (*parts, x, x.strides[0], _numpy(block.shared_gate), self.state))
        return mixed

    def _feed_forward(self, block: Block, names: Sequence[str], x: np.ndarray) -> np.ndarray:
        """Returns where the output is, as `_experts` does. names: of the layers, down last"""
        *gate_up, down = names
        ff, architecture = block.linear(down).shape[1], self.model.config.architecture
        self._linears({name: block.linear(name) for name in gate_up}, x)
        gate, up = self._parts(gate_up, (ff, ff))
        kernel = gate_kernel(ff, self.tokens, architecture.gelu, kernel_clamp(architecture))
        self.program.add(kernel, (gate, up, gate.strides[0], up.strides[0], self.state))
        return self._linear(block, down, gate)

    def _add_layer_input(self, block: Block, inputs: np.ndarray) -> None:
        length = self.model.config.layer_input_length
        gate, up = self.y["inp_gate"], inputs[:, length * block.index : length * (block.index + 1)]
        self._linears({"inp_gate": block.linear("inp_gate")}, self.x)
        kernel = gate_kernel(length, self.tokens, True)
        self.program.add(kernel, (gate, up, gate.strides[0], up.strides[0], self.state))
        self._add(self._linear(block, "proj", gate), block, "post_norm")

    def _qkv(self, block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A block's q, k and v; v is k where it has no weight of its own, and any memory will do for what it lacks."""
        if block.qkv == [FUSED_QKV]:
            q, k, v = self._parts(block.qkv, self.model.config.qkv_rows(block.index))
            return q, k, v
        parts = [self.y[name] for name in block.qkv]
        return parts[0], parts[min(1, len(parts) - 1)], parts[-1]

    def _experts(self, block: Block, x: np.ndarray, routed: np.ndarray, rows: ExpertRows) -> np.ndarray:
        """The steps of a mixture of experts of x, by what the router makes of `routed`; returns where its output is."""
        assert block.experts is not None
        stacks = [block.experts.stack(name) for name in block.experts.names]
        experts = [self.experts(stack) for stack in stacks]
        self.rooms |= {id(stack): 0 for stack in stacks}
        router = self.prepare(self.program, [block.experts.router], routed, self.state)[0]
        self.multiply(self.program, router, self.router_logits)
        self.program.barrier()
        common: dict[Rounding, Panels] = {}
        if self.capacity == 1:  # after the router, whose inputs may have had the same panels
            for each in experts[:-1]:
                if each.rounding not in common:
                    common[each.rounding] = self._fill(self.program, each.rounding, self.d, x, self.state)
        scale = stacks[-1].scale
        return rows.add(self.program, self.router_logits, x, experts, common, None if scale is None else _numpy(scale))

    def _parts(self, names: Sequence[str], rows: Sequence[int]) -> list[np.ndarray]:
        """The outputs of layers with the same input, each of so many rows, whether they are one layer or several."""
        if len(names) == len(rows):
            return [self.y[name] for name in names]
        ends = np.cumsum(rows)
        return [self.y[names[0]][:, end - count : end] for count, end in zip(rows, ends, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class PositionTables:
    """What depends on a token's position.

    angles: cosines, then sines, float32 [2, room, rotated / 2]
    scales: what the queries are multiplied by, float32 [room]
    """

    angles: dict[Turning, np.ndarray]
    scales: np.ndarray

    @classmethod
    def of(cls, model: Transformer, room: int, reach: int) -> PositionTables:
        """For so many positions, of a context that may come to `reach` of them."""
        config, positions = model.config, torch.arange(room, dtype=torch.float64)[:, None]
        angles = {}
        for turning in Turning:
            frequencies, factor = model.turns(turning, reach)
            turned = positions * frequencies
            angles[turning] = (factor * torch.stack((turned.cos(), turned.sin()))).float().numpy()
        warmth = query_scales(config, 0, room)
        scales = config.attention_scale * (torch.ones(room, dtype=torch.float64) if warmth is None else warmth)
        return cls(angles, scales.float().numpy())


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()
