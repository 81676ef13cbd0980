"""The names under which a search leaves its best, and what is said where a file of such a name is not there."""

from __future__ import annotations

import re
from pathlib import Path

from nkat.host.record import parse_json

MODEL, RECORD = "optimal.nkat", "optimal.json"  # always of the best; the record is there where no Θ is, too
_NAME = re.compile(r"optimal(_rank\d+_gamma[\d.]+)?\.nkat")


def optimal_name(rank: int, gamma: float) -> str:
    """The name that says what the best is: two decimals of γ, more where it has more."""
    return f"optimal_rank{rank}_gamma{gamma_text(gamma)}.nkat"


def gamma_text(gamma: float) -> str:
    """0.97, 0.985."""
    return f"{gamma:.2f}" if round(gamma, 2) == gamma else f"{gamma:g}"


def about_missing(path: Path) -> str:
    """What a search says of a file of such a name that is not in its folder; "" where it is, or no search says."""
    summary = path.with_name(RECORD)
    # A record that is a pipe would wait for ever.
    if not _NAME.fullmatch(path.name) or path.exists() or not summary.is_file():
        return ""
    try:
        record = parse_json(summary.read_bytes())
        if record["file"] is None:
            return f": the search in {path.parent} wrote none, because {record['why_none']}"
        setting = record["setting"]
        best = path.with_name(MODEL if path.name != MODEL else Path(record["file"]).name)
        return (
            f": the best that the search in {path.parent} found is {best} (rank {setting['rank']}, gamma "
            f"{setting['gamma']:g})"
        )
    except (OSError, ValueError, LookupError, TypeError):  # not what a search writes
        return ""
