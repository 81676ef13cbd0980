"""Texts to measure on: the user's file, or English prose that every Python carries."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from nkat.errors import NKATError


@dataclass(frozen=True, slots=True)
class Text:
    """A text with the name and hash (SHA-256 of its UTF-8 bytes) under which results report it."""

    name: str
    content: str
    sha256: str


def load_text(path: str | Path | None) -> Text:
    """Reads a UTF-8 file, or gives the default text for None. Raises NKATError when it cannot be read or is empty."""
    if path is None:
        return default_text()
    path = Path(path)
    try:
        raw = path.read_bytes()
        content = raw.decode("utf-8")
    except FileNotFoundError:
        raise NKATError(f"{path}: no such text file") from None
    except IsADirectoryError:
        raise NKATError(f"{path}: this is a folder, not a text file") from None
    except UnicodeDecodeError as error:
        raise NKATError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise NKATError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not content.strip():
        raise NKATError(f"{path}: the text is empty")
    return Text(path.name, content, hashlib.sha256(raw).hexdigest())


def default_text() -> Text:
    """Python's own language reference (`pydoc_data.topics`): about half a megabyte, another one in each Python."""
    from pydoc_data import topics

    content = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    name = f"pydoc_data.topics of Python {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    return Text(name, content, hashlib.sha256(content.encode()).hexdigest())
