"""A whole forward pass on the CPU as one compiled program: decoding without Python between the operations.

The same arithmetic as `nkat.lm.transformer`; with INT8 activations the KV cache is float16, as in llama.cpp. There are
two programs: one token at a time, and up to `PREFILL_TOKENS` together. Both read the same repacked weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES

from nkat.errors import NKATError
from nkat.gguf.formats import packed_nbytes
from nkat.kernels.cpu.blocks import KEYS, Heads, add_kernel, attention_kernel, gate_kernel, norm_kernel, rope_kernel
from nkat.kernels.cpu.linear import CpuLinear, Panels
from nkat.kernels.cpu.matmul import embedding_kernel, panel_tokens
from nkat.kernels.cpu.program import Program, aligned, pool
from nkat.lm.architectures import BLOCK_LINEARS
from nkat.lm.linear import StarLinear
from nkat.lm.transformer import FIRST_ROOM, Block, Transformer, cache_memory, next_room

PREFILL_TOKENS = 256  # at once: enough to spread the work of taking a weight apart, few enough for the L2 cache


class _Cache:
    """Keys and values of every block; see `nkat.kernels.cpu.blocks`. `room`: tokens that there is memory for."""

    def __init__(self, blocks: int, heads: Heads, room: int) -> None:
        self.heads, self.room = heads, 0
        self.keys = [self._array(0) for _ in range(blocks)]
        self.values = [self._array(0) for _ in range(blocks)]
        self.grow(room)

    def _array(self, room: int) -> np.ndarray:
        dtype = np.float16 if self.heads.half else np.float32
        return aligned((self.heads.kv, room, self.heads.size), dtype)

    def grow(self, room: int) -> None:
        """Memory for more tokens. Where there is none, nothing has changed.

        The new arrays take no memory until they are written to, so that no more than one is there twice.
        """
        room = -(-room // KEYS) * KEYS
        with cache_memory(room):
            new = [[self._array(room) for _ in arrays] for arrays in (self.keys, self.values)]
        for arrays, larger in zip((self.keys, self.values), new, strict=True):
            for i, array in enumerate(larger):
                array[:, : self.room] = arrays[i]  # whole blocks of keys, whose order within is the same
                arrays[i] = array
        self.room = room

    @property
    def head_bytes(self) -> int:
        return self.room * self.heads.size * self.heads.cache_bytes

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.keys, *self.values))


class CompiledDecoder:
    """`nkat.engine.decoder.Decoder` on the CPU kernels. The model's layers must have been repacked for them, and its
    embedding be of a type that they have; see `nkat.engine.decoder.make_decoder`."""

    def __init__(self, model: Transformer, capacity: int, threads: int) -> None:
        config = model.config
        self.model, self.capacity, self.length = model, capacity, 0
        self.threads = pool(threads)
        self.name = f"compiled CPU program, {threads} thread{'s' if threads > 1 else ''}"
        self.heads = Heads(
            config.head_count,
            config.kv_head_count,
            config.head_dim,
            config.rope.dimensions,
            config.rope.interleaved,
            config.architecture.qk_norm,
            half=model.output.int8_activations,
        )
        self.cache = _Cache(config.block_count, self.heads, min(capacity, FIRST_ROOM))
        self.angles = self._angles(self.cache.room)
        self._made_for = model.theta_changes
        self._one = _ForwardPass(self, 1, 1)
        self._many = _ForwardPass(self, min(PREFILL_TOKENS, capacity), panel_tokens())

    @property
    def cache_nbytes(self) -> int:
        return self.cache.nbytes

    def _angles(self, room: int) -> list[np.ndarray]:
        """Of blocks that see everything, and of those with a window, for so many positions."""
        model, config = self.model, self.model.config
        return [
            _rotation_tables(frequencies, rope.magnitude, room)
            for frequencies, rope in (
                (model.frequencies, config.rope),
                (model.local_frequencies, config.local_rope),
            )
        ]

    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        if not tokens:
            raise NKATError("there is no token to start from")
        self._check_room(len(tokens))
        if len(tokens) == 1:
            return self.step(tokens[0])
        logits = None
        for start in range(0, len(tokens), PREFILL_TOKENS):
            part = tokens[start : start + PREFILL_TOKENS]
            logits = self._many.run(part, self.length, start + len(part) == len(tokens))
            self.length += len(part)
        assert logits is not None
        return logits

    def step(self, token: int) -> torch.Tensor:
        self._check_room(1)
        logits = self._one.run([token], self.length, True)
        self.length += 1
        return logits

    def set_gamma(self, gamma: float | None) -> None:
        self.model.set_gamma(gamma)

    def _check_room(self, count: int) -> None:
        if self._made_for != self.model.theta_changes:
            raise NKATError("Θ was replaced after this decoder was made; make a new one")
        if self.length + count > self.capacity:
            raise NKATError(
                f"the KV cache holds {self.capacity} tokens; {self.length} are in it and {count} more do not fit"
            )
        if self.length + count > self.cache.room:
            self._grow(next_room(self.cache.room, self.length + count, self.capacity))

    def _grow(self, room: int) -> None:
        """All that can fail comes before the steps' memory is let go."""
        room = -(-room // KEYS) * KEYS
        passes = (self._one, self._many)
        with cache_memory(room):
            angles, scores = self._angles(room), [forward.scores_for(room) for forward in passes]
        self.cache.grow(room)
        self.angles = angles
        for forward, array in zip(passes, scores, strict=True):
            forward.use_cache(array)


class _ForwardPass:
    """The program for up to `capacity` tokens, `tokens` to a panel."""

    def __init__(self, decoder: CompiledDecoder, capacity: int, tokens: int) -> None:
        model, config = decoder.model, decoder.model.config
        self.decoder, self.tokens = decoder, tokens
        self.capacity = -(-capacity // tokens) * tokens
        self.state = np.zeros(8, np.int64)  # how many tokens, position of the first
        self.last = np.ones(8, np.int64)  # the state of the output layer: one token
        self.epsilon = np.array([config.rms_epsilon], np.float32)
        self.scale = np.array([config.attention_scale], np.float32)
        self.d = config.embedding_length
        self.x, self.normed = self._rows(self.d), self._rows(self.d)
        self.ids = np.zeros(self.capacity, np.int64)
        self.panels: dict[tuple[str, object], Panels] = {}
        self.stars: list[tuple[StarLinear, np.ndarray, np.ndarray]] = []  # layer, arguments of down and of matmul
        self.strength = model.gamma  # that the programs are set to
        self.program = Program()
        self.head = self.program if self.capacity == 1 else Program()
        self._embedding()

        first = model.blocks[0]
        self.y = {name: self._rows(first.linear(name).require_compiled().padded_rows) for name in BLOCK_LINEARS}
        self.mixed = self._rows(config.head_count * config.head_dim)
        self.rows = 8 if tokens > 1 else max(r for r in (1, 2, 4) if r == 1 or r < 2 * config.head_count)
        self.ropes: list[np.ndarray] = []  # arguments of each block's kernels that read the cache
        self.attentions: list[np.ndarray] = []
        for block in model.blocks:
            self._block(block)
        self.use_cache(self.scores_for(decoder.cache.room))
        self.program.barrier()
        self._output()

    def scores_for(self, room: int) -> np.ndarray:
        """Scratch for the attention over so many tokens: [thread, row, bytes]."""
        return np.zeros((self.decoder.threads.count, self.rows, 4 * (room + KEYS)), np.uint8)

    def use_cache(self, scores: np.ndarray) -> None:
        """Tells the steps where the cache is, which moves when it grows. The decoder keeps what they are told."""
        decoder, self.scores = self.decoder, scores
        cache, score_bytes = decoder.cache, scores.shape[2]
        for block, rope, attention in zip(decoder.model.blocks, self.ropes, self.attentions, strict=True):
            keys, values = (a[block.index].ctypes.data for a in (cache.keys, cache.values))
            cosines, sines = (table.ctypes.data for table in decoder.angles[block.local])
            rope[6], rope[7], rope[12], rope[13], rope[14] = cosines, sines, keys, values, cache.head_bytes
            attention[2], attention[3], attention[4] = keys, values, cache.head_bytes
            attention[7], attention[8], attention[9] = self.scores.ctypes.data, self.rows * score_bytes, score_bytes

    def _rows(self, columns: int) -> np.ndarray:
        return aligned((self.capacity, columns), np.float32)

    def run(self, tokens: Sequence[int], position: int, want_logits: bool) -> torch.Tensor:
        """Logits after the last token, float32 [V]; an empty tensor when they are not wanted."""
        count, vocabulary = len(tokens), self.decoder.model.config.vocab_size
        if min(tokens) < 0 or max(tokens) >= vocabulary:
            raise NKATError(f"token id {min(tokens)} or {max(tokens)} lies outside the vocabulary of {vocabulary}")
        self.ids[:count] = tokens
        self.state[:2] = count, position
        self._set_strengths()
        self.program.run(self.decoder.threads)
        if not want_logits:
            return torch.empty(0)
        if self.head is not self.program:
            self.last_row[0] = self.x[count - 1]
            self.head.run(self.decoder.threads)
        return torch.from_numpy(self.logits[0, :vocabulary])

    def _set_strengths(self) -> None:
        if self.strength == self.decoder.model.gamma:
            return
        self.strength = self.decoder.model.gamma
        for layer, down, matmul in self.stars:
            star = layer.require_compiled().star
            assert star is not None
            star.set_kappa(layer.kappa)
            down[2] = matmul[11] = star.terms if layer.kappa else 0

    def _panels(self, linear: CpuLinear, state: np.ndarray, capacity: int, tokens: int) -> Panels:
        key = (f"{linear.shape[1]} {capacity} {tokens} {state.ctypes.data}", linear.rounding)
        if key not in self.panels:
            self.panels[key] = Panels(linear.rounding, linear.shape[1], capacity, tokens, state)
        return self.panels[key]

    def _linears(self, program: Program, layers: dict[str, StarLinear], x: np.ndarray, state: np.ndarray) -> None:
        """Layers with the same input: rounds it once for each way of rounding, then multiplies."""
        tokens = self.tokens if state is self.state else 1
        filled: set[int] = set()
        steps = []
        for name, layer in layers.items():
            linear = layer.require_compiled()
            panels = self._panels(linear, state, len(x), tokens)
            if id(panels) not in filled:
                panels.fill(program, x, x.strides[0])
                filled.add(id(panels))
            u = None
            if linear.star is not None:
                linear.star.set_kappa(layer.kappa)
                u = np.zeros((len(panels.q), linear.star.terms, tokens), np.float32)
            steps.append((name, layer, linear, panels, u))
        downs = [linear.down(program, panels, u) if u is not None else None for _, _, linear, panels, u in steps]
        program.barrier()
        for (name, layer, linear, panels, u), down in zip(steps, downs, strict=True):
            y = self.logits if state is self.last else self.y[name]
            words = linear.matmul(program, panels, y, y.strides[0], u)
            if down is not None:
                assert linear.star is not None
                down[2] = words[11] = linear.star.terms if layer.kappa else 0
                self.stars.append((layer, down, words))
        program.barrier()

    def _norm(self, program: Program, x: np.ndarray, weight: np.ndarray, out: np.ndarray, state: np.ndarray) -> None:
        tokens = self.tokens if state is self.state else 1
        program.add(norm_kernel(self.d, tokens), (x, weight, self.epsilon, out, state))

    def _add(self, y: np.ndarray, block: Block, post_norm: str) -> None:
        """Residual stream += y, through a norm where the model has one there."""
        normalise = self.decoder.model.config.architecture.post_norm
        weight = _numpy(block.norms[post_norm]) if normalise else 0
        kernel = add_kernel(self.d, self.tokens, normalise)
        self.program.add(kernel, (self.x, y, y.strides[0], weight, self.epsilon, self.state))

    def _embedding(self) -> None:
        """Token ids → residual stream, from the table as the file has it."""
        table = self.decoder.model.embedding
        factor = np.array([self.decoder.model.config.embedding_scale], np.float32)
        units = self.d // GGML_QUANT_SIZES[table.qtype][0]
        packed, row_bytes = table.file_bytes.numpy(), packed_nbytes(table.qtype, (self.d,))
        kernel = embedding_kernel(table.qtype, self.tokens)
        self.program.add(kernel, (packed, row_bytes, units, self.ids, factor, self.x, self.x.strides[0], self.state))

    def _block(self, block: Block) -> None:
        program, y, state, norms = self.program, self.y, self.state, block.norms
        heads, config = self.decoder.heads, self.decoder.model.config
        layers = {name: block.linear(name) for name in BLOCK_LINEARS}
        self._norm(program, self.x, _numpy(norms["attn_norm"]), self.normed, state)
        self._linears(program, {n: layers[n] for n in ("attn_q", "attn_k", "attn_v")}, self.normed, state)
        q, k, v = (y[n] for n in ("attn_q", "attn_k", "attn_v"))
        q_norm, k_norm = (_numpy(norms[f"attn_{n}_norm"]) if config.architecture.qk_norm else 0 for n in "qk")
        later = 0  # `use_cache` puts it in
        rope = program.add(
            rope_kernel(heads),
            (
                *(q, k, v, q.strides[0], k.strides[0], v.strides[0], later, later, q_norm, k_norm, self.epsilon),
                *(self.scale, later, later, later, state),
            ),
        )
        self.ropes.append(rope)
        program.barrier()
        window = config.sliding_window if block.local else 1 << 40
        attention = program.add(
            attention_kernel(heads, self.rows),
            (
                *(q, q.strides[0], later, later, later),
                *(self.mixed, self.mixed.strides[0], later, later, later),
                *(window, state),
            ),
        )
        self.attentions.append(attention)
        program.barrier()
        self._linears(program, {"attn_output": layers["attn_output"]}, self.mixed, state)
        self._add(y["attn_output"], block, "post_attention_norm")
        self._norm(program, self.x, _numpy(norms["ffn_norm"]), self.normed, state)
        self._linears(program, {n: layers[n] for n in ("ffn_gate", "ffn_up")}, self.normed, state)
        gate, up = y["ffn_gate"], y["ffn_up"]
        kernel = gate_kernel(config.feed_forward_length, self.tokens, config.architecture.gelu)
        program.add(kernel, (gate, up, gate.strides[0], state))
        self._linears(program, {"ffn_down": layers["ffn_down"]}, gate, state)
        self._add(y["ffn_down"], block, "post_ffw_norm")

    def _output(self) -> None:
        model = self.decoder.model
        linear = model.output.require_compiled()
        self.logits = aligned((1, linear.padded_rows), np.float32)
        normed = aligned((1, self.d), np.float32)
        self.last_row = self.x if self.head is self.program else aligned((1, self.d), np.float32)
        self._norm(self.head, self.last_row, _numpy(model.output_norm), normed, self.last)
        self._linears(self.head, {"output": model.output}, normed, self.last)


def _rotation_tables(frequencies: torch.Tensor, magnitude: float, capacity: int) -> np.ndarray:
    """Cosines, then sines, of every position's angles: float32 [2, capacity, rotated / 2]."""
    angles = torch.arange(capacity, dtype=torch.float64)[:, None] * frequencies
    return (magnitude * torch.stack((angles.cos(), angles.sin()))).float().numpy()


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()
