"""Opening as asked, and what a start takes in time and memory."""

from __future__ import annotations

import mmap
import os
import signal
import sys
from pathlib import Path

import pytest

from nkat.errors import NKATError
from nkat.host.memory import memory, resident_of
from nkat.lm.request import Request
from nkat.measure import startup
from nkat.measure.startup import fresh_startup, measure_startup
from tests.support.tiny_models import write_tiny_model

SMAPS = """\
7f0000000000-7f0000200000 r--s 00000000 08:01 99                         /data/my model.gguf
Size:               2048 kB
Rss:                1024 kB
Pss:                1024 kB
VmFlags: rd sh mr mw me ms
7f0000200000-7f0000400000 rw-p 00000000 00:00 0
Rss:                 512 kB
7f0000400000-7f0000600000 r--s 00200000 08:01 99                         /data/my model.gguf
Rss:                   4 kB
7f0000600000-7f0000800000 r--p 00000000 08:01 98                         /data/my model.gguf.other
Rss:                  64 kB
"""


def test_pages_of_one_file_are_counted_over_its_mappings() -> None:
    assert resident_of(SMAPS, "/data/my model.gguf") == 1028 * 1024
    assert resident_of(SMAPS, "/data/my model.gguf.other") == 64 * 1024
    assert resident_of(SMAPS, "/data/my") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a file's pages from a process's own")
def test_own_pages_are_told_from_those_of_a_file(tmp_path: Path) -> None:
    size = 32 << 20
    path = tmp_path / "weights"
    path.write_bytes(b"x" * size)
    before = memory(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert before.model_file == 0
        assert sum(mapped[at] for at in range(0, size, 4096)) > 0
        during = memory(path)
        assert during.model_file == size
        assert during.anonymous - before.anonymous < size // 2
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # fresh pages for sure; malloc may hand out old ones
    with mmap.mmap(-1, 2 * size, flags=private) as own:
        own.write(b"x" * len(own))
        after = memory(path)
    assert after.model_file == 0
    assert after.anonymous - during.anonymous > size // 2
    assert after.peak >= after.resident > 0


def test_a_start_is_measured_in_its_own_process(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "llama.gguf", "llama")
    start = fresh_startup(Request(path), "the rain in a tin", threads=1)
    assert start.first_token_cold >= start.load >= 0
    assert start.first_token >= start.load + start.decoder
    assert start.once == max(0.0, start.first_token_cold - start.first_token)
    record = start.record()
    assert record["memory_before_model"]["resident"] > 0
    assert record["process_start_seconds"] > 0
    # This process has waited for that one: it is how one sees that it was another.
    here = measure_startup(Request(path), "the rain in a tin")
    assert here.process > start.process


def test_errors_come_back_from_the_other_process(tmp_path: Path) -> None:
    with pytest.raises(NKATError, match="no such file"):
        fresh_startup(Request(tmp_path / "none.gguf"), "text", threads=1)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_process_that_dies_is_said(tmp_path: Path, monkeypatch) -> None:
    """As the system's out-of-memory killer would end it."""
    monkeypatch.setattr(startup, "_answer", _die)
    with pytest.raises(NKATError, match="ended without an answer"):
        fresh_startup(Request(tmp_path / "m.gguf"), "text", threads=1)


def _die(sender, request, prompt, threads) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_ctrl_c_still_works_afterwards(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(NKATError):
        fresh_startup(Request(tmp_path / "none.gguf"), "text", threads=1)
    assert signal.getsignal(signal.SIGINT) is before


def test_gamma_needs_a_theta(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "llama.gguf", "llama")
    with pytest.raises(NKATError, match="has no Θ, so --theta-gamma has no meaning"):
        Request(path, gamma=0.9).open()
    request = Request(path)
    loaded = request.load(*request.open())
    assert loaded.gamma is None
