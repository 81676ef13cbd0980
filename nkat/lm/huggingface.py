"""What Hugging Face's transformers calls a model's linear layers, and how it orders their rows.

Some architectures are converted with the rows of q and k in another order: transformers turns the elements i and
i + d/2 of a head (RoPE's "neox" kind), and ggml's "norm" kind turns 2i and 2i + 1. A GGUF of such a model has row
i of a head's first half at 2i, and that of its second half at 2i + 1 (llama.cpp's conversion/llama.py, `permute`).
In a gated delta net transformers has the value heads of a key head side by side, and a GGUF those of all key heads in
turn, unless its architecture keeps their order (conversion/qwen.py, `_reorder_v_heads`). Of all other layers the inputs
are ordered alike in both.
"""

from __future__ import annotations

import re

import torch

from nkat.gguf.names import block_number
from nkat.lm.architectures import DELTA_LINEARS, FUSED_QKV, QKV
from nkat.lm.config import ModelConfig
from nkat.lm.recurrence import Recurrence
from nkat.theta.layers import gguf_name

_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    FUSED_QKV: "self_attn.qkv_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_RECURRENT_MODULES = {
    FUSED_QKV: "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_out": "linear_attn.out_proj",
}
# Of the language model: a picture's encoder has layers of the same names behind another path.
_IN_A_BLOCK = re.compile(r"(?:(?:model|language_model)\.)*(layers\.\d{1,9}\..+)")


def module_name(name: str, config: ModelConfig) -> str | None:
    """`model.layers.3.mlp.up_proj` for `blk.3.ffn_up.weight`; None for a weight that is no linear module there."""
    linear, block = _parts(name)
    module = _MODULES.get(linear)
    if config.recurrence is not None and block in config.recurrent_blocks:
        # qkv and gate are one module there where the value heads are in its order, and two here
        parts = FUSED_QKV, "attn_gate"
        module = _RECURRENT_MODULES.get(linear, module)
        module = None if config.recurrence.row.grouped and linear in parts else module
    if linear == "ffn_up" and config.architecture.fused_gate_up:
        module = "mlp.gate_up_proj"
    return None if module is None or block < 0 else f"model.layers.{block}.{module}"


def weight_name(module: str) -> str | None:
    """The other way: what a GGUF calls a module's weight, which it need not have; None for a module outside blocks."""
    if re.fullmatch(r"(?:(?:model|language_model)\.)*lm_head", module):
        return "output.weight"
    found = _IN_A_BLOCK.fullmatch(module)
    return None if found is None else gguf_name(found[1] + ".weight")


def rows_for_hf(name: str, rows: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Outputs [m, k] of a weight of the GGUF in the order that transformers has them."""
    return _reordered(name, rows, config, to_hf=True)


def rows_for_gguf(name: str, rows: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """The other way."""
    return _reordered(name, rows, config, to_hf=False)


def inputs_for_hf(name: str, columns: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Inputs [k, n] of a weight of the GGUF in the order that transformers has them."""
    return _inputs(name, columns, config, to_hf=True)


def inputs_for_gguf(name: str, columns: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """The other way."""
    return _inputs(name, columns, config, to_hf=False)


def _parts(name: str) -> tuple[str, int]:
    """A weight's linear layer, and its block."""
    return name.removesuffix(".weight").rpartition(".")[2], block_number(name)


def _reordered(name: str, rows: torch.Tensor, config: ModelConfig, to_hf: bool) -> torch.Tensor:
    linear, block = _parts(name)
    if block in config.recurrent_blocks:
        return _value_rows(linear, rows, config, to_hf)
    if not config.architecture.permuted_qk or linear not in (*QKV[:2], FUSED_QKV):
        return rows
    if linear == FUSED_QKV:
        q, k, v = rows.split(config.qkv_rows(block))
        turned = [_reordered(f"blk.{block}.{one}", part, config, to_hf) for one, part in zip(QKV, (q, k), strict=False)]
        return torch.cat([*turned, v])
    heads = rows.unflatten(0, (-1, config.of(block).head_dim))
    pairs = heads.unflatten(1, (-1, 2) if to_hf else (2, -1))
    return pairs.transpose(1, 2).reshape(rows.shape)


def _value_rows(linear: str, rows: torch.Tensor, config: ModelConfig, to_hf: bool) -> torch.Tensor:
    """Of a recurrent block's layer."""
    sizes = config.recurrence
    if sizes is None or linear not in sizes.inputs:
        return rows
    before = 2 * sizes.keys if linear == FUSED_QKV else 0
    return torch.cat((rows[:before], _value_heads(rows[before:], sizes, to_hf)))


def _inputs(name: str, columns: torch.Tensor, config: ModelConfig, to_hf: bool) -> torch.Tensor:
    linear, block = _parts(name)
    sizes = config.recurrence
    if sizes is None or block not in config.recurrent_blocks or linear != DELTA_LINEARS[-1]:
        return columns
    return _value_heads(columns.mT, sizes, to_hf).mT


def _value_heads(rows: torch.Tensor, sizes: Recurrence, to_hf: bool) -> torch.Tensor:
    """Rows by value heads [heads · any number, k], those of a key head side by side or each key head's in turn."""
    if sizes.row.grouped:
        return rows
    both = sizes.key_heads, sizes.value_heads // sizes.key_heads
    return rows.unflatten(0, (*(both[::-1] if to_hf else both), -1)).transpose(0, 1).reshape(rows.shape)
