"""The cache folder, and that nothing that is wrong with a memo is an error."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nkat.host.cache import Memo, cache_folder, keep_sealed, load_sealed, own_folder
from tests.conftest import ROOT


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NKAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def number(content: dict) -> int:
    return int(content["number"])


def test_the_folder_is_the_named_one_or_the_users(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("NKAT_CACHE")
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path))
    assert cache_folder() == tmp_path / "nkat"


def test_what_was_set_is_there_the_next_time(cache: Path) -> None:
    memo = Memo.open("room/numbers.json")
    assert memo.get(number) is None
    assert not cache.exists()  # asking leaves nothing behind
    memo.set({"number": 3, "other": [None, "Θ"]})
    memo.set({"number": 4})
    again = Memo.open("room/numbers.json")
    assert again.get(number) == 4
    assert again.get(lambda content: content["other"]) == [None, "Θ"]
    assert json.loads((cache / "room" / "numbers.json").read_text(encoding="utf-8"))["number"] == 4
    assert [path.name for path in (cache / "room").iterdir()] == ["numbers.json"]
    if os.name != "nt":
        assert {path.stat().st_mode & 0o777 for path in (cache, cache / "room")} == {0o700}


DAMAGED = {
    "empty": b"",
    "cut short": b'{"number": 1',
    "a text": b'"text"',
    "a list": b"[1]",
    "null": b"null",
    "no UTF-8": b"\xff\xfe\0",
    "too deep": b"[" * 100_000,
    "other names": b"{}",
    "another type": b'{"number": null}',
    "no number": b'{"number": "x"}',
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_means_empty(cache: Path, kind: str) -> None:
    memo = Memo.open("numbers.json")
    cache.mkdir()
    memo.path.write_bytes(DAMAGED[kind])
    assert memo.get(number) is None
    memo.set({"number": 1})
    assert memo.get(number) == 1


def test_other_mistakes_of_the_reader_are_not_hidden(cache: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        Memo.open("numbers.json").get(lambda content: 1 // len(content))


def test_a_cache_that_cannot_be_written_is_said_in_one_line(cache: Path, capsys: pytest.CaptureFixture) -> None:
    cache.write_text("a file where the folder should be")
    memo = Memo.open("numbers.json")
    memo.set({"number": 1})
    assert memo.get(number) is None
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"note: without a cache: {cache}")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_folder_without_permission(cache: Path, capsys: pytest.CaptureFixture) -> None:
    cache.mkdir()
    cache.chmod(0o500)
    Memo.open("numbers.json").set({"number": 1})
    cache.chmod(0o700)
    assert "is not writable" in capsys.readouterr().err


def test_a_folder_in_the_files_place_is_said_too(cache: Path, capsys: pytest.CaptureFixture) -> None:
    memo = Memo.open("numbers.json")
    memo.path.mkdir(parents=True)
    memo.set({"number": 1})
    assert "this is a folder" in capsys.readouterr().err


posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX modes and names")
NAME = "compiled/a.o"


@posix
def test_empty_is_unset_and_relative_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in ("NKAT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    assert cache_folder() == tmp_path / "home" / ".cache" / "nkat"
    for name in ("XDG_CACHE_HOME", "NKAT_CACHE"):
        monkeypatch.setenv(name, f"here/{tmp_path.name}")
        assert cache_folder() is None
        Memo.open("x.json").set({"number": 1})
        keep_sealed(NAME, b"code")
        assert own_folder() is load_sealed(NAME) is Memo.open("x.json").get(number) is None
        monkeypatch.setenv(name, "")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "no absolute path" in said[0]
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    assert cache_folder() is None
    monkeypatch.setenv("HOME", "")
    found = cache_folder()  # the system knows the user's
    assert found is None or found.parent.name == ".cache"
    assert not (tmp_path / "nowhere").exists()


@posix
@pytest.mark.parametrize("below", ["", "compiled"])
def test_a_folder_that_others_may_write_to_is_not_used(cache: Path, capsys, below: str) -> None:
    keep_sealed(NAME, b"code")
    assert load_sealed(NAME) == b"code"
    (cache / below).chmod(0o770)
    assert load_sealed(NAME) is None
    keep_sealed(NAME, b"other")
    assert capsys.readouterr().err.count("\n") == 1
    (cache / below).chmod(0o755)
    assert load_sealed(NAME) == b"code"


@posix
@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root gives files away")
def test_another_users_folder_is_not_used(cache: Path) -> None:
    keep_sealed(NAME, b"code")
    os.chown(cache, 12345, 12345)
    assert load_sealed(NAME) is None


def test_only_what_this_user_sealed_is_taken(cache: Path, tmp_path: Path, capsys) -> None:
    keep_sealed(NAME, b"code")
    keep_sealed("compiled/b.o", b"other code")
    file = cache / "compiled" / "a.o"
    whole = file.read_bytes()
    assert load_sealed(NAME) == b"code"
    assert capsys.readouterr().err == ""
    forged = [b"", whole[:32], whole[:-1], whole + b"x", hashlib.sha256(b"evil").digest() + b"evil", b"evil" * 20]
    forged.append((cache / "compiled" / "b.o").read_bytes())  # sealed, but as something else
    for content in forged:
        file.write_bytes(content)
        assert load_sealed(NAME) is None
    assert capsys.readouterr().err.count("\n") == 1
    file.write_bytes(whole)
    assert load_sealed(NAME) == b"code"
    shutil.copytree(cache, tmp_path / "copy")
    (tmp_path / "copy" / "key").write_bytes(bytes(32))
    (cache / "key").unlink()
    assert load_sealed(NAME) is None  # another key
    keep_sealed(NAME, b"code")
    assert load_sealed(NAME) == b"code"


@posix
def test_the_key_is_the_users_alone(cache: Path) -> None:
    keep_sealed(NAME, b"code")
    key = cache / "key"
    first = key.read_bytes()
    assert (len(first), key.stat().st_mode & 0o777) == (32, 0o600)
    key.chmod(0o644)  # somebody may have read it
    assert load_sealed(NAME) is None
    assert key.read_bytes() != first
    assert key.stat().st_mode & 0o777 == 0o600
    for damage in (b"", bytes(31), bytes(33)):
        key.write_bytes(damage)
        keep_sealed(NAME, b"code")
        assert load_sealed(NAME) == b"code"
        assert len(key.read_bytes()) == 32
    key.unlink()
    key.symlink_to(cache / "elsewhere")
    (cache / "elsewhere").write_bytes(bytes(32))
    keep_sealed(NAME, b"code")
    assert not key.is_symlink()
    assert {path.name for path in cache.iterdir()} == {"key", "compiled", "elsewhere"}


@posix
@pytest.mark.parametrize(
    ("what", "environment"),
    [
        ("HOME is nowhere", {"HOME": "/nonexistent", "NKAT_CACHE": "", "XDG_CACHE_HOME": ""}),
        ("HOME is relative", {"HOME": "x", "NKAT_CACHE": "", "XDG_CACHE_HOME": ""}),
        ("a file in the folder's place", {"NKAT_CACHE": "FILE"}),
        ("a file above it", {"NKAT_CACHE": "FILE/x"}),
        ("a name too long", {"NKAT_CACHE": "/" + "x" * 5000}),
        ("a full disk", {"NKAT_CACHE": "FOLDER"}),
        ("a pipe as memo", {"NKAT_CACHE": "PIPES"}),
        ("a cache that works", {"NKAT_CACHE": "FOLDER"}),
    ],
)
def test_without_a_cache_everything_runs_and_one_line_says_so(tmp_path: Path, what: str, environment: dict) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "memo.json")
    places = {"FILE": tmp_path / "file", "FOLDER": tmp_path / "folder", "PIPES": tmp_path / "pipes"}
    for word, place in places.items():
        environment = {name: value.replace(word, str(place)) for name, value in environment.items()}
    full = "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))" if what == "a full disk" else ""
    program = f"""if True:
        import resource
        from nkat.host.cache import Memo, keep_sealed, load_sealed
        from nkat.kernels.cpu import jit
        {full}
        for name in ("one", "two"):
            jit.compile_kernel(name, lambda k: k.fetch_add(k.pointer(0), 1))
        Memo.open("memo.json").set({{"number": 1}})
        Memo.open("memo.json").get(lambda found: found["number"])
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert done.stderr.count("\n") == (what != "a cache that works"), done.stderr
    assert done.stderr == "" or done.stderr.startswith("note: without a cache: ")
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "folder", "pipes"}
    if what == "a cache that works":
        assert len(list((tmp_path / "folder" / "compiled").glob("*.o"))) == 2
