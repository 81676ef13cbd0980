"""llama-server as the program: its row, and `backend_selector.py --runtime llama-server` as a user runs it, with a
stand-in and, where LLAMA_SERVER names one, the real one.

LLAMA_SERVER=~/llama.cpp/build/bin python -m pytest tests/kobold/test_llama_server.py
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nkat.errors import NKATError
from nkat.kobold.api import base_url, get_json
from nkat.kobold.choose import choices
from nkat.kobold.command import Settings, command_of
from nkat.kobold.files import Adapter, RunFiles, prepare_files
from nkat.kobold.layers import ModelMemory
from nkat.kobold.llama_server import (
    BACKENDS,
    LLAMA_SERVER,
    WATCH,
    adapter_settings,
    measure_speed,
    parse_devices,
    parse_help,
    presets_text,
    probe,
    settings_of,
)
from nkat.kobold.machine import Machine
from nkat.kobold.process import Loaded, running, wait_until_ready
from nkat.kobold.program import Program
from nkat.theta.combine import WeightedFile
from tests.kobold.test_session import SECONDS, Launched, our_greedy
from tests.support.fake_llama_server import install
from tests.support.kobold_api import post
from tests.support.tiny_models import write_tiny_model
from tests.support.user import empty_home, free_port

SELECTOR, CONVERTER = "backend_selector.py", "nkat_gguf_converter.py"
REAL = os.environ.get("LLAMA_SERVER")
GIB = 1 << 30
posix = pytest.mark.skipif(os.name == "nt", reason="uses POSIX signals, shells or programs that begin with #!")
DEVICES = """\
Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24210 MiB, 23500 MiB free)
  Vulkan1: AMD Radeon RX 6800 (RADV NAVI21) (16384 MiB, 16000 MiB free)
  MTL0: Apple M2 Pro (21845 MiB, 21845 MiB free)
"""
MACHINE = Machine(False, frozenset({"avx2"}), 8, 32 * GIB, 30 * GIB, (), "no NVIDIA driver", "no Vulkan library")
SEVEN_B = ModelMemory((120 << 20,) * 32, 32 << 20, 100 << 20, 80 << 20, 50 << 20, 2048)
FILES = RunFiles(Path("m.nkat"), Path("/m/base.gguf"), "", (Adapter(Path("/c/theta.gguf")),), {}, 4, 0.97)
SETTINGS = Settings(2048, 8, "127.0.0.1", 5001)


@pytest.fixture(autouse=True)
def user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return empty_home(monkeypatch, tmp_path)


@pytest.fixture(params=["stand-in", "real"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if os.name == "nt":
        pytest.skip("the stand-in is a script that begins with #!")
    if request.param == "stand-in":
        return install(tmp_path / "llama")
    return real_server()


def real_server() -> Path:
    if REAL is None:
        pytest.skip("LLAMA_SERVER names no llama-server")
    return Path(REAL)


@pytest.fixture
def thetas(script, base: Path, tmp_path: Path) -> list[Path]:
    return make_thetas(script, base, tmp_path)


def make_thetas(script, base: Path, tmp_path: Path) -> list[Path]:
    """Two Θ for one model, of different ranks and strengths."""
    made = []
    for name, rank, gamma in (("a.bin", 4, 0.5), ("b.bin", 2, 0.7)):
        made.append(tmp_path / name)
        flags = ("--theta-only", "--theta-rank", rank, "--theta-gamma", gamma, "--seed", rank)
        assert script(CONVERTER, "--input", base, "--output", made[-1], *flags).returncode == 0
    return made


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def launch(server: Path):
    started: list[Launched] = []

    def start(*arguments: object) -> Launched:
        started.append(Launched("--runtime", "llama-server", "--llama-server", server, "--launch", *arguments))
        return started[-1]

    yield start
    for launched in started:
        launched.process.kill()
        launched.process.communicate()


def run(script, server: Path, *arguments: object) -> dict:
    done = script(SELECTOR, "--json", "--runtime", "llama-server", "--llama-server", server, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# The row


def test_flags_and_devices_are_what_it_says(tmp_path: Path) -> None:
    text = """\
-ctk,   --cache-type-k TYPE             KV cache data type for K
                                        allowed values: f32, f16, q8_0
-ngl,   --gpu-layers, --n-gpu-layers N  max. number of layers, see --nothing
--spec-draft-ngl, -ngld, --gpu-layers-draft, --n-gpu-layers-draft N
                                        draft model layers, not --this
