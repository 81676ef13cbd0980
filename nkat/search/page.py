"""The report of a search, as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nkat.host.page import Page, machine_facts
from nkat.host.tables import Column, Table
from nkat.measure.columns import CHANGE_PERCENT, PERPLEXITY, TPE
from nkat.search import report
from nkat.search.objective import GUARD

_HOW = ("mode", "seed", "sampler", "pruner", "chunks", "held_out_chunks", "search_seconds", "study", "gamma_range")


def search_page(
    record: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], words: Sequence[str], command: str, picture: Path
) -> Page:
    """record, trials: of a search;  words: what came out;  command: that ran it;  picture: of it, as PNG"""
    best, fit = record["optimal"], record["fit"]
    commands = {"This search:": command}
    if fit:
        commands["The fit that its trials cut:"] = fit["command"]
    if best:
        commands["The best of it, made again:"] = best["command"]
    return Page(
        title=f"A search for the best Θ of {Path(record['model']).name}",
        summary=words,
        tables=[*([report.held_out_table(record)] if record["held_out"] else []), trials_table(trials)],
        pictures={"Scores by trial, by rank and γ, what decides, and perplexity against bytes": picture},
        commands=commands,
        facts={
            "What was measured": _files(record),
            "How": {name.replace("_", " "): record[name] for name in _HOW if record.get(name) is not None},
            "Machine and versions": machine_facts(record),
        },
    )


def trials_table(trials: Sequence[Mapping[str, Any]]) -> Table:
    """Every trial of a search's history."""
    columns = [
        Column("trial", "number"),
        Column("state", "state", str.lower),
        Column("setting", ("setting", "rank", "gamma", "layers", "depth_decay"), lambda name, *_: name),
        PERPLEXITY,
        CHANGE_PERCENT,
        TPE,
        Column("Θ bytes", "theta_bytes", ","),
        Column("dearest guard text, at most %", ("guard_bound_percent", "guard_text"), "+.3f"),
        Column("admitted", "admitted", lambda yes: "yes" if yes else "no"),
        Column("seconds", "seconds", ".1f"),
    ]
    guarded = any(GUARD in row for row in trials)
    rows = [_trial_row(row) for row in trials]
    shown = [c for c in columns if guarded or c.names[0] not in ("guard_bound_percent", "admitted")]
    return Table("trials", shown, rows, "every trial, on the chunks that trials see")


def _trial_row(row: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: value for key, value in row.items() if key not in ("setting", GUARD)}
    if not row["parameters"]:
        values |= {"change_percent": None, "change_percent_stderr": None}
    found = {**values, **row["parameters"], "setting": report.name_of(row)}
    if GUARD in row:
        dearest = max(row[GUARD]["prices"], key=lambda price: price["bound_percent"])
        found |= {f"guard_{key}": value for key, value in dearest.items()} | {"admitted": row[GUARD]["admitted"]}
    return found


def _files(record: Mapping[str, Any]) -> dict[str, str]:
    fit, best = record["fit"], record["optimal"]
    files = {
        "base model": f"{record['model']}, sha256 {record['model_sha256']}",
        "text that was judged on": f"{record['text']}, sha256 {record['text_sha256'] or 'not recorded'}",
    }
    if fit:
        files["text that was learned"] = f"sha256 {fit['asked']['calibration_sha256']}"
        files["Θ that was learned"] = f"{fit['file']}, sha256 {fit['sha256']}"
    if best:
        files["the best"] = f"{best['file']}, sha256 {best['sha256']}"
    return files
