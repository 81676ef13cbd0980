"""What a figure needs so that others can repeat it: model, Θ, text, setting, machine and versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nkat.engine.decoder import Decoder
from nkat.gguf.writer import FileRange, Part, part_size, sha256_of_parts
from nkat.host import hardware
from nkat.host.commandline import own_command
from nkat.host.console import bar
from nkat.host.record import toolkit_version
from nkat.lm.load import LoadedModel
from nkat.measure.texts import Text
from nkat.theta.combine import WeightedFile
from nkat.theta.modelfile import ModelFile
from nkat.theta.set import LoraSet, TermSet

PACKAGES = ("torch", "numpy", "llvmlite", "triton", "gguf", "tokenizers")


def provenance(
    model: Path,
    loaded: LoadedModel,
    *,
    theta: TermSet | None = None,
    theta_files: Sequence[WeightedFile] = (),
    text: Text | None = None,
    decoder: Decoder | None = None,
) -> dict[str, Any]:
    """For a JSON record. The model's hash is not here: `file_hash` reads all of it.

    theta_files: with Θ, in place of the model's own; the record's `theta_file` is whichever file it came from, the
        first of several, and `theta_files` has each with its weight
    """
    device = loaded.model.device
    machine = hardware.describe(device)
    record: dict[str, Any] = {
        "model": str(model),
        "command": own_command(),
        "theta_file": None if theta is None else str(theta_files[0].path if theta_files else model),
        "theta_files": [{"file": str(file.path), "weight": file.weight} for file in theta_files],
        "theta_enabled": theta is not None,
        "device": str(device),
        "threads": machine["threads"],
        "dtype": str(loaded.model.output.dtype).removeprefix("torch."),
        "activations": "int8" if loaded.model.output.int8_activations else "float",
        "machine": machine,
        "versions": {name: _installed(name) for name in PACKAGES},
        **toolkit_version(),
    }
    if text is not None:
        record |= {"text": text.name, "text_sha256": text.sha256}
    if theta is not None:
        record |= {
            "theta_rank": theta.rank,
            "theta_gamma": loaded.gamma,
            "theta_source": theta.source,
            "theta_layers": len(theta.layers),
            "theta_bytes": theta.nbytes,
        }
    if isinstance(theta, LoraSet):
        record |= {"theta_file": None, "lora": list(theta.adapters)}
    elif theta is not None:
        record |= {"base_name": theta.base_name, "base_sha256": theta.base_sha256}
    if decoder is not None:
        record |= {"decoder": decoder.name, "kv_cache_bytes": decoder.cache_nbytes}
    return record


_CONDITIONS = (
    "model", "model_sha256", "theta_file", "theta_source", "theta_rank", "theta_gamma", "theta_bytes",
    "base_sha256",
    "text", "text_sha256", "task_file", "task_sha256",
    "chunks", "context", "scored_tokens", "seq_len", "iterations", "repetitions",
    "device", "threads", "dtype", "activations", "decoder", "nkat_version", "git_commit",
)  # fmt: skip


def conditions_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record holds of all its figures, for the rows of a table that programs read."""
    found = {name: record[name] for name in _CONDITIONS if name in record}
    if adapters := record.get("lora"):  # they have scales, and no γ
        found |= {"theta_file": None, "theta_gamma": None}
        found["lora"] = _weighted((one["path"], one["scale"]) for one in adapters)
    elif files := record.get("theta_files"):
        found["theta_file"] = _weighted((one["file"], one["weight"]) for one in files)
    return {**found, "device_name": record["machine"]["device_name"]}


def _weighted(files: Iterable[tuple[str, float]]) -> str:
    """Files with their weights as the command line takes them, all in one cell."""
    return " + ".join(file if weight == 1 else f"{file}:{weight:g}" for file, weight in files)


def file_hash(model: ModelFile | Path) -> str:
    """SHA-256 of a file, in hexadecimal, with a progress bar; of a model in several files that of their whole."""
    path = model if isinstance(model, Path) else model.path
    parts: list[Part] = [FileRange(path, 0, path.stat().st_size)]
    if isinstance(model, ModelFile) and model.layout == "plain" and model.is_split:
        parts = model.base_parts()
    with bar(sum(part_size(part) for part in parts), "hashing the model", "B") as progress:
        return sha256_of_parts(parts, progress.update)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
