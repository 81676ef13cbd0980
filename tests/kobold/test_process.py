"""Running KoboldCpp: what its log says, how it fails, how it ends, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nkat.errors import NKATError
from nkat.kobold.api import base_url, check_port, is_private
from nkat.kobold.backends import CPU, VULKAN, Place
from nkat.kobold.benchmark import Speed, fastest, layer_splits
from nkat.kobold.choose import Choice
from nkat.kobold.command import Settings
from nkat.kobold.guard import Guard
from nkat.kobold.koboldcpp import WATCH, measure_speed, model_name, read_result
from nkat.kobold.process import Loaded, ServerProcess, check_loaded, running, wait_until_ready
from tests.conftest import ROOT
from tests.support.fake_koboldcpp import NEW, OLD, install
from tests.support.kobold_api import post
from tests.support.processes import words_of
from tests.support.tiny_models import write_tiny_model
from tests.support.user import free_port

posix = pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals to another process")
SECONDS = 120.0
KNOWN = {"KoboldCpp": model_name}
SETTINGS = Settings(512, 1, "127.0.0.1", 5001)

# Lines of real logs: 1.76 with CPU, 1.76 with Vulkan on a software device, 1.115.1 (esobold) asked for Vulkan without
# its library, and llama.cpp's own form of a CUDA log.
LOGS = {
    "cpu 1.76": (
        """\
Welcome to KoboldCpp - Version 1.76
Initializing dynamic library: koboldcpp_default.so
llm_load_tensors: ggml ctx size =    0.15 MiB
llm_load_tensors:        CPU buffer size =   120.79 MiB
llama_kv_cache_init:        CPU KV buffer size =    24.61 MiB
llama_new_context_with_model:        CPU compute buffer size =    97.13 MiB
llama_lora_adapter_init_internal:        CPU LoRA buffer size =     4.66 MiB
llama_lora_adapter_init_internal: loaded 420 tensors from lora file""",
        Loaded("1.76", "default", {"CPU": 120.79}, 420, 1),
        0.0,
    ),
    "vulkan 1.76": (
        """\
Attempting to use Vulkan library for faster prompt ingestion. A compatible Vulkan will be required.
Initializing dynamic library: koboldcpp_vulkan.so
ggml_vulkan: Found 1 Vulkan devices:
llm_load_tensors: offloaded 10/31 layers to GPU
llm_load_tensors: llvmpipe (LLVM 15.0.6, 256 bits) buffer size =    21.14 MiB
llm_load_tensors: Vulkan_Host buffer size =    99.65 MiB
llama_kv_cache_init: llvmpipe (LLVM 15.0.6, 256 bits) KV buffer size =     4.45 MiB""",
        Loaded(None, "vulkan", {"llvmpipe (LLVM 15.0.6, 256 bits)": 21.14, "Vulkan_Host": 99.65}, None),
        21.14,
    ),
    "default instead of vulkan 1.115.1": (
        """\
Welcome to KoboldCpp - Version 1.115.1
Initializing dynamic library: koboldcpp_default.so
load_tensors: offloading 4 repeating layers to GPU
load_tensors: offloaded 5/31 layers to GPU
load_tensors:          CPU model buffer size =   434.91 MiB
load_tensors:   CPU_REPACK model buffer size =    28.05 MiB""",
        Loaded("1.115.1", "default", {"CPU": 434.91, "CPU_REPACK": 28.05}, None),
        0.0,
    ),
    "cuda on Windows": (
        """\
