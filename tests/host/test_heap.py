"""What a process does with the memory it has freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Page faults of making and freeing the same 64 blocks of 4 MB five times more.
_PROGRAM = """
import resource, sys
from nkat.host.heap import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("this system cannot")
def make():
    for block in [bytearray(b"x") * (4 << 20) for _ in range(64)]:
        del block
make()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    make()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc")
def test_freed_memory_is_kept_on_request() -> None:
    faults = {}
    for how in ("kept", "given back"):
        command = [sys.executable, "-c", _PROGRAM, how]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if "this system cannot" in done.stderr:
            pytest.skip("this system's malloc is not glibc's")
        assert done.returncode == 0, done.stderr
        faults[how] = int(done.stdout)
    assert faults["kept"] < 100
    assert faults["given back"] > 1000  # control: 5 · 64 blocks of 1,024 pages, or 512 of them huge
