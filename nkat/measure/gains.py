"""What was measured of a Θ at home, as tables for whoever gets it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nkat.host.record import parse_json, plain
from nkat.host.tables import Column, Table
from nkat.measure.columns import CHANGE, PERPLEXITY, TPE
from nkat.measure.guard import prices_table
from nkat.theta.set import ThetaSet


def gain_table(held_out: Mapping[str, Any], text: str) -> Table:
    """held_out: `Score.record` on chunks of a text that chose nothing, with how many there were"""
    columns = [Column("text", "text"), Column("chunks", "chunks"), PERPLEXITY, CHANGE, TPE]
    return Table("gain", columns, [{**held_out, "text": text}])


def found_beside(path: Path, theta: ThetaSet) -> tuple[list[Table], list[Table]]:
    """Gains and prices by the record that a search left beside its best; none where there is no record of this Θ."""
    beside = path.with_suffix(".json")
    try:
        if not beside.is_file():  # a pipe would wait for ever
            return [], []
        record = parse_json(beside.read_bytes())
        if record["metadata"] != plain(theta.metadata()):
            return [], []
        held_out = record["held_out"]
        prices = [prices_table(held_out["guard"])] if "guard" in held_out else []
        return [gain_table(held_out, record["text"])], prices
    except (OSError, ValueError, LookupError, TypeError):  # not what a search writes
        return [], []
