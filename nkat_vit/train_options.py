"""The options of a training run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.host import commandline
from nkat_vit.attention import COLOR_GROUPS
from nkat_vit.data import DATASETS_HELP, dataset_name, is_folder
from nkat_vit.gauge import FORMS
from nkat_vit.model import COLOR_NORMS, POOLS, STEMS
from nkat_vit.policies import AUTO_AUGMENT
from nkat_vit.recipe import (
    AMP,
    FROM_DATASET,
    OPTIMIZERS,
    PRESETS,
    TTA_CHOICES,
    describe_presets,
    read_config,
    with_preset,
)

_EXAMPLES = """\
  python -m nkat_vit.train --dataset cifar10 --preset stage2
  python -m nkat_vit.train --dataset mnist --preset fast --epochs 3 --output output/vit/mnist
  python -m nkat_vit.train --resume output/vit/mnist
  python -m nkat_vit.train --resume output/vit/mnist --extend-to 6
  python -m nkat_vit.train --dataset cifar10 --conv_stem tiny --patch_size 2 --embed_dim 384 --depth 7 \\
      --temperature 0.65 --top_k 6 --top_p 0.80 --nkat_strength 0.0024 --nkat_decay 0.99 --dropout_attn 0.17 \\
      --dropout_embed 0.08 --mixup 0.1 --cutmix 0.2 --randaugment 2 9 --lr 2e-4 --epochs 40 --warmup 5 \\
      --ema 0.9995 --clip_grad 1.0
  python -m nkat_vit.train --dataset cifar10 --preset fast
  python -m nkat_vit.train --dataset folder:my-pictures --preset fast --image-size 48
  torchrun --nproc-per-node 2 -m nkat_vit.train --dataset cifar10 --preset strong"""

# (name, type or choices, help); every name is accepted with hyphens as well. Defaults are those of the preset.
_MODEL_FLAGS: list[tuple[str, Any, str]] = [
    ("conv_stem", tuple(STEMS), "convolutions before the patches"),
    ("patch_size", int, "side of a patch, in the stem's cells"),
    ("embed_dim", int, "width"),
    ("depth", int, "blocks"),
    ("heads", int, "attention heads"),
    ("mlp_ratio", float, "hidden width of the MLPs over embed_dim"),
    ("color_norm", COLOR_NORMS, "LayerNorm over the colours of each pixel, in place of the picture or beside it"),
    ("split_heads", bool, f"heads in {COLOR_GROUPS} groups: red, green, blue, shared"),
    ("color_dim", int, "width of each colour's local features"),
    ("color_layers", int, "how many blocks see them, from the first"),
    ("temperature", float, "divides the attention scores"),
    ("top_k", int, "keys each query may look at, 0: all"),
    ("top_p", float, "weight of the keys each query may look at, 1: all"),
    ("nkat_strength", float, "of the gauge terms, 0: none"),
    ("nkat_decay", float, "of the strength, a layer"),
    ("gauge_rank", int, "of the gauge terms' factors"),
    ("gauge_form", tuple(FORMS), "the star product of query and key, or the query rotated by exp(sθ)"),
    ("dropout_attn", float, "of attention weights"),
    ("dropout_embed", float, "of embedded patches"),
    ("dropout", float, "in the MLPs"),
    ("drop_path", float, "stochastic depth of the last block"),
    ("pool", POOLS, "how tokens become one vector"),
]
_AUGMENT_FLAGS: list[tuple[str, Any, str]] = [
    ("crop", int, "greatest shift in pixels"),
    ("flip", bool, "mirror half of the pictures (default: where the set allows it)"),
    ("cutout", int, "side of the square left out"),
    ("mixup", float, "α of Mixup, 0: off"),
    ("cutmix", float, "α of CutMix, 0: off"),
    ("channel_shuffle", float, "probability that colours change places"),
]
_TRAIN_FLAGS: list[tuple[str, Any, str]] = [
    ("epochs", int, "passes over the training pictures"),
    ("batch_size", int, "over all processes"),
    ("grad_accum", int, "parts that a batch is taken in, for less memory; BatchNorm sees one part at a time"),
    ("opt", OPTIMIZERS, "optimiser; muon: for matrices and convolutions, AdamW for the rest"),
    ("lr", float, "AdamW's peak learning rate"),
    ("muon_lr", float, "Muon's"),
    ("muon_momentum", float, "share of the average so far in Muon's average of gradients"),
    ("muon_steps", int, "Newton–Schulz steps that make Muon's singular values about 1"),
    ("warmup", float, "epochs until the peak; a cosine follows"),
    ("weight_decay", float, "decoupled: multiplied by the learning rate, with which it rises and falls"),
    (
        "layer_decay",
        float,
        "layer-wise decay, as BEiT's and timm's: learning rate, and with it weight decay, of layer i times "
        "X^(depth + 1 - i), where 0 is what comes before the blocks and depth + 1 the head; 1: off",
    ),
    ("ema", float, "decay of the averaged weights, 0: off"),
    ("clip_grad", float, "greatest norm of the gradient, 0: off"),
    ("smoothing", float, "label smoothing"),
    ("seed", int, "of everything random"),
    ("validation", int, "pictures held out of the training set"),
    ("limit_train", int, "train on so many pictures, 0: all"),
    ("epoch_size", int, "pictures of an epoch, which goes on through the set where the last ended; 0: all"),
    (
        "tta",
        TTA_CHOICES,
        "judge by the mean of views: mirrored, moved by a pixel, both; auto: flip where the set allows it",
    ),
]


def make_parser() -> argparse.ArgumentParser:
    """The command line; settings of the recipe that are not given are absent from the result."""
    parser = commandline.parser("Train the image model on an image set.", f"{_EXAMPLES}\n\n{describe_presets()}")
    parser.add_argument("--dataset", type=dataset_name, default=argparse.SUPPRESS, metavar="SET", help=DATASETS_HELP)
    parser.add_argument(
        *("--image-size", "--image_size"),
        type=commandline.positive_int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="side that a folder's pictures are scaled and cropped to (the median of their shorter sides, at most 64)",
    )
    parser.add_argument("--preset", choices=list(PRESETS), help="all settings not given (stage2)")
    parser.add_argument("--config", type=Path, help="settings from a JSON file, such as a run's config.json")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder with the sets (data)")
    parser.add_argument("--output", type=Path, help="folder for the run (output/vit/SET-PRESET-seedN)")
    parser.add_argument("--resume", nargs="?", const="", metavar="FOLDER", help="go on with the run in the folder")
    parser.add_argument(
        "--extend-to",
        type=commandline.positive_int,
        metavar="EPOCHS",
        help="with --resume: a longer run; the learning rate goes on as one of that length has it, and falls again",
    )
    parser.add_argument("--force", action="store_true", help="start anew in a folder that holds a run; replace --json")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile (needs a C++ compiler); worth it on a GPU"
    )
    parser.add_argument(
        "--save-steps", type=commandline.non_negative_int, default=0, help="checkpoints within epochs, too"
    )
    parser.add_argument("--tensorboard", action="store_true", help="log for TensorBoard (needs tensorboard)")
    parser.add_argument("--no-test", action="store_true", help="leave the test set alone")
    parser.add_argument("--no-cuda", action="store_true", help="the processor although there is a GPU")
    parser.add_argument("--threads", type=commandline.thread_count, help="processor threads")
    parser.add_argument("--json", metavar="FILE", help='record of the run; "-": last line of stdout')
    for title, flags in (("model", _MODEL_FLAGS), ("augmentation", _AUGMENT_FLAGS), ("training", _TRAIN_FLAGS)):
        group = parser.add_argument_group(f"{title} (defaults: the preset's)")
        for name, kind, text in flags:
            options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text, "dest": name}
            if kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif isinstance(kind, tuple):
                options["choices"] = kind
            else:
                options |= {"type": kind, "metavar": {int: "N", float: "X"}[kind]}
            group.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **options)
        if title == "augmentation":
            group.add_argument(
                "--randaugment", type=int, nargs=2, metavar=("N", "M"), default=argparse.SUPPRESS, help="M of 30"
            )
            group.add_argument(
                *("--auto_augment", "--auto-augment", "--aa"),
                choices=AUTO_AUGMENT,
                default=argparse.SUPPRESS,
                help="a policy in place of RandAugment; autoaugment: the one found on CIFAR-10",
            )
        if title == "training":
            group.add_argument(
                "--amp",
                nargs="?",
                const="auto",
                choices=AMP,
                default=argparse.SUPPRESS,
                help="bfloat16 autocast; without a value: where a few measured steps find it faster",
            )
            group.add_argument("--model-ema", action="store_true", help="averaged weights, at the preset's decay")
    return parser


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a run is made: the flags of their names, None where one was not given.

    flags: settings of the recipe that were given, by name
    """

    preset: str | None
    config: Path | None
    data_root: Path
    output: Path | None
    resume: str | None
    extend_to: int | None
    force: bool
    compile: bool
    save_steps: int
    tensorboard: bool
    no_test: bool
    no_cuda: bool
    threads: int | None
    json: str | None
    model_ema: bool
    flags: Mapping[str, Any]


