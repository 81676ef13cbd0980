"""κΘ folded into the weights, re-quantised in each tensor's own type: a plain GGUF that costs nothing at run time.

W' = Q(W + κΘ[:m, :n]), Q the reference quantiser of the tensor's type. The file has the base's metadata and tensors in
order; only adapted tensors' bytes differ. A block format can lose most of a Θ that is small beside its quantisation
step, and Q adds the rounding error of a second quantisation; so both are measured, with the perplexity left.

Limits: no importance matrix; types that `nkat.gguf.formats` cannot unpack cannot be merged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from nkat.gguf.file import TensorInfo
from nkat.gguf.formats import dequantise
from nkat.gguf.quantise import quantisation_steps, quantise
from nkat.gguf.weights import read_weight, scale_beside
from nkat.gguf.writer import (
    Part,
    Progress,
    part_size,
    replaced_parts,
    write_parts,
)
from nkat.host.console import bar, counted, say
from nkat.host.files import atomic_output
from nkat.host.tables import Column, Table, show
from nkat.lm.load import load_model
from nkat.measure.columns import CHANGE, PERPLEXITY
from nkat.measure.judge import Judge
from nkat.measure.perplexity import Perplexity, change_text, paired
from nkat.theta.algebra import Theta, ThetaError, coupling, low_rank_form
from nkat.theta.modelfile import ModelFile
from nkat.theta.set import ThetaSet


@dataclass(frozen=True, slots=True)
class MergeLoss:
    """What re-quantisation does to κΘ in one tensor or in all of a type: sums over the weights, which add up.

    change: ‖κΘ‖²; error: ‖W' − (W + κΘ)‖²; aligned: ⟨W' − W, κΘ⟩
    in_steps: sum of (κΘ / quantisation step)²; moved: weights that are not what they were; count: weights
    """

    change: float = 0.0
    error: float = 0.0
    aligned: float = 0.0
    in_steps: float = 0.0
    moved: int = 0
    count: int = 0

    def __add__(self, other: MergeLoss) -> MergeLoss:
        return MergeLoss(
            self.change + other.change,
            self.error + other.error,
            self.aligned + other.aligned,
            self.in_steps + other.in_steps,
            self.moved + other.moved,
            self.count + other.count,
        )

    def describe(self) -> dict[str, float | None]:
        """The figures for people: ratios of norms, and means; None for a Θ that is zero."""
        zero = self.change == 0.0
        return {
            "error_over_theta": None if zero else math.sqrt(self.error / self.change),
            "theta_kept": None if zero else self.aligned / self.change,
            "theta_in_steps": math.sqrt(self.in_steps / self.count),
            "weights_moved": self.moved / self.count,
        }


def merge_weight(
    weight: torch.Tensor, theta: Theta, kappa: float, qtype: GGMLQuantizationType
) -> tuple[np.ndarray, MergeLoss]:
    """Packed W' (uint8) of W [m, n], float32, that is stored in `qtype`; and what that lost.

    Raises ThetaError where a weight becomes too large for the type.
    """
    m, n = weight.shape
    down, up = low_rank_form(*theta.factors(), m, n)
    change = kappa * (up @ down)
    wanted = weight + change
    if not bool(torch.isfinite(wanted).all()):
        raise ThetaError("the weight with Θ in it holds NaN or infinity")
    packed = quantise(wanted, qtype)
    merged = dequantise(torch.from_numpy(packed), qtype, (m, n))
    if not bool(torch.isfinite(merged).all()):
        raise ThetaError(f"the weight with Θ in it is too large for {qtype.name}")
    return packed, MergeLoss(
        change=_sum_of_squares(change),
        error=_sum_of_squares(merged - wanted),
        aligned=float(((merged - weight) * change).sum(dtype=torch.float64)),
        in_steps=_sum_of_squares(change / quantisation_steps(weight, qtype)),
        moved=int((merged != weight).sum()),
        count=weight.numel(),
    )


def write_merged(
    path: Path | None,
    model: ModelFile,
    theta_set: ThetaSet,
    gamma: float,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, MergeLoss]:
    """Writes the model with κ(γ)Θ in its weights; returns the loss of each adapted tensor, in the file's order.

    path: None to measure the losses and write nothing. Raises ThetaError naming the tensor that cannot be merged.
    """
    losses: dict[str, MergeLoss] = {}
    parts = _merged_parts(model, theta_set.layers, coupling(gamma), losses)
    if path is None:
        for part in parts:
            if progress:
                progress(part_size(part))
        return losses
    with atomic_output(path, model.base_size, force, model.files) as file:
        write_parts(file, parts, progress)
    return losses


def measure_merge(judge: Judge, theta_set: ThetaSet, gamma: float, merged_path: Path) -> dict[str, Any]:
    """Perplexity of the base, of the base with Θ and of the merged file, on the same chunks."""
    with_theta, base = judge.score(theta_set, gamma), judge.without()
    merged = judge.other(load_model(merged_path)).without(progress="merged")
    gain, kept = with_theta.change, paired(base, merged)
    share = gain_kept(base, with_theta.perplexity, merged)
    return {
        "text": judge.passages.name,
        "text_sha256": judge.passages.sha256,
        "chunks": base.chunks,
        "context": base.context,
        "base": base.record(),
        "theta": {**with_theta.perplexity.record(), **gain.record()},
        "merged": {**merged.record(), **kept.record()},
        "merged_against_theta": paired(with_theta.perplexity, merged).record(),
        "gain_kept": None if share is None else share[0],
        "gain_kept_stderr": None if share is None else share[1],
    }


def gain_kept(base: Perplexity, with_theta: Perplexity, merged: Perplexity) -> tuple[float, float] | None:
    """The share of Θ's gain (of ln perplexity) that the merged model has, and its standard error; None: no gain.

    The error is the ratio's from the tokens (delta method): that of the mean of Δmerged − share·ΔΘ, over ΔΘ's mean.
    """
    gain, kept = paired(base, with_theta), paired(base, merged)
    if not gain.clear or gain.log_ratio >= 0:
        return None
    share = kept.log_ratio / gain.log_ratio
    rest = Perplexity(base.nll + (merged.nll - base.nll) - share * (with_theta.nll - base.nll), base.context)
    return share, paired(base, rest).log_ratio_stderr / abs(gain.log_ratio)


def merge_model(
    path: Path,
    model: ModelFile,
    theta_set: ThetaSet,
    gamma: float,
    judge: Judge | None,
    force: bool = False,
) -> dict[str, Any]:
    """Writes the merged model and returns the record of what it lost; judge None: a dry run, nothing is written.

    Raises NKATError, before anything is written, for γ = 1, a Θ of experts, or one made from the text that judges it.
    """
    if coupling(gamma) == 0.0:
        raise ThetaError("merging needs gamma below 1: at 1 the coupling is 0 and there is nothing to merge")
    for name, theta in theta_set.layers.items():
        if theta.experts is not None:
            raise ThetaError(f"{name}: --merge cannot put Θ into a mixture's experts; --export-lora can")
    if judge is not None:
        judge.check(theta_set)
    with bar(model.base_size, f"merging into {path.name}", "B") as done:
        losses = write_merged(None if judge is None else path, model, theta_set, gamma, force, done.update)
    return {
        "output": str(path),
        "bytes": model.base_size,
        "rank": theta_set.rank,
        "gamma": gamma,
        **describe_losses(losses, model.require_base().tensors),
        "perplexity": None if judge is None else measure_merge(judge, theta_set, gamma, path),
    }


def describe_losses(losses: Mapping[str, MergeLoss], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The record of `write_merged`: by type, and tensor by tensor."""
    types: dict[str, list[str]] = {}
    for name in losses:
        types.setdefault(tensors[name].type_name, []).append(name)
    return {
        "all": sum(losses.values(), MergeLoss()).describe(),
        "types": [
            {"type": kind, "tensors": len(names), **sum((losses[name] for name in names), MergeLoss()).describe()}
            for kind, names in types.items()
        ],
        "tensors": [
            {"name": name, "type": tensors[name].type_name, **loss.describe()} for name, loss in losses.items()
        ],
    }


