"""Texts: the default one, and files that are no text."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nkat.errors import NKATError
from nkat.measure.texts import load_text


def test_default_text_is_long_english_prose_with_its_hash() -> None:
    text = load_text(None)
    assert len(text.content) > 300_000
    assert "expression" in text.content
    assert text.sha256 == hashlib.sha256(text.content.encode()).hexdigest()
    assert text.name.startswith("pydoc_data.topics of Python 3.")


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    raw = "Θ\r\nline\n".encode()
    path.write_bytes(raw)
    text = load_text(path)
    assert (text.name, text.content, text.sha256) == ("t.txt", "Θ\r\nline\n", hashlib.sha256(raw).hexdigest())


def test_no_text(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    with pytest.raises(NKATError, match="no such text file"):
        load_text(path)
    with pytest.raises(NKATError, match="folder"):
        load_text(tmp_path)
    path.write_bytes(b" \n")
    with pytest.raises(NKATError, match="the text is empty"):
        load_text(path)
    path.write_bytes(b"abc\xff")
    with pytest.raises(NKATError, match=r"not UTF-8 text \(byte 3\)"):
        load_text(path)
