"""GGUF metadata and tensor shapes → a frozen `ModelConfig`. Nothing here touches a weight.

Models of the architectures in `nkat.lm.architectures`, with the meaning llama.cpp gives their keys
(https://github.com/ggml-org/llama.cpp, src/models/*.cpp and src/llama-model.cpp). Whatever would make the forward pass
another one than the file asks for is refused: experts in groups, keys that another architecture reads, RoPE scaling
other than linear, YaRN and longrope, unknown tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from nkat.errors import NKATError
from nkat.gguf.file import TensorInfo
from nkat.lm.architectures import (
    ARCHITECTURES,
    ATTENTION_CAP,
    FUSED_QKV,
    LOGIT_CAP,
    LONG_ROPE,
    QK_NORMS,
    QKV,
    ROUTER,
    SINKS,
    STACKS,
    TEMPERATURE,
    YARN_KEYS,
    Architecture,
    Sizes,
)
from nkat.theta.set import SUFFIXES

# Keys that change the forward pass in a way that is not computed, unless the architecture's row says that it reads
# them; and the values with which they do not.
_REFUSED: dict[str, tuple[bool | float, ...]] = {
    "nextn_predict_layers": (0,),
    "expert_group_count": (0, 1),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    ATTENTION_CAP: (0.0,),
    LOGIT_CAP: (0.0,),
    TEMPERATURE: (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    **dict(zip(YARN_KEYS, ((32.0,), (1.0,), (0.0,)), strict=True)),
}


# Sizes that a file may ask for. Lengths, counts and positions are signed 32-bit integers in llama.cpp, too.
MAX_SIZE = (1 << 31) - 1
# Elements of one attention head, of which every thread keeps one on its stack: 16 KB. The largest in use have 576.
MAX_HEAD = 4096
MAX_EXPERTS = 1024  # as in llama.cpp


class ConfigError(NKATError):
    """The metadata or the tensors do not describe a model this toolkit can run; the message names the key or tensor."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding of one kind of block.

    interleaved: pairs are elements (2i, 2i+1) ("norm"); otherwise (i, i + dimensions/2) ("neox")
    dimensions: leading elements of a head that are rotated; the others pass unchanged
    base: pair i turns by base^(-2i/dimensions) radians a position
    scale: multiplies positions; 1/factor of linear scaling and, for the slow pairs only, of YaRN
    yarn: blend between scaled and unscaled by pair, for a model trained on `original_context` tokens: pairs that turn
    more than `fast` times in them are not scaled, those that turn less than `slow` times are
    magnitude: multiplies both sine and cosine
    The factors for long contexts (longrope) take effect where there is room for more than `original_context` tokens.
    """

    interleaved: bool
    dimensions: int
    base: float
    scale: float
    yarn: bool
    original_context: int
    magnitude: float
    fast: float = 32.0
    slow: float = 1.0


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of experts: how many there are, how many a token goes to, the length of an expert's inner vector."""

    count: int
    used: int
    feed_forward_length: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """All that the forward pass needs to know besides the weights. Lengths in elements, contexts in tokens."""

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
    mixture: Mixture | None = None  # in place of the one feed-forward network of every block

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> ModelConfig:
        """Reads and checks everything. Raises ConfigError naming the key or the tensor that is wrong."""
        config = _read(metadata, tensors)
        _check_tensors(config, tensors)
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

    def qkv_rows(self, block: int) -> tuple[int, int, int]:
        """Outputs of a block's q, k and v."""
        kv = self.kv_head_count * self.head_dim
        return self.head_count * self.head_dim, kv, kv

    def linears(self, block: int) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of a block's linear layers, by name, in the order of their computation."""
        d, ff = self.embedding_length, self.feed_forward_length
        rows = self.qkv_rows(block)
        qkv = {FUSED_QKV: sum(rows)} if block in self.fused_qkv else dict(zip(QKV, rows, strict=True))
        up = {"ffn_up": 2 * ff} if self.architecture.fused_gate_up else {"ffn_gate": ff, "ffn_up": ff}
        attention = {**{name: (outputs, d) for name, outputs in qkv.items()}, "attn_output": (d, rows[0])}
        if self.mixture is not None:
            return attention
        return {**attention, **{name: (outputs, d) for name, outputs in up.items()}, "ffn_down": (d, ff)}

    def stacks(self) -> dict[str, tuple[int, int, int]]:
        """(experts, outputs, inputs) of a mixture's weights, by name."""
        assert self.mixture is not None
        count, d, ff = self.mixture.count, self.embedding_length, self.mixture.feed_forward_length
        return dict(zip(STACKS, ((count, ff, d), (count, ff, d), (count, d, ff)), strict=True))

    @property
    def active_experts(self) -> float:
        """The share of the experts that a token goes to; 1 without experts."""
        return 1.0 if self.mixture is None else self.mixture.used / self.mixture.count

    def query_scale(self, position: float) -> float:
        """What a query is multiplied by for its place: 1, and more for later ones where the model was made so."""
        if not self.temperature:
            return 1.0
        return 1.0 + self.temperature * math.log1p(math.floor(position / self.temperature_length))

    def norm_shape(self, norm: str) -> tuple[int]:
        """Of one of the architecture's block norms."""
        return (self.head_dim,) if norm in QK_NORMS else (self.embedding_length,)


