"""What the names of a GGUF's tensors say."""

from __future__ import annotations

import re

EXPERTS_IN_NAME = "_exps."  # of a mixture's weights and biases, all experts in one tensor
_BLOCK_NUMBER = re.compile(r"^blk\.([0-9]{1,9})\.")


def block_number(name: str) -> int:
    """12 for `blk.12.attn_q.weight`, −1 for a tensor outside the blocks."""
    match = _BLOCK_NUMBER.match(name)
    return int(match[1]) if match else -1
