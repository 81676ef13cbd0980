"""The report of a comparison, as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nkat.host.page import Page, machine_facts
from nkat.host.tables import Table

_FILES = {
    "model": ("model", "model_sha256"),
    "base model": ("base_name", "base_sha256"),
    "text": ("text", "text_sha256"),
}
_HOW = (
    "theta_source", "theta_rank", "theta_gamma", "theta_layers", "theta_bytes", "seq_len", "iterations", "repetitions",
    "chunks", "scored_tokens", "dtype", "activations", "decoder", "device",
)  # fmt: skip


def comparison_page(record: Mapping[str, Any], tables: Sequence[Table], words: Sequence[str], picture: Path) -> Page:
    """record, tables, words: of a comparison;  picture: of it, as PNG"""
    known = {what: keys for what, keys in _FILES.items() if keys[0] in record}  # a LoRA does not name its base
    files = {what: f"{record[name]}, sha256 {record[sha256]}" for what, (name, sha256) in known.items()}
    adapters = record.get("lora", ())
    for number, adapter in enumerate(adapters, 1):
        files[f"LoRA {number}"] = f"{adapter['path']}, scale {adapter['scale']:g}, sha256 {adapter['sha256']}"
    for number, file in enumerate(record["theta_files"], 1):
        files[f"Θ {number}"] = f"{file['file']}, weight {file['weight']:g}, sha256 {file['sha256']}"
    if not (adapters or record["theta_files"]):
        files["Θ"] = "in the model file"
    how = [name for name in _HOW if not (adapters and name == "theta_gamma")]  # they have scales, and no γ
    return Page(
        title=f"{Path(record['model']).name} without and with {'LoRA' if adapters else 'Θ'}",
        summary=words,
        tables=tables,
        pictures={"Both arms as bars from zero, and beside them the paired differences with their intervals": picture},
        commands={"This report, measured anew:": record["command"]},
        facts={
            "What was measured": files,
            "How": {name.replace("_", " "): record[name] for name in how if record.get(name) is not None},
            "Machine and versions": machine_facts(record),
        },
    )
