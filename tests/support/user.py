"""What a user's machine is like for a test: empty folders, free ports."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest


def empty_home(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """An empty home and cache below `folder`, and no KoboldCpp that is named; returns the working folder."""
    for name in ("home", "work"):
        (folder / name).mkdir()
    monkeypatch.delenv("KOBOLDCPP", raising=False)
    monkeypatch.setenv("NKAT_CACHE", str(folder / "cache"))
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("USERPROFILE", str(folder / "home"))
    monkeypatch.chdir(folder / "work")
    return folder / "work"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
