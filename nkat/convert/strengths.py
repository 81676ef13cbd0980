"""What a Θ is worth at other strengths, and beside the model it was made from: measured, for `--strengths`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nkat.host.console import counted, format_bytes, say
from nkat.host.tables import Column, Table, show
from nkat.lm.load import LoadedModel
from nkat.measure.columns import CHANGE_PERCENT
from nkat.measure.judge import Judge
from nkat.theta.set import ThetaSet

GAMMAS = (0.90, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)
CHUNKS = 4


def gamma_sweep(judge: Judge, theta_set: ThetaSet, gammas: Sequence[float] = GAMMAS) -> list[dict[str, Any]]:
    """Perplexity of a model with Θ at each γ, against γ = 1 (no Θ) on the same tokens, which comes last."""
    rows = []
    for gamma in gammas:
        score = judge.score(theta_set, gamma, progress=f"gamma {gamma:g}")
        rows.append({"gamma": gamma, "perplexity": score.perplexity.ppl, **score.change.record()})
    base = judge.without()
    return [*rows, {"gamma": 1.0, "perplexity": base.ppl, "change_percent": 0.0, "change_percent_stderr": 0.0}]


def measure_strengths(judge: Judge, theta_set: ThetaSet, reference: LoadedModel | None) -> dict[str, Any]:
    """The record: perplexity over γ, and beside the reference's where there is one."""
    chunks = judge.passages.chunks
    record: dict[str, Any] = {
        "text": judge.passages.name,
        "chunks": len(chunks),
        "context": chunks.shape[1],
        "made_for": theta_set.gamma,
        "gammas": gamma_sweep(judge, theta_set),
    }
    if reference is not None:
        record["reference"] = _beside_reference(judge, theta_set, reference)
    return record


def strengths_table(record: Mapping[str, Any]) -> Table:
    """The record as a table: perplexity over γ."""
    where = f"{counted(record['chunks'], 'chunk')} of {counted(record['context'], 'token')} of {record['text']}"
    made_for = record["made_for"]

    def gamma_text(gamma: float) -> str:
        return f"{gamma:g}" + (" (made for)" if gamma == made_for else "")

    columns = [Column("gamma", "gamma", gamma_text), Column("perplexity", "perplexity", ".3f"), CHANGE_PERCENT]
    conditions = {key: record[key] for key in ("text", "chunks", "context", "made_for")}
    return Table("strengths", columns, record["gammas"], f"\nperplexity by gamma, {where}:", conditions)


def print_strengths(record: Mapping[str, Any]) -> None:
    """The record as a table, and what the reference's bytes buy."""
    show(strengths_table(record))
    if "reference" not in record:
        return
    found, base = record["reference"], record["gammas"][-1]["perplexity"]
    fitted, better = found["perplexity_with_theta"], found["perplexity"]
    more = found["bytes"] - found["bytes_with_theta"]
    verdict = (
        "Θ gives more for less" if fitted <= better and more > 0 else f"{format_bytes(more)} more buy {better:.3f}"
    )
    say(
        f"\nper byte: {format_bytes(found['base_bytes'])} give {base:.3f}, {format_bytes(found['bytes_with_theta'])} "
        f"with Θ {fitted:.3f}, the reference's {format_bytes(found['bytes'])} {better:.3f}: {verdict}"
    )


def _beside_reference(judge: Judge, theta_set: ThetaSet, reference: LoadedModel) -> dict[str, Any]:
    """The larger file is what the user could take instead: what it costs in bytes and what it gives."""
    base_bytes = judge.loaded.file.base_size
    return {
        "bytes": reference.file.base_size,
        "perplexity": judge.other(reference).without(progress="reference").ppl,
        "base_bytes": base_bytes,
        "bytes_with_theta": base_bytes + theta_set.nbytes,
        "perplexity_with_theta": judge.score(theta_set).perplexity.ppl,
    }
