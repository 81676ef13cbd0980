"""What another program computed, for comparison; tests/golden/README.md says which."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

GOLDEN_FOLDER = Path(__file__).resolve().parent.parent / "golden"


def read_golden(name: str) -> Any:
    """The content of tests/golden/{name}.json."""
    return json.loads((GOLDEN_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def kept(variant: Mapping[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """Those of the vocabulary's logits [..., V] that a variant of tiny_logits.json holds."""
    return logits[..., :: variant.get("every", 1)]
