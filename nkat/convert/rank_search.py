"""`--optimize-rank`: which rank earns its bytes, measured on a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nkat.host.console import format_table
from nkat.lm.load import LoadedModel, load_model
from nkat.measure.perplexity import Perplexity, paired, score_chunks, text_chunks
from nkat.measure.texts import Text, load_text
from nkat.measure.tpe import byte_ratio, tpe
from nkat.theta.modelfile import ModelFile
from nkat.theta.set import ThetaSet, check_judging_text, truncate_rank

RANKS = (2, 4, 6, 8)


@dataclass(frozen=True, slots=True)
class Trial:
    """A model and the chunks of text to measure it on: int64 [chunks, context]."""

    loaded: LoadedModel
    text: Text
    chunks: torch.Tensor


def prepare(model_file: ModelFile, text_path: Path | None, chunks: int) -> Trial:
    """Opens model and text. Raises NKATError for what cannot be measured, before time is spent on Θ."""
    text = load_text(text_path)
    loaded = load_model(model_file)
    return Trial(loaded, text, text_chunks(loaded.tokenizer, text.content, chunks))


def search_rank(trial: Trial, theta_set: ThetaSet, ranks: Sequence[int] = RANKS) -> tuple[ThetaSet, dict[str, Any]]:
    """Measures Θ cut to each of `ranks` and returns the one with the highest TPE, with the record of all.

    theta_set: Θ of the highest of `ranks`; its columns are ordered, so the first r of them are the Θ of rank r
    """
    model, cut, text = trial.loaded.model, trial.chunks, trial.text
    check_judging_text(theta_set, text.sha256, trial.loaded.gguf.path)
    model.set_gamma(None)
    base = Perplexity(score_chunks(model, cut, progress="without Θ"))
    candidates = {rank: truncate_rank(theta_set, rank) for rank in ranks}
    rows: list[dict[str, Any]] = [_row(None, base, base, 1.0)]
    for rank, candidate in candidates.items():
        model.set_thetas(candidate.layers)
        model.set_gamma(candidate.gamma)
        measured = Perplexity(score_chunks(model, cut, progress=f"rank {rank}"))
        rows.append(_row(rank, measured, base, byte_ratio(trial.loaded.tensors, candidate.nbytes)))
    best = max(rows[1:], key=lambda row: row["tpe"])
    _print_decision(rows, best, f"{base.chunks} chunks of {base.context} tokens of {text.name}")
    record = {"text": text.name, "text_sha256": text.sha256, "chunks": base.chunks, "rows": rows, "rank": best["rank"]}
    return candidates[best["rank"]], record


def _row(rank: int | None, measured: Perplexity, base: Perplexity, ratio: float) -> dict[str, Any]:
    change = paired(base, measured)
    return {
        "rank": rank,
        "perplexity": measured.ppl,
        "perplexity_stderr": measured.stderr,
        "change_percent": change.percent,
        "change_percent_stderr": change.percent_stderr,
        "byte_ratio": ratio,
        "tpe": tpe(measured.ppl, ratio),
    }


def _print_decision(rows: list[dict[str, Any]], best: dict[str, Any], where: str) -> None:
    cells = [
        [
            "without Θ" if row["rank"] is None else f"rank {row['rank']}",
            f"{row['perplexity']:.3f} ± {row['perplexity_stderr']:.3f}",
            "" if row["rank"] is None else f"{row['change_percent']:+.3f} ± {row['change_percent_stderr']:.3f}",
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
