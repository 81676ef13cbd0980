"""The test set, touched once: a model's result on it is kept in the model's checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from nkat_vit import checkpoint
from nkat_vit.checkpoint import TrainedModel
from nkat_vit.data import load_images
from nkat_vit.predict import accuracy


def judge_once(trained: TrainedModel, data_root: Path, device: torch.device) -> TrainedModel:
    """The model with "test", "test_images" and "test_sha256" among its facts: from its `best.pt`, or measured now."""
    if "test" in trained.facts:
        return trained
    config = trained.recipe.train
    test = load_images(trained.recipe.dataset, data_root, train=False).to(device)
    result = accuracy(trained.model, test, config.tta, config.amp)
    facts = trained.facts | {"test": result, "test_images": len(test), "test_sha256": test.sha256}
    content = {"recipe": trained.recipe.values(), "weights": trained.model.state_dict()}
    checkpoint.save(trained.path, facts | content)
    return replace(trained, facts=facts)
