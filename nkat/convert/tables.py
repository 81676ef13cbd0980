"""What a conversion made, layer by layer, and what source `residual` achieved: records, and tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nkat.host.console import remark, say
from nkat.host.tables import Column, Table, show
from nkat.measure.columns import KL, SAME_TOP
from nkat.measure.divergence import divergence_row
from nkat.measure.perplexity import change_text
from nkat.sources.fit.choice import print_choice
from nkat.sources.lora import missed_table
from nkat.sources.residual import ErrorsLeft
from nkat.theta.modelfile import ModelFile
from nkat.theta.set import ThetaSet


def describe_layers(model: ModelFile, theta_set: ThetaSet) -> list[dict[str, Any]]:
    """One entry a weight with Θ: its name, shape and type, Θ's rank and bytes."""
    tensors = model.require_base().tensors
    return [
        {
            "name": name,
            "shape": tensors[name].shape,
            "type": tensors[name].type_name,
            "rank": theta.rank,
            "bytes": theta.nbytes,
        }
        for name, theta in theta_set.layers.items()
    ]


def print_summary(record: Mapping[str, Any]) -> None:
    """The converter's record as a table by kind of layer, and what was written."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for layer in record["layers"]:
        groups.setdefault(layer["name"].removesuffix(".weight").rpartition(".")[2], []).append(layer)
    rows = [
        {
            "layer": kind,
            "count": len(layers),
            "shape": layers[0]["shape"],
            "type": layers[0]["type"],
            "rank": layers[0]["rank"],
            "theta_bytes": sum(layer["bytes"] for layer in layers),
        }
        for kind, layers in groups.items()
    ]
    rows.append({"layer": "all", "count": len(record["layers"]), "theta_bytes": record["theta_bytes"]})
    columns = [
        Column("layer", "layer"),
        Column("count", "count"),
        Column("shape", "shape", lambda shape: "x".join(str(n) for n in shape)),
        Column("type", "type"),
        Column("rank", "rank"),
        Column("Θ bytes", "theta_bytes", ","),
    ]
    say()
    show(Table("layers", columns, rows))
    if record["output"]:
        say(
            f"\nadded {record['bytes_added']:,} bytes ({record['bytes_added_percent']:.2f} % of the base) "
            f"in {sum(record['seconds'].values()):.1f} s"
        )
    if record["dry_run"]:
        say("dry run: nothing was written")
        return
    if record["output"]:
        remark(f"wrote {record['output']} ({record['output_bytes']:,} bytes)")
    if record["lora"]:
        remark(f"wrote {record['lora']} ({record['lora_bytes']:,} bytes)")
    if record["peft"]:
        remark(f"wrote {record['peft']} ({record['peft_bytes']:,} bytes)")


def print_fit(record: Mapping[str, Any]) -> None:
    """What a fit gained where it did not learn."""
    if "errors" in record.get("start_from", {}):
        show(missed_table(record["start_from"]["errors"]))
    if record["choice"] is not None:
        chosen_from = "\nrank, gamma and step were chosen from (first looked at on some chunks, then judged on all):"
        print_choice(record["choice"], chosen_from)
        say()
    change = change_text(record["heldout_change_percent"], record["heldout_change_percent_stderr"])
    kept = f"of step {record['kept_step']} of {record['steps']}"
    say(f"fit: the Θ {kept} changes perplexity by {change} on the part of the text that was kept back")
    if divergence := record["heldout_divergence"]:
        row = divergence_row(divergence)
        kl, same = KL.cell(row), SAME_TOP.cell(row)
        say(f"     KL divergence from the model without Θ {kl}; the same token is likeliest for {same} % of the text")
    if not record["finished"]:
        say("the fit was interrupted: this is the best Θ so far, and the same command with --resume goes on")


def describe_errors(errors: Mapping[str, ErrorsLeft], moments: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
    """The record: for each kind of layer and for all, the share of the outputs' squared error that is left.

    moments: those of the layers' inputs that were used, if any. Errors are added up over layers before they are
    divided, so that a share is that of the error in the model and not of the average layer.
    """
    kinds: dict[str, list[ErrorsLeft]] = {}
    for name, error in errors.items():
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(error)
    return {
        "moments": _known(moments),
        "kinds": [{"kind": kind, **_shares(found)} for kind, found in kinds.items()],
        "all": _shares(list(errors.values())),
    }


def print_errors(record: Mapping[str, Any]) -> None:
    """The record as a table."""
    columns = [
        Column("layer", "kind"),
        Column("count", "layers"),
        Column("Θ", "theta_left", _percent),
        Column("unrestricted, same bytes", ("unrestricted_left", "unrestricted_rank"), _percent_of_rank),
        Column("Θ, diagonal only", "diagonal_left", _percent),
    ]
    known = {
        "full": "inputs weighted with their full second moments",
        "diagonal": "inputs weighted with the diagonal of their second moments",
        "mixed": "inputs weighted with their second moments, some with the diagonal alone",
        "none": "all inputs weighted alike; --calibrate TEXT weights them as a text does",
    }[record["moments"]]
    caption = f"\nsquared error of the layers' outputs that is left of what the input lost ({known}):"
    rows = [*record["kinds"], {"kind": "all", **record["all"]}]
    show(Table("errors left", columns, rows, caption, {"moments": record["moments"]}))


def _known(moments: Mapping[str, torch.Tensor] | None) -> str:
    if moments is None:
        return "none"
    dimensions = {value.ndim for value in moments.values()}
    return "mixed" if len(dimensions) == 2 else "full" if 2 in dimensions else "diagonal"


def _shares(errors: Sequence[ErrorsLeft]) -> dict[str, Any]:
    lost = sum(error.lost for error in errors)
    diagonal = [error.diagonal for error in errors if error.diagonal is not None]
    return {
        "layers": len(errors),
        "theta_left": _share(sum(error.theta for error in errors), lost),
        "unrestricted_left": _share(sum(error.unrestricted for error in errors), lost),
        "unrestricted_rank": sum(error.unrestricted_rank for error in errors) / len(errors),
        "diagonal_left": _share(sum(diagonal), lost) if len(diagonal) == len(errors) else None,
    }


def _share(left: float, lost: float) -> float | None:
    return left / lost if lost > 0 else None


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _percent_of_rank(share: float, rank: float) -> str:
    return f"{_percent(share)} (rank {rank:g})"