Initializing dynamic library: C:\\Temp\\_MEI123\\koboldcpp_cublas.dll
load_tensors:        CUDA0 model buffer size =  3820.94 MiB
load_tensors:   CPU_Mapped model buffer size =    70.31 MiB
load_tensors:    CUDA_Host model buffer size =    10.00 MiB""",
        Loaded(None, "cublas", {"CUDA0": 3820.94, "CPU_Mapped": 70.31, "CUDA_Host": 10.0}, None),
        3820.94,
    ),
}


@pytest.mark.parametrize("name", LOGS)
def test_reads_real_logs(name: str) -> None:
    text, expected, on_gpu = LOGS[name]
    loaded = Loaded()
    for line in text.splitlines():
        loaded.read(line, WATCH)
    assert loaded == expected
    assert loaded.gpu_megabytes == on_gpu


def test_another_library_is_an_error_with_advice() -> None:
    check_loaded(Loaded(), ("vulkan",), "vulkan", "do this")  # nothing is known yet
    check_loaded(Loaded(library="hipblas"), ("cublas", "hipblas"), "cuda", "do this")
    with pytest.raises(NKATError, match=r"asked for cuda, but .* koboldcpp_default .* koboldcpp_cublas or .*; do this"):
        check_loaded(Loaded(library="default"), ("cublas", "hipblas"), "cuda", "do this")


def test_urls() -> None:
    assert base_url("", 5001) == base_url("0.0.0.0", 5001) == "http://127.0.0.1:5001"
    assert base_url("::1", 1, secure=True) == "https://[::1]:1"
    assert [is_private(host) for host in ("127.0.0.1", "localhost", "::1", "", "0.0.0.0", "192.168.1.5")] == [
        *[True] * 3,
        *[False] * 3,
    ]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def command(tmp_path: Path, port: int) -> Callable[..., list[str]]:
    """A command for a stand-in that behaves as told."""
    model = write_tiny_model(tmp_path / "m.gguf", "llama")

    def make(version: str = NEW, *flags: str, **behaviour: object) -> list[str]:
        script = install(tmp_path / "kobold", version, **behaviour)
        words = [sys.executable, str(script), "--model", str(model), "--usecpu", "--gpulayers", "0"]
        return [*words, "--host", "127.0.0.1", "--port", str(port), *flags]

    return make


def accept(_: Loaded) -> None:
    return


def wait(process: ServerProcess, port: int, seconds: float = SECONDS) -> str:
    return wait_until_ready(process, base_url("127.0.0.1", port), seconds, accept)


def everything_ended(started: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(started, timeout=60)
    return not alive


@pytest.mark.parametrize("version", [OLD, NEW])
@pytest.mark.parametrize("tree", [False, True])
def test_ready_answers_and_ends(command, port: int, version: str, tree: bool) -> None:
    with running(command(version, tree=tree), WATCH) as process:
        assert wait(process, port) == "koboldcpp/m"
        assert process.loaded.version == version
        assert post(base_url("127.0.0.1", port), "/api/v1/generate", {"prompt": "x"})["results"][0]["text"]
        family = [psutil.Process(process.child.pid), *psutil.Process(process.child.pid).children(recursive=True)]
        assert len(family) == 1 + tree
    assert everything_ended(family)


def test_a_busy_port_is_known_before_and_named(command, port: int) -> None:
    check_port("127.0.0.1", port, KNOWN)
    with running(command(), WATCH) as process:
        wait(process, port)
        said = rf"port {port} .* a KoboldCpp with koboldcpp/m; port \d+ is free: --port \d+"
        with pytest.raises(NKATError, match=said):
            check_port("127.0.0.1", port, KNOWN)
        with pytest.raises(NKATError, match="in use"):
            check_port("0.0.0.0", port, KNOWN)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(NKATError, match="another program"):
            check_port("127.0.0.1", other.getsockname()[1], KNOWN)


def test_a_port_of_something_that_does_not_speak_http(port: int) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()

        def greet() -> None:
            for _ in range(2):  # to see whether somebody listens, and to ask for the model
                caller, _address = other.accept()
                with caller:
                    caller.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(NKATError, match="another program"):
            check_port("127.0.0.1", port, KNOWN)


def test_an_address_that_is_not_this_machines() -> None:
    with pytest.raises(NKATError, match=r"cannot listen at port 5001 of --host 192\.0\.2\.1"):  # RFC 5737: nobody's
        check_port("192.0.2.1", 5001, KNOWN)


def test_a_proxy_in_the_environment_is_not_asked(command, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with running(command(), WATCH) as process:
        assert wait(process, port) == "koboldcpp/m"


@pytest.mark.parametrize("version", [OLD, NEW])
def test_a_port_that_was_taken_meanwhile(command, port: int, version: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        said = r"could not listen|ended with status 1"
        with pytest.raises(NKATError, match=said), running(command(version), WATCH) as process:
            wait(process, port)


def test_crash_at_load_gives_its_own_words(tmp_path: Path, command, port: int, capsys: pytest.CaptureFixture) -> None:
    words = command(OLD)
    write_tiny_model(tmp_path / "m.gguf", "gemma3")
    with pytest.raises(NKATError) as failure, running(words, WATCH) as process:
        wait(process, port)
    assert "crashed (SIGSEGV, status 139)" in str(failure.value) or os.name == "nt"
    assert "unknown model architecture: 'gemma3'; a newer KoboldCpp may know it" in str(failure.value)
    assert "\n" not in str(failure.value)
    assert "failed to load model" in capsys.readouterr().err
    with running(command(NEW), WATCH) as process:  # control: the newer one knows it
        assert wait(process, port)


def test_wrong_flags_give_its_own_words(command, port: int) -> None:
    said = r"ended with status 2 .* unrecognized arguments: --nonsense"
    with pytest.raises(NKATError, match=said), running(command(NEW, "--nonsense"), WATCH) as process:
        wait(process, port)


def test_time_out(command, port: int) -> None:
    with (
        pytest.raises(NKATError, match="not ready within 1 seconds"),
        running(command(NEW, seconds=60), WATCH) as process,
    ):
        wait(process, port, seconds=1.0)
    assert process.child.returncode is not None


def test_a_program_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(NKATError, match="cannot be started"), running([str(tmp_path / "nothing")], WATCH):
        pytest.fail("not reached")


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_forwarded(command, port: int, number: int) -> None:
    before = signal.getsignal(number)
    with running(command(), WATCH) as process:
        wait(process, port)
        signal.raise_signal(number)
        assert process.wait() in (-number, 1)  # Python turns SIGINT into a traceback and status 1 or the signal
        assert process.signalled == number
    assert signal.getsignal(number) == before


@posix
def test_a_second_signal_ends_what_ignores_the_first(command, port: int) -> None:
    with running(command(NEW, deaf=True), WATCH) as process:
        wait(process, port)
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        signal.raise_signal(signal.SIGTERM)
        assert process.wait() == -signal.SIGKILL


PARENT = """
import sys, time
from nkat.kobold import guard
from nkat.kobold.api import base_url
from nkat.kobold.koboldcpp import WATCH
from nkat.kobold.process import running, wait_until_ready
guard._GRACE_SECONDS = 1.0
with running(sys.argv[2:], WATCH) as process:
    wait_until_ready(process, base_url("127.0.0.1", int(sys.argv[1])), 120, lambda loaded: None)
    print("ready", flush=True)
    time.sleep(600)
