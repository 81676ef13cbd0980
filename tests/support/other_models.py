"""Tiny random GGUF files of architectures that the toolkit does not run, with the tensors that llama.cpp wants of each.

Names and shapes are from its src/models/*.cpp (b11434), which loads these files.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf

from tests.support.tiny_models import _add_gpt2_vocabulary, _random_tensor

D, FF, HEADS, KV_HEADS, BLOCKS, CONTEXT = 64, 96, 4, 2, 2, 512
KV = D // HEADS * KV_HEADS
Tensors = Iterator[tuple[str, tuple[int, ...]]]  # name without ".weight" where it has that, shape


def _starcoder2(block: str) -> Tensors:
    for norm in ("attn_norm", "ffn_norm"):
        yield from _norm(block + norm)
    for name, rows in (("attn_q", D), ("attn_k", KV), ("attn_v", KV), ("attn_output", D)):
        yield from _linear(block + name, rows, D)
    yield from _linear(block + "ffn_up", FF, D)
    yield from _linear(block + "ffn_down", D, FF)


def _falcon(block: str) -> Tensors:
    yield from _norm(block + "attn_norm")
    yield block + "attn_qkv.weight", (D + 2 * KV, D)
    yield block + "attn_output.weight", (D, D)
    yield block + "ffn_up.weight", (FF, D)
    yield block + "ffn_down.weight", (D, FF)


def _command_r(block: str) -> Tensors:
    yield block + "attn_norm.weight", (D,)
    for name, rows in (("attn_q", D), ("attn_k", KV), ("attn_v", KV), ("attn_output", D)):
        yield f"{block}{name}.weight", (rows, D)
    for name, shape in (("ffn_gate", (FF, D)), ("ffn_up", (FF, D)), ("ffn_down", (D, FF))):
        yield f"{block}{name}.weight", shape


def _deepseek2(block: str) -> Tensors:
    """The first block dense, the others with experts and a shared one."""
    yield block + "attn_norm.weight", (D,)
    yield block + "attn_kv_a_norm.weight", (32,)
    yield block + "attn_q_a_norm.weight", (48,)
    yield block + "attn_q_a.weight", (48, D)
    yield block + "attn_q_b.weight", (HEADS * 24, 48)
    yield block + "attn_kv_a_mqa.weight", (32 + 8, D)
    yield block + "attn_kv_b.weight", (HEADS * (16 + 16), 32)
    yield block + "attn_output.weight", (D, HEADS * 16)
    yield block + "ffn_norm.weight", (D,)
    if block == "blk.0.":
        yield from ((f"{block}{name}.weight", shape) for name, shape in _gated("", FF))
        return
    yield block + "ffn_gate_inp.weight", (4, D)
    yield from ((f"{block}{name}.weight", (4, *shape)) for name, shape in _gated("_exps", 48))
    yield from ((f"{block}{name}.weight", shape) for name, shape in _gated("_shexp", 48))


def _mamba(block: str) -> Tensors:
    inner, state, rank = 2 * D, 16, 4
    yield block + "attn_norm.weight", (D,)
    yield block + "ssm_in.weight", (2 * inner, D)
    yield block + "ssm_conv1d.weight", (inner, 4)
    yield block + "ssm_conv1d.bias", (inner,)
    yield block + "ssm_x.weight", (rank + 2 * state, inner)
    yield block + "ssm_dt.weight", (inner, rank)
    yield block + "ssm_dt.bias", (inner,)
    yield block + "ssm_a", (inner, state)
    yield block + "ssm_d", (inner,)
    yield block + "ssm_out.weight", (D, inner)


def _bert(block: str) -> Tensors:
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        yield from _linear(block + name, D, D)
    yield from _norm(block + "attn_output_norm")
    yield from _linear(block + "ffn_up", FF, D)
    yield from _linear(block + "ffn_down", D, FF)
    yield from _norm(block + "layer_output_norm")


def _norm(name: str) -> Tensors:
    yield name + ".weight", (D,)
    yield name + ".bias", (D,)


def _linear(name: str, rows: int, columns: int) -> Tensors:
    yield name + ".weight", (rows, columns)
    yield name + ".bias", (rows,)


def _gated(suffix: str, inner: int) -> Tensors:
    yield "ffn_gate" + suffix, (inner, D)
    yield "ffn_up" + suffix, (inner, D)
    yield "ffn_down" + suffix, (D, inner)


BLOCK_TENSORS: dict[str, Callable[[str], Tensors]] = {
    "starcoder2": _starcoder2,
    "falcon": _falcon,
    "command-r": _command_r,
    "deepseek2": _deepseek2,
    "mamba": _mamba,
    "bert": _bert,
}


def write_other_model(path: Path, arch: str, seed: int = 0) -> Path:
    """Writes a tiny model of one of BLOCK_TENSORS; the same arguments give the same bytes."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(f"tiny {arch}")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(D)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(0 if arch == "mamba" else FF)
    writer.add_head_count(0 if arch == "mamba" else HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_layer_norm_rms_eps(1e-5)
    if arch in ("starcoder2", "falcon", "command-r"):
        writer.add_head_count_kv(KV_HEADS)
        writer.add_rope_freq_base(10000.0)
    if arch == "command-r":
        writer.add_logit_scale(0.5)
    if arch == "bert":
        writer.add_causal_attention(False)
        writer.add_token_type_count(2)
    if arch == "mamba":
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * D)
        writer.add_ssm_state_size(16)
        writer.add_ssm_time_step_rank(4)
    if arch == "deepseek2":
        writer.add_leading_dense_block_count(1)
        writer.add_q_lora_rank(48)
        writer.add_kv_lora_rank(32)
        writer.add_key_length(24)
        writer.add_value_length(16)
        writer.add_rope_dimension_count(8)
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        writer.add_expert_shared_count(1)
        writer.add_expert_feed_forward_length(48)
        writer.add_expert_weights_scale(1.0)
    vocabulary = _add_gpt2_vocabulary(writer, "gpt-2")
    for name, shape in _tensors(arch, vocabulary):
        matrix = len(shape) > 1
        mean = 0.0 if matrix or name.endswith(".bias") else 1.0
        spread = 1.5 / shape[-1] ** 0.5 if matrix else 0.2
        values = _random_tensor(seed, name, shape, -2.0 if name.endswith("ssm_a") else mean, spread)
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(arch: str, vocabulary: int) -> Tensors:
    yield "token_embd.weight", (vocabulary, D)
    if arch == "bert":
        yield "token_types.weight", (2, D)
        yield "position_embd.weight", (CONTEXT, D)
        yield from _norm("token_embd_norm")
    else:
        yield "output_norm.weight", (D,)
        if arch in ("starcoder2", "falcon"):
            yield "output_norm.bias", (D,)
    for i in range(BLOCKS):
        yield from BLOCK_TENSORS[arch](f"blk.{i}.")
