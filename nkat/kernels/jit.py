"""Compiles the kernels of `nkat.kernels.llvm` for the processor at hand and keeps the machine code.

Code is kept in the cache folder under a hash of the IR, the processor and the compiler, so that a kernel that changed
is never taken for the old one. Limits: little-endian processors; llvmlite must have wheels for the platform.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import threading
from collections.abc import Callable
from time import perf_counter

import llvmlite
import llvmlite.binding as binding

from nkat.atomic import atomic_output
from nkat.errors import NKATError
from nkat.kernels.llvm import Builder
from nkat.models import cache_folder

KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


@functools.cache
def target() -> binding.TargetMachine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3, jit=True
    )


@functools.cache
def cpu_features() -> frozenset[str]:
    """LLVM's names of what this processor can do."""
    return frozenset(name for name, there in binding.get_host_cpu_features().items() if there)


_KEPT: list[binding.ExecutionEngine] = []  # code lives as long as its engine
_LOCK = threading.Lock()
compile_seconds = 0.0  # spent compiling so far in this process: reported apart from timings


@functools.cache
def best_isa() -> str:
    """The best of the instruction sets that the kernels know: avx512-vnni, avx-vnni, avx2 or generic."""
    there = cpu_features()
    if {"avx512vnni", "avx512bw"} <= there:
        return "avx512-vnni"
    if {"avxvnni", "avx2"} <= there:
        return "avx-vnni"
    return "avx2" if {"avx2", "fma", "f16c"} <= there else "generic"


def compile_kernel(name: str, emit: Callable[[Builder], None], isa: str | None = None) -> int:
    """Address of a C function void(const int64_t *arguments, int64_t thread, int64_t threads).

    Taken from the cache folder where it was compiled before. Raises NKATError when LLVM rejects it.
    """
    builder = Builder(name, isa or best_isa())
    emit(builder)
    builder.ir.ret_void()
    return _address(str(builder.module), name)


def _address(source: str, name: str) -> int:
    global compile_seconds
    started = perf_counter()
    with _LOCK:
        code = _object_code(source)
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _engine_machine())
        engine.add_object_file(binding.ObjectFileRef.from_data(code))
        engine.finalize_object()
        _KEPT.append(engine)
        compile_seconds += perf_counter() - started
        return engine.get_function_address(name)


def _engine_machine() -> binding.TargetMachine:
    return binding.Target.from_default_triple().create_target_machine(opt=3, jit=True)


def _object_code(source: str) -> bytes:
    machine = target()
    compiler = f"{llvmlite.__version__} {binding.llvm_version_info}"
    key = "\n".join([compiler, machine.triple, binding.get_host_cpu_name(), *sorted(cpu_features()), source])
    path = cache_folder() / "kernels" / f"{hashlib.sha256(key.encode()).hexdigest()}.o"
    if path.is_file():
        return path.read_bytes()
    try:
        module = binding.parse_assembly(source)
        module.verify()
    except RuntimeError as error:
        raise NKATError(f"this version of LLVM ({compiler}) rejects a kernel: {str(error).splitlines()[0]}") from None
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    binding.create_pass_builder(machine, options).getModulePassManager().run(
        module, binding.create_pass_builder(machine, options)
    )
    code = machine.emit_object(module)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(path, len(code), force=True) as file:
        file.write(code)
    return code
