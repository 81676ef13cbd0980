"""Which weights of a model get Θ: the default set, and the user's names and globs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from nkat.errors import NKATError
from nkat.gguf.file import TensorInfo
from nkat.gguf.names import EXPERTS_IN_NAME, block_number, draft_blocks

_BLOCK_LINEAR = re.compile(r"blk\.\d+\.(attn_(q|k|v|qkv|output|gate)|ssm_(in|out)|ffn_(gate|up|down)(_shexp)?)\.weight")

# Names the same matrices have in Meta's LLaMA checkpoints and in Hugging Face's, and what GGUF calls them.
_OTHER_NAMES = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_qkvz": "ssm_in",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.out_proj": "ssm_out",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
}


def adaptable_layers(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The 2-D linear weights inside the blocks (attention q, k, v, gate, output; what leads into and out of a recurrent
    part; FFN gate, up, down, also of an expert that is every token's), in block order."""
    unread = draft_blocks(tensors)  # llama.cpp refuses an adapter for what it has not loaded
    names = [name for name, info in tensors.items() if _BLOCK_LINEAR.fullmatch(name) and len(info.shape) == 2]
    return sorted((name for name in names if block_number(name) not in unread), key=block_number)


def _experts(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The 3-D weights of mixtures, [experts, outputs, inputs], which get Θ only when they are named."""
    unread = draft_blocks(tensors)
    return [
        name
        for name, info in tensors.items()
        if name.endswith(f"{EXPERTS_IN_NAME}weight") and len(info.shape) == 3 and block_number(name) not in unread
    ]


def select_layers(tensors: Mapping[str, TensorInfo], patterns: Sequence[str] | None) -> list[str]:
    """The weights that `patterns` name; all adaptable ones when there are none.

    A pattern is a GGUF name or glob (`blk.*.attn_q.weight`), or the name in a LLaMA or Hugging Face checkpoint
    (`layers.0.feed_forward.w1.weight`). One that matches nothing is an NKATError naming the nearest names.
    """
    candidates = adaptable_layers(tensors)
    if not candidates:
        raise NKATError("the model has no 2-D attention or FFN weights inside blocks, so there is nothing to adapt")
    if patterns is None:
        return candidates
    candidates = sorted([*candidates, *_experts(tensors)], key=block_number)
    chosen = set()
    for pattern in patterns:
        translated = gguf_name(pattern)
        matches = [name for name in candidates if fnmatchcase(name, translated)]
        if not matches:
            raise NKATError(_no_match(pattern, translated, candidates, tensors))
        chosen.update(matches)
    return [name for name in candidates if name in chosen]


def gguf_name(name: str) -> str:
    """Translates a LLaMA or Hugging Face name or glob to GGUF's; any other comes back unchanged."""
    translated = re.sub(r"^(model\.)?layers\.", "blk.", name)
    for other, ours in _OTHER_NAMES.items():
        translated = translated.replace(f".{other}.", f".{ours}.")
    return translated


def _no_match(pattern: str, translated: str, candidates: list[str], tensors: Mapping[str, TensorInfo]) -> str:
    if translated in tensors:
        shape = "x".join(str(n) for n in tensors[translated].shape)
        return f"layer {pattern!r} is a tensor of shape {shape} that Θ cannot adapt: only linear weights in blocks"
    nearest = difflib.get_close_matches(translated, candidates, n=3, cutoff=0.4) or candidates[:3]
    return f"no layer matches {pattern!r}; the nearest are {', '.join(nearest)}"
