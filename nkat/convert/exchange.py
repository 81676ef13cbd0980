"""What goes from and to other programs: importance matrices of llama.cpp's, PEFT's adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nkat.convert.inputs import Inputs
from nkat.convert.options import ConvertOptions
from nkat.gguf.imatrix import OLD_SUFFIX, imatrix_parts
from nkat.gguf.writer import FileRange, MetadataValue, part_size, sha256_of_parts, write_gguf
from nkat.host.console import counted, remark, say
from nkat.host.files import check_output
from nkat.lm.peft import CONFIG, WEIGHTS, check_safetensors, peft_files, write_files
from nkat.measure.texts import load_text
from nkat.sources.importance import gather_imatrix, moments_from_file
from nkat.theta.modelfile import ModelFile
from nkat.theta.set import ThetaSet

IMATRIX_KEY = "nkat.imatrix.sha256"


def save_imatrix(options: ConvertOptions, inputs: Inputs) -> dict[str, Any]:
    """Gathers an importance matrix of the input on --calibrate and writes it; returns its record."""
    assert options.save_imatrix is not None
    path, text = options.save_imatrix, load_text(options.calibrate)
    check_output(path, options.force, options.inputs_there)
    matrix = gather_imatrix(inputs.loaded, text, options.imatrix_chunks)
    parts = imatrix_parts(matrix, old=path.suffix == OLD_SUFFIX)
    if not options.dry_run:
        write_gguf(path, parts, options.force, options.inputs_there)
    silent = {name: int((entry.counts == 0).sum()) for name, entry in matrix.entries.items() if not entry.counts.all()}
    return {
        "output": str(path),
        "form": "dat" if path.suffix == OLD_SUFFIX else "gguf",
        "bytes": sum(part_size(part) for part in parts),
        "text": text.name,
        "text_sha256": text.sha256,
        "chunks": matrix.chunks,
        "context": matrix.chunk_size,
        "entries": len(matrix.entries),
        "experts_without_rows": silent,
        "dry_run": options.dry_run,
    }


def print_imatrix(record: Mapping[str, Any]) -> None:
    """What was gathered, and where it is."""
    size = f"{counted(record['chunks'], 'chunk')} of {record['context']} tokens of {record['text']}"
    say(f"imatrix {counted(record['entries'], 'weight')}, {size}")
    if record["experts_without_rows"]:
        count = sum(record["experts_without_rows"].values())
        say(f"        no token went to {counted(count, 'expert')}: a longer text would reach more of them")
    remark(f"{'would write' if record['dry_run'] else 'wrote'} {record['output']} ({record['bytes']:,} bytes)")


def moments_of_file(
    path: Path, model: ModelFile, names: Sequence[str]
) -> tuple[dict[str, torch.Tensor], dict[str, MetadataValue]]:
    """E[x_j²] [n] of the named weights' inputs out of an importance matrix; and what a Θ file records."""
    moments, _ = moments_from_file(path, model.require_base().tensors, names)
    return moments, {IMATRIX_KEY: sha256_of_parts([FileRange(path, 0, path.stat().st_size)])}


def check_peft(options: ConvertOptions) -> None:
    """What can be known of a PEFT folder before time is spent."""
    if options.export_peft is None:
        return
    check_safetensors()
    for name in (CONFIG, WEIGHTS):
        if options.export_peft.exists():
            check_output(options.export_peft / name, options.force, options.inputs_there)


def write_peft(options: ConvertOptions, model: ModelFile, theta_set: ThetaSet, gamma: float) -> int:
    """Writes κ(γ)Θ as a PEFT adapter, unless it is a dry run; returns the bytes of its files."""
    assert options.export_peft is not None
    files = peft_files(theta_set, gamma, model)
    if not options.dry_run:
        write_files(options.export_peft, files, options.force)
    return sum(len(data) for data in files.values())