class _Keys:
    """Typed, checked look-ups of `{architecture}.{key}`."""

    def __init__(self, metadata: Mapping[str, object], architecture: Architecture) -> None:
        self.metadata, self.architecture = metadata, architecture

    def name(self, key: str) -> str:
        return f"{self.architecture.name}.{key}"

    def get(self, key: str) -> object:
        """The value or None; an array with one value for every block counts as that value."""
        value = self.metadata.get(self.name(key))
        if isinstance(value, np.ndarray):
            distinct = np.unique(value)
            if len(distinct) != 1:
                raise ConfigError(f"metadata {self.name(key)} differs from block to block, which is not supported")
            return distinct[0].item()
        return value

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"metadata {self.name(key)} must be an integer, got {value!r}")
        if value < minimum:
            raise ConfigError(f"metadata {self.name(key)} must be at least {minimum}, got {value}")
        if value > maximum:
            raise ConfigError(f"metadata {self.name(key)} must be at most {maximum}, got {value}")
        return value

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"metadata {self.name(key)} must be a number, got {value!r}")
        if not (math.isfinite(value) and value > above):
            raise ConfigError(f"metadata {self.name(key)} must be a finite number above {above:g}, got {value}")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self._required(key, default)
        if not isinstance(value, str):
            raise ConfigError(f"metadata {self.name(key)} must be a string, got {value!r}")
        return value

    def _required(self, key: str, default: object) -> object:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"metadata {self.name(key)} is missing")
        return value


