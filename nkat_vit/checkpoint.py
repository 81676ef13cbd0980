"""Checkpoints: `last.pt` continues a run bit by bit, `best.pt` is the model to use.

Both are dictionaries of tensors, numbers, strings and lists (`nkat.host.tensors`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from nkat.errors import NKATError
from nkat.host.tensors import load_tensors, save_tensors
from nkat_vit.data import ImageSet, has_own_test, load_images
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
    version = content.get("format") if isinstance(content, dict) else None
    if not isinstance(version, int) or version != FORMAT:  # a tensor cannot be compared
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


def check_like(found: object, wanted: object, path: Path, part: str) -> None:
    """Raises NKATError unless a part of a checkpoint has the form of what this run would write there.

    That is the same keys, lengths, kinds of values, shapes and dtypes, all the way down, and no number that is none.
    """
    if not _is_like(found, wanted):
        raise damaged(path, part)


def damaged(path: Path, part: str) -> NKATError:
    """For a checkpoint whose part is missing or not of its form."""
    return NKATError(f"{path}: this checkpoint is damaged ({part})")


def _is_like(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict)
            and found.keys() == wanted.keys()
            and all(_is_like(found[key], value) for key, value in wanted.items())
        )
    if isinstance(wanted, list | tuple):
        return (
            type(found) is type(wanted)
            and len(found) == len(wanted)
            and all(_is_like(one, other) for one, other in zip(found, wanted, strict=True))
        )
    if isinstance(wanted, torch.Tensor):
        return (
            isinstance(found, torch.Tensor)
            and found.dtype == wanted.dtype
            and found.shape == wanted.shape
            and bool(found.isfinite().all())
        )
    return type(found) is type(wanted) and (not isinstance(found, float) or math.isfinite(found))


def load_model(path: str | Path, device: torch.device | None = None) -> TrainedModel:
    """The model of a `best.pt`, or of a run's folder, on the processor unless a device is given.

    Raises NKATError for a file that is absent, cut, damaged, or no such checkpoint.
    """
    path = Path(path)
    path = path / "best.pt" if path.is_dir() else path
    content = load(path, "weights")
    recipe = recipe_of(content, path)
    model = NKATViT(recipe.model)
    weights = content.get("weights")
    check_like(weights, model.state_dict(), path, "weights")
    model.load_state_dict(cast(dict[str, Any], weights))
    facts = {name: value for name, value in content.items() if name not in ("weights", "recipe")}
    return TrainedModel(model.to(device).eval(), recipe, facts, path)


def load_set(trained: TrainedModel, data_root: Path, train: bool) -> ImageSet:
    """The whole training or test set of a model.

    Raises NKATError where it is absent or damaged, and where the pictures of a folder are others than at training, so
    that it cannot be told which of them the model has not seen.
    """
    recipe = trained.recipe
    images = load_images(recipe.dataset, data_root, train, recipe.spec)
    if not train and has_own_test(recipe.dataset, data_root):
        return images
    learned = images if train else load_images(recipe.dataset, data_root, True, recipe.spec)
    if learned.sha256 != trained.facts.get("data_sha256", learned.sha256):
        raise NKATError(
            f"{trained.path}: {recipe.dataset} has other pictures than when this model was trained: which ones it has "
            "not seen cannot be told"
        )
    return images
