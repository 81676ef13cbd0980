"""Fixtures: real models from the cache, shared texts, and the scripts as a user would run them."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nkat.models import cached
from tests.support.isa import ISA_VARIABLE, restrict_kernels

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = Path(os.environ.get("NKAT_SHARED_DATA", ROOT.parent / "shared" / "data"))

Script = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure() -> None:
    """Some tests press Ctrl-C or close the terminal; a shell's background job and nohup would ignore that."""
    if isa := os.environ.get(ISA_VARIABLE):
        restrict_kernels(isa)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return _model("smollm2")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    return _model("gemma3")


@pytest.fixture(scope="session")
def qwen() -> Path:
    return _model("qwen")


@pytest.fixture(scope="session")
def stories() -> Path:
    return _shared("models/stories260K-f32.gguf")


@pytest.fixture(scope="session")
def shared_text() -> Callable[[str], Path]:
    return lambda name: _shared(f"text/{name}")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Runs a script of the toolkit in this process: script("nkat_gguf_converter.py", "--input", path, ...).

    Importing torch anew for each of a hundred runs would take most of the suite's time; `process` does that.
    """

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        out, err = io.StringIO(), io.StringIO()
        command = [str(ROOT / name), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            runpy.run_path(command[0], run_name="__main__")
        return subprocess.CompletedProcess(command, ended.value.code or 0, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def process() -> Script:
    """The same in a process of its own, as a user's shell does it."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)

    return run


@pytest.fixture
def fails(script: Script) -> Callable[..., str]:
    """Runs a script that must refuse its input: status 2 and exactly one line on stderr, which is returned."""

    def run(name: str, *arguments: object) -> str:
        done = script(name, *arguments)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2, done
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _model(name: str) -> Path:
    isa = os.environ.get(ISA_VARIABLE)
    if isa is not None and (name != "smollm2" or isa == "generic"):
        pytest.skip("make test-isa leaves it out, for its time")
    path = cached(name)
    if path is None:
        pytest.skip(f"{name} is not in the model cache; fetch it with: python -m nkat.models {name}")
    return path


def _shared(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"the shared data folder has no {name}")
    return path
