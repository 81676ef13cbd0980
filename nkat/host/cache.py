"""The user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$NKAT_CACHE, else the user's: fetched models, compiled kernels, adapters, what was found out about KoboldCpp."""
    if "NKAT_CACHE" in os.environ:
        return Path(os.environ["NKAT_CACHE"])
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "nkat"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nkat"
