"""The user's cache folder, and JSON files in it that keep what was found out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nkat.errors import NKATError
from nkat.host.console import note
from nkat.host.files import atomic_output

_Found = TypeVar("_Found")


def cache_folder() -> Path:
    """$NKAT_CACHE, else the user's: fetched models, compiled kernels, adapters, what was found out about KoboldCpp."""
    if "NKAT_CACHE" in os.environ:
        return Path(os.environ["NKAT_CACHE"])
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "nkat"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nkat"


@dataclass(frozen=True, slots=True)
class Memo:
    """What was found out once, in a JSON file of the cache: an object of names and values.

    It can be deleted at any time, so nothing that is wrong with it is an error: unreadable or damaged means empty, and
    what cannot be kept is found out again.
    """

    path: Path

    @classmethod
    def open(cls, name: str) -> Memo:
        """`name`: below the cache folder, such as "kobold/programs.json"; it need not be there."""
        return cls(cache_folder() / name)

    def get(self, read: Callable[[dict[str, Any]], _Found]) -> _Found | None:
        """What `read` takes from the content, or None where that is missing or of another form than `read` expects."""
        try:
            return read(self._content())
        except (LookupError, TypeError, ValueError):
            return None

    def set(self, found: Mapping[str, Any]) -> None:
        """Adds these names, or gives them new values; the file changes in one step. Says so when it cannot."""
        data = json.dumps(self._content() | dict(found), indent=2).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_output(self.path, len(data), force=True) as file:
                file.write(data)
        except OSError as error:
            note(f"note: {self.path}: cannot be written: {error.strerror or error}")
        except NKATError as error:
            note(f"note: {error}")

    def _content(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # RecursionError: brackets without end
            return {}
        return content if isinstance(content, dict) else {}
