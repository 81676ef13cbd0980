"""Finding KoboldCpp, and believing only what it says itself."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from nkat.errors import NKATError
from nkat.kobold import find as kobold_find
from nkat.kobold.find import places
from nkat.kobold.probe import (
    SOUGHT,
    download_command,
    find_kobold,
    libraries_in_program,
    parse_help,
    probe_kobold,
    programs_in,
)
from tests.support.fake_koboldcpp import NEW, OLD, archive, install, install_program, mark_when_run
from tests.support.user import empty_home

posix = pytest.mark.skipif(os.name == "nt", reason="the stand-in for a one-file program is a shell script")
REAL_HELP = """\
usage: koboldcpp.py [-h] [--usecuda [[main GPU ID] ...]] [--jinja]

KoboldCpp Server - Version 1.115.1

options:
  -h, --help            show this help message and exit
  --usecuda [[main GPU ID] ...], --usecublas [[main GPU ID] ...], --usehipblas [[main GPU ID] ...]
                        Use CUDA for GPU Acceleration. Not --useclblast, which is gone.
  --jinja               Enables jinja. Tool calls need --jinja_tools
  --gpulayers [[GPU layers]], --gpu-layers [[GPU layers]], -ngl [[GPU layers]]
                        Set to -1 to enable autofit
  -p, --prompt [prompt]
  --quantkv [quantization level f16/bf16/q8_0/q5_1/q4_0]
