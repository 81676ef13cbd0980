"""`--optimize-rank`: which rank earns its bytes, measured on a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nkat.host.console import counted, format_table
from nkat.measure.judge import Judge, Score
from nkat.measure.perplexity import change_text, perplexity_text
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


def _row(rank: int | None, score: Score) -> dict[str, Any]:
    return {"rank": rank, **score.record()}


def print_decision(record: Mapping[str, Any]) -> None:
    """The record as a table, and the rank that is kept."""
    rows = record["rows"]
    best = next(row for row in rows if row["rank"] == record["rank"])
    where = f"{counted(record['chunks'], 'chunk')} of {counted(record['context'], 'token')} of {record['text']}"
    cells = [
        [
            "without Θ" if row["rank"] is None else f"rank {row['rank']}",
            perplexity_text(row["perplexity"], row["perplexity_stderr"], 3),
            "" if row["rank"] is None else change_text(row["change_percent"], row["change_percent_stderr"], ""),
            f"{row['byte_ratio']:.4f}",
            f"{row['tpe']:.6f}",
        ]
        for row in rows
    ]
    print(f"\nmeasured on {where}:\n")
    print(format_table(cells, ["", "perplexity", "change %", "bytes ratio", "TPE"]))
    print(f"\nkeeping rank {best['rank']}, the highest TPE of the ranks tried")
    if best["tpe"] <= rows[0]["tpe"]:
        print("note: no rank scores better than the model without Θ")
