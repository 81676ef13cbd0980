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
_KERNELS = ("tests/kernels/test_cpu.py", "tests/engine/test_compiled.py")
_AMD_SOURCE = Path(__file__).with_name("answer_as_amd.c")


@dataclass(frozen=True, slots=True)
class Setting:
    """environment: what holds the libraries back;  files: of the marked tests only those in these, () for all"""

    environment: dict[str, str]
    files: tuple[str, ...] = ()


def held_to(torch: str, onednn: str, mkl: str, kernels: str, **more: str) -> Setting:
    libraries = {"ATEN_CPU_CAPABILITY": torch, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}
    return Setting({**libraries, ISA_VARIABLE: kernels, **more})


SETTINGS = {
    "avx2": held_to("avx2", "AVX2", "AVX2", "avx2"),
    # One thread, as sums that are shared by two have another order again.
    "default": held_to("default", "SSE41", "SSE4_2", "generic", OMP_NUM_THREADS="1"),
    # faulthandler would take over the signal by which CPUID is answered.
    "amd": Setting({"LD_PRELOAD": "", "PYTEST_ADDOPTS": "-p no:faulthandler"}),
    **{f"kernels {isa}": Setting({ISA_VARIABLE: isa}, _KERNELS) for isa in ("avx512-vnni", "avx-vnni")},
}


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


def run(name: str, folder: Path) -> int:
    """Exit status of pytest."""
    setting = SETTINGS[name]
    environment = setting.environment.copy()
    if "LD_PRELOAD" in environment:
        environment["LD_PRELOAD"] = str(folder / "answer_as_amd.so")
        command = ["cc", "-O1", "-shared", "-fPIC", "-o", environment["LD_PRELOAD"], str(_AMD_SOURCE)]
        subprocess.run(command, check=True)
    command = [sys.executable, "-m", "pytest", "-m", "isa and not slow", *setting.files]
    return subprocess.run(command, env=os.environ | environment, check=False).returncode


def main(names: list[str]) -> int:
    print(f"processor: {processor_name()}, {os.cpu_count()} logical processors", flush=True)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names or SETTINGS:
            reason = cannot(name)
            if reason is not None:
                print(f"--- {name}: skipped: {reason}", flush=True)
                continue
            shown = " ".join(f"{key}={value}" for key, value in SETTINGS[name].environment.items() if value)
            print(f"--- {name}: {shown}", flush=True)
            started = perf_counter()
            if run(name, Path(folder)) != 0:
                failed.append(name)
            print(f"    {name}: {'failed' if name in failed else 'passed'} in {perf_counter() - started:.0f} s")
    print(f"failed: {', '.join(failed)}" if failed else "all of these passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