"""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user's empty home, on a machine without KoboldCpp; returns the working folder."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(kobold_find, "__file__", str(tmp_path / "toolkit" / "nkat" / "kobold" / "find.py"))
    return empty_home(monkeypatch, tmp_path)


def test_flags_are_those_of_option_lines_only() -> None:
    version, flags, types = parse_help(REAL_HELP)
    assert version == "1.115.1"
    assert flags == {
        *("--help", "--usecuda", "--usecublas", "--usehipblas", "--jinja", "--gpulayers", "--gpu-layers", "--prompt"),
        "--quantkv",
    }
    assert types == ("f16", "bf16", "q8_0", "q5_1", "q4_0")
    assert parse_help("  --quantkv [quantization level 0/1/2]")[2] == ("0", "1", "2")
    assert parse_help("usage: something else") == (None, frozenset(), ())


@pytest.mark.parametrize(("version", "cuda"), [(OLD, "--usecublas"), (NEW, "--usecuda")])
def test_source_folder(tmp_path: Path, version: str, cuda: str) -> None:
    install(tmp_path, version, ("default", "cublas"))
    kobold = probe_kobold(find_kobold(tmp_path))
    assert (kobold.version, kobold.is_source, kobold.libraries) == (version, True, {"default", "cublas"})
    assert kobold.flag("--usecuda", "--usecublas") == cuda
    assert ("--useclblast" in kobold.flags) == (version == OLD)
    assert ("--failsafe" in kobold.flags) == (version == NEW)
    assert not kobold.has_library("vulkan")


@posix
def test_one_file_program(alone: Path, tmp_path: Path) -> None:
    path = install_program(tmp_path / "home" / "koboldcpp-linux-x64", NEW, ("default", "vulkan_noavx2"))
    kobold = probe_kobold(find_kobold(None))
    assert (kobold.path, kobold.version, kobold.is_source) == (path.resolve(), NEW, False)
    assert kobold.libraries == {"default", "vulkan_noavx2"}
    # The answer is remembered until the file changes: this one can no longer answer.
    (tmp_path / "home" / ".koboldcpp-linux-x64-unpacked" / "koboldcpp.py").unlink()
    assert probe_kobold(path) == kobold
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(NKATError, match="is not a KoboldCpp that runs here"):
        probe_kobold(path)


@posix
@pytest.mark.parametrize("answer", [5, {}, {"version": NEW, "flags": None, "libraries": None, "cache_types": []}])
def test_a_damaged_memory_is_asked_again(alone: Path, tmp_path: Path, answer: object) -> None:
    path = install_program(alone / "koboldcpp", NEW)
    kobold = probe_kobold(path)
    memory = tmp_path / "cache" / "kobold" / "programs.json"
    (key,) = json.loads(memory.read_text())
    memory.write_text(json.dumps({key: answer, "another": answer}))
    assert probe_kobold(path) == kobold
    assert json.loads(memory.read_text())[key]["version"] == NEW
    assert json.loads(memory.read_text())["another"] == answer


@posix
def test_asking_without_remembering_leaves_the_cache_alone(alone: Path, tmp_path: Path) -> None:
    probe_kobold(install_program(alone / "koboldcpp", NEW), remember=False)
    assert not (tmp_path / "cache").exists()


def test_table_of_contents(tmp_path: Path) -> None:
    names = [
        "koboldcpp.py",
        "koboldcpp_default.dll",
        "sub/koboldcpp_cublas.so",
        "precompiled_koboldcpp_failsafe.so",
        "x.so",
    ]
    path = tmp_path / "program"
    path.write_bytes(b"MZ" * 5000 + archive(names))
    assert libraries_in_program(path) == {"default", "cublas", "failsafe"}
    path.write_bytes(path.read_bytes() + b"a signature" * 100)
    assert libraries_in_program(path) == {"default", "cublas", "failsafe"}
    path.write_bytes(b"MZ" * 5000)
    assert libraries_in_program(path) is None
    whole = archive(names)
    path.write_bytes(whole[60:])  # cut off at the front: the table's position lies before the file
    assert libraries_in_program(path) is None


def test_order_of_places(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NKATError, match=r"no KoboldCpp found .* download it with: curl .*koboldcpp"):
        find_kobold(None)
    at_home = install(tmp_path / "home" / "koboldcpp", OLD)
    assert find_kobold(None) == at_home
    with_the_toolkit = install(tmp_path / "toolkit" / "koboldcpp", NEW)
    assert find_kobold(None) == with_the_toolkit
    other = install(tmp_path / "other", NEW)
    monkeypatch.setenv("KOBOLDCPP", str(tmp_path / "other"))
    assert find_kobold(None) == other
    assert find_kobold(at_home) == at_home


def test_where_the_download_goes_is_where_it_is_looked_for(alone: Path) -> None:
    words = shlex.split(download_command(), posix=os.name != "nt")
    target = Path(words[words.index("-fLo") + 1].strip('"'))
    assert target.parent in places(SOUGHT)
    assert target.parent == Path.home() / "koboldcpp"


@pytest.mark.parametrize("entries", [[], ["", "."], [".", "HERE"], ["koboldcpp"], ["HERE/koboldcpp/.."]])
@pytest.mark.parametrize("toolkit", ["toolkit", "work"])
def test_what_is_in_the_current_folder_is_not_run_unasked(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, entries: list[str], toolkit: str
) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join(entries).replace("HERE", str(alone)))
    monkeypatch.setattr(kobold_find, "__file__", str(tmp_path / toolkit / "nkat" / "kobold" / "find.py"))
    here = install(alone, NEW)
    with pytest.raises(NKATError, match=r"koboldcpp.py is in .* not run; --kobold koboldcpp.py"):
        find_kobold(None)
    at_home = install(tmp_path / "home" / "koboldcpp", NEW)
    assert find_kobold(None) == at_home
    assert capsys.readouterr().err.count("was not run") == 1
    assert find_kobold(Path("koboldcpp.py")).samefile(here)
    monkeypatch.setenv("KOBOLDCPP", "koboldcpp.py")
    assert find_kobold(None).samefile(here)


def test_list_runs_nothing_of_the_current_folder(script, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = mark_when_run(alone / "koboldcpp.py", alone / "koboldcpp", alone / "nvidia-smi", alone / "git")
    monkeypatch.setenv("PATH", os.pathsep.join(["", ".", str(alone)]))
    done = script("backend_selector.py", "--list")
    assert (done.returncode, done.stderr.count("\n"), ran.exists()) == (2, 1, False)
    assert "--kobold koboldcpp.py" in done.stderr
    install(alone.parent / "home" / "koboldcpp", NEW)
    done = script("backend_selector.py", "--list")
    assert (done.returncode, done.stderr.count("\n"), ran.exists()) == (0, 1, False)
    assert "koboldcpp.py is in the current folder and was not run; --kobold koboldcpp.py names it" in done.stderr
    script("backend_selector.py", "--list", "--kobold", "koboldcpp.py")  # the control
    assert ran.exists()


def test_the_folder_that_is_there_for_it_may_be_the_current_one(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    at_home = install(tmp_path / "home" / "koboldcpp", NEW)
    monkeypatch.chdir(at_home.parent)
    assert find_kobold(None) == at_home
    monkeypatch.chdir(tmp_path / "home")
    assert find_kobold(None) == at_home
    assert capsys.readouterr().err == ""
    install(tmp_path / "home" / "Downloads", NEW)
    at_home.unlink()
    monkeypatch.chdir(tmp_path / "home" / "Downloads")
    with pytest.raises(NKATError, match="was not run"):
        find_kobold(None)


def test_a_user_without_a_home(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(NKATError, match="no KoboldCpp found"):
        find_kobold(None)
    with pytest.raises(NKATError, match="no such user's home"):
        find_kobold(Path("~nobody-of-this-name/koboldcpp"))


def test_what_was_named_must_be_one(alone: Path, tmp_path: Path) -> None:
    with pytest.raises(NKATError, match="no such file"):
        find_kobold(tmp_path / "nowhere")
    with pytest.raises(NKATError, match="no KoboldCpp in this folder"):
        find_kobold(alone)
    text = alone / "koboldcpp.txt"
    text.write_text("not a program")
    assert list(programs_in(alone)) == []
    broken = tmp_path / "koboldcpp.py"
    broken.write_text("raise SystemExit('it is broken')")
    with pytest.raises(NKATError, match="status 1, it is broken"):
        probe_kobold(find_kobold(broken))


@posix
def test_a_download_without_the_right_to_run(alone: Path) -> None:
    path = alone / "koboldcpp"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o644)
    with pytest.raises(NKATError, match=r"chmod \+x"):
        find_kobold(path)