def parse_arguments(argv: Sequence[str] | None = None) -> TrainOptions:
    """The command line; a mistake ends the program with one line and status 2."""
    parsed = make_parser().parse_args(argv)
    names = {"dataset", "image_size", "randaugment", "auto_augment", "amp"} | {
        f[0] for f in (*_MODEL_FLAGS, *_AUGMENT_FLAGS, *_TRAIN_FLAGS)
    }
    flags = {name: value for name, value in vars(parsed).items() if name in names}
    return commandline.taken(TrainOptions, parsed, flags=flags)


def given_values(options: TrainOptions) -> dict[str, Any]:
    """Settings that the user chose: an explicit preset, then the file, then the flags."""
    chosen = chosen_values(options)
    values = with_preset(options.preset, chosen) if options.preset else chosen
    if options.model_ema and not values.get("ema", 1.0):
        raise NKATError("--model-ema and an ema of 0 contradict each other")
    return values


def chosen_values(options: TrainOptions) -> dict[str, Any]:
    """Settings beside the preset's. What a file says of a folder's pictures was measured for another run."""
    values = read_config(options.config) if options.config else {}
    flags = dict(options.flags)
    if is_folder(str(values.get("dataset"))):
        stays = {"image_size"} if is_folder(str((values | flags)["dataset"])) else set()
        values = {name: value for name, value in values.items() if name not in {*FROM_DATASET} - stays}
    return values | flags
