"""What a model says of pictures: python -m nkat_vit.predict PICTURE… --checkpoint RUN

    python -m nkat_vit.predict cat.jpg photos/ --checkpoint output/vit/cifar10-fast-seed0

Files of any size and mode, and all pictures in folders, brought to the model's own form (`nkat_vit.picture_files`); the
most probable classes of each, by the softmax of the logits. A picture that cannot be read is one line, the others are
answered all the same, and the exit status is 2. `predict_logits` does the same for tensors.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("nkat_vit.predict")

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nkat.errors import NKATError
from nkat.host import commandline
from nkat.host.console import bar, counted, note
from nkat.host.hardware import describe, pick_device, set_threads
from nkat.host.record import check_record, recorded, toolkit_version
from nkat.host.tables import Column, Table, show
from nkat.host.tools import suggest
from nkat_vit.answer_options import add_answer_options
from nkat_vit.checkpoint import TrainedModel, load_model
from nkat_vit.data import ImageSet
from nkat_vit.picture_files import ReadPicture, find_pictures, has_bright_edge, read_picture
from nkat_vit.recipe import class_names

_BATCH = 500


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager[None]:
    """bfloat16 autocast for amp "bf16", nothing for "off"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


@torch.no_grad()
def predict_logits(model: nn.Module, images: Tensor, tta: str = "none", amp: str = "off") -> Tensor:
    """Logits float32 [n, classes] of pictures uint8 [n, c, h, w] on the model's device.

    tta: what is averaged, see `TrainConfig`. The model must be in evaluation mode.
    """
    parts = []
    for chunk in _chunks(images):
        with autocast(images.device, amp):
            logits = [share * model(view)[0].float() for view, share in _views(chunk.float() / 255, tta)]
        parts.append(torch.stack(logits).sum(dim=0))
    return torch.cat(parts)


def _views(pictures: Tensor, tta: str) -> list[tuple[Tensor, float]]:
    """What is averaged of pictures [n, c, h, w], and with which share."""
    views = [(pictures, 1.0)]
    if "shift" in tta:
        height, width = pictures.shape[2:]
        padded = F.pad(pictures, (1, 1, 1, 1), mode="reflect")
        views = [(pictures, 0.5), (padded[:, :, :height, :width], 0.25), (padded[:, :, 2:, 2:], 0.25)]
    if "flip" in tta:
        views = [(side, share / 2) for view, share in views for side in (view, view.flip(-1))]
    return views


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


def answers(trained: TrainedModel, images: Tensor, top: int) -> list[list[dict[str, Any]]]:
    """The `top` most probable classes of each picture uint8 [n, c, h, w], as JSON has them, the first one first.

    With the recipe's test-time augmentation and precision, as the test set is judged.
    """
    config, names = trained.recipe.train, class_names(trained.recipe)
    shares = predict_logits(trained.model, images, config.tta, config.amp).softmax(dim=1).cpu()
    best = shares.topk(min(top, len(names)), dim=1)
    return [
        [{"class": names[index], "index": index, "probability": share} for index, share in zip(*row, strict=True)]
        for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def read_all(paths: Sequence[Path], trained: TrainedModel, invert: bool) -> tuple[list[ReadPicture], dict[Path, str]]:
    """The pictures that can be read, brought to the model's form, and what is wrong with each of the others."""
    config = trained.recipe.model
    read, failed = [], {}
    with bar(len(paths), "reading", "picture") as progress:
        for path in paths:
            try:
                read.append(read_picture(path, config.channels, config.image_size, invert))
            except NKATError as error:
                failed[path] = str(error)
            progress.update()
    return read, failed


def answers_table(rows: Sequence[dict[str, Any]], conditions: dict[str, Any]) -> Table:
    """A line a picture, the classes side by side. rows: of the record"""
    most = len(rows[0]["answers"])
    flat = []
    for row in rows:
        line = {"picture": row["picture"]}
        for i, answer in enumerate(row["answers"], start=1):
            line |= {f"class_{i}": answer["class"], f"probability_{i}": answer["probability"]}
        flat.append(line)
    columns = [Column("picture", "picture")]
    for i in range(1, most + 1):
        title, keys = ("answer" if i == 1 else str(i)), (f"class_{i}", f"probability_{i}")
        columns.append(Column(title, keys, lambda name, share: f"{name} {100 * share:.1f} %"))
    return Table("predictions", columns, flat, conditions=conditions)


def main() -> None:
    parser = commandline.parser(
        "What a trained model says of pictures: the most probable classes of each.",
        "  python -m nkat_vit.predict cat.jpg dog.png --checkpoint output/vit/cifar10-fast-seed0\n"
        "  python -m nkat_vit.predict scans --checkpoint output/vit/mnist --invert --top 3 --json answers.json",
    )
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE", help="files, or folders of them")
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pt, or the run's folder")
    parser.add_argument("--top", type=commandline.positive_int, default=5, metavar="K", help="classes a picture (5)")
    parser.add_argument(
        "--invert", action="store_true", help="dark on bright, as on paper, for a model of bright on dark, as MNIST is"
    )
    add_answer_options(parser)
    options = parser.parse_args()
    check_record(options.json, options.force, [*options.pictures, options.checkpoint])
    set_threads(options.threads)
    device = pick_device(not options.no_cuda)
    trained = load_model(options.checkpoint, device)
    paths, empty = find_pictures(options.pictures)
    read, unreadable = read_all(paths, trained, options.invert)
    failed = empty | unreadable
    for problem in failed.values():
        note(f"error: {problem}", always=True)
    found = answers(trained, torch.stack([one.pixels for one in read]).to(device), options.top) if read else []
    about = {"checkpoint": str(trained.path), "dataset": trained.recipe.dataset, "tta": trained.recipe.train.tta}
    record = {
        **about,
        "inverted": options.invert,
        "pictures": [
            {"picture": str(one.path), "size": list(one.size), "mode": one.mode, "answers": row}
            for one, row in zip(read, found, strict=True)
        ],
        "failed": [{"picture": str(path), "error": problem} for path, problem in failed.items()],
        "machine": describe(device),
        **toolkit_version(),
    }
    with recorded(record, options.json, options.force):
        if read:
            show(answers_table(record["pictures"], about))
    bright = sum(has_bright_edge(one.pixels) for one in read)
    if bright and trained.recipe.model.channels == 1 and trained.recipe.model.mean[0] < 0.5:
        note(
            f"{counted(bright, 'picture')} with a bright edge, and what this model has learned is bright on dark: "
            f"{'without' if options.invert else 'with'} --invert they are turned over"
        )
    if failed:
        sys.exit(commandline.USER_ERROR)
    suggest("vit interpret", "--checkpoint", options.checkpoint)
