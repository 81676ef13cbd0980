"""What a Θ is worth at other strengths, and beside the model it was made from: measured, for the converter's report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nkat.host.console import format_bytes, format_table
from nkat.lm.load import load_model
from nkat.lm.transformer import Transformer
from nkat.measure.judge import Validation, every_token
from nkat.measure.perplexity import Perplexity, paired, text_chunks
from nkat.measure.texts import load_text
from nkat.theta.modelfile import ModelFile, open_model_file
from nkat.theta.set import ThetaSet, check_judging_text

GAMMAS = (0.90, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)
_CHUNKS = 4


def gamma_sweep(model: Transformer, held: Validation, gammas: Sequence[float] = GAMMAS) -> list[dict[str, Any]]:
    """Perplexity of a model with Θ at each γ, against γ = 1 (no Θ) on the same tokens, which comes last."""
    before = model.gamma
    model.set_gamma(None)
    base = Perplexity(held.score(model, "gamma 1")[None])
    rows = []
    for gamma in gammas:
        model.set_gamma(gamma)
        measured = Perplexity(held.score(model, f"gamma {gamma:g}")[None])
        change = paired(base, measured)
        rows.append(
            {
                "gamma": gamma,
                "perplexity": measured.ppl,
                "change_percent": change.percent,
                "change_percent_stderr": change.percent_stderr,
            }
        )
    model.set_gamma(before)
    return [*rows, {"gamma": 1.0, "perplexity": base.ppl, "change_percent": 0.0, "change_percent_stderr": 0.0}]


def report_strengths(
    model_file: ModelFile,
    theta_set: ThetaSet,
    text_path: Path | None,
    validation: Validation | None,
    reference: Path | None,
) -> dict[str, Any]:
    """Prints and returns perplexity over γ, and beside the reference's where there is one.

    Measured on the user's text, else on the fit's validation chunks, else on the text every Python carries.
    """
    loaded = load_model(model_file, thetas=theta_set.layers, gamma=theta_set.gamma)
    if text_path is None and validation is not None:
        held = Validation(validation.chunks[:_CHUNKS], validation.counted[:_CHUNKS])
        where = "the calibration text's validation slice"
    else:
        text = load_text(text_path)
        check_judging_text(theta_set, text.sha256, model_file.path)
        held, where = every_token(text_chunks(loaded.tokenizer, text.content, _CHUNKS)), text.name
    rows = gamma_sweep(loaded.model, held)
    print(f"\nperplexity by gamma, {len(held.chunks)} chunks of {held.chunks.shape[1]} tokens of {where}:\n")
    cells = [
        [
            f"{row['gamma']:g}" + (" (made for)" if row["gamma"] == theta_set.gamma else ""),
            f"{row['perplexity']:.3f}",
            f"{row['change_percent']:+.3f} ± {row['change_percent_stderr']:.3f}",
        ]
        for row in rows
    ]
    print(format_table(cells, ["gamma", "perplexity", "change %"]))
    record: dict[str, Any] = {"text": where, "chunks": len(held.chunks), "gammas": rows}
    if reference is not None:
        record["reference"] = _beside_reference(
            loaded.model, model_file.base_size, theta_set.nbytes, reference, held, rows[-1]["perplexity"]
        )
    return record


def _beside_reference(
    model: Transformer, base_bytes: int, theta_bytes: int, path: Path, held: Validation, base: float
) -> dict[str, Any]:
    """The larger file is what the user could take instead: what it costs in bytes and what it gives."""
    fitted = Perplexity(held.score(model, "with Θ")[None]).ppl
    reference_file = open_model_file(path)
    reference = load_model(reference_file).model
    reference.set_gamma(None)
    better = Perplexity(held.score(reference, "reference")[None]).ppl
    bytes_with = base_bytes + theta_bytes
    more = reference_file.base_size - bytes_with
    verdict = (
        "Θ gives more for less" if fitted <= better and more > 0 else f"{format_bytes(more)} more buy {better:.3f}"
    )
    print(
        f"\nper byte: {format_bytes(base_bytes)} give {base:.3f}, {format_bytes(bytes_with)} with Θ "
        f"{fitted:.3f}, the reference's {format_bytes(reference_file.base_size)} {better:.3f}: {verdict}"
    )
    return {
        "bytes": reference_file.base_size,
        "perplexity": better,
        "bytes_with_theta": bytes_with,
        "perplexity_with_theta": fitted,
    }
