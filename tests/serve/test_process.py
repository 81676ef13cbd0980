"""The command: what it refuses before it starts, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nkat.serve import job
from nkat.serve.options import KEY_VARIABLE, keys, parse_arguments
from tests.conftest import ROOT
from tests.support.serving import write_model
from tests.support.tiny_models import write_tiny_model

pytest.importorskip("uvicorn", reason="the server needs starlette and uvicorn: pip install nkat[serve]")

SERVER = "nkat_server.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("process"))


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def options(*arguments: object):
    return parse_arguments(["--model", "model.nkat", *map(str, arguments)])


# --- before it starts


def test_mistakes_are_one_line(fails, model: Path, tmp_path: Path) -> None:
    plain = write_tiny_model(tmp_path / "plain.gguf", "llama")
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, said in (
            (("--model", tmp_path / "none.nkat"), "no such file"),
            (("--model", model, "--host", "0.0.0.0"), "--no-key"),
            (("--model", model, "--port", taken.getsockname()[1]), "is taken"),
            (("--model", model, "--port", 70000), "65535"),
            (("--model", model, "--host", "256.0.0.1", "--no-key"), "--host 256.0.0.1"),
            (("--model", model, "--port", 0, "--context", 4096), "2048"),
            (("--model", model, "--port", 0, "--gammas", 0.9, 1.5), "--gammas"),
            (("--model", plain, "--port", 0, "--gammas", 0.9), "has no Θ"),
            (("--model", plain, "--port", 0, "--theta-gamma", 0.9), "has no Θ"),
            (("--model", model, "--api-key", "two words"), "printable"),
            (("--model", model, "--api-key", ""), "printable"),
            (("--model", model, "--api-key", "a", "--no-key"), "contradicts"),
            (("--model", model, "--api-key", "a", "--api-key-file", "b"), "not both"),
            (("--model", model, "--api-key-file", tmp_path / "none.txt"), "No such file"),
            (("--model", model, "--api-key-file", tmp_path / "empty.txt"), "has no key"),
            (("--model", model, "--cors", "chat.example"), "--cors"),
            (("--model", model, "--alias", "a:b"), "--alias"),
        ):
            assert said in fails(SERVER, *arguments), arguments


def test_without_the_extra_it_says_which(fails, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "find_spec", lambda name: None)
    assert fails(SERVER, "--model", model).endswith("pip install starlette uvicorn, or nkat[serve]")


def test_keys_come_from_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keys(options()) == keys(options("--host", "::1")) == ()
    assert keys(options("--host", "0.0.0.0", "--no-key")) == ()
    path = tmp_path / "keys.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    monkeypatch.setenv(KEY_VARIABLE, "from-the-environment")
    assert keys(options("--host", "0.0.0.0")) == ("from-the-environment",)
    assert keys(options("--no-key")) == ()
    assert keys(options("--api-key", "given")) == ("given",)
    assert keys(options("--api-key-file", path)) == ("one", "two")


# --- how it ends


@pytest.fixture
def started(model: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL, once it listens."""
    command = [sys.executable, str(ROOT / SERVER), "--model", str(model), "--port", "0", "--threads", "1"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
        [*command, "--gammas", "0.7"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout is not None
    found = re.search(r"listening at (http://\S+) ", child.stdout.readline())
    assert found is not None
    yield child, found[1]
    if child.poll() is None:
        child.kill()
        child.communicate()


def ask(url: str, **body: object) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    data = json.dumps({"prompt": "the rain", "temperature": 0} | body)
    connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
    return connection.getresponse()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_ends_it_in_order(started: tuple[subprocess.Popen[str], str]) -> None:
    """So does SIGTERM: `benchmarks.serve_load`."""
    child, url = started
    stream = ask(url, stream=True, max_tokens=2000)
    assert stream.readline().startswith(b"data: ")
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    rest = stream.read()
    assert b"[DONE]" in rest or b"shutting_down" in rest
    assert (child.returncode, out) == (0, "")
    lines = err.strip().splitlines()
    assert lines[0].endswith(": 2048 tokens at most, as tiny, tiny:base, tiny:gamma=0.7")
    assert lines[-1] == "stopped"
    assert sum(line.startswith("stopping: ") for line in lines) == 1
    assert sum(" POST /v1/completions 200 " in line for line in lines) == 1
    assert not [line for line in lines if "Traceback" in line or "rror" in line]