def _read(metadata: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> ModelConfig:
    arch = metadata.get("general.architecture")
    if arch is None:
        raise ConfigError("metadata general.architecture is missing: this GGUF is not a language model")
    architecture = ARCHITECTURES.get(arch) if isinstance(arch, str) else None
    if architecture is None:
        raise ConfigError(f"architecture {arch!r} is not supported; the supported ones are {', '.join(ARCHITECTURES)}")
    keys = _Keys(metadata, architecture)
    _refuse(keys)

    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(without_ones(embedding.shape, 2)) != 2:
        raise ConfigError("tensor token_embd.weight is missing or not 2-D: this GGUF is not a language model")
    vocab_size = keys.integer("vocab_size", embedding.shape[-2])

    d = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise ConfigError(
            f"metadata {arch}.attention.head_count {heads} is no multiple of attention.head_count_kv {kv_heads}"
        )
    if keys.get("attention.key_length") is None and d % heads:
        raise ConfigError(f"metadata {arch}.embedding_length {d} is no multiple of attention.head_count {heads}")
    head_dim = keys.integer("attention.key_length", d // heads)
    if head_dim > MAX_HEAD:
        raise ConfigError(f"metadata {arch}.attention.key_length: a head of {head_dim} elements, more than {MAX_HEAD}")
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        if keys.integer(key, head_dim) != head_dim:
            raise ConfigError(
                f"metadata {arch}.{key} {keys.get(key)} differs from the key length {head_dim}: not supported"
            )

    blocks = keys.integer("block_count")
    if blocks > len(tensors):  # else a hostile count would make the loops and tuples below as long as it likes
        raise ConfigError(f"metadata {arch}.block_count is {blocks}, but the file has only {len(tensors)} tensors")
    context = keys.integer("context_length")
    rope, local_rope = _read_rope(keys, head_dim, context)
    temperature = 0.0 if keys.get(TEMPERATURE) in (None, 0) else keys.number(TEMPERATURE)
    window, local_blocks = _read_window(keys, blocks)
    return ModelConfig(
        architecture=architecture,
        context_length=context,
        vocab_size=vocab_size,
        embedding_length=d,
        feed_forward_length=keys.integer("feed_forward_length", 0 if architecture.experts else None, minimum=0),
        block_count=blocks,
        head_count=heads,
        kv_head_count=kv_heads,
        head_dim=head_dim,
        rms_epsilon=keys.number("attention.layer_norm_rms_epsilon"),
        rope=rope,
        local_rope=local_rope,
        local_blocks=local_blocks,
        sliding_window=window,
        attention_scale=architecture.attention_scale(Sizes(blocks, d, heads, head_dim)),
        embedding_scale=d**0.5 if architecture.scaled_embedding else 1.0,
        fused_qkv=frozenset(i for i in range(blocks) if f"blk.{i}.{FUSED_QKV}.weight" in tensors),
        attention_cap=_read_cap(keys, ATTENTION_CAP, architecture.attention_cap),
        logit_cap=_read_cap(keys, LOGIT_CAP, architecture.logit_cap),
        temperature=temperature,
        temperature_length=rope.original_context,
        mixture=_read_mixture(keys) if architecture.experts else None,
    )


def _read_mixture(keys: _Keys) -> Mixture:
    count = keys.integer("expert_count", minimum=2, maximum=MAX_EXPERTS)
    used = keys.integer("expert_used_count", maximum=count)
    # older files of qwen3moe have no length of an expert's own (src/models/qwen3moe.cpp)
    length = keys.integer("expert_feed_forward_length", keys.integer("feed_forward_length", 0, minimum=0) // used)
    return Mixture(count, used, length)


def _read_cap(keys: _Keys, key: str, usual: float) -> float:
    """0: none"""
    value = keys.get(key)
    return usual if value is None else 0.0 if value == 0 else keys.number(key)


def _refuse(keys: _Keys) -> None:
    for key in ("expert_count", "expert_used_count"):
        count = keys.get(key)
        if count not in (None, 0) and not keys.architecture.experts:
            name = keys.architecture.name
            raise ConfigError(
                f"metadata {keys.name(key)} is {count!r}: mixtures of experts are not supported in {name} models"
            )
    for key, neutral in _REFUSED.items():
        value = keys.get(key)
        if value is not None and value not in neutral and key not in keys.architecture.reads:
            raise ConfigError(f"metadata {keys.name(key)} = {value!r} is not supported")


def _read_rope(keys: _Keys, head_dim: int, context: int) -> tuple[Rope, Rope]:
    """RoPE of blocks that see everything, and of blocks with a sliding window."""
    dimensions = keys.integer("rope.dimension_count", head_dim)
    if dimensions % 2 or dimensions > head_dim:
        raise ConfigError(
            f"metadata {keys.name('rope.dimension_count')} must be even and at most {head_dim}, got {dimensions}"
        )
    if keys.integer("rope.dimension_count_swa", dimensions) != dimensions:
        raise ConfigError(f"metadata {keys.name('rope.dimension_count_swa')} differs from the other: not supported")
    kind = keys.text("rope.scaling.type", "linear")
    kinds = ("none", "linear", "yarn", *(("longrope",) if keys.architecture.long_rope else ()))
    if kind not in kinds:
        raise ConfigError(
            f"metadata {keys.name('rope.scaling.type')} {kind!r} is not supported, only {' and '.join(kinds)}"
        )
    # Files older than rope.scaling.* wrote rope.scale_linear; 0 stands for "no scaling" in both.
    factor_key = "rope.scaling.factor" if keys.get("rope.scaling.factor") is not None else "rope.scale_linear"
    factor = keys.number(factor_key, 1.0) if keys.get(factor_key) not in (None, 0) else 1.0
    if kind == "none":
        factor = 1.0
    if kind == "yarn" and factor < 1.0:
        raise ConfigError(f"metadata {keys.name('rope.scaling.factor')} must be at least 1 for yarn, got {factor:g}")
    attention_factor = keys.number("rope.scaling.attn_factor", 1.0)
    fast, slow, log_multiplier = (
        keys.number(key, usual, above=-1.0) if key in keys.architecture.reads else usual
        for key, usual in zip(YARN_KEYS, (32.0, 1.0, 0.0), strict=True)
    )
    # YaRN's attention temperature, folded into q and k as llama.cpp does it
    warmth = (1.0 + 0.1 * math.log(factor)) / (1.0 + 0.1 * log_multiplier * math.log(factor)) if kind == "yarn" else 1.0
    rope = Rope(
        interleaved=keys.architecture.interleaved_rope,
        dimensions=dimensions,
        base=keys.number("rope.freq_base", 10000.0, above=1.0),
        scale=1.0 / factor,
        yarn=kind == "yarn",
        original_context=keys.integer("rope.scaling.original_context_length", context),
        magnitude=attention_factor * warmth,
        fast=fast,
        slow=slow,
    )
    window = keys.architecture.window
    if window is None or window.rope_base is None:
        return rope, replace(rope, base=keys.number("rope.freq_base_swa", rope.base, above=1.0))
    local_base = keys.number("rope.freq_base_swa", window.rope_base, above=1.0)
    return rope, replace(rope, base=local_base, scale=1.0, yarn=False, magnitude=attention_factor)


def _read_window(keys: _Keys, blocks: int) -> tuple[int, tuple[bool, ...]]:
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
        if len(pattern) != blocks:
            raise ConfigError(f"metadata {keys.name(name)} has {len(pattern)} values for {blocks} blocks")
        return length, tuple(bool(value) for value in pattern)
    period = keys.integer(name, window.period, minimum=0)
    return length, tuple(period == 0 or i % period < period - 1 for i in range(blocks))


def without_ones(shape: tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    """A shape without the ones before its last so many dimensions: ggml, which writes them last, ignores them."""
    extra = len(shape) - dimensions
    return shape[extra:] if extra > 0 and set(shape[:extra]) == {1} else shape


def _check_tensors(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> None:
    """Every tensor that the model needs is there, has the shape it must have, and there is none besides."""
    architecture, d, v = config.architecture, config.embedding_length, config.vocab_size
    required: dict[str, tuple[int, ...]] = {"token_embd.weight": (v, d), "output_norm.weight": (d,)}
    optional: dict[str, tuple[int, ...]] = {"output.weight": (v, d)}
    factors = (*(("rope_freqs",) if architecture.rope_factors else ()), *(LONG_ROPE if architecture.long_rope else ()))
    optional |= {f"{name}.weight": (config.rope.dimensions // 2,) for name in factors}
    if "output" in architecture.biases:
        optional["output.bias"] = (v,)
    for i in range(config.block_count):
        block = f"blk.{i}."
        for linear, (outputs, inputs) in config.linears(i).items():
            required[f"{block}{linear}.weight"] = (outputs, inputs)
            if architecture.may_have_bias(linear):
                optional[f"{block}{linear}.bias"] = (outputs,)
        required |= {f"{block}{norm}.weight": config.norm_shape(norm) for norm in architecture.block_norms}
        if architecture.sinks:
            required[f"{block}{SINKS}.weight"] = (config.head_count,)
        if config.mixture is not None:
            stacks: dict[str, tuple[int, ...]] = {ROUTER: (config.mixture.count, d), **config.stacks()}
            required |= {f"{block}{name}.weight": shape for name, shape in stacks.items()}
            biases = {name: shape[:-1] for name, shape in stacks.items() if architecture.may_have_bias(name)}
            optional |= {f"{block}{name}.bias": shape for name, shape in biases.items()}

    for name, shape in (required | optional).items():
        info = tensors.get(name)
        if info is None:
            if name in required:
                raise ConfigError(f"tensor {name} is missing, expected with shape {shape}")
        elif without_ones(info.shape, len(shape)) != shape:
            raise ConfigError(f"tensor {name} has shape {info.shape}, expected {shape}")
    known = required.keys() | optional.keys()
    for name in tensors:
        if name not in known and not name.endswith(SUFFIXES):
            raise ConfigError(
                f"tensor {name} is unknown in a {architecture.name} model of {config.block_count} blocks; "
                "it would be left out of the computation"
            )
