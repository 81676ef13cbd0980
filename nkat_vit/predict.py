"""Logits and accuracy of a model on uint8 pictures: batches, mixed precision, test-time augmentation.

The test set is touched once: a model's result on it is kept in the model's checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nkat_vit.checkpoint import TrainedModel, load_set
from nkat_vit.checkpoint import save as save_checkpoint
from nkat_vit.data import ImageSet

_BATCH = 500


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager[None]:
    """bfloat16 autocast for amp "bf16", nothing for "off"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


@torch.no_grad()
def predict_logits(model: nn.Module, images: Tensor, tta: str = "none", amp: str = "off") -> Tensor:
    """Logits float32 [n, classes] of pictures uint8 [n, c, h, w] on the model's device.

    tta "flip" averages the logits of each picture and of its mirror image. The model must be in evaluation mode.
    """
    parts = []
    for chunk in _chunks(images):
        pictures = chunk.float() / 255
        with autocast(images.device, amp):
            logits = model(pictures)[0].float()
            if tta == "flip":
                logits = (logits + model(pictures.flip(-1))[0].float()) / 2
        parts.append(logits)
    return torch.cat(parts)


def accuracy(model: nn.Module, images: ImageSet, tta: str = "none", amp: str = "off") -> float:
    """Share of pictures whose largest logit is their label, 0 to 1. Leaves the model in the mode it was in."""
    training = model.training
    model.eval()
    try:
        guess = predict_logits(model, images.images, tta, amp).argmax(dim=1)
    finally:
        model.train(training)
    return float((guess == images.labels).double().mean())


def judged_facts(trained: TrainedModel, data_root: Path, device: torch.device) -> dict[str, Any]:
    """The model's facts with "test", "test_images" and "test_sha256": those of its `best.pt`, or measured now."""
    if "test" in trained.facts:
        return trained.facts
    config = trained.recipe.train
    test = load_set(trained, data_root, train=False).to(device)
    result = accuracy(trained.model, test, config.tta, config.amp)
    return trained.facts | {"test": result, "test_images": len(test), "test_sha256": test.sha256}


def judge_once(trained: TrainedModel, data_root: Path, device: torch.device) -> TrainedModel:
    """The model with its `judged_facts`, which its `best.pt` keeps from now on."""
    if "test" in trained.facts:
        return trained
    facts = judged_facts(trained, data_root, device)
    content = {"recipe": trained.recipe.values(), "weights": trained.model.state_dict()}
    save_checkpoint(trained.path, facts | content)
    return replace(trained, facts=facts)


def _chunks(images: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(images), _BATCH):
        yield images[start : start + _BATCH]