"""
    flags, types = parse_help(text)
    assert types == ("f32", "f16", "q8_0")
    assert flags == {
        *("--cache-type-k", "--gpu-layers", "--n-gpu-layers", "--spec-draft-ngl", "--gpu-layers-draft"),
        "--n-gpu-layers-draft",
    }
    found = parse_devices(DEVICES)
    assert [(gpu.interface, gpu.index, gpu.name, gpu.free) for gpu in found] == [
        ("CUDA", 0, "NVIDIA GeForce RTX 4090", 23500 << 20),
        ("Vulkan", 1, "AMD Radeon RX 6800 (RADV NAVI21)", 16000 << 20),
        ("MTL", 0, "Apple M2 Pro", 21845 << 20),
    ]
    assert parse_devices("Available devices:\n  (none)\n") == ()


def program(*devices: str, old: bool = False, folder: Path) -> Program:
    return probe(install(folder, devices=list(devices), old=old))


@posix
def test_the_devices_it_lists_are_its_backends(tmp_path: Path) -> None:
    found = choices(
        program(*[line.strip() for line in DEVICES.splitlines()[1:]], folder=tmp_path), MACHINE, SEVEN_B, None, BACKENDS
    )
    usable = [(choice.backend.name, choice.layers) for choice in found if choice.lacks is None]
    assert usable == [("cuda", 33), ("metal", 33), ("vulkan", 33), ("cpu", 0)]
    assert [choice.reason for choice in found if choice.lacks] == [
        "this llama-server lists no ROCm device",
        "this llama-server lists no SYCL device",
    ]
    asked = program("Vulkan1: A card (16384 MiB, 16000 MiB free)", folder=tmp_path)
    first = choices(asked, MACHINE, SEVEN_B, None, BACKENDS)[0]
    values = settings_of(asked, first, FILES, SETTINGS)
    assert values == {
        "model": str(FILES.model),
        "alias": "m",
        "lora": str(FILES.adapters[0].path),
        "device": "Vulkan1",
        "gpu-layers": 33,
        "fit": "off",
        "ctx-size": 2048,
        "threads": 8,
        "verbosity": 4,
        "host": "127.0.0.1",
        "port": 5001,
    }
    words = command_of(asked, values, ["--jinja"])
    assert words[0] == str(asked.path)
    assert " ".join(words[-5:]) == "--host 127.0.0.1 --port 5001 --jinja"
    fitted = settings_of(asked, first, FILES, replace(SETTINGS, autofit=True))
    assert (fitted["gpu-layers"], fitted["fit"]) == ("auto", "on")


@posix
def test_settings_differ_by_version(tmp_path: Path) -> None:
    draft = replace(SETTINGS, draft=Path("/m/small.gguf"), draft_tokens=5)
    new, old = program(folder=tmp_path / "new"), program(folder=tmp_path / "old", old=True)
    cpu = {one.label: choices(one, MACHINE, None, None, BACKENDS)[0] for one in (new, old)}
    values = settings_of(new, cpu[new.label], FILES, draft)
    assert (values["spec-draft-model"], values["spec-type"]) == (str(draft.draft), "draft-simple")
    assert (values["spec-draft-n-max"], values["spec-draft-ngl"], values["device"]) == (5, 0, "none")
    values = settings_of(old, cpu[old.label], FILES, draft)
    assert (values["model-draft"], values["draft-max"], values["gpu-layers-draft"]) == (str(draft.draft), 5, 0)
    assert not {"fit", "spec-type", "spec-draft-model"} & values.keys()
    quantised = settings_of(new, cpu[new.label], FILES, replace(SETTINGS, cache_type="q8_0"))
    assert (quantised["cache-type-k"], quantised["cache-type-v"], quantised["flash-attn"]) == ("q8_0", "q8_0", "on")
    with pytest.raises(NKATError, match=r"has no --models-preset; a newer one may have it"):
        LLAMA_SERVER.write(old, tmp_path / "x.ini", values, (), False)


def test_several_adapters_keep_their_weights() -> None:
    one, other = Adapter(Path("a.gguf")), Adapter(Path("b,c.gguf"))
    assert adapter_settings(()) == {}
    assert adapter_settings((one, other)) == {"lora": 'a.gguf,"b,c.gguf"'}
    assert adapter_settings((one, replace(other, weight=-0.5))) == {"lora-scaled": 'a.gguf:1,"b,c.gguf:-0.5"'}


def test_a_presets_file_holds_no_more_than_its_form_can() -> None:
    text = presets_text({"a model": {"model": "/m/my model.gguf", "gpu-layers": 3, "load-on-startup": True}})
    assert text == "version = 1\n\n[a model]\nmodel = /m/my model.gguf\ngpu-layers = 3\nload-on-startup = true\n"
    for bad in ("/m/a#b.gguf", "/m/a;b.gguf", "/m/a ", "/m/a\nb"):
        with pytest.raises(NKATError, match="a presets file cannot hold this"):
            presets_text({"a": {"model": bad}})
    with pytest.raises(NKATError, match="cannot hold this name"):
        presets_text({"a]b": {}})


def test_its_log_is_read() -> None:
    loaded = Loaded()
    for line in (
        "0.00.093.316 I load_tensors:        CUDA0 model buffer size =  3820.94 MiB",
        "[40123] 0.00.093.320 I load_tensors:   CPU_Mapped model buffer size =    70.31 MiB",
        "0.00.104.992 I llama_adapter_lora_init_impl: loaded 420 tensors from lora file",
        "0.00.105.992 I llama_adapter_lora_init_impl: loaded 420 tensors from lora file",
    ):
        loaded.read(line, WATCH)
    assert loaded == Loaded(None, None, {"CUDA0": 3820.94, "CPU_Mapped": 70.31}, 840, 2)
    assert loaded.gpu_megabytes == 3820.94


# As a user runs it


def test_list(script, server: Path) -> None:
    record = run(script, server, "--list")
    assert record["runtime"] == "llama-server"
    assert {"--lora-scaled", "--models-preset"} <= set(record["llama_server"]["flags"])
    assert "q8_0" in record["llama_server"]["cache_types"]
    names = {choice["backend"]: choice["lacks"] for choice in record["choices"]}
    assert names["cpu"] is None
    assert set(names) == {"cuda", "rocm", "metal", "sycl", "vulkan", "cpu"}


@posix
def test_launch_serves_several_thetas_and_leaves_nothing(launch, base: Path, thetas: list[Path], port: int) -> None:
    asked = ["--theta", thetas[0], "--theta-scaled", f"{thetas[1]}:0.5"]
    launched = launch("--model", base, *asked, "--port", port, "--contextsize", 512, "--threads", 1, "--json")
    lines = launched.until_ready()
    assert lines[-1] == f"ready      base at {base_url('127.0.0.1', port)}\n"
    assert "2 adapters of 84 tensors" in lines[-2]
    assert [line for line in lines if "weight 0.5" in line]
    record = json.loads(launched.process.stdout.readline())
    assert record["loaded"]["adapters"] == 2
    url = record["url"]
    assert [one["scale"] for one in get_json(f"{url}/lora-adapters")] == [1.0, 0.5]
    off = [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}]
    assert "content" in post(url, "/completion", {"prompt": [1, 2, 3], "n_predict": 4})
    post_list(url, "/lora-adapters", off)  # switched while it runs
    assert [one["scale"] for one in get_json(f"{url}/lora-adapters")] == [0.0, 0.0]
    status, _ = launched.end(signal.SIGTERM)
    assert status == 128 + signal.SIGTERM


def post_list(url: str, path: str, body: list) -> None:
    import urllib.request

    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60).close()


@posix
def test_saved_presets_are_what_it_loads(script, server: Path, nkat: Path, port: int, tmp_path: Path) -> None:
    target = tmp_path / "my.ini"
    asked = ["--model", nkat, "--save-config", target, "--port", port, "--contextsize", 512, "--threads", 1]
    record = run(script, server, *asked)
    assert record["config"]["ctx-size"] == 512
    assert "[tiny]\n" in target.read_text()
    done = script(SELECTOR, "--runtime", "llama-server", "--llama-server", server, *asked, "--force")
    line = next(line for line in done.stderr.splitlines() if line.startswith("wrote ")).partition("load it with: ")[2]
    with running(shlex.split(line), WATCH) as process:
        assert wait_until_ready(process, base_url("127.0.0.1", port), SECONDS, lambda _: None) == "tiny"
        assert process.told(lambda loaded: loaded.adapters == 1)


@posix
def test_dry_run_can_be_pasted(script, server: Path, nkat: Path, port: int) -> None:
    asked = ("--runtime", "llama-server", "--llama-server", server, "--model", nkat, "--port", port)
    done = script(SELECTOR, *asked, "--dry-run", "--quantkv", "q8_0", "--contextsize", 512)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[words.index("--cache-type-k") + 1] == "q8_0"
    assert Path(words[words.index("--lora") + 1]).is_file()


@posix
def test_benchmark_keeps_the_fastest(script, server: Path, nkat: Path, port: int) -> None:
    asked = ["--model", nkat, "--contextsize", 512, "--threads", 1, "--port", port]
    record = run(script, server, *asked, "--backend", "cpu", "--benchmark")
    assert [(row["arm"], row["backend"]) for row in record["benchmark"]] == [("with Θ", "cpu"), ("without", "cpu")]
    assert all(row["generation"] > 0 and row["processing"] > 0 for row in record["benchmark"])
    assert [(row["context"], row["generated"]) for row in record["benchmark"]] == [(512, 100), (512, 100)]
    assert record["default_config"].endswith(".ini")
    found = run(script, server, *asked, "--list")["choices"][0]
    assert (found["backend"], found["speed"]) == ("cpu", record["benchmark"][0]["generation"])


@posix
def test_a_folder_of_models_by_name(script, launch, nkat: Path, base: Path, port: int, tmp_path: Path) -> None:
    """The model with its Θ and the one without, at one port; what cannot be read is skipped with a word."""
    folder = tmp_path / "models"
    folder.mkdir()
    for path in (nkat, base):
        path.rename(folder / path.name)
    (folder / "broken.gguf").write_bytes(b"GGUF")
    (folder / "lost.gguf").symlink_to("nowhere")
    launched = launch("--router", folder, "--model", folder / "tiny.nkat", "--port", port, "--contextsize", 512)
    lines = launched.until_ready()
    assert "adapter of 42 tensors" in lines[-2]
    assert lines[-1].startswith("ready      tiny at ")
    url = base_url("127.0.0.1", port)
    for name in ("base", "tiny"):
        answer = post(url, "/v1/completions", {"model": name, "prompt": "x", "max_tokens": 2, "n_predict": 2})
        assert answer["model"] == name
    launched.process.send_signal(signal.SIGTERM)
    _, said = launched.process.communicate(timeout=SECONDS)
    assert f"note: {folder / 'broken.gguf'} was skipped: " in said
    assert f"note: {folder / 'lost.gguf'} was skipped: No such file" in said
    assert 'name a model in a request: "tiny", "base"' in said


@posix
def test_a_draft_model_and_a_quantised_cache(launch, server: Path, port: int, tmp_path: Path) -> None:
    draft = write_tiny_model(tmp_path / "draft.gguf", "llama", seed=5, blocks=1, head_dim=32)
    base = write_tiny_model(tmp_path / "large.gguf", "llama", head_dim=32)
    asked = ["--model", base, "--draftmodel", draft, "--draftamount", 3, "--quantkv", "q8_0", "--port", port]
    launched = launch(*asked, "--contextsize", 512, "--threads", 1)
    launched.until_ready()
    url = base_url("127.0.0.1", port)
    answer = post(url, "/completion", {"prompt": [1, 2, 3], "n_predict": 8, "temperature": 0})
    assert "content" in answer
    if server == Path(REAL or ""):
        assert answer["timings"]["draft_n"] > 0  # it really guessed
    launched.end(signal.SIGTERM)


@pytest.fixture
def fails(script, server: Path) -> Callable[..., str]:
    """The error's line, which is the last."""

    def check(*arguments: object) -> str:
        done = script(SELECTOR, "--runtime", "llama-server", "--llama-server", server, *arguments)
        assert done.returncode == 2, done
        assert "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1]

    return check