def print_merge(record: Mapping[str, Any]) -> None:
    """The table of types, and the perplexities where they were measured."""
    columns = [
        Column("type", "type"),
        Column("tensors", "tensors"),
        Column("κΘ in steps", "theta_in_steps", ".3f"),
        Column("weights moved", "weights_moved", _share_text),
        Column("κΘ kept", "theta_kept", _share_text),
        Column("rounding / κΘ", "error_over_theta", ".3f"),
    ]
    caption = f"\nκΘ (gamma {record['gamma']:g}) in the weights, re-quantised:"
    show(Table("merge losses", columns, record["types"], caption, {"gamma": record["gamma"]}))
    measured = record["perplexity"]
    if measured is None:
        say("\ndry run: nothing was written, so that perplexity was not measured")
        return
    arms = [("without Θ", "base"), ("with Θ", "theta"), ("merged", "merged")]
    where = f"{counted(measured['chunks'], 'chunk')} of {counted(measured['context'], 'token')}"
    rows = [{"arm": label, **measured[arm]} for label, arm in arms]
    conditions = {key: measured[key] for key in ("text", "chunks", "context")}
    show(
        Table("merged", [Column("", "arm"), PERPLEXITY, CHANGE], rows, f"\non {measured['text']}: {where}", conditions)
    )
    say(f"\nmerged against with Θ: {_percent(measured['merged_against_theta'])}")
    if measured["gain_kept"] is None:
        say("Θ makes this model no better on this text beyond two standard errors, so there is no gain to keep.")
    else:
        say(gain_text(measured["gain_kept"], measured["gain_kept_stderr"], record["all"]["theta_kept"]))
    say(f"wrote {record['output']} ({record['bytes']:,} bytes)")


