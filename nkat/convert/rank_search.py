"""`--optimize-rank`: which rank earns its bytes, measured on a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nkat.host.console import counted, say
from nkat.host.tables import Column, Table, show
from nkat.measure.columns import CHANGE_PERCENT, PERPLEXITY_3, TPE
from nkat.measure.judge import Judge, Score
from nkat.theta.set import ThetaSet, truncate_rank

RANKS = (2, 4, 6, 8)


def search_rank(judge: Judge, theta_set: ThetaSet, ranks: Sequence[int] = RANKS) -> tuple[ThetaSet, dict[str, Any]]:
    """Measures Θ cut to each of `ranks` and returns the one with the highest TPE, with the record of all.

    theta_set: Θ of the highest of `ranks`; its columns are ordered, so the first r of them are the Θ of rank r
    """
    candidates = {rank: truncate_rank(theta_set, rank) for rank in ranks}
    scores = {rank: judge.score(cut, progress=f"rank {rank}") for rank, cut in candidates.items()}
    base = judge.base()  # scored beside the first
    rows = [_row(None, base), *(_row(rank, score) for rank, score in scores.items())]
    best = max(rows[1:], key=lambda row: row["tpe"])
    measured, passages = base.perplexity, judge.passages
    record: dict[str, Any] = {"text": passages.name, "text_sha256": passages.sha256}
    record |= {"chunks": measured.chunks, "context": measured.context}
    return candidates[best["rank"]], {**record, "rows": rows, "rank": best["rank"]}


_NOTHING = {"change_percent": None, "change_percent_stderr": None}  # the model without Θ changes nothing


def _rank_text(rank: int) -> str:
    return f"rank {rank}" if rank else "without Θ"


def _row(rank: int | None, score: Score) -> dict[str, Any]:
    return {"rank": rank, **score.record()}


def decision_table(record: Mapping[str, Any]) -> Table:
    """The record as a table: every rank beside the model without Θ."""
    where = f"{counted(record['chunks'], 'chunk')} of {counted(record['context'], 'token')} of {record['text']}"
    columns = [
        Column("", "rank", _rank_text),
        PERPLEXITY_3,
        CHANGE_PERCENT,
        Column("bytes ratio", "byte_ratio", ".4f"),
        TPE,
    ]
    rows = [{**row, "rank": row["rank"] or 0} | ({} if row["rank"] else _NOTHING) for row in record["rows"]]
    conditions = {key: record[key] for key in ("text", "text_sha256", "chunks", "context")}
    return Table("ranks", columns, rows, f"\nmeasured on {where}:", conditions)


def print_decision(record: Mapping[str, Any]) -> None:
    """The record as a table, and the rank that is kept."""
    rows = record["rows"]
    best = next(row for row in rows if row["rank"] == record["rank"])
    show(decision_table(record))
    say(f"\nkeeping rank {best['rank']}, the highest TPE of the ranks tried")
    if best["tpe"] <= rows[0]["tpe"]:
        say("note: no rank scores better than the model without Θ")
