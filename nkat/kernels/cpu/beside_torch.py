"""Kernels between torch's operations, on the threads that torch has anyway.

The threads of `nkat.kernels.cpu.program` are for programs of hundreds of steps. Between two operations of torch they
wake on a processor that is busy and take turns there with torch's own; a kernel of half a millisecond then gains
nothing from a second one. torch's threads are OpenMP's, and they are asked by OpenMP's own entry.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nkat.kernels.cpu.jit import compile_kernel
from nkat.kernels.cpu.llvm import Builder
from nkat.kernels.cpu.program import pool


def run(kernel: int, *arguments: torch.Tensor | int) -> None:
    """Runs a kernel without barriers in as many parts as torch has threads; a tensor stands for its address."""
    words = np.array([a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments], dtype=np.int64)
    threads, parallel = torch.get_num_threads(), _openmp()
    if parallel is None:
        pool(threads).run(kernel, words)
        return
    job = np.array([kernel, words.ctypes.data, 0, threads], dtype=np.int64)
    parallel(_member_kernel(), job.ctypes.data, threads, 0)


@functools.cache
def _openmp() -> Callable[[int, int, int, int], Any] | None:
    """`GOMP_parallel(function, its argument, threads, flags)` of the OpenMP that torch has loaded, which libomp and
    Intel's have too; None where there is none, as in Windows."""
    try:
        found = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return found


@functools.cache
def _member_kernel() -> int:
    """What each thread of a team runs: parts of a kernel while there are any, as a team may be smaller than asked for.

    arguments: kernel, its arguments, parts that were begun, parts
    """

    def emit(k: Builder) -> None:
        begun, parts = k.arguments + 16, k.integer(3)
        part = k.variable(k.fetch_add(begun, 1))
        with k.while_(lambda: part.value < parts):
            k.call_address(k.pointer(0), [k.pointer(1), part.value, parts])
            part.value = k.fetch_add(begun, 1)

    return compile_kernel("member_of_a_team", emit)