def gain_text(share: float, stderr: float, theta_kept: float | None) -> str:
    """The share of the gain, and a word where it is far from the share of κΘ in the weights.

    theta_kept: of κΘ over all tensors; None for a Θ that is zero
    """
    text = f"merging keeps {100 * share:.0f} % ± {100 * stderr:.0f} of Θ's gain (of ln perplexity)"
    if theta_kept is None or abs(share - theta_kept) <= max(2 * stderr, 0.1):
        return f"{text}."
    return (
        f"{text}, though the weights keep {100 * theta_kept:.0f} % of κΘ. Both are measured: κΘ counts every weight's "
        "change alike, the gain what the changes do to this text, those of rounding among them. On another text the "
        "gain may be another."
    )


def _share_text(share: float) -> str:
    return f"{100 * share:.1f} %"


def _percent(figures: Mapping[str, float]) -> str:
    return change_text(figures["change_percent"], figures["change_percent_stderr"])


def _merged_parts(
    model: ModelFile, thetas: Mapping[str, Theta], kappa: float, losses: dict[str, MergeLoss]
) -> Iterator[Part]:
    """The base's parts with adapted tensors replaced, one at a time as they are asked for; fills `losses`."""
    base = model.require_base()

    def merged(info: TensorInfo) -> np.ndarray:
        try:
            weight = read_weight(base.file, info.name)
            own = kappa / scale_beside(base.file, info.name)  # which multiplies the merged weight, too
            packed, losses[info.name] = merge_weight(weight, thetas[info.name], own, info.type)
        except ThetaError as error:
            raise ThetaError(f"{model.path}: {info.name}: {error}") from None
        base.file.release(info.name)
        return packed

    return replaced_parts(model.base_parts(), base.file, thetas, merged)


def _sum_of_squares(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
