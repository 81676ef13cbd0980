"""GGUF metadata and tensor shapes → a frozen `ModelConfig`. Nothing here touches a weight.

Models of the architectures in `nkat.lm.architectures`, with the meaning llama.cpp gives their keys
(https://github.com/ggml-org/llama.cpp, src/models/*.cpp and src/llama-model.cpp). Whatever would make the forward pass
another one than llama.cpp's is refused: experts in groups, RoPE scaling other than linear, YaRN and longrope, unknown
tensors. Keys that mean something in other architectures only get a warning, as llama.cpp does not look at them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from nkat.gguf.file import TensorInfo
from nkat.gguf.names import block_number
from nkat.lm.architectures import (
    ARCHITECTURES,
    ATTENTION_CAP,
    BESIDE_NORMS,
    FUSED_QKV,
    LAYER_INPUTS,
    LOGIT_CAP,
    LONG_ROPE,
    QK_NORMS,
    QKV,
    ROPE_SWITCH,
    ROUTER,
    SCALES,
    SHARED_GATE,
    SHARED_KV,
    SHORT_ROPE,
    SINKS,
    TEMPERATURE,
    Architecture,
    Sizes,
)
from nkat.lm.keys import ConfigError, Keys
from nkat.lm.mixture import Mixture
from nkat.lm.recurrence import Recurrence
from nkat.lm.refused import refuse
from nkat.lm.rope import Rope, read_rope
from nkat.theta.set import SUFFIXES

# Elements of one attention head, of which every thread keeps one on its stack: 16 KB. The largest in use have 576.
MAX_HEAD = 4096


class Turning(Enum):
    """How RoPE turns q and k of a block."""

    SEES_ALL = 0  # by `ModelConfig.rope`
    WINDOW = 1  # by `ModelConfig.local_rope`
    NONE = 2  # not at all


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """What may differ from block to block. Lengths in elements.

    kv_block: whose keys and values its queries meet: its own, or those of an earlier block
    has_value: they come of a weight of their own; otherwise they are the keys, before norm and RoPE
    """

    kv_heads: int
    head_dim: int
    feed_forward: int
    kv_block: int
    has_value: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """All that the forward pass needs to know besides the weights. Lengths in elements, contexts in tokens.

    A model that multiplies what it adds to the residual stream by a number has that stream kept divided by it, so that
    nothing but the embedding's scale and the norms' epsilon knows: RMS norms do not see how long their input is.
    """

    architecture: Architecture
    context_length: int
    vocab_size: int
    embedding_length: int
    feed_forward_length: int
    block_count: int
    head_count: int
    kv_head_count: int
    head_dim: int
    rms_epsilon: float
    rope: Rope
    local_rope: Rope  # of blocks with a sliding window
    local_blocks: tuple[bool, ...]  # True: the block sees the last `sliding_window` tokens only, itself included
    sliding_window: int  # 0: none
    attention_scale: float  # multiplies q·k
    embedding_scale: float
    fused_qkv: frozenset[int] = frozenset()  # blocks that have q, k and v in one weight, in that order
    attention_cap: float = 0.0  # scores are kept within ±this (c·tanh(x/c)); 0: not
    logit_cap: float = 0.0
    temperature: float = 0.0  # see `query_scale`; 0: none
    temperature_length: int = 0
    unturned_blocks: frozenset[int] = frozenset()  # whose q and k RoPE leaves as they are
    logit_scale: float = 1.0  # logits are divided by it
    sizes: tuple[BlockSizes, ...] = ()  # of each block; none: all are as the fields above say
    idle: frozenset[str] = frozenset()  # weights that nothing reads: k and v of blocks that use an earlier one's
    mixture: Mixture | None = None  # in place of the one feed-forward network of every block, or beside it
    layer_input_length: int = 0  # of what every block adds about each token; 0: nothing
    recurrence: Recurrence | None = None
    recurrent_blocks: frozenset[int] = frozenset()  # which have what `recurrence` says in place of attention
    draft_blocks: range = range(0)  # blocks of the file that foretell later tokens, and that are left out

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> ModelConfig:
        """Reads and checks everything. Raises ConfigError naming the key or the tensor that is wrong."""
        config = _read(metadata, tensors)
        read = {name: info for name, info in tensors.items() if block_number(name) not in config.draft_blocks}
        _check_tensors(config, read)
        return config

    def check_length(self, tokens: int, what: str, beyond: bool = False) -> None:
        """Raises ConfigError for more tokens than the model was made for, unless they are wanted all the same.

        what: the flag that asks for them
        """
        if tokens > self.context_length and not beyond:
            raise ConfigError(
                f"{what}: {tokens} tokens are more than the {self.context_length} that the model was made for; "
                "--beyond-context runs them all the same"
            )

    def turning(self, block: int) -> Turning:
        """How RoPE turns a block's q and k."""
        if block in self.unturned_blocks:
            return Turning.NONE
        return Turning.WINDOW if self.local_blocks[block] else Turning.SEES_ALL

    def of(self, block: int) -> BlockSizes:
        """The sizes of a block."""
        if self.sizes:
            return self.sizes[block]
        return BlockSizes(self.kv_head_count, self.head_dim, self.feed_forward_length, block)

    @property
    def shared_blocks(self) -> frozenset[int]:
        """Blocks whose keys and values later ones use, too."""
        return frozenset(sizes.kv_block for i, sizes in enumerate(self.sizes) if sizes.kv_block != i)

    def has_own_kv(self, block: int) -> bool:
        return self.of(block).kv_block == block and block not in self.recurrent_blocks

    def qkv_rows(self, block: int) -> tuple[int, int, int]:
        """Outputs of a block's q, with those of its gate where it has one, k and v."""
        sizes = self.of(block)
        kv = sizes.kv_heads * sizes.head_dim
        return self._head_rows(block) * (2 if self.architecture.gated_attention else 1), kv, kv

    def _head_rows(self, block: int) -> int:
        """Elements of all query heads."""
        return self.head_count * self.of(block).head_dim

    def feed_forward(self, block: int) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the linear layers of a block's feed-forward network, by name."""
        ff, d, mixture = self.of(block).feed_forward, self.embedding_length, self.mixture
        if mixture is not None and not mixture.beside:
            return mixture.shared_linears(d)
        up = {"ffn_up": 2 * ff} if self.architecture.fused_gate_up else {"ffn_gate": ff, "ffn_up": ff}
        return {**{name: (outputs, d) for name, outputs in up.items()}, "ffn_down": (d, ff)}

    def linears(self, block: int) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of a block's linear layers, by name, in the order of their computation."""
        d, length, rows = self.embedding_length, self.layer_input_length, self.qkv_rows(block)
        if self.recurrence is not None and block in self.recurrent_blocks:
            return {**self.recurrence.linears(d), **self.feed_forward(block)}
        qkv = {FUSED_QKV: sum(rows)} if block in self.fused_qkv else dict(zip(QKV, rows, strict=True))
        if not self.has_own_kv(block):
            qkv = {"attn_q": rows[0]}
        elif not self.of(block).has_value:
            del qkv["attn_v"]
        return {
            **{name: (outputs, d) for name, outputs in qkv.items()},
            "attn_output": (d, self._head_rows(block)),
            **self.feed_forward(block),
            **({"inp_gate": (length, d), "proj": (d, length)} if length else {}),
            **{name: (rows[1], d) for name in QKV[1:] if f"blk.{block}.{name}.weight" in self.idle},
        }

    @property
    def has_gpu_step(self) -> bool:
        """Whether `nkat.engine.plan` has operations for all that it computes."""
        return self.mixture is None and self.architecture.has_gpu_step

    @property
    def active_experts(self) -> float:
        """The share of the experts that a token goes to; 1 without experts."""
        return 1.0 if self.mixture is None else self.mixture.active

    def norms(self, block: int) -> dict[str, tuple[int]]:
        """Lengths of the RMS norms of a block, by name (`Architecture.norm_in_file`)."""
        names = [name for name in self.architecture.block_norms if name != "attn_k_norm" or self.has_own_kv(block)]
        if block in self.recurrent_blocks:
            names = [name for name in names if name not in QK_NORMS]
        lengths = dict.fromkeys(names, self.embedding_length)
        wide = dict(zip(QK_NORMS, self.qkv_rows(block)[:2], strict=True))
        for name in lengths.keys() & wide.keys():
            lengths[name] = wide[name] if self.architecture.wide_qk_norm else self.of(block).head_dim
        if self.mixture is not None and self.mixture.beside:
            lengths |= dict.fromkeys(BESIDE_NORMS, self.embedding_length)
        if self.layer_input_length:
            lengths["post_norm"] = self.embedding_length
        return {name: (length,) for name, length in lengths.items()}

    def query_scale(self, position: float) -> float:
        """What a query is multiplied by for its place: 1, and more for later ones where the model was made so."""
        if not self.temperature:
            return 1.0
        return 1.0 + self.temperature * math.log1p(math.floor(position / self.temperature_length))


