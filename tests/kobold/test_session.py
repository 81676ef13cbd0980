"""`backend_selector.py` as a user runs it, with stand-ins for KoboldCpp and, where KOBOLDCPP names one, a real one.

KOBOLDCPP=~/koboldcpp python -m pytest tests/kobold/test_session.py
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import psutil
import pytest
import torch

from nkat.engine.decoder import make_decoder
from nkat.errors import NKATError
from nkat.gguf.file import GGUFFile
from nkat.gguf.formats import dequantise, packed_tensor
from nkat.kobold.api import base_url
from nkat.kobold.backends import CPU, Place
from nkat.kobold.choose import Choice
from nkat.kobold.menu import ask_backend, ask_model
from nkat.lm.load import load_model
from nkat.theta.modelfile import open_model_file
from tests.conftest import ROOT
from tests.support.fake_koboldcpp import NEW, OLD, install, install_program
from tests.support.kobold_api import post
from tests.support.processes import words_of
from tests.support.tiny_models import write_tiny_model
from tests.support.user import empty_home, free_port

SELECTOR, CONVERTER = "backend_selector.py", "nkat_gguf_converter.py"
REAL = os.environ.get("KOBOLDCPP")
KINDS = [f"folder {OLD}", f"folder {NEW}", f"program {NEW}", "real"]
SECONDS = 300.0
posix = pytest.mark.skipif(os.name == "nt", reason="uses POSIX signals, shells or terminals")


@pytest.fixture(autouse=True)
def user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return empty_home(monkeypatch, tmp_path)


@pytest.fixture(params=KINDS)
def kobold(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind, _, version = request.param.partition(" ")
    if kind == "real":
        return real_kobold()
    if kind == "folder":
        return install(tmp_path / "kobold", version)
    if os.name == "nt":
        pytest.skip("the stand-in for a one-file program is a shell script")
    (tmp_path / "bin").mkdir()
    return install_program(tmp_path / "bin" / "koboldcpp-linux-x64", version, tree=True)


def real_kobold() -> Path:
    if REAL is None:
        pytest.skip("KOBOLDCPP names no KoboldCpp")
    return Path(REAL)


@pytest.fixture
def port() -> int:
    return free_port()


def run(script, *arguments: object) -> dict:
    done = script(SELECTOR, "--json", *arguments)  # in front: what follows -- is KoboldCpp's
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class Launched:
    """The script in a process of its own, that has started a KoboldCpp."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, str(ROOT / SELECTOR), *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def until_ready(self) -> list[str]:
        """Its output up to the line that says where KoboldCpp is."""
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith("ready"):
                self.family = psutil.Process(self.process.pid).children(recursive=True)
                return lines
        raise AssertionError(self.process.stderr.read())

    def end(self, number: int) -> tuple[int, str]:
        """Sends a signal; returns the exit status and what was still said. Nothing may be left running."""
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=SECONDS)
        _, alive = psutil.wait_procs(self.family, timeout=60)
        assert not alive
        return self.process.returncode, out


@pytest.fixture
def launch() -> Iterator[Callable[..., Launched]]:
    started: list[Launched] = []

    def start(*arguments: object) -> Launched:
        started.append(Launched(*arguments))
        return started[-1]

    yield start
    for launched in started:
        launched.process.kill()
        launched.process.communicate()


# The same for all KoboldCpps


def test_list(script, kobold: Path) -> None:
    record = run(script, "--kobold", kobold, "--list")
    assert re.fullmatch(r"\d+\.\d+[.\d]*", record["kobold"]["version"])
    assert "--usecpu" in record["kobold"]["flags"]
    assert "default" in record["kobold"]["libraries"]
    assert sorted(choice["backend"] for choice in record["choices"]) == ["clblast", "cpu", "cuda", "failsafe", "vulkan"]
    assert record["choices"][0]["lacks"] is None
    done = script(SELECTOR, "--kobold", kobold, "--list")
    assert record["kobold"]["version"] in done.stdout
    assert "cores" in done.stdout


