"""How a model does on a set, class by class: confusion matrix, accuracy of each class, top-5 accuracy, throughput.

The test set is touched once: what is found on it is kept in the model's checkpoint, and is enough to show all of this
again without the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from nkat_vit.checkpoint import TrainedModel, damaged
from nkat_vit.checkpoint import save as save_checkpoint
from nkat_vit.data import ImageSet, load_images
from nkat_vit.predict import predict_logits

TOP = 5  # with no more classes than that, all of them are right


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a model said of the pictures of a set.

    confusion: [classes, classes], int64: how many pictures of the row's class were taken for the column's
    top5: share of pictures whose class has one of the five largest logits; None with five classes or fewer
    images_per_second: of judging, from bytes to logits, test-time augmentation included; None: not measured
    """

    confusion: Tensor
    top5: float | None
    images_per_second: float | None

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return int(self.confusion.trace()) / int(self.confusion.sum())

    def facts(self) -> dict[str, Any]:
        """As a checkpoint keeps it: numbers and lists."""
        return {
            "test": self.accuracy,
            "test_images": int(self.confusion.sum()),
            "test_confusion": self.confusion.tolist(),
            "test_top5": self.top5,
            "test_images_per_second": self.images_per_second,
        }


def confusion_matrix(labels: Tensor, guesses: Tensor, classes: int) -> Tensor:
    """Counts int64 [classes, classes] of labels [n] (rows) and guesses [n] (columns), on the processor."""
    pairs = (labels * classes + guesses).cpu()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_accuracies(confusion: Tensor) -> list[float | None]:
    """Share of each class's pictures that are taken for it (its recall); None for a class without pictures."""
    return [int(row[i]) / int(row.sum()) if row.sum() else None for i, row in enumerate(confusion)]


def most_taken_for(confusion: Tensor, label: int) -> tuple[int, float] | None:
    """The class for which a class's pictures are wrongly taken most often, and what share of them; None: none is."""
    row = confusion[label].clone()
    total, row[label] = int(row.sum()), 0
    other = int(row.argmax())
    return (other, int(row[other]) / total) if row[other] else None


def top_share(logits: Tensor, labels: Tensor, count: int = TOP) -> float:
    """Share of pictures of which fewer than `count` classes have a larger logit than their own. logits: [n, classes]"""
    own = logits.gather(1, labels[:, None])
    return float(((logits > own).sum(dim=1) < count).double().mean())


def judge(model: nn.Module, images: ImageSet, tta: str = "none", amp: str = "off") -> Judgement:
    """What the model says of a set on its device. The model must be in evaluation mode."""
    started = perf_counter()
    logits = predict_logits(model, images.images, tta, amp)
    guesses = logits.argmax(dim=1).cpu()  # waits for a GPU
    seconds = perf_counter() - started
    classes = logits.shape[1]
    top5 = top_share(logits, images.labels) if classes > TOP else None
    return Judgement(confusion_matrix(images.labels.cpu(), guesses, classes), top5, len(images) / seconds)


def judged_facts(trained: TrainedModel, data_root: Path, device: torch.device, again: bool = False) -> dict[str, Any]:
    """The model's facts with what `Judgement.facts` says of the test set, and "test_sha256": those of its `best.pt`, or
    measured now. again: also where they are there
    """
    if "test" in trained.facts and not again:
        return trained.facts
    config = trained.recipe.train
    test = load_images(trained.recipe.dataset, data_root, train=False).to(device)
    result = judge(trained.model, test, config.tta, config.amp)
    return trained.facts | result.facts() | {"test_sha256": test.sha256}


def judge_once(trained: TrainedModel, data_root: Path, device: torch.device) -> TrainedModel:
    """The model with its `judged_facts`, which its `best.pt` keeps from now on."""
    if "test" in trained.facts:
        return trained
    facts = judged_facts(trained, data_root, device)
    content = {"recipe": trained.recipe.values(), "weights": trained.model.state_dict()}
    save_checkpoint(trained.path, facts | content)
    return replace(trained, facts=facts)


def kept_judgement(trained: TrainedModel) -> Judgement | None:
    """What a checkpoint says of the test set, or None where it was measured before all of that was kept.

    Raises NKATError for a checkpoint whose figures are none, or contradict each other.
    """
    facts, classes = trained.facts, trained.recipe.model.classes
    if "test_confusion" not in facts:
        return None
    rows, top5, speed = (facts.get(f"test_{name}") for name in ("confusion", "top5", "images_per_second"))
    if not (_is_confusion(rows, classes) and _is_number(top5, 1.0) and _is_number(speed, math.inf)):
        raise damaged(trained.path, "the test set's figures")
    kept = Judgement(torch.tensor(rows), top5, speed)
    if facts.get("test") != kept.accuracy or facts.get("test_images") != int(kept.confusion.sum()):
        raise damaged(trained.path, "the test set's figures")
    return kept


def describe_classes(confusion: Tensor, names: Sequence[str]) -> str:
    """The worst and the best class in words: `worst cat, 31.2 % right (20.1 % taken for dog); best truck, 88.0 %`."""
    found = [(share, label) for label, share in enumerate(class_accuracies(confusion)) if share is not None]
    (low, worst), (high, best) = min(found), max(found)
    taken = most_taken_for(confusion, worst)
    other = f" ({100 * taken[1]:.1f} % taken for {names[taken[0]]})" if taken else ""
    return f"worst {names[worst]}, {100 * low:.1f} % right{other}; best {names[best]}, {100 * high:.1f} %"


def _is_confusion(rows: object, classes: int) -> bool:
    return (
        isinstance(rows, list)
        and len(rows) == classes
        and all(isinstance(row, list) and len(row) == classes for row in rows)
        and all(type(count) is int and 0 <= count < 1 << 32 for row in rows for count in row)
        and any(count for row in rows for count in row)
    )


def _is_number(value: object, largest: float) -> bool:
    """Whether it is None or a number from 0 up to a largest."""
    return value is None or (isinstance(value, float) and 0 <= value <= largest and math.isfinite(value))