"""


@posix
@pytest.mark.parametrize("behaviour", [{}, {"tree": True}, {"deaf": True, "tree": True}])
def test_no_orphan_when_killed(command, port: int, behaviour: dict) -> None:
    """SIGKILL cannot be caught: somebody else has to clean up."""
    words = [sys.executable, "-c", PARENT, str(port), *command(NEW, **behaviour)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout.readline().strip() == b"ready"
        family = psutil.Process(parent.pid).children(recursive=True)
        assert sum("koboldcpp.py" in " ".join(words_of(p)) for p in family) == 1 + bool(behaviour.get("tree"))
        parent.kill()
    assert everything_ended(family)


@posix
def test_without_the_guard_there_would_be_one(command, port: int) -> None:
    """The control of the test above."""
    program = """
import subprocess, sys, time
subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
print("ready", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program, *command()], stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        family = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    _, alive = psutil.wait_procs(family, timeout=1)
    assert alive
    for process in alive:
        process.kill()


def test_the_guard_ends_with_its_block() -> None:
    before = {p.pid for p in psutil.Process().children()}
    with Guard() as guard:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **guard.popen_options)
        guard.watch(child)
    assert child.wait(timeout=60) != 0
    assert {p.pid for p in psutil.Process().children()} == before


@posix
def test_a_watcher_that_was_killed_is_no_error() -> None:
    before = {p.pid for p in psutil.Process().children()}
    with Guard() as guard:
        (watcher,) = [p for p in psutil.Process().children() if p.pid not in before]
        watcher.kill()
        psutil.wait_procs([watcher], timeout=60)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **guard.popen_options)
        guard.watch(child)
    assert child.wait(timeout=60) != 0


def test_benchmark_is_read(command) -> None:
    speed = measure_speed(command(NEW, "--contextsize", "512"), SETTINGS, "cpu", SECONDS, accept)
    assert speed == Speed(processing=100.0, generation=20.0, seconds=pytest.approx(9.12), context=512, generated=100)
    assert read_result(["ProcessingSpeed: 30.50T/s", "GenerationSpeed: 49.88T/s"]) is None


def test_benchmark_that_fails(tmp_path: Path, command) -> None:
    words = command(OLD)
    write_tiny_model(tmp_path / "m.gguf", "gemma3")
    with pytest.raises(NKATError, match=r"gave no figures.*unknown model architecture"):
        measure_speed(words, SETTINGS, "cpu", SECONDS, accept)


def test_splits_and_the_fastest() -> None:
    gpu = Choice(VULKAN, Place.GPU, None, "", ("vulkan",), layers=31, all_layers=31)
    cpu = Choice(CPU, Place.CPU, None, "", ("default",))
    assert [choice.layers for choice in layer_splits(gpu)] == [31, 15, 0]
    assert layer_splits(cpu) == [cpu]
    measured = [
        (choice, Speed(processing, generation, 1.0, 512, 100))
        for choice, processing, generation in ((cpu, 900, 40.0), (gpu, 100, 49.0), (cpu, 200, 50.0), (gpu, 50, 50.1))
    ]
    assert fastest(measured)[1].processing == 200  # the fastest generation but for noise, and of those prompts
    with pytest.raises(NKATError, match="no backend could be measured"):
        fastest([])
