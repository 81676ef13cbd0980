"""Compiles the kernels of `nkat.kernels.cpu.llvm` for the processor at hand and keeps the machine code.

Code is kept in the cache folder under a hash of the IR, the processor and the compiler, so that a kernel that changed
is never taken for the old one. Limits: little-endian processors; llvmlite must have wheels for the platform.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import threading
from collections.abc import Callable

import llvmlite
import llvmlite.binding as binding

from nkat.errors import NKATError
from nkat.host.cache import keep_sealed, load_sealed
from nkat.kernels.cpu.llvm import Builder

KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


@functools.cache
def target() -> binding.TargetMachine:
    """What is compiled for: this processor."""
    return _new_target()


def _new_target() -> binding.TargetMachine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3, jit=True
    )


@functools.cache
def llvm_host_features() -> frozenset[str]:
    """LLVM's names of what this processor can do; `nkat.host.hardware.cpu_features` are the system's."""
    return frozenset(name for name, there in binding.get_host_cpu_features().items() if there)


_KEPT: list[binding.ExecutionEngine] = []  # code lives as long as its engine
_LOCK = threading.Lock()


@functools.cache
def best_isa() -> str:
    """The best of the instruction sets that the kernels know: avx512-vnni, avx-vnni, avx2 or generic."""
    there = llvm_host_features()
    if {"avx512vnni", "avx512bw"} <= there:
        return "avx512-vnni"
    if {"avxvnni", "avx2"} <= there:
        return "avx-vnni"
    return "avx2" if {"avx2", "fma", "f16c"} <= there else "generic"


def compile_kernel(name: str, emit: Callable[[Builder], None], isa: str | None = None) -> int:
    """Address of a C function void(const int64_t *arguments, int64_t thread, int64_t threads).

    Its machine code comes from the cache folder if it was compiled before. Raises NKATError when LLVM rejects it.
    """
    builder = Builder(name, isa or best_isa())
    emit(builder)
    builder.ir.ret_void()
    with _LOCK:
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _new_target())  # it takes the target over
        engine.add_object_file(binding.ObjectFileRef.from_data(_machine_code(str(builder.module))))
        engine.finalize_object()
        _KEPT.append(engine)
    return engine.get_function_address(name)


def _machine_code(source: str) -> bytes:
    """An object file, from the cache only with this user's seal: it is going to be run."""
    compiler = f"{llvmlite.__version__} {binding.llvm_version_info}"
    key = "\n".join([compiler, target().triple, binding.get_host_cpu_name(), *sorted(llvm_host_features()), source])
    name = f"compiled/{hashlib.sha256(key.encode()).hexdigest()}.o"
    kept = load_sealed(name)
    if kept is not None:
        return kept
    try:
        module = binding.parse_assembly(source)
        module.verify()
    except RuntimeError as error:
        raise NKATError(f"this version of LLVM ({compiler}) rejects a kernel: {str(error).splitlines()[0]}") from None
    # the kernels are vectors already, and unrolled where it pays
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    passes = binding.create_pass_builder(target(), options)
    passes.getModulePassManager().run(module, passes)
    code: bytes = target().emit_object(module)
    keep_sealed(name, code)
    return code
