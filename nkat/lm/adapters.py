"""LoRA adapters opened for a model, whatever wrote them: a folder of PEFT's, or a GGUF of llama.cpp's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.gguf.writer import FileRange, sha256_of_parts
from nkat.lm.config import ModelConfig
from nkat.lm.peft import WEIGHTS, read_peft
from nkat.theta.lora import check_lora, read_lora
from nkat.theta.lowrank import LowRank, sum_of
from nkat.theta.modelfile import ModelFile, architecture_of
from nkat.theta.set import LoraSet


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter. kind: "peft" or "gguf";  sha256: of the file with its weights;  terms: at scale 1, by weight name"""

    path: Path
    kind: str
    sha256: str
    terms: dict[str, LowRank]

    def record(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "kind": self.kind,
            "sha256": self.sha256,
            "rank": max(term.rank for term in self.terms.values()),
            "layers": len(self.terms),
        }


def open_adapter(path: Path, model: ModelFile) -> Adapter:
    """Reads an adapter, a `.safetensors` or its folder for PEFT's, and checks that it fits the model.

    Raises NKATError for one that is damaged, made for another model, or more than low-rank terms of linear layers.
    """
    base = model.require_base()
    if path.is_dir() or path.suffix == ".safetensors":
        weights = path / WEIGHTS if path.is_dir() else path
        kind, terms = "peft", read_peft(path, ModelConfig.from_gguf(base.file.metadata, base.tensors))
    else:
        weights = path
        kind, terms = "gguf", read_lora(path, architecture_of(base.file))
    check_lora(terms, base.tensors, path)
    return Adapter(path, kind, sha256_of_parts([FileRange(weights, 0, weights.stat().st_size)]), terms)


def lora_set(adapters: Sequence[tuple[Adapter, float]]) -> LoraSet:
    """All of them together, each at its scale. Raises NKATError where they do nothing at all."""
    by_name: dict[str, list[LowRank]] = {}
    for adapter, scale in adapters:
        for name, term in adapter.terms.items():
            by_name.setdefault(name, []).append(LowRank(term.up * scale, term.down))
    records = tuple({**adapter.record(), "scale": scale} for adapter, scale in adapters)
    found = LoraSet.of({name: sum_of(terms) for name, terms in by_name.items()}, records)
    if all(term.is_zero() for term in found.layers.values()):
        names = ", ".join(str(adapter.path) for adapter, _ in adapters)
        raise NKATError(
            f"{names}: has no effect: one factor of every layer is zero, as in a LoRA that was never trained"
        )
    return found
