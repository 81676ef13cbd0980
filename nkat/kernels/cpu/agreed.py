"""Numbers that the kernels and those who call them must agree on. Here, so that to know them loads no LLVM."""

from __future__ import annotations

KEYS = 16  # positions in one block of the key cache
STORED_FLOOR = -16.0  # log-probabilities that are stored count in a divergence where they are above
