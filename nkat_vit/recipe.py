"""What a training run is: one flat set of named values, from a preset, a file and the command line, in that order.

The names are the command line's; `Recipe` holds them checked. A run writes them to `config.json`, which `--config`
reads again. Values that only make sense in colour (and mirroring, which letters do not survive) follow the data set
unless they are given. What is known of a folder of pictures was measured before the run, and is among its values, so
that a checkpoint needs no folder.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.host.record import parse_json
from nkat_vit.augment import AugmentConfig
from nkat_vit.data import DatasetSpec, find_dataset, is_folder, title_of
from nkat_vit.model import ViTConfig

OPTIMIZERS = ("adamw", "muon")
AMP = ("off", "bf16", "auto")
TTA = ("none", "flip", "shift", "flip+shift")
TTA_CHOICES = (*TTA, "auto")  # auto: flip where the set's pictures may be mirrored; a recipe holds what it came to


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How a model is trained.

    lr, warmup: AdamW's peak learning rate, reached after so many epochs; a cosine to zero follows
    muon_lr: peak for the matrices and convolutions with `opt` muon; everything else stays with AdamW at `lr`
    muon_momentum: share of the average so far in Muon's average of gradients; muon_steps: Newton–Schulz steps
    batch_size: over all processes; grad_accum: parts that each process takes its share in, one after the other
    layer_decay: factor of the learning rate from one layer to the one before it; 1 is off
    ema: decay of the averaged weights, which are what is judged and kept; 0 is off
    clip_grad: greatest norm of the gradient; 0 is off
    amp: "bf16" autocast, "off", or "auto": whichever a few measured steps find faster
    validation: pictures held out of the training set, by seed; limit_train: train on so many only (0: all)
    epoch_size: pictures of an epoch, which goes on through the set where the last one ended (0: all of them)
    tta: whose logits are averaged when judging: with "flip" those of a picture and its mirror image; with "shift" those
        of the picture (half) and of it moved by a pixel to the lower right and to the upper left (a quarter each), as
        airbench94 does (Jordan, 2024, arXiv 2404.00498); "flip+shift" all six
    """

    epochs: int = 40
    batch_size: int = 128
    grad_accum: int = 1
    opt: str = "adamw"
    lr: float = 2e-4
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_steps: int = 5
    warmup: float = 5.0
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    ema: float = 0.9995
    clip_grad: float = 1.0
    smoothing: float = 0.0
    amp: str = "off"
    seed: int = 0
    validation: int = 5000
    limit_train: int = 0
    epoch_size: int = 0
    tta: str = "none"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "grad_accum", "muon_steps", "validation"):
            _check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "muon_lr"):
            value = getattr(self, name)
            _check(math.isfinite(value) and value > 0, f"{name} must be positive, got {value}")
        for name in ("warmup", "weight_decay", "clip_grad", "limit_train", "epoch_size", "seed"):
            _check(getattr(self, name) >= 0, f"{name} must be at least 0, got {getattr(self, name)}")
        shorter = f"epoch_size {self.epoch_size} is less than one batch of {self.batch_size}"
        _check(not 0 < self.epoch_size < self.batch_size, shorter)
        _check(0 < self.layer_decay <= 1, f"layer_decay must lie in 0 < x <= 1, got {self.layer_decay}")
        for name in ("ema", "smoothing", "muon_momentum"):
            _check(0 <= getattr(self, name) < 1, f"{name} must lie in 0 <= x < 1, got {getattr(self, name)}")
        for name, choices in (("opt", OPTIMIZERS), ("amp", AMP), ("tta", TTA)):
            value = getattr(self, name)
            _check(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A data set, a model for it, and how to train that.

    spec: what is known of the data set, the names of its classes among it
    """

    dataset: str
    spec: DatasetSpec
    model: ViTConfig
    augment: AugmentConfig
    train: TrainConfig

    def values(self) -> dict[str, Any]:
        """All of it as one flat dictionary: the inverse of `make_recipe`, for JSON and checkpoints."""
        flat: dict[str, Any] = {"dataset": self.dataset}
        if is_folder(self.dataset):
            flat |= folder_values(self.spec)
        for part, names in ((self.model, MODEL_NAMES), (self.augment, AUGMENT_NAMES), (self.train, TRAIN_NAMES)):
            flat |= {name: getattr(part, name) for name in names}
        flat["randaugment"] = list(self.augment.randaugment)
        return flat


# What follows from the data set is no choice of the user's, but for the side at which a folder's pictures are taken.
FROM_DATASET = ("image_size", "channels", "classes", "mean", "std")
MODEL_NAMES = tuple(field.name for field in fields(ViTConfig) if field.name not in FROM_DATASET)
AUGMENT_NAMES = tuple(field.name for field in fields(AugmentConfig))
_LARGEST = 1e9  # of any setting; a file may hold 1e999, which is infinity, and NaN
TRAIN_NAMES = tuple(field.name for field in fields(TrainConfig))

# The plan's baseline; the defaults of the three parts are its values, and those it leaves open.
STAGE2: dict[str, Any] = {
    "conv_stem": "tiny",
    "patch_size": 2,
    "embed_dim": 384,
    "depth": 7,
    "temperature": 0.65,
    "top_k": 6,
    "top_p": 0.80,
    "nkat_strength": 0.0024,
    "nkat_decay": 0.99,
    "dropout_attn": 0.17,
    "dropout_embed": 0.08,
    "mixup": 0.1,
    "cutmix": 0.2,
    "randaugment": [2, 9],
    "cutout": 8,
    "lr": 2e-4,
    "epochs": 40,
    "warmup": 5,
    "ema": 0.9995,
    "clip_grad": 1.0,
}
# The same size of model over 64 tokens instead of 16, learning faster.
STRONG: dict[str, Any] = STAGE2 | {
    "conv_stem": "small",
    "patch_size": 1,
    "pool": "seq",
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "dropout_attn": 0.0,
    "dropout_embed": 0.0,
    "drop_path": 0.1,
    "cutout": 0,
    "opt": "muon",
    "lr": 1e-3,
    "muon_lr": 0.01,
    "smoothing": 0.1,
    "tta": "auto",
    "ema": 0.999,
}
# Most accuracy in ten minutes to an hour on two cores: convolutions before the same gauge attention.
FAST: dict[str, Any] = {
    "conv_stem": "white",
    "patch_size": 1,
    "embed_dim": 256,
    "depth": 2,
    "color_norm": "off",
    "split_heads": False,
    "pool": "seq",
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "nkat_strength": 0.0024,
    "nkat_decay": 0.99,
    "dropout_attn": 0.0,
    "dropout_embed": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "randaugment": [1, 9],
    "crop": 2,
    "cutout": 0,
    "opt": "muon",
    "lr": 0.012,
    "muon_lr": 0.2,
    "muon_momentum": 0.7,
    "muon_steps": 3,
    "epochs": 12,
    "warmup": 1,
    "batch_size": 512,
    "smoothing": 0.2,
    "ema": 0.99,
    "amp": "auto",
    "tta": "auto",
}
PRESETS = {"stage2": STAGE2, "strong": STRONG, "fast": FAST}


def with_preset(preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's values with the given ones over them.

    A run that is shorter than the preset's has a warm-up that is shorter in proportion, unless one is given. A policy
    (`auto_augment`) takes the place of the preset's RandAugment.
    """
    usual = PRESETS[preset]
    values = usual | dict(given)
    if given.get("auto_augment", "off") != "off" and "randaugment" not in given:
        values["randaugment"] = [0, 0]
    epochs = values["epochs"]
    if "warmup" not in given and isinstance(epochs, int) and epochs < usual["epochs"]:
        values["warmup"] = usual["warmup"] * epochs / usual["epochs"]
    return values


def optimizer_of(preset: str) -> str:
    """The optimiser that a preset learns with."""
    return str(PRESETS[preset].get("opt", TrainConfig().opt))


def check_schedule(config: TrainConfig) -> None:
    """Raises NKATError for a run whose learning rate would never fall. (Older runs that have one can still be used.)"""
    if config.warmup >= config.epochs:
        raise NKATError(
            f"a warm-up of {config.warmup:g} epochs leaves a run of {config.epochs} no time to learn with a falling "
            "rate; give a shorter --warmup or more --epochs"
        )


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """From flat values, "dataset" among them; what is absent takes its default. Raises NKATError for unknown names."""
    given = dict(values)
    _check("dataset" in given, "no data set is given (--dataset)")
    dataset = given.pop("dataset")
    _check(isinstance(dataset, str), f"dataset must be a name, got {dataset!r:.80}")
    if is_folder(dataset):
        spec = _folder_spec(dataset, given)
        given = {name: value for name, value in given.items() if name not in FROM_DATASET}
    else:
        spec = find_dataset(dataset)
        _check(
            given.pop("image_size", spec.size) == spec.size,
            f"image_size is for folders of pictures; {dataset}'s are {spec.size} x {spec.size}",
        )
    known = {*MODEL_NAMES, *AUGMENT_NAMES, *TRAIN_NAMES}
    unknown = sorted(set(given) - known)
    _check(not unknown, f"unknown setting(s): {', '.join(unknown)}; known are {', '.join(sorted(known | {'dataset'}))}")
    if spec.channels == 1:
        given.setdefault("color_norm", "off")
        given.setdefault("split_heads", False)
        shuffled = given.get("channel_shuffle")
        _check(not shuffled, f"channel_shuffle {shuffled!r:.80} needs three channels, a grey picture has no colours")
    given.setdefault("flip", spec.mirrored)
    if given.get("tta") == "auto":
        given["tta"] = "flip" if spec.mirrored else "none"
    if given.get("auto_augment", "off") != "off":
        given.setdefault("randaugment", (0, 0))
    if "randaugment" in given:
        given["randaugment"] = _pair(given["randaugment"])
    _check_types(given)
    return Recipe(
        dataset,
        spec,
        ViTConfig(
            image_size=spec.size,
            channels=spec.channels,
            classes=len(spec.classes),
            mean=spec.mean,
            std=spec.std,
            **_pick(given, MODEL_NAMES),
        ),
        AugmentConfig(**_pick(given, AUGMENT_NAMES)),
        TrainConfig(**_pick(given, TRAIN_NAMES)),
    )


def folder_values(spec: DatasetSpec) -> dict[str, Any]:
    """What a recipe's flat values hold of a folder of pictures."""
    values = spec.size, spec.channels, list(spec.classes), list(spec.mean), list(spec.std)
    return dict(zip(FROM_DATASET, values, strict=True))


def _folder_spec(dataset: str, values: Mapping[str, Any]) -> DatasetSpec:
    """The inverse of `folder_values`. Whether its pictures may be mirrored is what `flip` says: nobody else knows."""
    missing = [name for name in FROM_DATASET if name not in values]
    _check(
        not missing, f"{dataset}: its {', '.join(missing)} are not among the settings; they are measured by training"
    )
    size, channels, classes, mean, std = (values[name] for name in FROM_DATASET)
    for name, value in (("image_size", size), ("channels", channels)):
        _check(type(value) is int and 1 <= value <= _LARGEST, f"{name} must be a whole number, got {value!r:.80}")
    names = isinstance(classes, list | tuple) and len(classes) > 1 and all(isinstance(name, str) for name in classes)
    _check(names, f"classes must be two names or more, got {classes!r:.80}")
    for name, value in (("mean", mean), ("std", std)):
        numbers = isinstance(value, list | tuple) and all(type(v) in (int, float) and math.isfinite(v) for v in value)
        _check(numbers, f"{name} must be numbers, got {value!r:.80}")
    mirrored = values.get("flip", True) is True
    return DatasetSpec(title_of(dataset), tuple(classes), channels, size, tuple(mean), tuple(std), mirrored=mirrored)


def class_names(recipe: Recipe) -> tuple[str, ...]:
    """What a model's classes are called, in the order of its logits."""
    return recipe.spec.classes


def describe_presets() -> str:
    """For --help: all values of the first preset, and of each other one those that differ."""
    lines: list[str] = []
    first: dict[str, Any] = {}
    for name, preset in PRESETS.items():
        values = make_recipe({"dataset": "cifar10"} | preset).values()
        changed = {key: value for key, value in values.items() if value != first.get(key, ...)}
        head = f"{name}, as {next(iter(PRESETS))} but" if first else f"{name} (for cifar10; grey sets have no colours)"
        first = first or values
        words = [
            f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
            for key, value in changed.items()
            if key != "dataset"
        ]
        lines.append(textwrap.fill(f"{head}: {', '.join(words)}", 118, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(["presets:", *lines])


def read_config(path: Path) -> dict[str, Any]:
    """Flat values from a JSON file, as a run's `config.json`."""
    try:
        values = parse_json(path.read_bytes())
    except OSError as error:
        raise NKATError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise NKATError(f"{path}: this is no JSON: {error}") from None
    _check(isinstance(values, dict), f"{path}: expected one JSON object with a run's settings")
    return values


def with_amp(recipe: Recipe, amp: str) -> Recipe:
    """The recipe with "auto" decided."""
    return replace(recipe, train=replace(recipe.train, amp=amp))


def _pick(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _pair(value: Any) -> tuple[int, int]:
    _check(
        isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int and 0 <= v <= 100 for v in value),
        f"randaugment takes two numbers, N and M, got {value!r:.80}",
    )
    return value[0], value[1]


def _check_types(values: Mapping[str, Any]) -> None:
    """A file can hold anything; numbers have to be numbers before they are compared."""
    for part in (ViTConfig, AugmentConfig, TrainConfig):
        for field in fields(part):
            if field.name not in values or field.name in ("randaugment", *FROM_DATASET):
                continue
            value, kind = values[field.name], type(field.default)
            accepted = (int, float) if kind is float else kind
            fits = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
            _check(fits, f"{field.name} must be of type {kind.__name__}, got {value!r:.80}")
            finite = not isinstance(value, int | float) or abs(value) <= _LARGEST
            _check(finite, f"{field.name} must be a number up to {_LARGEST:g}, got {value!r:.80}")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise NKATError(message)
