"""Logits and accuracy of a model on uint8 pictures: batches, mixed precision, test-time augmentation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

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


def _chunks(images: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(images), _BATCH):
        yield images[start : start + _BATCH]