@posix
def test_mistakes(fails, nkat: Path, base: Path, port: int, tmp_path: Path) -> None:
    lemma = tmp_path / "lemma.gguf"
    lemma.write_bytes(
        base.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lemma").replace(b"llama.", b"lemma.")
    )
    message = fails("--model", lemma, "--backend", "cpu", "--launch", "--port", port)
    assert "llama-server ended with status 1 before it was ready" in message
    assert "lemma" in message
    assert "is set by this script" in fails("--model", nkat, "--dry-run", "--", "--lora-scaled", "x:1")
    assert "has no --admin" in fails("--admin", tmp_path, "--launch")
    assert "has no backend clblast" in fails("--model", nkat, "--backend", "clblast", "--dry-run")
    other = write_tiny_model(tmp_path / "other.gguf", "llama", vocab="spm")
    assert "cannot draft for" in fails("--model", nkat, "--draftmodel", other, "--dry-run")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert "is in use by another program" in fails("--model", nkat, "--launch", "--port", port)


@posix
def test_an_adapter_it_says_nothing_about(script, tmp_path: Path, nkat: Path, port: int, monkeypatch) -> None:
    monkeypatch.setattr("nkat.kobold.process._LOG_SECONDS", 0.5)  # the stand-in never says what is waited for
    deaf = install(tmp_path / "deaf", forgetful=True)
    asked = ("--runtime", "llama-server", "--llama-server", deaf, "--model", nkat, "--launch", "--port", port)
    assert "llama-server did not load the adapter" in script(SELECTOR, *asked).stderr


