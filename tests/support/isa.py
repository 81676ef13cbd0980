"""`make test-isa`: the tests marked `isa` once more, as they would run on other processors.

torch, oneDNN, MKL and our own kernels choose their code by what the processor can do, and each code sums in an order of
its own. What is promised bit by bit must hold in all of them, and every tolerance must be wide enough for all of them.

    python -m tests.support.isa             every setting that this processor can run
    python -m tests.support.isa avx2 amd    these only
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import llvmlite.binding as binding

from nkat.host.hardware import is_x86
from nkat.kernels.cpu import jit

# LLVM's names of what each instruction set of our kernels needs, the best first.
NEEDS: dict[str, set[str]] = {
    "avx512-vnni": {"avx512vnni", "avx512bw"},
    "avx-vnni": {"avxvnni", "avx2"},
    "avx2": {"avx2", "fma", "f16c"},
    "generic": set(),
}
# And of what a processor without the better ones does not have: AVX10 and AMX imply AVX-512 or come with it.
_LACKS = {
    "avx512-vnni": "(?!)",
    "avx-vnni": "avx512|avx10|amx",
    "avx2": "avx512|avx10|amx|avx(vnni|ifma|neconvert)",
    "generic": "avx|amx|fma|f16c|xop|vaes|vpclmulqdq|sha512|sm3|sm4",
}
ISA_VARIABLE = "NKAT_TEST_ISA"
_KERNEL_TESTS = ("tests/kernels/test_cpu.py", "tests/engine/test_compiled.py")
_AMD_SOURCE = Path(__file__).with_name("answer_as_amd.c")


@dataclass(frozen=True, slots=True)
class Setting:
    """environment: what holds the libraries back;  arguments: of pytest, for fewer than all of the marked tests"""

    environment: dict[str, str]
    arguments: tuple[str, ...] = ()


SETTINGS = {
    # One thread, as sums that two share have another order again.
    "default": Setting(
        {
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
            "OMP_NUM_THREADS": "1",
            ISA_VARIABLE: "generic",
        }
    ),
    "avx2": Setting(
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            ISA_VARIABLE: "avx2",
        }
    ),
    # faulthandler would take over the signal by which CPUID is answered. The kernels are those of avx2.
    "amd": Setting(
        {"LD_PRELOAD": "answer_as_amd.so", "PYTEST_ADDOPTS": "-p no:faulthandler", ISA_VARIABLE: "avx2"},
        (f"--ignore={_KERNEL_TESTS[0]}",),
    ),
    **{f"kernels {isa}": Setting({ISA_VARIABLE: isa}, _KERNEL_TESTS) for isa in ("avx512-vnni", "avx-vnni")},
}
HOST_NAME = binding.get_host_cpu_name()


def restrict_kernels(isa: str) -> None:
    """From here on our kernels are compiled as for a processor whose best instruction set is this one."""
    there = binding.get_host_cpu_features()
    kept = binding.FeatureMap({name: has and not re.match(_LACKS[isa], name) for name, has in there.items()})
    binding.get_host_cpu_features = lambda: kept
    if _LACKS[isa] != "(?!)":
        binding.get_host_cpu_name = lambda: "x86-64"
    if jit.best_isa() != isa:
        raise RuntimeError(f"the kernels take {jit.best_isa()}, not {isa}")


def processor_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def cannot(name: str) -> str | None:
    """Why this processor cannot run a setting; None where it can."""
    if not is_x86():
        return "not an x86 processor"
    isa = SETTINGS[name].environment.get(ISA_VARIABLE)
    lacking = set() if isa is None else NEEDS[isa] - jit.llvm_host_features()
    if lacking:
        return f"the processor has no {', '.join(sorted(lacking))}"
    if name == "amd":
        if not sys.platform.startswith("linux") or "cpuid_fault" not in Path("/proc/cpuinfo").read_text():
            return "the system does not let CPUID be answered for it; on an AMD processor `make test` runs this"
        if shutil.which("cc") is None:
            return f"needs a C compiler for {_AMD_SOURCE.name}"
    return None


def run(name: str, folder: Path) -> tuple[bool, str]:
    """Whether all passed, and what to print."""
    reason = cannot(name)
    if reason is not None:
        return True, f"--- {name}: skipped: {reason}"
    started = perf_counter()
    setting = SETTINGS[name]
    environment = setting.environment.copy()
    if "LD_PRELOAD" in environment:
        environment["LD_PRELOAD"] = str(folder / environment["LD_PRELOAD"])
        command = ["cc", "-O1", "-shared", "-fPIC", "-o", environment["LD_PRELOAD"], str(_AMD_SOURCE)]
        subprocess.run(command, check=True)
    command = [sys.executable, "-m", "pytest", "-m", "isa and not slow", *setting.arguments]
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=False)
    shown = " ".join(f"{key}={value}" for key, value in setting.environment.items())
    end = f"{'passed' if done.returncode == 0 else 'FAILED'} in {perf_counter() - started:.0f} s"
    return done.returncode == 0, f"--- {name}: {shown}\n{done.stdout}    {name}: {end}"


def main(names: list[str]) -> int:
    print(f"processor: {processor_name()} ({HOST_NAME} to LLVM), whose best kernels are {jit.best_isa()}", flush=True)
    names, failed = names or list(SETTINGS), []
    # Two at once: most of the time goes into compiling kernels and into Python, on one core.
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for name, (passed, text) in zip(names, pool.map(lambda name: run(name, Path(folder)), names), strict=True):
            print(text, flush=True)
            if not passed:
                failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "no setting failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
