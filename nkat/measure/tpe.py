"""TPE of a language model: perplexity against the bytes a decoded token reads.

    TPE = ppl⁻¹ / log10(1 + λ)      λ = 10·c − 1      c = bytes read per decoded token with Θ / without

A count of bytes and no timing, so that the score is the same on every machine. Without Θ c = 1 and TPE = 1 / ppl.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from nkat.gguf.file import TensorInfo
from nkat.gguf.names import EXPERTS_IN_NAME, block_number, draft_blocks


def bytes_per_token(tensors: Mapping[str, TensorInfo], active_experts: float = 1.0) -> int:
    """Bytes of weights read to decode one token: every tensor once, but only one row of an untied embedding, and of a
    mixture's experts only those that the token goes to, and nothing of the blocks that foretell later tokens.

    active_experts: their share of all (`ModelConfig.active_experts`)
    The key-value cache is left out: it depends on the context's length and is the same with and without Θ.
    """
    unread = draft_blocks(tensors)
    total = sum(
        round(info.nbytes * active_experts) if EXPERTS_IN_NAME in name else info.nbytes
        for name, info in tensors.items()
        if block_number(name) not in unread
    )
    embedding = tensors["token_embd.weight"]
    if "output.weight" in tensors:
        total -= embedding.nbytes - embedding.nbytes // embedding.shape[0]
    return total


def byte_ratio(tensors: Mapping[str, TensorInfo], theta_bytes: int, active_experts: float = 1.0) -> float:
    """c, for a Θ of `theta_bytes`, all of which is read for every token; active_experts: see `bytes_per_token`."""
    base = bytes_per_token(tensors, active_experts)
    return (base + theta_bytes) / base


def tpe(perplexity: float, ratio: float = 1.0) -> float:
    """The score for a measured perplexity and c = `ratio`; higher is better."""
    return 1.0 / (perplexity * math.log10(10.0 * ratio))
