"""What Hugging Face's transformers calls a model's linear layers, and how it orders their rows.

Some architectures are converted with the rows of q and k in another order: transformers turns the elements i and
i + d/2 of a head (RoPE's "neox" kind), and ggml's "norm" kind turns 2i and 2i + 1. A GGUF of such a model has row
i of a head's first half at 2i, and that of its second half at 2i + 1 (llama.cpp's conversion/llama.py, `permute`).
What stands before the weights, the inputs of each layer, is ordered alike in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from nkat.gguf.names import block_number
from nkat.lm.architectures import FUSED_QKV, QKV
from nkat.lm.config import ModelConfig
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
}
# Of the language model: a picture's encoder has layers of the same names behind another path.
_IN_A_BLOCK = re.compile(r"(?:(?:model|language_model)\.)*(layers\.\d{1,9}\..+)")


def module_name(name: str, config: ModelConfig) -> str | None:
    """`model.layers.3.mlp.up_proj` for `blk.3.ffn_up.weight`; None for a weight that is no linear module there."""
    linear = name.removesuffix(".weight").rpartition(".")[2]
    module = _MODULES.get(linear)
    if linear == "ffn_up" and config.architecture.fused_gate_up:
        module = "mlp.gate_up_proj"
    return None if module is None or block_number(name) < 0 else f"model.layers.{block_number(name)}.{module}"


def weight_name(module: str) -> str | None:
    """The other way: what a GGUF calls a module's weight, which it need not have; None for a module outside blocks."""
    if re.fullmatch(r"(?:(?:model|language_model)\.)*lm_head", module):
        return "output.weight"
    found = _IN_A_BLOCK.fullmatch(module)
    return None if found is None else gguf_name(found[1] + ".weight")


def rows_for_hf(name: str, rows: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Outputs [m, k] of a weight of the GGUF in the order that transformers has them."""
    return _reordered(name, rows, config, lambda heads: heads.unflatten(1, (-1, 2)))


def rows_for_gguf(name: str, rows: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """The other way."""
    return _reordered(name, rows, config, lambda heads: heads.unflatten(1, (2, -1)))


def _reordered(
    name: str, rows: torch.Tensor, config: ModelConfig, pairs: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """pairs: a head's rows [heads, d, k] as [heads, a, b, k], of which a and b change places"""
    linear, block = name.removesuffix(".weight").rpartition(".")[2], block_number(name)
    if not config.architecture.permuted_qk or linear not in (*QKV[:2], FUSED_QKV):
        return rows
    if linear == FUSED_QKV:
        q, k, v = rows.split(config.qkv_rows(block))
        turned = [_reordered(f"blk.{block}.{one}", part, config, pairs) for one, part in zip(QKV, (q, k), strict=False)]
        return torch.cat([*turned, v])
    heads = rows.unflatten(0, (-1, config.of(block).head_dim))
    return pairs(heads).transpose(1, 2).reshape(rows.shape)
