"""Fetching from a server on this machine: cache, resumption, hashes, and what is refused in one line."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.file_download
import pytest
from huggingface_hub.utils import WeakFileLock

import nkat
from nkat.errors import NKATError
from nkat.gguf.split import open_gguf
from nkat.harness.arguments import ModelArguments
from nkat.harness.model import EvaluatedModel
from nkat.hub import fetch as fetching
from nkat.hub.fetch import fetch, is_name, local_model
from nkat.hub.names import HubName
from tests.conftest import ROOT
from tests.support.fake_koboldcpp import NEW, install
from tests.support.hub_server import COMMIT, HubServer, hub_server
from tests.support.split_models import split_model
from tests.support.tiny_models import write_tiny_model

NAME = HubName("tiny/model", "Q8_0")
CONTENT = bytes(range(256)) * 400


@pytest.fixture
def server() -> Iterator[HubServer]:
    with hub_server() as running:
        running.repos["tiny/model"] = {"model-Q8_0.gguf": CONTENT, "README.md": b"hello"}
        yield running


@pytest.fixture
def hub(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """This process uses it, with an empty cache, and does not wait between two tries."""
    constants = huggingface_hub.constants
    for name, value in server.settings(tmp_path / "hf").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 10_000
    )  # what is written at once, and lost when it breaks off
    monkeypatch.setattr(huggingface_hub.file_download, "time", SimpleNamespace(sleep=lambda _: None))
    huggingface_hub.close_session()  # which remembers proxies
    yield server
    huggingface_hub.close_session()


def blobs(tmp_path: Path) -> dict[str, int]:
    folder = tmp_path / "hf" / "hub" / "models--tiny--model" / "blobs"
    return {path.suffix: path.stat().st_size for path in folder.iterdir()}


def test_a_name_that_the_hub_cannot_have_is_one_line() -> None:
    with pytest.raises(NKATError, match=r"^hf:\.\./x: Repo id must"):
        fetch(HubName("../x"))


def test_a_file_is_fetched_once_into_the_librarys_own_cache(hub: HubServer, capsys) -> None:
    path = fetch(NAME)
    assert path.read_bytes() == CONTENT
    assert path.name == "model-Q8_0.gguf"
    assert huggingface_hub.try_to_load_from_cache("tiny/model", "model-Q8_0.gguf") == str(path)
    assert huggingface_hub.hf_hub_download("tiny/model", "model-Q8_0.gguf") == str(path)
    assert len(hub.downloads()) == 1
    assert fetch(HubName("tiny/model")) == path == local_model(Path("hf:tiny/model:model-Q8_0.gguf"))
    assert (len(hub.downloads()), hub.sent) == (1, len(CONTENT))
    assert "fetching hf:tiny/model:Q8_0: model-Q8_0.gguf, 102.4 kB" in capsys.readouterr().err


def test_all_parts_of_a_model_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    whole = write_tiny_model(tmp_path / "m-Q4_K_M.gguf", "llama", blocks=1)
    for part in split_model(whole, 5):
        hub.repos["tiny/model"][part.name] = part.read_bytes()
    path = fetch(HubName("tiny/model"))
    assert path.name == "m-Q4_K_M-00001-of-00003.gguf"
    assert len(hub.downloads()) == 3
    assert len(open_gguf(path).tensors) == len(open_gguf(whole).tensors)
    assert fetch(HubName("tiny/model")) == path
    assert len(hub.downloads()) == 3


def test_paths_stay_what_they_are(hub: HubServer, tmp_path: Path, monkeypatch) -> None:
    assert local_model(tmp_path / "no.gguf") == tmp_path / "no.gguf"
    monkeypatch.chdir(tmp_path)
    assert is_name(Path("hf:tiny/model"))
    Path("hf:tiny").mkdir()
    Path("hf:tiny/model").write_text("a file of that name")
    assert local_model(Path("hf:tiny/model")) == Path("hf:tiny/model")
    assert not is_name(Path("hf:tiny/model"))
    assert hub.asked == []


def test_a_broken_download_goes_on_where_it_ended(hub: HubServer, tmp_path: Path, capsys) -> None:
    hub.most = 30_000
    path = fetch(NAME)  # the library itself tries again as long as something comes
    assert path.read_bytes() == CONTENT
    assert [headers.get("range") for headers in hub.downloads()] == [None, *(f"bytes={30_000 * i}-" for i in (1, 2, 3))]
    assert hub.sent == len(CONTENT)


def test_the_next_command_goes_on_too(hub: HubServer, tmp_path: Path, capsys) -> None:
    """Nothing more comes after the first part, until the library gives up."""
    hub.most = 30_000
    one = hub.repos["tiny/model"]

    class Once(dict):
        def __getitem__(self, name: str) -> bytes:
            if hub.sent:
                hub.most = 0
            return dict.__getitem__(self, name)

    hub.repos["tiny/model"] = Once(one)
    with pytest.raises(
        NKATError, match=r"hf:tiny/model:Q8_0: cannot be fetched from .*; what has come is kept"
    ) as caught:
        fetch(NAME)
    assert "\n" not in str(caught.value)
    assert blobs(tmp_path) == {".incomplete": 30_000}
    hub.repos["tiny/model"], hub.most = one, None
    hub.asked.clear()
    assert fetch(NAME).read_bytes() == CONTENT
    assert [headers.get("range") for headers in hub.downloads()] == ["bytes=30000-"]
    assert blobs(tmp_path) == {"": len(CONTENT)}
    assert "102.4 kB, of which 30.0 kB are there" in capsys.readouterr().err


def test_a_server_that_begins_at_the_beginning_again(hub: HubServer, tmp_path: Path) -> None:
    hub.most = 30_000
    hub.ranges = False
    real = hub.repos["tiny/model"]

    class Twice(dict):
        def __getitem__(self, name: str) -> bytes:
            if hub.sent:
                hub.most = None
            return dict.__getitem__(self, name)

    hub.repos["tiny/model"] = Twice(real)
    assert fetch(NAME).read_bytes() == CONTENT
    assert hub.downloads()[-1]["range"] == "bytes=30000-"
    assert hub.sent == 30_000 + len(CONTENT)


def test_other_bytes_than_were_promised_are_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.lies = True
    with pytest.raises(NKATError, match=r"model-Q8_0.gguf has hash .* it is damaged and was deleted; try again"):
        fetch(NAME)
    assert blobs(tmp_path) == {}
    assert huggingface_hub.try_to_load_from_cache("tiny/model", "model-Q8_0.gguf") is None
    hub.lies = False
    assert fetch(NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("etag", ["../../../out", "W/abc", "0" * 63, "x" * 64])
def test_what_is_no_hash_is_no_files_name(hub: HubServer, tmp_path: Path, etag: str) -> None:
    hub.etag = etag
    with pytest.raises(NKATError, match="does not say the size and the hash of model-Q8_0"):
        fetch(NAME)
    assert not list(tmp_path.rglob("*out*"))
    assert hub.downloads() == []


def test_remains_of_another_file_are_no_beginning(hub: HubServer, tmp_path: Path) -> None:
    """Too many bytes, or as many of another file: the hash says so."""
    fetch(NAME).resolve().unlink()
    (folder,) = (tmp_path / "hf" / "hub" / "models--tiny--model").glob("blobs")
    (pointer,) = folder.parent.glob("snapshots/*/*.gguf")
    digest = os.path.basename(os.readlink(pointer))  # noqa: PTH115, PTH119
    partial = folder / f"{digest}.incomplete"
    partial.write_bytes(bytes(len(CONTENT) + 5))
    assert fetch(NAME).read_bytes() == CONTENT
    (folder / digest).unlink()
    partial.write_bytes(bytes(1000))
    with pytest.raises(NKATError, match="it is damaged and was deleted"):
        fetch(NAME)
    assert fetch(NAME).read_bytes() == CONTENT


def test_small_files_have_gits_hash(hub: HubServer, tmp_path: Path, monkeypatch) -> None:
    """Those that are not kept as large files: checked by it as well."""
    right = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()
    real = huggingface_hub.get_hf_file_metadata
    for etag, works in ((right, True), ("0" * 40, False)):
        monkeypatch.setattr(
            huggingface_hub,
            "get_hf_file_metadata",
            lambda *a, etag=etag, **k: SimpleNamespace(etag=etag, size=real(*a, **k).size),
        )
        if works:
            fetching._fetch_blob(huggingface_hub, NAME, "model-Q8_0.gguf", COMMIT)
            assert blobs(tmp_path) == {"": len(CONTENT)}
        else:
            with pytest.raises(NKATError, match="damaged and was deleted"):
                fetching._fetch_blob(huggingface_hub, NAME, "model-Q8_0.gguf", COMMIT)


def test_without_links_there_are_no_two_copies(hub: HubServer, tmp_path: Path, monkeypatch) -> None:
    """As on Windows, where links are for developers only."""
    monkeypatch.setattr(huggingface_hub.file_download, "are_symlinks_supported", lambda *_: False)
    path = fetch(NAME)
    assert path.read_bytes() == CONTENT
    assert not path.is_symlink()
    assert blobs(tmp_path) == {}
    assert fetch(NAME) == path
    assert len(hub.downloads()) == 1


def test_another_process_that_fetches_it_is_waited_for(hub: HubServer, tmp_path: Path, capsys) -> None:
    digest = hashlib.sha256(CONTENT).hexdigest()
    lock = tmp_path / "hf" / "hub" / ".locks" / "models--tiny--model" / f"{digest}.lock"
    lock.parent.mkdir(parents=True)
    found: list[Path] = []
    waiting = threading.Thread(target=lambda: found.append(fetch(NAME)))
    with WeakFileLock(lock):
        waiting.start()
        waiting.join(3)
        assert waiting.is_alive()
        assert hub.downloads() == []
    waiting.join(60)
    assert found[0].read_bytes() == CONTENT
    assert "another process is fetching this file" in capsys.readouterr().err


# --- without a network


def test_offline_the_cache_is_used(hub: HubServer, monkeypatch, capsys) -> None:
    path = fetch(NAME)
    hub.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch(NAME) == fetch(HubName("tiny/model")) == path
    assert hub.asked == []
    with pytest.raises(
        NKATError, match=r"there are Q8_0 \(in the cache; no others can be fetched: HF_HUB_OFFLINE is set"
    ):
        fetch(HubName("tiny/model", "Q4_0"))
    with pytest.raises(
        NKATError, match="hf:other/model: not in the cache, and cannot be fetched: HF_HUB_OFFLINE is set"
    ):
        fetch(HubName("other/model"))


def test_a_server_that_does_not_answer(hub: HubServer, monkeypatch, capsys) -> None:
    path = fetch(NAME)
    capsys.readouterr()
    hub.down = True
    assert fetch(NAME) == path
    assert "note: hf:tiny/model:Q8_0: no answer from http://127.0.0.1" in capsys.readouterr().err
    with pytest.raises(NKATError, match=r"hf:other/model: not in the cache, and cannot be fetched: .*503") as caught:
        fetch(HubName("other/model"))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert fetch(NAME) == path
    assert "Connection refused" in capsys.readouterr().err


# --- refusals


def test_refusals_are_one_line(hub: HubServer, tmp_path: Path, monkeypatch) -> None:
    def said(name: HubName) -> str:
        with pytest.raises(NKATError) as caught:
            fetch(name)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "has no such model, or a private one, for which HF_TOKEN must hold a token" in said(HubName("no/model"))
    hub.repos["gated/model"] = {"m-Q8_0.gguf": CONTENT}
    hub.gated.add("gated/model")
    assert f"accepted first, at {hub.url}/gated/model; then give your token in HF_TOKEN" in said(HubName("gated/model"))
    assert "there are Q8_0" in said(HubName("tiny/model", "Q4_0"))
    monkeypatch.setattr(huggingface_hub.constants, "MAX_HTTP_DOWNLOAD_SIZE", 1000)
    assert "`hf download tiny/model model-Q8_0.gguf` fetches it" in said(NAME)
    monkeypatch.undo()


def test_a_full_disk_is_known_at_the_start(hub: HubServer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(NKATError, match=r"102.4 kB are to be fetched into .*, and the disk has 1.0 kB free"):
        fetch(NAME)
    assert hub.downloads() == []


def test_a_token_opens_what_is_gated_and_goes_nowhere_else(hub: HubServer, monkeypatch) -> None:
    hub.gated.add("tiny/model")
    hub.elsewhere = True
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert fetch(NAME).read_bytes() == CONTENT
    with_token = {path for _, path, headers in hub.asked if "authorization" in headers}
    assert with_token == {"/api/models/tiny/model", *(p for p in with_token if p.startswith("/tiny/model/resolve/"))}
    assert any(path.startswith("/elsewhere/") for _, path, _ in hub.asked)


# --- through the command line


def run(server: HubServer, cache: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, **server.settings(cache), **more}
    command = [sys.executable, "-m", "nkat.models", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=settings, cwd=ROOT)


def test_the_environment_says_where_and_whether(server: HubServer, tmp_path: Path) -> None:
    done = run(server, tmp_path / "hf", "hf:tiny/model")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "hf")
    assert "next: python -m nkat.models" not in done.stderr
    assert "--input hf:tiny/model --output models/model-Q8_0.nkat" in done.stderr
    assert {path.split("/")[1] for _, path, _ in server.asked} == {"api", "tiny"}  # nobody is told anything else
    server.asked.clear()
    again = run(server, tmp_path / "hf", "hf:tiny/model", HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert server.asked == []
    wrong = run(server, tmp_path / "hf", "hf:tiny/model:Q3_K")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: hf:tiny/model:Q3_K: there is no such file; there are Q8_0\n"


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_keeps_what_has_come(server: HubServer, tmp_path: Path) -> None:
    content = CONTENT * 250
    server.repos["tiny/model"] = {"model-Q8_0.gguf": content}
    server.most, server.stalls = 22_000_000, True
    command = [sys.executable, "-m", "nkat.models", "hf:tiny/model"]
    settings = {**os.environ, **server.settings(tmp_path / "hf")}
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=settings, cwd=ROOT)
    try:
        assert server.stalled.wait(60)
        running.send_signal(signal.SIGINT)
        _, notes = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, notes
    assert "are kept: the same command goes on from there" in notes
    kept = blobs(tmp_path)[".incomplete"]
    assert 10_000_000 <= kept <= server.most
    server.most, server.stalls = None, False
    server.asked.clear()
    done = run(server, tmp_path / "hf", "hf:tiny/model")
    assert Path(done.stdout.strip()).read_bytes() == content
    assert server.downloads()[0]["range"] == f"bytes={kept}-"


def test_every_command_takes_a_name(hub: HubServer, script, fails, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NKAT_CACHE", str(tmp_path / "nkat"))
    model = write_tiny_model(tmp_path / "tiny.gguf", "llama")
    hub.repos["tiny/model"] = {"model-F32.gguf": model.read_bytes()}
    converter, engine = "nkat_gguf_converter.py", "nkat_inference_engine.py"
    target = tmp_path / "made.nkat"
    assert script(converter, "--input", "hf:tiny/model", "--output", target).returncode == 0
    done = script(engine, "--model", "hf:tiny/model", "--generate", "the", "--max-tokens", 2, "--no-cuda")
    assert done.returncode == 0, done.stderr
    done = script(engine, "--model", "hf:tiny/model", "--perplexity", "--chunks", 1, "--no-cuda")
    assert "--input hf:tiny/model --output model-F32.nkat" in done.stderr
    refused = fails(converter, "--input", "hf:tiny/model", "--in-place")
    assert "--in-place would change the copy of hf:tiny/model in the cache: give --output" in refused
    assert "there is no such file; there are F32" in fails(engine, "--model", "hf:tiny/model:Q2_K", "--gemm")
    reference = ("--perplexity", "--reference", "hf:tiny/model:Q2_K")
    assert "there are F32" in fails(engine, "--model", model, *reference)
    search = ("--mode", "custom", "--trials", 1, "--output-dir", tmp_path / "s")
    assert "there are F32" in fails("nkat_auto_optimizer.py", "--model", "hf:tiny/model:Q2_K", *search)
    kobold = ("--kobold", install(tmp_path / "kobold", NEW), "--dry-run")
    for words in (("--model", "hf:tiny/model:Q2_K"), ("--model", target, "--base", "hf:tiny/model:Q2_K")):
        assert "there are F32" in fails("backend_selector.py", *kobold, *words)
    done = script("backend_selector.py", *kobold, "--model", "hf:tiny/model", "--backend", "cpu")
    assert done.returncode == 0, done.stderr
    assert "model-F32.gguf" in done.stdout
    assert "there are F32" in fails("nkat_server.py", "--model", "hf:tiny/model:Q2_K", "--port", 0)
    with pytest.raises(NKATError, match="there are F32"):
        EvaluatedModel(ModelArguments.of({"path": "hf:tiny/model:Q2_K"}))
    with pytest.raises(NKATError, match="there are F32"):
        nkat.open_model("hf:tiny/model:Q2_K")
    assert nkat.open_model("hf:tiny/model").path.name == "model-F32.gguf"
    residual = ("--theta-source", "residual", "--reference", "hf:tiny/model:Q2_K")
    assert "there are F32" in fails(converter, "--input", model, "--output", tmp_path / "r.nkat", *residual)
