"""What a conversion made: the layers for its record, and the summary for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nkat.host.console import format_table
from nkat.theta.modelfile import ModelFile
from nkat.theta.set import ThetaSet


def describe_layers(model: ModelFile, theta_set: ThetaSet) -> list[dict[str, Any]]:
    """One entry a weight with Θ: its name, shape and type, Θ's rank and bytes."""
    return [
        {
            "name": name,
            "shape": model.base.tensors[name].shape,
            "type": model.base.tensors[name].type_name,
            "rank": theta.rank,
            "bytes": theta.nbytes,
        }
        for name, theta in theta_set.thetas.items()
    ]


def print_summary(record: Mapping[str, Any]) -> None:
    """The converter's record as a table by kind of layer, and what was written."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for layer in record["layers"]:
        groups.setdefault(layer["name"].removesuffix(".weight").rpartition(".")[2], []).append(layer)
    rows = [
        [
            kind,
            str(len(layers)),
            "x".join(str(n) for n in layers[0]["shape"]),
            layers[0]["type"],
            str(layers[0]["rank"]),
            f"{sum(layer['bytes'] for layer in layers):,}",
        ]
        for kind, layers in groups.items()
    ]
    rows.append(["all", str(len(record["layers"])), "", "", "", f"{record['theta_bytes']:,}"])
    print()
    print(format_table(rows, ["layer", "count", "shape", "type", "rank", "Θ bytes"]))
    if record["output"]:
        print(
            f"\nadded {record['bytes_added']:,} bytes ({record['bytes_added_percent']:.2f} % of the base) "
            f"in {sum(record['seconds'].values()):.1f} s"
        )
    if record["dry_run"]:
        print("dry run: nothing was written")
        return
    if record["output"]:
        print(f"wrote {record['output']} ({record['output_bytes']:,} bytes)")
    if record["lora"]:
        print(f"wrote {record['lora']} ({record['lora_bytes']:,} bytes)")