@posix
def test_a_benchmark_that_ends_early(tmp_path: Path, base: Path, port: int) -> None:
    server = install(tmp_path / "llama")
    settings = Settings(512, 1, "127.0.0.1", port)
    command = [str(server), "--model", str(tmp_path / "nothing.gguf"), "--host", "127.0.0.1", "--port", str(port)]
    with pytest.raises(NKATError, match="ended with status 1 before it was ready"):
        measure_speed(command, settings, "cpu", SECONDS, lambda _: None)


# The real one only


@posix
def test_greedy_tokens_equal_ours(script, launch, server: Path, tmp_path: Path, stories: Path, port: int) -> None:
    if REAL is None or server != Path(REAL):
        pytest.skip("the stand-in computes nothing")
    nkat, prompt = tmp_path / "theta.nkat", "One day, a girl named Sue"
    made = script(CONVERTER, "--input", stories, "--output", nkat, "--theta-only", "--theta-gamma", "0.5")
    assert made.returncode == 0
    texts = {}
    for theta in (True, False):
        arguments = ["--model", stories, *(["--theta", nkat] if theta else []), "--backend", "cpu"]
        launched = launch(*arguments, "--port", port, "--contextsize", 1024, "--threads", 1)
        launched.until_ready()
        url = base_url("127.0.0.1", port)
        ids = post(url, "/tokenize", {"content": prompt, "add_special": True})["tokens"]
        greedy = {"prompt": ids, "n_predict": 32, "temperature": 0, "ignore_eos": True}
        texts[theta] = post(url, "/completion", greedy)["content"]
        ours, margins = our_greedy(stories, nkat if theta else None, ids, 32)
        first = next((n for n, piece in enumerate(ours) if not texts[theta].startswith(piece)), None)
        assert first is None or margins[first] < 1e-2, (first, margins[first], ours[-1], texts[theta])
        launched.end(signal.SIGTERM)
    assert texts[True] != texts[False]


