"""Triton if it is installed: `tl` for the kernels' source, `jit` to mark them, `require_triton` before one is launched.

CUDA builds of torch for Linux bring it along. Modules with kernels must import without it, so that everything that
needs no GPU runs; nothing in them is ever called then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nkat.errors import NKATError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(function: Callable[..., None]) -> Any:
    """`triton.jit`; without Triton the function itself, which cannot run."""
    return function if triton is None else triton.jit(function)


def require_triton() -> None:
    """Raises NKATError when there is no Triton."""
    if triton is None:
        raise NKATError(
            "CUDA needs the package triton, which is not installed: pip install triton "
            "(triton-windows on Windows), or add --no-cuda to use the processor"
        )