@posix
def test_launch_serves_and_leaves_nothing(launch, kobold: Path, nkat: Path, port: int) -> None:
    launched = launch("--model", nkat, "--kobold", kobold, "--backend", "cpu", "--launch", "--port", port,
                      "--contextsize", 512, "--threads", 1, "--json")  # fmt: skip
    lines = launched.until_ready()
    assert f"at {base_url('127.0.0.1', port)}" in lines[-1]
    assert "koboldcpp_default really loaded" in lines[-2]
    assert "adapter of 42 tensors" in lines[-2]
    record = json.loads(launched.process.stdout.readline())
    assert record["loaded"]["library"] == "default"
    assert (record["url"], record["name"]) == (base_url("127.0.0.1", port), "koboldcpp/base")
    request = {"prompt": "the", "max_length": 4, "top_k": 1}
    assert "text" in post(record["url"], "/api/v1/generate", request)["results"][0]
    hosts = {c.laddr.ip for p in launched.family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert hosts == {"127.0.0.1"}
    status, _ = launched.end(signal.SIGTERM)
    assert status == 128 + signal.SIGTERM


@posix
def test_dry_run_can_be_pasted(script, kobold: Path, nkat: Path, port: int) -> None:
    done = script(SELECTOR, "--model", nkat, "--kobold", kobold, "--dry-run", "--port", port, "--contextsize", 512)
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    words = shlex.split(line)
    assert Path(words[words.index("--lora") + 1]).is_file()
    nothing = subprocess.DEVNULL
    with subprocess.Popen(["sh", "-c", line], stdout=nothing, stderr=nothing, start_new_session=True) as shell:
        try:
            assert wait_for(port) == "koboldcpp/base"
        finally:
            os.killpg(shell.pid, signal.SIGKILL)


@posix
def test_saved_config_is_one_koboldcpp_loads(script, kobold: Path, nkat: Path, port: int, tmp_path: Path) -> None:
    target = tmp_path / "my.kcpps"
    arguments = ["--model", nkat, "--kobold", kobold, "--backend", "cpu", "--save-config", target, "--port", port]
    record = run(script, *arguments, "--contextsize", 512, "--threads", 1)
    assert json.loads(target.read_text()) == record["config"]
    words = [*record["command"][: 2 if record["command"][1].endswith(".py") else 1], "--config", str(target)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as process:
        try:
            assert wait_for(port) == "koboldcpp/base"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
        assert b"loaded 42 tensors from lora file" in process.stdout.read()
    assert "exists already" in script(SELECTOR, *arguments).stderr
    assert script(SELECTOR, *arguments, "--force").returncode == 0


def test_benchmark_keeps_the_fastest(script, kobold: Path, nkat: Path) -> None:
    arguments = ["--model", nkat, "--kobold", kobold, "--contextsize", 512, "--threads", 1]
    record = run(script, *arguments, "--backend", "cpu", "--benchmark")
    assert [(row["arm"], row["backend"]) for row in record["benchmark"]] == [("with Θ", "cpu"), ("without", "cpu")]
    assert all(row["generation"] > 0 and row["processing"] > 0 for row in record["benchmark"])
    config = json.loads(Path(record["default_config"]).read_text())
    assert config["model_param"] == str(nkat.with_name("base.gguf"))
    assert "lora" in config
    found = run(script, *arguments, "--list")["choices"][0]
    assert (found["backend"], found["speed"]) == ("cpu", record["benchmark"][0]["generation"])
    other_context = run(script, "--model", nkat, "--kobold", kobold, "--list")["choices"][0]
    assert other_context["speed"] is None  # another context may need another split


def test_a_model_it_does_not_know(fails_with_log, kobold: Path, base: Path, port: int) -> None:
    base.write_bytes(
        base.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lemma").replace(b"llama.", b"lemma.")
    )
    message = fails_with_log("--model", base, "--kobold", kobold, "--backend", "cpu", "--launch", "--port", port)
    assert "before it was ready" in message
    assert "lemma" in message


@pytest.fixture
def fails_with_log(script) -> Callable[..., str]:
    """The error's line, which is the last; KoboldCpp's own lines may stand before it."""

    def check(*arguments: object) -> str:
        done = script(SELECTOR, *arguments)
        assert done.returncode == 2, done
        assert "Traceback" not in done.stderr.splitlines()[-1]
        lines = done.stderr.strip().splitlines()
        assert [line for line in lines if line.startswith("error: ")] == [lines[-1]]
        return lines[-1]

    return check


@posix
@pytest.mark.parametrize("version", [OLD, NEW])
def test_another_library_than_asked_for_is_an_error(
    fails_with_log, tmp_path: Path, nkat: Path, port: int, version
) -> None:
    install(tmp_path / "kobold", version)
    check_hidden_library(fails_with_log, tmp_path, nkat, port)


@posix
def test_another_library_than_asked_for_is_an_error_in_the_real_one(
    fails_with_log, tmp_path: Path, nkat: Path, port: int
) -> None:
    folder = real_kobold().parent if real_kobold().is_file() else real_kobold()
    if any(folder.glob("koboldcpp_vulkan*")) or not (folder / "koboldcpp.py").is_file():
        pytest.skip("needs a KoboldCpp folder without koboldcpp_vulkan")
    (tmp_path / "kobold").symlink_to(folder)
    check_hidden_library(fails_with_log, tmp_path, nkat, port)


def check_hidden_library(fails_with_log, tmp_path: Path, nkat: Path, port: int) -> None:
    """Behind a user's own start script nobody can see which libraries there are before it runs."""
    wrapper = tmp_path / "koboldcpp"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path / "kobold" / "koboldcpp.py"}" "$@"\n')
    wrapper.chmod(0o755)
    arguments = ["--model", nkat, "--kobold", wrapper, "--backend", "vulkan", "--gpulayers", 2, "--port", port]
    message = fails_with_log(*arguments, "--launch")
    assert "asked for vulkan, but KoboldCpp loaded koboldcpp_default" in message
    assert "carries vulkan" in message
    children = [" ".join(words_of(p)) for p in psutil.Process().children(recursive=True)]
    assert not [line for line in children if str(port) in line]


# With stand-ins only: what a real one cannot be made to do


def test_without_arguments_it_never_waits(script, process, user: Path, base: Path, nkat: Path) -> None:
    install(user.parent / "home" / "koboldcpp", NEW)
    done = script(SELECTOR)
    assert (done.returncode, "name a model with --model" in done.stderr) == (0, True)
    (user / "models").mkdir()
    for path in (nkat, base):
        (user / "models" / path.name).write_bytes(path.read_bytes())
    done = process(SELECTOR)
    assert done.returncode == 0, done.stderr
    assert "tiny.nkat, the newest of 2" in done.stderr
    assert "--lora" in done.stdout.splitlines()[-1]
    assert "add --launch" in done.stderr


@posix
def test_menu(user: Path, nkat: Path, base: Path, port: int) -> None:
    install(user.parent / "home" / "koboldcpp", NEW, ("default", "failsafe"))
    (user / nkat.name).write_bytes(nkat.read_bytes())
    (user / base.name).write_bytes(base.read_bytes())
    said, status = on_terminal(["", "7", "2"], "--port", str(port), until="ready")
    assert ("1  tiny.nkat" in said, "2  base.gguf" in said) == (True, True)
    assert "Enter starts cpu, a number another, q ends:" in said
    assert "a number from 1 to 2, Enter, or q" in said
    assert "failsafe: koboldcpp_failsafe really loaded" in said
    assert status == 128 + signal.SIGINT


@posix
def test_menu_enter_starts_the_first(user: Path, nkat: Path, port: int) -> None:
    install(user.parent / "home" / "koboldcpp", NEW, ("default", "failsafe"))
    (user / nkat.name).write_bytes(nkat.read_bytes())
    said, status = on_terminal([""], "--port", str(port), until="ready")
    assert "koboldcpp_default really loaded" in said
    assert status == 128 + signal.SIGINT


def test_q_and_the_end_of_input_leave_the_menus(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    cpu = Choice(CPU, Place.CPU, None, "", ("default",))

    def nothing_more(_: str) -> str:
        raise EOFError

    for answer in (lambda _: "q", nothing_more):
        monkeypatch.setattr("builtins.input", answer)
        assert ask_backend([cpu], "get one") is None
        assert ask_model([base]) is None
    monkeypatch.setattr("builtins.input", lambda _: "")
    assert (ask_backend([cpu], "get one"), ask_model([base])) == (cpu, base)


def on_terminal(answers: list[str], *arguments: str, until: str | None = None) -> tuple[str, int]:
    """Runs the script on a pseudo-terminal, answers each question, presses Ctrl-C once `until` was said."""
    import pty

    main, side = pty.openpty()
    command = [sys.executable, str(ROOT / SELECTOR), *arguments]
    child = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, start_new_session=True)
    os.close(side)
    said, waiting, stopped = "", list(answers), False
    while True:
        try:
            piece = os.read(main, 4096)
        except OSError:  # Linux: the other side was closed
            break
        if not piece:
            break
        said += piece.decode("utf-8", "replace")
        if waiting and said.rstrip(" ").endswith("ends:"):
            os.write(main, waiting.pop(0).encode() + b"\n")
            said += "\n"
        if until and not stopped and f"\n{until}" in said:
            stopped = True
            child.send_signal(signal.SIGINT)
    os.close(main)
    return said, child.wait(timeout=SECONDS)


def test_a_gpu_that_the_library_does_not_find(
    fails_with_log, tmp_path: Path, nkat: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nkat.kobold.process._LOG_SECONDS", 0.5)  # the stand-in never says what is waited for
    arguments = ["--model", nkat, "--backend", "vulkan", "--gpulayers", 2, "--port", port, "--launch"]
    blind = install(tmp_path / "blind", NEW, ("default", "vulkan"), blind=True)
    message = fails_with_log(*arguments, "--kobold", blind)
    assert "put all weights into main memory" in message
    deaf = install(tmp_path / "forgetful", NEW, forgetful=True)
    message = fails_with_log("--model", nkat, "--kobold", deaf, "--port", port, "--launch")
    assert "did not load the adapter" in message


@posix
def test_vulkan_that_works(launch, tmp_path: Path, nkat: Path, port: int) -> None:
    both = install(tmp_path / "kobold", OLD, ("default", "vulkan"))
    launched = launch(
        "--model", nkat, "--kobold", both, "--backend", "vulkan", "--gpulayers", 2, "--port", port, "--launch"
    )
    lines = launched.until_ready()
    assert "vulkan: koboldcpp_vulkan really loaded; Test GPU (made up) 60 MiB" in lines[-2]
    assert launched.end(signal.SIGINT)[0] == 128 + signal.SIGINT


@posix
def test_killed_while_loading(launch, tmp_path: Path, nkat: Path, port: int) -> None:
    slow = install(tmp_path / "kobold", NEW, seconds=120)
    launched = launch("--model", nkat, "--kobold", slow, "--port", port, "--launch")
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        launched.family = psutil.Process(launched.process.pid).children(recursive=True)
        if any("--usecpu" in words_of(p) for p in launched.family):  # KoboldCpp, not a fork of the script
            break
        time.sleep(0.1)
    assert launched.end(signal.SIGTERM)[0] == 128 + signal.SIGTERM


def test_mistakes(fails, tmp_path: Path, nkat: Path, base: Path, user: Path) -> None:
    kobold = install(tmp_path / "kobold", NEW)
    always = ["--kobold", kobold]
    assert "no such file" in fails(SELECTOR, "--kobold", tmp_path / "no", "--list")
    assert "--model FILE is needed" in fails(SELECTOR, *always, "--launch")
    assert "exclude each other" in fails(SELECTOR, *always, "--model", nkat, "--launch", "--dry-run")
    assert "is set by this script" in fails(SELECTOR, *always, "--model", nkat, "--", "--port", 7)
    assert "from 256 to 262144" in fails(SELECTOR, *always, "--model", nkat, "--contextsize", 100)
    assert "make -C" in fails(SELECTOR, *always, "--model", nkat, "--backend", "cuda", "--dry-run")
    assert "has no --useclblast" in fails(SELECTOR, *always, "--model", nkat, "--backend", "clblast", "--dry-run")
    assert "no such file" in fails(SELECTOR, *always, "--model", tmp_path / "no.nkat", "--dry-run")
    assert "was made for another model" in fails(
        SELECTOR,
        *always,
        "--model",
        write_tiny_model(tmp_path / "o.gguf", "llama", seed=2),
        "--theta",
        nkat,
        "--dry-run",
    )
    existing = tmp_path / "r.json"
    existing.write_text("{}")
    assert "exists already" in fails(SELECTOR, *always, "--list", "--json", existing)
    assert "exists already" in fails(SELECTOR, *always, "--model", nkat, "--benchmark", "--save-config", existing)


def test_extra_flags(script, fails, tmp_path: Path, nkat: Path) -> None:
    new, old = install(tmp_path / "new", NEW), install(tmp_path / "old", OLD)
    record = run(script, "--model", nkat, "--kobold", new, "--dry-run", "--", "--quiet", "--noflashattention")
    assert record["command"][-2:] == ["--quiet", "--noflashattention"]
    target = tmp_path / "a.kcpps"
    run(script, "--model", nkat, "--kobold", new, "--save-config", target, "--", "--quiet")
    assert json.loads(target.read_text())["quiet"] is True
    arguments = ["--model", nkat, "--kobold", old, "--save-config", tmp_path / "b.kcpps", "--", "--quiet"]
    done = script(SELECTOR, *arguments)
    assert (done.returncode, "cannot write flags behind --" in done.stderr) == (2, True)


def test_layers_that_make_no_sense_are_said(script, tmp_path: Path, nkat: Path) -> None:
    kobold = install(tmp_path / "kobold", NEW)
    always = ["--model", nkat, "--kobold", kobold, "--dry-run"]
    assert "so --gpulayers has no meaning" in script(SELECTOR, *always, "--gpulayers", 3).stderr
    assert "--gpulayers" not in script(SELECTOR, *always).stderr


def test_listening_to_everybody_is_said(script, tmp_path: Path, nkat: Path) -> None:
    kobold = install(tmp_path / "kobold", NEW)
    done = script(SELECTOR, "--model", nkat, "--kobold", kobold, "--dry-run", "--host", "0.0.0.0")
    assert "everybody in your network" in done.stderr
    asked = ("--model", nkat, "--kobold", kobold, "--dry-run", "--host", "0.0.0.0", "--")
    assert "everybody" not in script(SELECTOR, *asked, "--password", "x").stderr
    assert "everybody" in script(SELECTOR, *asked, "--quiet").stderr
    done = script(SELECTOR, "--model", nkat, "--kobold", kobold, "--dry-run")
    assert "everybody" not in done.stderr
    assert "--host 127.0.0.1" in done.stdout


# The real one only: the same tokens as our own engine


@posix
def test_greedy_tokens_equal_ours(script, launch, tmp_path: Path, stories: Path, port: int) -> None:
    prompt = "One day, a girl named Sue"  # Θ changes what comes after it
    check_greedy(script, launch, tmp_path, stories, port, prompt, "--theta-gamma", "0.5")


@posix
@pytest.mark.slow
def test_greedy_tokens_equal_ours_for_smollm2(script, launch, tmp_path: Path, smollm2: Path, port: int) -> None:
    """Its weights widened to F32: with the Q4_1 file KoboldCpp rounds activations to 8 bits, and we do not."""
    real_kobold()
    wide = widened(smollm2, tmp_path / "wide.gguf")
    check_greedy(script, launch, tmp_path, wide, port, "Once upon a time, there was a little girl named Lily. She had")


def check_greedy(script, launch, tmp_path: Path, model: Path, port: int, prompt: str, *how: str) -> None:
    """32 tokens with the adapter are ours with Θ, or differ first where our two best logits are within 1e-2.

    Without the adapter they are ours without Θ, and differ from those with it.
    """
    kobold = real_kobold()
    nkat = tmp_path / "theta.nkat"
    assert script(CONVERTER, "--input", model, "--output", nkat, "--theta-only", *how).returncode == 0
    texts = {}
    for theta in (True, False):
        arguments = ["--model", model, *(["--theta", nkat] if theta else []), "--kobold", kobold, "--backend", "cpu"]
        launched = launch(*arguments, "--launch", "--port", port, "--contextsize", 1024, "--threads", 1)
        launched.until_ready()
        url = base_url("127.0.0.1", port)
        ids = post(url, "/api/extra/tokencount", {"prompt": prompt})["ids"]
        greedy = {"max_length": 32, "top_k": 1, "temperature": 1.0, "rep_pen": 1.0, "ban_eos_token": True}
        answer = post(url, "/api/v1/generate", {"prompt": prompt, **greedy})["results"][0]
        # tokencount always counts a BOS; newer versions do not generate with one where the model wants none.
        used = ids[len(ids) - answer.get("prompt_tokens", len(ids)) :]
        texts[theta] = answer["text"]
        ours, margins = our_greedy(model, nkat if theta else None, used, 32)
        first = next((n for n, piece in enumerate(ours) if not texts[theta].startswith(piece)), None)
        assert first is None or margins[first] < 1e-2, (first, margins[first], ours[-1], texts[theta])
        launched.end(signal.SIGTERM)
    assert texts[True] != texts[False]


def our_greedy(model: Path, theta: Path | None, prompt: list[int], count: int) -> tuple[list[str], list[float]]:
    """The text after 1, 2, … tokens, and the distance between the two best logits at each."""
    thetas = open_model_file(theta).theta if theta else None
    loaded = load_model(model, thetas=thetas.layers if thetas else None, gamma=thetas.gamma if thetas else None)
    decoder = make_decoder(loaded.model, len(prompt) + count)
    ids, texts, margins = list(prompt), [], []
    start = loaded.tokenizer.decode(ids)
    logits = decoder.prefill(ids)
    for _ in range(count):
        logits = logits.clone()
        logits[torch.tensor(sorted(loaded.tokenizer.eog_ids))] = -torch.inf
        best = logits.topk(2)
        margins.append(float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
        texts.append(loaded.tokenizer.decode(ids)[len(start) :])
        logits = decoder.step(ids[-1])
    return texts, margins


def widened(source: Path, target: Path) -> Path:
    """The same model with every weight in F32."""
    with GGUFFile.open(source) as file:
        writer = gguf.GGUFWriter(target, str(file.metadata["general.architecture"]))
        reader = gguf.GGUFReader(source)
        for field in reader.fields.values():
            if field.name.startswith("GGUF.") or field.name == "general.architecture":
                continue
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
        for info in file.tensors.values():
            writer.add_tensor(info.name, dequantise(packed_tensor(file.raw(info.name)), info.type, info.shape).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return target


def wait_for(port: int) -> str:
    """The model's name at this port, once there is one."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                pass
        except OSError:
            time.sleep(0.2)
            continue
        return get_model(base_url("127.0.0.1", port))
    raise NKATError("not ready in time")


def get_model(url: str) -> str:
    import urllib.request

    with urllib.request.urlopen(f"{url}/api/v1/model", timeout=10) as answer:
        return json.loads(answer.read())["result"]
