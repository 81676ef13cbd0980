"""Checkpoints: `last.pt` continues a run bit by bit, `best.pt` is the model to use.

Both are dictionaries of tensors, numbers, strings and lists (`nkat.host.tensors`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nkat.errors import NKATError
from nkat.host.tensors import load_tensors, save_tensors
from nkat_vit.model import NKATViT
from nkat_vit.recipe import Recipe, make_recipe

FORMAT = 1


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A model ready for use, in evaluation mode, and what is known about it (`best.pt` without the weights)."""

    model: NKATViT
    recipe: Recipe
    facts: dict[str, Any]
    path: Path


def save(path: Path, content: dict[str, Any]) -> None:
    """Replaces `path` in one step."""
    save_tensors(path, content | {"format": FORMAT})


def load(path: Path, kind: str) -> dict[str, Any]:
    """A checkpoint of the kind "run" or "weights", on the CPU. Raises NKATError for anything else."""
    content = load_tensors(path, "a checkpoint")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise NKATError(f"{path}: this is no checkpoint of nkat_vit, version {FORMAT}")
    if content.get("kind") != kind:
        wanted = {"run": "last.pt, which continues a run", "weights": "best.pt, a model to use"}[kind]
        raise NKATError(f"{path}: this checkpoint is of the kind {content.get('kind')!r}; needed is {wanted}")
    return content


def recipe_of(content: dict[str, Any], path: Path) -> Recipe:
    """The recipe in a checkpoint. Raises NKATError where there is none."""
    values = content.get("recipe")
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise NKATError(f"{path}: this checkpoint is damaged: it has no recipe")
    return make_recipe(values)


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """While parts of a checkpoint are put in place: what is missing, or of another form, is one line."""
    try:
        yield
    except NKATError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise NKATError(f"{path}: this checkpoint is damaged: {type(error).__name__} {line}"[:300]) from None


def load_model(path: str | Path, device: torch.device | None = None) -> TrainedModel:
    """The model of a `best.pt`, or of a run's folder, on the processor unless a device is given.

    Raises NKATError for a file that is absent, cut, damaged, or no such checkpoint.
    """
    path = Path(path)
    path = path / "best.pt" if path.is_dir() else path
    content = load(path, "weights")
    recipe = recipe_of(content, path)
    model = NKATViT(recipe.model)
    with damage(path):
        model.load_state_dict(content["weights"])
    facts = {name: value for name, value in content.items() if name not in ("weights", "recipe")}
    return TrainedModel(model.to(device).eval(), recipe, facts, path)
