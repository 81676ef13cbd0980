"""KoboldCpp's row: what of today it is given by which version, and several models in one of it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from nkat.errors import NKATError
from nkat.kobold.api import base_url, get_json
from nkat.kobold.backends import CPU, VULKAN, Place
from nkat.kobold.choose import Choice
from nkat.kobold.command import Settings
from nkat.kobold.files import RunFiles
from nkat.kobold.koboldcpp import flash_attention, settings_of
from nkat.kobold.probe import probe_kobold
from nkat.kobold.program import Program
from tests.kobold.test_session import CONVERTER, SECONDS, SELECTOR, Launched, real_kobold, run, wait_for
from tests.support.fake_koboldcpp import NEW, OLD, install
from tests.support.kobold_api import post
from tests.support.tiny_models import write_tiny_model
from tests.support.user import empty_home, free_port

FILES = RunFiles(Path("m.gguf"), Path("m.gguf"), "", (), {})
SETTINGS = Settings(2048, 8, "127.0.0.1", 5001)
ON_CPU = Choice(CPU, Place.CPU, None, "", ("default",))
ON_GPU = Choice(VULKAN, Place.GPU, None, "", ("vulkan",), layers=7, all_layers=9)
posix = pytest.mark.skipif(os.name == "nt", reason="uses POSIX signals")


@pytest.fixture(autouse=True)
def user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return empty_home(monkeypatch, tmp_path)


@pytest.fixture
def old(tmp_path: Path) -> Program:
    return probe_kobold(install(tmp_path / "old", OLD))


@pytest.fixture
def new(tmp_path: Path) -> Program:
    return probe_kobold(install(tmp_path / "new", NEW))


@pytest.fixture
def launch() -> Iterator:
    started: list[Launched] = []

    def start(*arguments: object) -> Launched:
        started.append(Launched(*arguments, "--launch"))
        return started[-1]

    yield start
    for launched in started:
        launched.process.kill()
        launched.process.communicate()


def added(program: Program, choice: Choice, **asked: object) -> dict:
    """What these wishes add to the settings."""
    plain = settings_of(program, choice, FILES, SETTINGS)
    found = settings_of(program, choice, FILES, replace(SETTINGS, **asked))
    return {key: value for key, value in found.items() if plain.get(key) != value}


def test_a_quantised_cache_by_version(old: Program, new: Program) -> None:
    assert added(new, ON_CPU, cache_type="q8_0") == {"quantkv": "q8_0"}
    assert added(new, ON_CPU, cache_type="q5_1") == {"quantkv": "q5_1"}
    assert added(old, ON_CPU, cache_type="q8_0") == {"quantkv": 1, "flashattention": True}
    assert added(old, ON_CPU, cache_type="q4_0") == {"quantkv": 2, "flashattention": True}
    with pytest.raises(NKATError, match=r"KoboldCpp 1\.76 has no KV cache of q5_1; .* takes: f16, q8_0, q4_0"):
        added(old, ON_CPU, cache_type="q5_1")
    ancient = replace(old, flags=old.flags - {"--quantkv"})
    with pytest.raises(NKATError, match="has no --quantkv; a newer one may have it"):
        added(ancient, ON_CPU, cache_type="q8_0")


def test_flash_attention_by_version(old: Program, new: Program) -> None:
    quantised = replace(SETTINGS, cache_type="q8_0")
    assert [flash_attention(new, SETTINGS, extra) for extra in ((), ("--noflashattention",))] == [True, False]
    assert [flash_attention(old, SETTINGS, extra) for extra in ((), ("--flashattention",))] == [False, True]
    assert flash_attention(old, quantised, ())


def test_its_own_fitting_by_version(old: Program, new: Program) -> None:
    assert added(new, ON_GPU, autofit=True) == {"gpulayers": -1, "autofit": True}
    assert added(old, ON_GPU, autofit=True) == {"gpulayers": -1}  # its own estimate, which it has always had
    assert added(new, ON_CPU, autofit=True) == {}


def test_a_draft_model_by_version(old: Program, new: Program) -> None:
    draft = Path("/m/small.gguf")
    assert added(new, ON_CPU, draft=draft) == {"draftmodel": str(draft), "draftgpulayers": 0}
    found = added(new, ON_GPU, draft=draft, draft_tokens=5)
    assert found == {"draftmodel": str(draft), "draftgpulayers": 999, "draftamount": 5}
    with pytest.raises(NKATError, match=r"KoboldCpp 1\.76 has no --draftmodel; a newer one may have it"):
        added(old, ON_CPU, draft=draft)


@pytest.fixture
def models(script, tmp_path: Path) -> Path:
    """A folder with a model, the same with Θ, and one that is damaged."""
    folder = tmp_path / "models"
    folder.mkdir()
    base = write_tiny_model(folder / "base.gguf", "llama", qtype=gguf.GGMLQuantizationType.Q8_0)
    assert script(CONVERTER, "--input", base, "--output", folder / "tiny.nkat").returncode == 0
    (folder / "broken.nkat").write_bytes(b"GGUF")
    return folder


@pytest.fixture(params=["stand-in", "real"])
def kobold(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "stand-in":
        return install(tmp_path / "kobold", NEW)
    found = real_kobold()
    if "--routermode" not in probe_kobold(found / "koboldcpp.py" if found.is_dir() else found).flags:
        pytest.skip("this KoboldCpp has no router")
    return found


@posix
@pytest.mark.parametrize("mode", ["--router", "--admin"])
def test_a_folder_of_models(launch, kobold: Path, models: Path, mode: str) -> None:
    port = free_port()
    host = ["--host", "0.0.0.0"] if mode == "--router" else []
    asked = ["--kobold", kobold, mode, models, "--model", models / "tiny.nkat", "--port", port, *host]
    launched = launch(*asked, "--contextsize", 512, "--threads", 1, "--json")
    lines = launched.until_ready()
    assert "adapter of 42 tensors" in lines[-2]
    words = json.loads(launched.process.stdout.readline())["command"]
    folder = Path(words[words.index("--admindir") + 1])
    saved = {path.name: json.loads(path.read_text()) for path in folder.glob("*.kcpps")}
    assert set(saved) == {"tiny.kcpps", "base.kcpps"}
    assert ("lora" in saved["tiny.kcpps"], "lora" in saved["base.kcpps"]) == (True, False)
    assert ("--routermode" in words) == (mode == "--router")
    if mode == "--router":
        post(base_url("127.0.0.1", port), "/v1/completions", {"model": "base.kcpps", "prompt": "x", "max_tokens": 2})
        assert wait_for(port) == "koboldcpp/base"
    launched.process.send_signal(signal.SIGTERM)
    _, said = launched.process.communicate(timeout=SECONDS)
    assert f"note: {models / 'broken.nkat'} was skipped: " in said
    assert "--adminpassword WORD asks for a password" in said
    if mode == "--router":
        assert 'name a model in a request by its file: "tiny.kcpps", "base.kcpps"' in said


def test_what_its_modes_need_is_said(fails, tmp_path: Path, models: Path) -> None:
    new, old = install(tmp_path / "k" / "new", NEW), install(tmp_path / "k" / "old", OLD)
    asked = (SELECTOR, "--dry-run", "--kobold")
    assert "listens at every address of this machine" in fails(*asked, new, "--router", models)
    assert "KoboldCpp 1.76 has no --routermode" in fails(*asked, old, "--router", models, "--host", "0.0.0.0")
    assert "KoboldCpp 1.76 has no --admin" in fails(*asked, old, "--admin", models)
    assert "no such folder" in fails(*asked, new, "--admin", tmp_path / "nothing")
    (models / "empty").mkdir()
    assert "no model in it that can be served" in fails(*asked, new, "--admin", models / "empty")


@posix
def test_a_draft_model_that_it_drops_without_a_word(script, launch, tmp_path: Path, models: Path) -> None:
    kobold = install(tmp_path / "stubborn", NEW, no_draft=True)
    draft = write_tiny_model(tmp_path / "small.gguf", "llama", seed=3, blocks=1)
    asked = ["--kobold", kobold, "--model", models / "base.gguf", "--draftmodel", draft, "--port", free_port()]
    done = script(SELECTOR, *asked, "--launch")
    assert (done.returncode, "KoboldCpp would run without the draft model" in done.stderr) == (2, True)
    good = launch(*asked[2:], "--kobold", install(tmp_path / "willing", NEW), "--draftamount", 4)  # the control
    assert good.until_ready()
    good.end(signal.SIGTERM)


@posix
def test_today_in_the_real_one(script, launch, tmp_path: Path) -> None:
    """A draft model, a quantised cache and two Θ with weights, all at once."""
    kobold = real_kobold()
    found = probe_kobold(kobold / "koboldcpp.py" if kobold.is_dir() else kobold)
    base = write_tiny_model(tmp_path / "large.gguf", "llama", head_dim=32)
    draft = write_tiny_model(tmp_path / "small.gguf", "llama", head_dim=32, blocks=1, seed=5)
    for name, rank in (("a.bin", 4), ("b.bin", 2)):
        flags = ("--theta-only", "--theta-rank", rank, "--theta-gamma", 0.5)
        assert script(CONVERTER, "--input", base, "--output", tmp_path / name, *flags).returncode == 0
    port = free_port()
    asked = [
        "--kobold",
        kobold,
        "--model",
        base,
        "--theta",
        tmp_path / "a.bin",
        "--theta-scaled",
        f"{tmp_path / 'b.bin'}:0.5",
    ]
    asked += ["--quantkv", "q8_0", "--backend", "cpu", "--port", port, "--contextsize", 512, "--threads", 1]
    if "--draftmodel" in found.flags:
        asked += ["--draftmodel", draft, "--draftamount", 3]
    launched = launch(*asked)
    lines = launched.until_ready()
    assert "adapter of 42 tensors" in lines[-2]
    assert any("weight 0.5" in line for line in lines)
    request = {"prompt": "the", "max_length": 8, "top_k": 1}
    assert "text" in post(base_url("127.0.0.1", port), "/api/v1/generate", request)["results"][0]
    if "--draftmodel" in found.flags:
        told = get_json(f"{base_url('127.0.0.1', port)}/api/extra/perf")
        assert told["last_draft_success"] + told["last_draft_failed"] > 0  # it really guessed
    launched.end(signal.SIGTERM)


def test_saved_fields_are_those_of_the_version(script, tmp_path: Path, models: Path) -> None:
    for version, expected in ((OLD, {"quantkv": 1, "flashattention": True}), (NEW, {"quantkv": "q8_0"})):
        target = tmp_path / f"{version}.kcpps"
        kobold = install(tmp_path / f"k{version}", version)
        run(script, "--kobold", kobold, "--model", models / "base.gguf", "--quantkv", "1", "--save-config", target)
        assert expected.items() <= json.loads(target.read_text()).items()