def _read(metadata: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> ModelConfig:
    arch = metadata.get("general.architecture")
    if arch is None:
        raise ConfigError("metadata general.architecture is missing: this GGUF is not a language model")
    architecture = ARCHITECTURES.get(arch) if isinstance(arch, str) else None
    if architecture is None:
        raise ConfigError(
            f"architecture {arch!r} is not supported; nkat_gguf_converter.py makes a Θ for it from its weights, and "
            "llama-perplexity --lora measures that as an adapter (--export-lora); the supported ones are "
            f"{', '.join(ARCHITECTURES)}"
        )
    keys = Keys(metadata, architecture)
    refuse(keys)
    mixture = Mixture.read(keys, tensors)

    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(without_ones(embedding.shape, 2)) != 2:
        raise ConfigError("tensor token_embd.weight is missing or not 2-D: this GGUF is not a language model")
    vocab_size = embedding.shape[-2]  # whatever `vocab_size` says: llama.cpp goes by the tokenizer's tokens

    d = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    in_file = keys.blocks_in_file
    if in_file > len(tensors):  # else a hostile count would make the loops and tuples below as long as it likes
        raise ConfigError(f"metadata {arch}.block_count is {in_file}, but the file has only {len(tensors)} tensors")
    blocks = in_file - keys.integer("nextn_predict_layers", 0, minimum=0, maximum=in_file - 1)
    kv_heads = _by_block(keys, "attention.head_count_kv", blocks, heads)
    for count in kv_heads:
        if heads % count:
            raise ConfigError(
                f"metadata {arch}.attention.head_count {heads} is no multiple of attention.head_count_kv {count}"
            )
    if keys.get("attention.key_length") is None and d % heads:
        raise ConfigError(f"metadata {arch}.embedding_length {d} is no multiple of attention.head_count {heads}")
    head_dim = keys.integer("attention.key_length", d // heads)
    if head_dim > MAX_HEAD:
        raise ConfigError(f"metadata {arch}.attention.key_length: a head of {head_dim} elements, more than {MAX_HEAD}")
    has_window = architecture.window is not None
    local_dim = keys.integer("attention.key_length_swa", head_dim, maximum=MAX_HEAD) if has_window else head_dim
    lengths = [("attention.value_length", head_dim)]
    if has_window:
        lengths.append(("attention.key_length_swa", local_dim if architecture.varied else head_dim))
        lengths.append(("attention.value_length_swa", local_dim))
    for key, length in lengths:
        if keys.integer(key, length) != length:
            raise ConfigError(
                f"metadata {arch}.{key} {keys.get(key)} differs from the key length {length}: not supported"
            )

    context = keys.integer("context_length")
    rope, local_rope = read_rope(keys, head_dim, local_dim, context)
    temperature = keys.number(TEMPERATURE) if TEMPERATURE in architecture.reads and keys.get(TEMPERATURE) else 0.0
    window, local_blocks = _read_window(keys, blocks)
    embedding_scale, residual_scale, attention_scale, logit_scale = (_read_scale(keys, key) for key in SCALES)
    residual = residual_scale or 1.0
    feed_forward = _by_block(keys, "feed_forward_length", blocks, None if mixture is None or mixture.beside else 1)
    recurrence, recurrent_blocks = Recurrence.read(keys, blocks, tensors)
    sizes = _read_sizes(keys, local_blocks, (head_dim, local_dim), kv_heads, feed_forward, tensors)
    return ModelConfig(
        architecture=architecture,
        context_length=context,
        vocab_size=vocab_size,
        embedding_length=d,
        feed_forward_length=max(feed_forward),
        block_count=blocks,
        head_count=heads,
        kv_head_count=max(kv_heads),
        head_dim=head_dim,
        rms_epsilon=keys.number("attention.layer_norm_rms_epsilon") / residual**2,
        rope=rope,
        local_rope=local_rope,
        local_blocks=local_blocks,
        sliding_window=window,
        attention_scale=attention_scale or architecture.attention_scale(Sizes(blocks, d, heads, head_dim)),
        embedding_scale=(d**0.5 if architecture.scaled_embedding else embedding_scale or 1.0) / residual,
        fused_qkv=frozenset(i for i in range(blocks) if f"blk.{i}.{FUSED_QKV}.weight" in tensors) - recurrent_blocks,
        attention_cap=_read_cap(keys, ATTENTION_CAP, architecture.attention_cap),
        logit_cap=_read_cap(keys, LOGIT_CAP, architecture.logit_cap),
        temperature=temperature,
        temperature_length=rope.original_context,
        unturned_blocks=frozenset(i for i in range(blocks) if _is_unturned(keys, i)),
        logit_scale=logit_scale or 1.0,
        sizes=sizes if architecture.varied else (),
        idle=frozenset(
            name
            for i, block in enumerate(sizes)
            for name in (f"blk.{i}.{linear}.weight" for linear in QKV[1:])
            if block.kv_block != i and name in tensors
        ),
        mixture=mixture,
        layer_input_length=_if_read(keys, LAYER_INPUTS),
        recurrence=recurrence,
        recurrent_blocks=recurrent_blocks,
        draft_blocks=range(blocks, in_file),
    )


def _by_block(keys: Keys, key: str, blocks: int, default: int | None = None) -> list[int]:
    """One number for each block; only where the architecture allows it may they differ."""
    if keys.architecture.varied:
        return keys.per_block(key, blocks, default)
    return [keys.integer(key, default)] * blocks


def _read_sizes(
    keys: Keys,
    local_blocks: Sequence[bool],
    head_dims: tuple[int, int],
    kv_heads: Sequence[int],
    feed_forward: Sequence[int],
    tensors: Mapping[str, TensorInfo],
) -> tuple[BlockSizes, ...]:
    """head_dims: of blocks that see everything, and of those with a window.

    The last blocks, where the file says so, use the keys and values of the last block of their kind before them.
    """
    blocks = len(local_blocks)
    own = blocks - _if_read(keys, SHARED_KV)

    def kv_block(i: int) -> int:
        if i < own:
            return i
        source = own - (2 if local_blocks[i] else 1)
        if own < 2 or local_blocks[source] != local_blocks[i]:
            raise ConfigError(
                f"metadata {keys.name(SHARED_KV)} {blocks - own}: block {i} would use the keys of block {source}, "
                "which does not see the same tokens"
            )
        return source

    return tuple(
        BlockSizes(
            kv_heads[kv_block(i)],
            head_dims[local],
            feed_forward[i],
            kv_block(i),
            not keys.architecture.varied or any(f"blk.{i}.{name}.weight" in tensors for name in ("attn_v", FUSED_QKV)),
        )
        for i, local in enumerate(local_blocks)
    )


def _if_read(keys: Keys, key: str) -> int:
    """0: the file has none, or the architecture does not look at it"""
    return keys.integer(key, 0, minimum=0) if key in keys.architecture.reads else 0


def _read_scale(keys: Keys, key: str) -> float:
    """0: the file has none, or the architecture does not look at it"""
    if key not in keys.architecture.reads or keys.get(key) in (None, 0):
        return 0.0
    return keys.number(key)


def _is_unturned(keys: Keys, block: int) -> bool:
    if ROPE_SWITCH in keys.architecture.reads and keys.get(ROPE_SWITCH) is False:
        return True
    period = keys.architecture.unturned_period
    return period > 0 and block % period == period - 1


def _read_cap(keys: Keys, key: str, usual: float) -> float:
    """0: none"""
    value = keys.get(key) if key in keys.architecture.reads else None
    return usual if value is None else 0.0 if value == 0 else keys.number(key)


def _read_window(keys: Keys, blocks: int) -> tuple[int, tuple[bool, ...]]:
    """The window's length (0: none) and which blocks have it."""
    none = 0, (False,) * blocks
    window = keys.architecture.window
    if window is None:
        return none
    length = keys.integer("attention.sliding_window", window.length, minimum=0)
    if length == 0:
        return none
    name = "attention.sliding_window_pattern"
    pattern = keys.metadata.get(keys.name(name))
    if isinstance(pattern, np.ndarray):
        return length, tuple(bool(value) for value in keys.by_block(name, pattern)[:blocks])
    period = keys.integer(name, window.period, minimum=0)
    return length, tuple(period == 0 or i % period < period - 1 for i in range(blocks))


def without_ones(shape: tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    """A shape without the ones before its last so many dimensions: ggml, which writes them last, ignores them."""
    extra = len(shape) - dimensions
    return shape[extra:] if extra > 0 and set(shape[:extra]) == {1} else shape


def _scales(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Numbers beside the weights of these shapes, as NVFP4 files have them: one of each, or one of each expert.

    What the inputs were divided by when they were packed is not used, as by llama.cpp.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        stem, _, kind = name.rpartition(".")
        one = (shape[0],) if len(shape) == 3 else (1,)
        if kind == "weight" and stem.rpartition(".")[2] in architecture.scaled:
            found |= {f"{stem}.scale": one, f"{stem}.input_scale": one}
    return found


def _check_tensors(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> None:
    """Every tensor that the model needs is there, has the shape it must have, and there is none besides."""
    architecture, d, v = config.architecture, config.embedding_length, config.vocab_size
    required: dict[str, tuple[int, ...]] = {"token_embd.weight": (v, d), "output_norm.weight": (d,)}
    optional: dict[str, tuple[int, ...]] = {"output.weight": (v, d)}
    factors: tuple[str, ...] = ("rope_freqs",) if architecture.rope_factors else ()
    factors += (SHORT_ROPE, LONG_ROPE) if architecture.long_rope else ()
    optional |= {f"{name}.weight": (config.rope.dimensions // 2,) for name in factors}
    if config.layer_input_length:
        length = config.layer_input_length * config.block_count
        required |= {
            "per_layer_token_embd.weight": (v, length),
            "per_layer_model_proj.weight": (length, d),
            "per_layer_proj_norm.weight": (config.layer_input_length,),
        }
    if "output" in architecture.biases:
        optional["output.bias"] = (v,)
    for i in range(config.block_count):
        block = f"blk.{i}."
        for linear, (outputs, inputs) in config.linears(i).items():
            required[f"{block}{linear}.weight"] = (outputs, inputs)
            if architecture.may_have_bias(linear) and i not in config.recurrent_blocks:
                optional[f"{block}{linear}.bias"] = (outputs,)
        norms = config.norms(i).items()
        required |= {f"{block}{architecture.norm_in_file(norm)}.weight": shape for norm, shape in norms}
        if architecture.qk_norm and not config.has_own_kv(i):
            optional[f"{block}attn_k_norm.weight"] = (config.of(i).head_dim,)  # llama.cpp, too, reads past it
        if architecture.sinks:
            required[f"{block}{SINKS}.weight"] = (config.head_count,)
        if config.recurrence is not None and i in config.recurrent_blocks:
            required |= {f"{block}{name}": shape for name, shape in config.recurrence.vectors().items()}
        if config.mixture is not None:
            weights = config.mixture.weights(d)
            required |= {f"{block}{name}.weight": shape for name, shape in weights.items()}
            biases = {name: shape[:-1] for name, shape in weights.items() if architecture.may_have_bias(name)}
            optional |= {f"{block}{name}.bias": shape for name, shape in biases.items()}
            if architecture.experts is not None and architecture.experts.shared_gate:
                required[f"{block}{SHARED_GATE}.weight"] = (d,)
            if config.mixture.beside:
                required[f"{block}{ROUTER}.scale"] = (d,)
        if architecture.block_scale:
            optional[f"{block}layer_output_scale.weight"] = (1,)

    optional |= _scales(architecture, required | optional)

    for name, shape in (required | optional).items():
        info = tensors.get(name)
        if info is None:
            if name in required:
                raise ConfigError(f"tensor {name} is missing, expected with shape {shape}")
        elif without_ones(info.shape, len(shape)) != shape:
            raise ConfigError(f"tensor {name} has shape {info.shape}, expected {shape}")
    known = required.keys() | optional.keys()
    known |= {*architecture.unread}
    for name in tensors:
        if name not in known and not name.endswith(SUFFIXES):
            raise ConfigError(
                f"tensor {name} is unknown in a {architecture.name} model of {config.block_count} blocks; "
                "it would be left out of the computation"
            )
