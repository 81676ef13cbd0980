"""What the names of a GGUF's tensors say."""

from __future__ import annotations

import re
from collections.abc import Iterable

EXPERTS_IN_NAME = "_exps."  # of a mixture's weights and biases, all experts in one tensor
_DRAFT_IN_NAME = ".nextn."  # of blocks that foretell the tokens after the next one
_BLOCK_NUMBER = re.compile(r"^blk\.([0-9]{1,9})\.")


def block_number(name: str) -> int:
    """12 for `blk.12.attn_q.weight`, −1 for a tensor outside the blocks."""
    match = _BLOCK_NUMBER.match(name)
    return int(match[1]) if match else -1


def draft_blocks(names: Iterable[str]) -> frozenset[int]:
    """The blocks that foretell the tokens after the next one (multi-token prediction), which come after all others and
    have no part in a token's logits."""
    return frozenset(block_number(name) for name in names if _DRAFT_IN_NAME in name)
