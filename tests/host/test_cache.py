"""The cache folder, and that nothing that is wrong with a memo is an error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nkat.host.cache import Memo, cache_folder


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
    assert said[0].startswith(f"note: {memo.path}: cannot be written: ")


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
