"""How many threads a computation may be given."""

from __future__ import annotations

import os

# Each thread takes a stack and a slot of the system's, and whoever asks for more than a few for each processor waits
# at every barrier: beyond some thousand of them OpenMP does not fail but ends the program.
_EACH_PROCESSOR = 4
_ALWAYS_ALLOWED = 64


def most_threads() -> int:
    """The largest sensible value of `--threads` on this machine."""
    return max(_ALWAYS_ALLOWED, _EACH_PROCESSOR * (os.cpu_count() or 1))
