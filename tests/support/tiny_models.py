"""Tiny random models as GGUF files that llama.cpp loads too: one call, one file of some hundred kilobytes.

The weights are random, the shapes are not: grouped-query attention, QKV biases, q/k norms, RoPE scaling and sliding
windows are as in the real architecture. A tensor's values depend on the seed, its name and its shape only, so variants
of one seed share the tensors they have in common. Limits: the architectures of `ARCHITECTURES`; quantised types
are those that `tests.support.random_blocks` can make (no K-quants).
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.support.random_blocks import pack

LOGIT_STD = 3.0  # a softmax over these is neither flat nor one-hot
SCORE_GAIN = 1.5  # on q and on k: attention scores get a standard deviation of about 2

_MERGES = ("Ġ t", "h e", "Ġt he", "i n", "Ġ a", "a n", "an d", "o n", "e r", "r e", "Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ")
_PIECES = ("▁t", "he", "▁the", "in", "▁a", "an", "and", "on", "er", "re", "▁▁", "▁▁▁▁", "th")
_LETTERS = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,'é世"


@dataclass(frozen=True, slots=True)
class TinyOptions:
    """What a tiny model may differ in. Lengths in elements."""

    blocks: int = 3
    embedding: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None  # None: embedding / heads
    feed_forward: int = 96
    context: int = 2048
    epsilon: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    qk_gain: float = SCORE_GAIN  # of these norms
    wide_qk_norm: bool = False  # of all heads together
    pre_norm: bool = True
    post_norm: bool = False
    post_gain: float = 4.0  # of these norms: large, or scaled and tied embeddings make every token predict itself
    qtype: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32  # of every tensor of 2 or 3 dimensions
    qtypes: Mapping[str, gguf.GGMLQuantizationType] | None = None  # of single ones, by name
    tied: bool = False  # True: no output.weight
    freq_base: float = 10000.0
    freq_base_swa: float | None = None  # {arch}.rope.freq_base_swa; left out when None (readers assume 10000)
    rope_scaling: Mapping[str, str | int | float] | None = None  # keys under {arch}.rope.scaling
    rotary: int | None = None  # elements of a head that RoPE turns; None: all
    long_factors: bool = False  # rope_factors_short.weight and rope_factors_long.weight, as Phi-3 has
    # gemma4: which blocks have a window; with it their heads' length, KV heads and feed-forward length by block, how
    # many of the last blocks use the keys of earlier ones, numbers that a block adds about a token, a scale of its own
    local: tuple[bool, ...] | None = None
    local_head_dim: int | None = None
    kv_heads_by_block: tuple[int, ...] | None = None
    feed_forward_by_block: tuple[int, ...] | None = None
    shared_kv: int = 0
    idle_kv: bool = False  # these have keys and values of their own all the same, which nobody reads
    layer_inputs: int = 0
    block_scale: bool = False
    keys_are_values: bool = False  # of blocks that see everything
    fused_qkv: bool = False
    fused_gate_up: bool = False
    metadata: Mapping[str, str | int | float] | None = None  # further keys under {arch}.
    rope_factors: bool = False  # rope_freqs.weight: one divisor for each rotated pair, as Llama 3.1 has
    sliding_window: int | None = None  # with it, gemma3's blocks 5, 11, ... see everything and the others the window
    experts: int = 0  # of a mixture in place of the feed-forward network, each of `feed_forward` inner elements
    experts_used: int = 2
    expert_length: bool = True  # expert_feed_forward_length is in the file
    beside: bool = False  # gemma4: with a feed-forward network for all tokens beside it, more norms and scales
    fused_experts: bool = False  # gate and up in one weight
    shared_length: int = 0  # inner elements of an expert that every token goes to
    shared_gate: bool = False  # of that expert
    expert_bias: bool = False  # and of the router and the attention's output
    sinks: bool = False
    ffn_norm: str = "ffn_norm"
    # qwen35: value heads of the blocks without attention (0: all blocks have it), their key heads, elements of a head,
    # which blocks have attention; a gate on attention; M-RoPE's sections
    value_heads: int = 0
    key_heads: int = 2
    state: int = 16
    kernel: int = 4
    interval: int = 4
    grouped: bool = False
    fused_inputs: bool = False  # old files of qwen3next: one weight for queries, keys, values and gates
    attention_gate: bool = False
    sections: tuple[int, ...] | None = None
    scaled: tuple[str, ...] = ()  # weights with a scale beside them, and one of their inputs that nobody reads
    draft: int = 0  # blocks behind the others that foretell later tokens, and that no forward pass reads
    vocab: str = "gpt2"  # or "spm"
    pre: str = "qwen2"  # tokenizer.ggml.pre of a gpt2 vocabulary
    add_bos: bool = False
    chat_template: str | None = None


_GATED_EXPERTS: dict[str, Any] = {"feed_forward": 48, "experts": 6, "shared_length": 32, "shared_gate": True}
_QWEN35 = TinyOptions(
    blocks=4,
    head_dim=24,
    rotary=12,
    qk_norm=True,
    ffn_norm="post_attention_norm",
    value_heads=4,
    attention_gate=True,
    sections=(2, 2, 2, 0),
    pre="qwen35",
)

# An architecture's usual choices. On purpose not made from the toolkit's own rows: llama.cpp is the judge of both.
ARCHITECTURES = {
    "llama": TinyOptions(epsilon=1e-5, pre="llama-bpe"),
    "qwen2": TinyOptions(qkv_bias=True),
    "qwen3": TinyOptions(head_dim=24, qk_norm=True),
    "gemma3": TinyOptions(head_dim=24, qk_norm=True, post_norm=True, vocab="spm", tied=True, add_bos=True),
    "gemma2": TinyOptions(head_dim=24, post_norm=True, vocab="spm", tied=True, add_bos=True),
    "gemma4": TinyOptions(
        blocks=6,
        head_dim=24,
        qk_norm=True,
        qk_gain=0.7,  # scores are not divided by anything
        post_norm=True,
        post_gain=2.5,
        vocab="spm",
        tied=True,
        add_bos=True,
        rope_factors=True,
        sliding_window=6,
        local=(True, False, True, False, True, False),
        local_head_dim=16,
        kv_heads_by_block=(2, 1, 2, 1, 2, 1),
        feed_forward_by_block=(96, 96, 96, 96, 160, 160),
        shared_kv=2,
        layer_inputs=8,
        block_scale=True,
    ),
    "phi3": TinyOptions(fused_qkv=True, fused_gate_up=True, epsilon=1e-5, vocab="spm", add_bos=True),
    "mistral3": TinyOptions(epsilon=1e-5, pre="tekken"),
    "smollm3": TinyOptions(blocks=5, pre="llama-bpe"),
    "glm4": TinyOptions(epsilon=1e-5, rotary=8, qkv_bias=True, post_norm=True, fused_gate_up=True, pre="glm4"),
    "granite": TinyOptions(
        epsilon=1e-5,
        pre="refact",
        metadata={"embedding_scale": 3.0, "residual_scale": 0.4, "attention.scale": 0.1, "logit_scale": 1.5},
    ),
    "granitemoe": TinyOptions(
        epsilon=1e-5,
        pre="refact",
        feed_forward=48,
        experts=6,
        expert_length=False,
        shared_length=40,
        metadata={"embedding_scale": 3.0, "residual_scale": 0.4, "attention.scale": 0.1, "logit_scale": 1.5},
    ),
    "olmo2": TinyOptions(wide_qk_norm=True, pre_norm=False, post_norm=True, pre="dbrx"),
    "qwen3moe": TinyOptions(head_dim=24, qk_norm=True, feed_forward=48, experts=6),
    "gpt-oss": TinyOptions(
        epsilon=1e-5,
        feed_forward=48,
        experts=6,
        qkv_bias=True,
        expert_bias=True,
        sinks=True,
        ffn_norm="post_attention_norm",
        sliding_window=6,
        pre="gpt-4o",
    ),
    "qwen35": _QWEN35,
    "qwen35moe": replace(_QWEN35, **_GATED_EXPERTS),
    "qwen3next": replace(_QWEN35, **_GATED_EXPERTS, grouped=True, sections=None, pre="qwen2", value_heads=6),
}

# What the architectures with features of their own are tested with, by the model, the compiled program, the GPU step.
FURTHER_FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"sliding_window": 6, "metadata": {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}}),
    ("gemma4", {}),
    ("gemma4", {"shared_kv": 0, "layer_inputs": 0, "keys_are_values": True, "block_scale": False}),
    ("phi3", {"long_factors": True, "rotary": 12, "metadata": {"rope.scaling.original_context_length": 30}}),
    (
        "mistral3",
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_context_length": 7, "yarn_log_multiplier": 0.5},
            "metadata": {"attention.temperature_scale": 0.3},
        },
    ),
    ("smollm3", {}),
    ("glm4", {}),
    ("granite", {}),
    (
        "olmo2",
        {
            "blocks": 5,
            "sliding_window": 6,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_context_length": 7},
        },
    ),
    ("qwen35", {"sections": (2, 1, 1, 2), "interval": 2, "value_heads": 6, "key_heads": 3}),
]

# As Gemma 4 26B-A4B is.
_26B: dict[str, Any] = {
    "experts": 6,
    "beside": True,
    "feed_forward": 48,
    "shared_kv": 0,
    "layer_inputs": 0,
    "keys_are_values": True,
}

# The same for mixtures of experts, which no step of the GPU's computes (`nkat.lm.config.ModelConfig.has_gpu_step`).
MIXTURE_FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3moe", {}),
    ("gpt-oss", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_context_length": 8}}),
    ("llama", {"experts": 6, "expert_length": False, "feed_forward": 48, "vocab": "spm", "add_bos": True}),
    ("mistral3", {"experts": 6, "expert_length": False, "feed_forward": 48}),
    ("granite", {"experts": 6, "expert_length": False, "feed_forward": 48}),
    ("granitemoe", {}),
    ("gemma4", {**_26B, "fused_experts": True}),
    ("gemma4", _26B),
    ("qwen35moe", {"fused_experts": True}),
    ("qwen35moe", {}),
    ("qwen3next", {"fused_inputs": True}),
    ("qwen3next", {}),
]


Packed = tuple[np.ndarray, gguf.GGMLQuantizationType]


def write_tiny_model(
    path: Path,
    arch: str,
    seed: int = 0,
    *,
    make: Callable[[str, tuple[int, ...]], Packed | None] | None = None,
    **options: Any,
) -> Path:
    """Write a tiny GGUF model to `path` (overwritten) and return `path`.

    The same arguments give bit-equal weights everywhere. make: weights of its own, packed, by name and shape; None: the
    usual ones. `options` are the fields of `TinyOptions`; an unknown one is a
    TypeError, an unknown architecture or vocabulary a ValueError.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"no tiny model for architecture {arch!r}: one of {', '.join(ARCHITECTURES)}")
    opts = replace(ARCHITECTURES[arch], **options)
    writer = gguf.GGUFWriter(path, arch)
    _add_hyperparameters(writer, arch, opts)
    vocab_size = _add_vocabulary(writer, opts)
    for name, shape, mean, std in _tensor_list(opts, vocab_size):
        if make is not None and (own := make(name, shape)) is not None:
            writer.add_tensor(name, own[0], raw_dtype=own[1])
            continue
        values = _random_tensor(seed, name, shape, mean, std)
        qtype = (opts.qtypes or {}).get(name, opts.qtype)
        if len(shape) > 1 and qtype != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, pack(values, qtype), raw_dtype=qtype)
        else:
            writer.add_tensor(name, values)
    for name, shape, _, _ in _tensor_list(opts, vocab_size):
        if name.endswith("weight") and name.split(".")[-2] in opts.scaled:
            one = shape[:1] if len(shape) == 3 else (1,)
            for kind in ("scale", "input_scale"):
                beside = name.removesuffix("weight") + kind
                writer.add_tensor(beside, _random_tensor(seed, beside, one, 0.8, 0.3))
    if opts.rope_factors:
        writer.add_tensor("rope_freqs.weight", np.linspace(1.0, 8.0, _rotary(opts) // 2, dtype=np.float32))
    if opts.long_factors:
        for name, largest in (("short", 2.0), ("long", 20.0)):
            factors = np.linspace(1.0, largest, _rotary(opts) // 2, dtype=np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _head_dim(opts: TinyOptions) -> int:
    return opts.embedding // opts.heads if opts.head_dim is None else opts.head_dim


def _sizes(opts: TinyOptions, block: int) -> tuple[int, int, int]:
    """Elements of a head, KV heads, feed-forward length of a block."""
    local = opts.local is not None and opts.local[block]
    head_dim = opts.local_head_dim if local and opts.local_head_dim else _head_dim(opts)
    kv_heads = opts.kv_heads_by_block[block] if opts.kv_heads_by_block else opts.kv_heads
    feed_forward = opts.feed_forward_by_block[block] if opts.feed_forward_by_block else opts.feed_forward
    return head_dim, kv_heads, feed_forward


def _rotary(opts: TinyOptions) -> int:
    return _head_dim(opts) if opts.rotary is None else opts.rotary


def _add_hyperparameters(writer: gguf.GGUFWriter, arch: str, opts: TinyOptions) -> None:
    head_dim = _head_dim(opts)
    writer.add_name(f"tiny {arch.replace('phi3', 'phi 3')}")  # "phi3" asks for special tokens that it lacks
    writer.add_context_length(opts.context)
    writer.add_embedding_length(opts.embedding)
    writer.add_block_count(opts.blocks + opts.draft)
    if opts.draft:
        writer.add_nextn_predict_layers(opts.draft)
    writer.add_feed_forward_length(opts.feed_forward_by_block or opts.feed_forward)
    if opts.experts:
        writer.add_expert_count(opts.experts)
        writer.add_expert_used_count(opts.experts_used)
        if opts.shared_length:
            writer.add_expert_shared_feed_forward_length(opts.shared_length)
        if opts.expert_length:
            writer.add_expert_feed_forward_length(opts.feed_forward)
    writer.add_head_count(opts.heads)
    writer.add_head_count_kv(opts.kv_heads_by_block or opts.kv_heads)
    if opts.local is not None:
        writer.add_sliding_window_pattern(opts.local)
        writer.add_shared_kv_layers(opts.shared_kv)
        writer.add_embedding_length_per_layer_input(opts.layer_inputs)
    if opts.local_head_dim is not None:
        writer.add_key_length_swa(opts.local_head_dim)
        writer.add_value_length_swa(opts.local_head_dim)
        writer.add_rope_dimension_count_swa(opts.local_head_dim)
    if opts.value_heads:
        writer.add_ssm_conv_kernel(opts.kernel)
        writer.add_ssm_inner_size(opts.value_heads * opts.state)
        writer.add_ssm_state_size(opts.state)
        writer.add_ssm_time_step_rank(opts.value_heads)
        writer.add_ssm_group_count(opts.key_heads)
        writer.add_full_attention_interval(opts.interval)
    if opts.sections is not None:
        writer.add_rope_dimension_sections(opts.sections)
    writer.add_layer_norm_rms_eps(opts.epsilon)
    writer.add_rope_freq_base(opts.freq_base)
    if opts.rotary is not None:
        writer.add_rope_dimension_count(opts.rotary)
    elif head_dim * opts.heads == opts.embedding:
        writer.add_rope_dimension_count(head_dim)
    if head_dim * opts.heads != opts.embedding:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    for key, value in (opts.rope_scaling or {}).items():
        _add_value(writer, f"{arch}.rope.scaling.{key}", value)
    if opts.sliding_window is not None:
        writer.add_sliding_window(opts.sliding_window)
    for key, value in (opts.metadata or {}).items():
        _add_value(writer, f"{arch}.{key}", value)
    if opts.freq_base_swa is not None:
        writer.add_float32(f"{arch}.rope.freq_base_swa", opts.freq_base_swa)


def _add_value(writer: gguf.GGUFWriter, key: str, value: str | int | float) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _tensor_list(opts: TinyOptions, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """(name, row-major shape, mean, standard deviation) of every weight, in file order."""
    n = opts.embedding

    yield "token_embd.weight", (vocab_size, n), 0.0, LOGIT_STD / math.sqrt(n)
    if not opts.tied:
        yield "output.weight", (vocab_size, n), 0.0, LOGIT_STD / math.sqrt(n)
    yield "output_norm.weight", (n,), 1.0, 0.2
    p = opts.layer_inputs
    if p:
        yield "per_layer_token_embd.weight", (vocab_size, opts.blocks * p), 0.0, 1 / math.sqrt(p)
        yield "per_layer_model_proj.weight", (opts.blocks * p, n), 0.0, 1.0
        yield "per_layer_proj_norm.weight", (p,), 1.0, 0.2
    for i in range(opts.blocks + opts.draft):
        block = f"blk.{i}."
        if i >= opts.blocks:
            yield block + "nextn.eh_proj.weight", (n, 2 * n), 0.0, 1 / math.sqrt(n)
            yield block + "nextn.enorm.weight", (n,), 1.0, 0.2
            yield block + "nextn.hnorm.weight", (n,), 1.0, 0.2
        head_dim, kv_heads, ff = _sizes(opts, i)
        n_q, n_kv = opts.heads * head_dim, kv_heads * head_dim
        own = not opts.blocks - opts.shared_kv <= i < opts.blocks
        if opts.pre_norm:
            yield block + "attn_norm.weight", (n,), 1.0, 0.2
        recurrent = opts.value_heads > 0 and i < opts.blocks and (i + 1) % opts.interval > 0
        if recurrent:
            yield from _recurrent_tensors(block, opts)
        qkv = [
            ("attn_q", n_q * (2 if opts.attention_gate else 1), SCORE_GAIN),
            ("attn_k", n_kv, SCORE_GAIN),
            ("attn_v", n_kv, 1.0),
        ]
        if opts.fused_qkv:
            qkv = [("attn_qkv", n_q + 2 * n_kv, SCORE_GAIN)]
        if recurrent:
            qkv = []
        elif not own and not opts.idle_kv:
            qkv = qkv[:1]
        elif opts.keys_are_values and opts.local is not None and not opts.local[i]:
            qkv = qkv[:2]
        for name, rows, gain in qkv:
            yield f"{block}{name}.weight", (rows, n), 0.0, gain / math.sqrt(n)
            if opts.qkv_bias:
                yield f"{block}{name}.bias", (rows,), 0.0, 0.5
        if (opts.qk_norm or opts.wide_qk_norm) and not recurrent:
            yield block + "attn_q_norm.weight", (n_q if opts.wide_qk_norm else head_dim,), opts.qk_gain, 0.3
            if own or opts.idle_kv:
                yield block + "attn_k_norm.weight", (n_kv if opts.wide_qk_norm else head_dim,), opts.qk_gain, 0.3
        if not recurrent:
            yield block + "attn_output.weight", (n, n_q), 0.0, 1 / math.sqrt(n_q)
        if opts.sinks:
            yield block + "attn_sinks.weight", (opts.heads,), 1.0, 1.5
        if opts.pre_norm:
            yield f"{block}{opts.ffn_norm}.weight", (n,), 1.0, 0.2
        if opts.experts:
            yield from _expert_tensors(block, opts)
        if opts.experts and not opts.beside:
            pass
        elif opts.fused_gate_up:
            yield block + "ffn_up.weight", (2 * ff, n), 0.0, 1.5 / math.sqrt(n)
        else:
            yield block + "ffn_gate.weight", (ff, n), 0.0, 1.5 / math.sqrt(n)
            yield block + "ffn_up.weight", (ff, n), 0.0, 1 / math.sqrt(n)
        if not opts.experts or opts.beside:
            yield block + "ffn_down.weight", (n, ff), 0.0, 1 / math.sqrt(ff)
        if opts.post_norm:
            yield block + "post_attention_norm.weight", (n,), opts.post_gain, 0.2 * opts.post_gain
            yield block + "post_ffw_norm.weight", (n,), opts.post_gain, 0.2 * opts.post_gain
        if p:
            yield block + "inp_gate.weight", (p, n), 0.0, 1.5 / math.sqrt(n)
            yield block + "proj.weight", (n, p), 0.0, 1 / math.sqrt(p)
            yield block + "post_norm.weight", (n,), opts.post_gain, 0.2 * opts.post_gain
        if opts.block_scale:
            yield block + "layer_output_scale.weight", (1,), 0.8, 0.1


def _expert_tensors(block: str, opts: TinyOptions) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """The router and the experts' weights. The latter are large enough for the clamps of gpt-oss to act."""
    n, ff, count = opts.embedding, opts.feed_forward, opts.experts
    large = 4.0 if opts.expert_bias else 1.0
    yield block + "ffn_gate_inp.weight", (count, n), 0.0, 2 / math.sqrt(n)
    if opts.fused_experts:
        yield block + "ffn_gate_up_exps.weight", (count, 2 * ff, n), 0.0, 1.5 * large / math.sqrt(n)
    else:
        yield block + "ffn_gate_exps.weight", (count, ff, n), 0.0, 1.5 * large / math.sqrt(n)
        yield block + "ffn_up_exps.weight", (count, ff, n), 0.0, large / math.sqrt(n)
    yield block + "ffn_down_exps.weight", (count, n, ff), 0.0, 1 / large / math.sqrt(ff)
    if shared := opts.shared_length:
        if opts.shared_gate:
            yield block + "ffn_gate_inp_shexp.weight", (n,), 0.0, 1 / math.sqrt(n)
        yield block + "ffn_gate_shexp.weight", (shared, n), 0.0, 1.5 / math.sqrt(n)
        yield block + "ffn_up_shexp.weight", (shared, n), 0.0, 1 / math.sqrt(n)
        yield block + "ffn_down_shexp.weight", (n, shared), 0.0, 1 / math.sqrt(shared)
    if opts.beside:
        yield block + "ffn_gate_inp.scale", (n,), 8.0, 2.0
        yield block + "ffn_down_exps.scale", (count,), 1.0, 0.3
        yield block + "pre_ffw_norm_2.weight", (n,), 1.0, 0.2
        yield block + "post_ffw_norm_1.weight", (n,), 1.0, 0.2
        yield block + "post_ffw_norm_2.weight", (n,), 1.0, 0.2
    if opts.expert_bias:
        yield block + "attn_output.bias", (n,), 0.0, 0.5
        yield block + "ffn_gate_inp.bias", (count,), 0.0, 0.5
        yield block + "ffn_gate_exps.bias", (count, ff), 0.0, 0.5
        yield block + "ffn_up_exps.bias", (count, ff), 0.0, 0.5
        yield block + "ffn_down_exps.bias", (count, n), 0.0, 0.5


def _recurrent_tensors(block: str, opts: TinyOptions) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Of a gated delta net. A memory's half-life is some tokens, strengths lie on both sides of a half, and no query is
    so far from its key that the norm of what it reads is one of rounding errors."""
    n, heads, values = opts.embedding, opts.value_heads, opts.value_heads * opts.state
    channels = 2 * opts.key_heads * opts.state + values
    if opts.fused_inputs:
        yield block + "ssm_in.weight", (channels + values, n), 0.0, 2 / math.sqrt(n)
    else:
        yield block + "attn_qkv.weight", (channels, n), 0.0, 2 / math.sqrt(n)
        yield block + "attn_gate.weight", (values, n), 0.0, 1.5 / math.sqrt(n)
    yield block + "ssm_conv1d.weight", (channels, opts.kernel), 0.8, 0.3
    yield block + "ssm_dt.bias", (heads,), -1.0, 0.5
    yield block + "ssm_a", (heads,), -0.4, 0.15
    if opts.grouped:
        yield block + "ssm_ba.weight", (2 * heads, n), 0.0, 1.5 / math.sqrt(n)
    else:
        yield block + "ssm_beta.weight", (heads, n), 0.0, 1.5 / math.sqrt(n)
        yield block + "ssm_alpha.weight", (heads, n), 0.0, 1.5 / math.sqrt(n)
    yield block + "ssm_norm.weight", (opts.state,), 1.0, 0.3
    yield block + "ssm_out.weight", (n, values), 0.0, 1 / math.sqrt(values)


def _random_tensor(seed: int, name: str, shape: tuple[int, ...], mean: float, std: float) -> np.ndarray:
    """Float32 with the given mean and deviation; uniform, as that needs no logarithm and so is bit-equal everywhere."""
    unit = np.random.RandomState([seed, zlib.crc32(name.encode())]).random_sample(shape)
    return (mean + std * math.sqrt(12) * (unit - 0.5)).astype(np.float32)


def _add_vocabulary(writer: gguf.GGUFWriter, opts: TinyOptions) -> int:
    """Add the tokenizer's metadata; returns the number of tokens."""
    if opts.vocab == "gpt2":
        size = _add_gpt2_vocabulary(writer, opts.pre)
    elif opts.vocab == "spm":
        size = _add_spm_vocabulary(writer)
    else:
        raise ValueError(f"no tiny vocabulary {opts.vocab!r}: gpt2 or spm")
    writer.add_add_bos_token(opts.add_bos)
    if opts.chat_template is not None:
        writer.add_chat_template(opts.chat_template)
    writer.add_vocab_size(size)
    return size


def byte_characters() -> list[str]:
    """The characters by which GPT-2's byte-level BPE writes the bytes 0..255 (printable ones stand for themselves)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]


def _add_gpt2_vocabulary(writer: gguf.GGUFWriter, pre: str) -> int:
    normal = [*byte_characters(), *(merge.replace(" ", "") for merge in _MERGES)]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*normal, *special])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(normal) + [gguf.TokenType.CONTROL] * len(special))
    writer.add_token_merges(_MERGES)
    writer.add_bos_token_id(len(normal))
    writer.add_eos_token_id(len(normal) + 2)
    return len(normal) + len(special)


def _add_spm_vocabulary(writer: gguf.GGUFWriter) -> int:
    """Gemma's order of special tokens, a user-defined token, the 256 bytes, then pieces and letters, best first."""
    kinds = gguf.TokenType
    tokens = [(text, kinds.CONTROL, 0.0) for text in ("<pad>", "<eos>", "<bos>")]
    tokens += [("<unk>", kinds.UNKNOWN, 0.0)]
    tokens += [(text, kinds.CONTROL, 0.0) for text in ("<start_of_turn>", "<end_of_turn>")]
    tokens += [("\n\n", kinds.USER_DEFINED, 0.0)]
    tokens += [(f"<0x{byte:02X}>", kinds.BYTE, 0.0) for byte in range(256)]
    tokens += [(piece, kinds.NORMAL, -1.0 - rank) for rank, piece in enumerate((*_PIECES, *_LETTERS))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in tokens])
    writer.add_token_scores([score for _, _, score in tokens])
    writer.add_token_types([kind for _, kind, _ in tokens])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_space_prefix(False)
    return len(tokens)