@posix
def test_adapters_beside_each_other_are_one_that_holds_both(
    server: Path, script, stories: Path, tmp_path: Path, port: int
) -> None:
    """What KoboldCpp gets, in the real llama-server against what that gets itself: the same probabilities."""
    if REAL is None or server != Path(REAL):
        pytest.skip("the stand-in computes nothing")
    thetas = make_thetas(script, stories, tmp_path)
    named = [WeightedFile(thetas[0]), WeightedFile(thetas[1], 0.5)]
    found = probe(server / "llama-server" if server.is_dir() else server)
    choice = choices(found, MACHINE, None, None, BACKENDS)[0]
    settings = Settings(512, 1, "127.0.0.1", port)
    told = {}
    for name, files in {
        "none": prepare_files(stories, (), None),
        "first": prepare_files(stories, named[:1], None),
        "merged": prepare_files(stories, named, None),
        "separate": prepare_files(stories, named, None, separate=True),
    }.items():
        with running(command_of(found, settings_of(found, choice, files, settings)), WATCH) as process:
            url = base_url("127.0.0.1", port)
            assert wait_until_ready(process, url, SECONDS, lambda _: None)
            request = {"prompt": [1, 5, 9], "n_predict": 1, "temperature": 0, "n_probs": 20, "ignore_eos": True}
            answer = post(url, "/completion", request)
            probs = answer["completion_probabilities"][0]["top_logprobs"]
            told[name] = {one["id"]: one["logprob"] for one in probs}
    apart = {
        name: max(abs(told["separate"][i] - told[name][i]) for i in told["separate"].keys() & told[name].keys())
        for name in told
    }
    assert apart["merged"] < 0.01  # F16 rounds the factors where the weights are in them
    assert min(apart["none"], apart["first"]) > 10 * apart["merged"], apart
