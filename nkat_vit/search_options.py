"""The options of the search over the image model."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nkat.host import commandline
from nkat.study.options import StudyOptions
from nkat_vit.metrics import LAMBDA_OF_BASELINE, TARGETS, accuracy_needed
from nkat_vit.model import STEMS
from nkat_vit.recipe import OPTIMIZERS, PRESETS, optimizer_of
from nkat_vit.search import CHOICES, FIRST_SET, OTHER_SETS

DESCRIPTION = (
    "Search the shape of the image model: accuracy and Local TPE on CIFAR-10 first, then Global TPE over four sets."
)
EXAMPLES = """\
  python nkat_auto_optimizer.py --task vit --mode quick --data-root data --output-dir output/round2
  python nkat_auto_optimizer.py --task vit --mode quick --data-root data --local-tpe 0.28 --accuracy 0.35
  python nkat_auto_optimizer.py --task vit --mode quick --data-root data --preset stage2
  python nkat_auto_optimizer.py --task vit --mode full --data-root data --storage postgresql://host/db --study-name r2
  python nkat_auto_optimizer.py --task vit --mode custom --trials 20 --epochs 18 --epoch-size 10000 --data-root data
  python nkat_auto_optimizer.py --task vit --mode quick --data-root data --resume"""
# By mode. The baseline has 17 tokens. Without a stem there are 65 or 257, at four and twenty times the baseline's work:
# too much for a quick search. Its epochs are parts of one pass through all pictures, which differ without RandAugment.
BUDGETS: dict[str, dict[str, Any]] = {
    "quick": {
        "epochs": 9,
        "other_epochs": 5,
        "epoch_size": 5120,
        "limit_train": 0,
        "validation": 1000,
        "max_tokens": 20,
        "batch_size": 256,
        "randaugment": (0, 0),
    },
    "full": {
        "epochs": 27,
        "other_epochs": 0,
        "epoch_size": 0,
        "limit_train": 0,
        "validation": 5000,
        "max_tokens": 0,
        "batch_size": 128,
        "randaugment": None,
    },
}
# By mode: stems beyond STAGE2's, and the preset that trials learn by. The white and the deep stem learn most from the
# few pictures of a quick search, and most of all as the preset fast learns.
STEMS_OF: dict[str, tuple[str, ...]] = {"quick": tuple(STEMS)}
PRESET_OF = {"quick": "fast"}

GATE_OF_PLAN = 0.60  # Local TPE


@dataclass(frozen=True, slots=True)
class ShapeOptions:
    """What is searched: the flags of their names, None where one was not given. `study`: how the search is run."""

    data_root: Path
    local_tpe: float
    accuracy: float
    sets: list[str]
    epochs: int | None
    other_epochs: int | None
    epoch_size: int | None
    limit_train: int | None
    validation: int | None
    preset: str | None
    opt: str | None
    lr: float | None
    muon_lr: float | None
    stems: list[str] | None
    max_tokens: int | None
    batch_size: int | None
    randaugment: tuple[int, int] | None
    amp: str
    final_seeds: int | None
    no_cuda: bool
    study: StudyOptions

    @property
    def learning(self) -> str:
        """The preset by which trials learn."""
        return self.preset or PRESET_OF.get(self.study.mode, "stage2")

    @property
    def optimizer(self) -> str:
        """Theirs."""
        return self.opt or optimizer_of(self.learning)


CONFLICTS: tuple[tuple[Callable[[ShapeOptions], object], str], ...] = (
    (
        lambda o: not (math.isfinite(o.local_tpe) and o.local_tpe >= 0),
        "--local-tpe must be at least 0, got {o.local_tpe}",
    ),
    (lambda o: not 0 <= o.accuracy <= 1, "--accuracy must be a share from 0 to 1, got {o.accuracy}"),
    (lambda o: o.muon_lr is not None and o.optimizer != "muon", "--muon-lr is for --opt muon"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this task alone."""
    add = parser.add_argument_group("image model").add_argument
    add("--data-root", type=Path, default=Path("data"), metavar="DIR", help="folder with the archives (data)")
    takes = 100 * accuracy_needed(GATE_OF_PLAN, LAMBDA_OF_BASELINE)
    add(
        "--local-tpe",
        type=float,
        default=GATE_OF_PLAN,
        metavar="X",
        help=f"Local TPE on CIFAR-10 that opens stage 2 ({GATE_OF_PLAN:.2f}, which takes {takes:.1f} %% at the "
        f"baseline's size, while STAGE2's target there is {100 * TARGETS[FIRST_SET].accuracy:.0f} %%)",
    )
    add(
        "--accuracy",
        type=float,
        default=TARGETS[FIRST_SET].accuracy,
        metavar="X",
        help="accuracy on CIFAR-10 that opens stage 2 as well (0.60); below that the other sets' are lowered alike",
    )
    add("--sets", nargs="+", choices=OTHER_SETS, default=list(OTHER_SETS), help="sets of stage 2 (all three)")
    chosen = ", ".join(f"{mode}: {usual['epochs']} / {usual['epoch_size'] or 'all'}" for mode, usual in BUDGETS.items())
    add(
        "--epochs",
        type=commandline.positive_int,
        metavar="N",
        help=f"of a surviving trial (epochs / pictures: {chosen})",
    )
    add(
        "--other-epochs",
        type=commandline.non_negative_int,
        metavar="N",
        help="of a trial that passes, on each set of stage 2, 0: as many as on CIFAR-10 (quick 5 with its own "
        "--epochs, else 0)",
    )
    add("--epoch-size", type=commandline.non_negative_int, metavar="N", help="pictures of an epoch, 0: a whole set")
    add(
        "--limit-train",
        type=commandline.non_negative_int,
        metavar="N",
        help="pictures of each set to train on, 0: all (all)",
    )
    add("--validation", type=commandline.positive_int, metavar="N", help="pictures of each set to judge on")
    add(
        "--preset",
        choices=list(PRESETS),
        help="how all trials learn: augmentation, dropouts, rates (quick fast, else stage2)",
    )
    add("--opt", choices=OPTIMIZERS, help="optimiser of all trials (the preset's)")
    add(
        "--lr",
        type=float,
        metavar="X",
        help="AdamW's peak learning rate (the preset's; with --opt 2e-4, muon 1e-3)",
    )
    add(
        "--muon-lr",
        type=float,
        metavar="X",
        help="Muon's peak learning rate (the preset's; with --opt 0.01)",
    )
    add(
        "--stems",
        nargs="+",
        choices=list(STEMS),
        help=f"stems to choose from (quick {', '.join(STEMS_OF['quick'])}; else {', '.join(CHOICES['conv_stem'])}, "
        "STAGE2's)",
    )
    add(
        "--max-tokens",
        type=commandline.non_negative_int,
        metavar="N",
        help="leave longer sequences out (quick 20, 0: any)",
    )
    add("--batch-size", type=commandline.positive_int, metavar="N", help="pictures a step (quick 256, full 128)")
    add(
        "--randaugment",
        type=int,
        nargs=2,
        metavar=("N", "M"),
        help="(quick 0 0 with its own --preset, else the preset's)",
    )
    add("--amp", choices=("off", "bf16", "auto"), default="auto", help="bfloat16 autocast (auto: where it is faster)")
    add(
        "--final-seeds",
        type=commandline.positive_int,
        metavar="N",
        help="runs of the winner on the test sets (GPU 3, else 1)",
    )
    add("--no-cuda", action="store_true", help="the processor although there is a GPU")


def shape_options(parser: argparse.ArgumentParser, parsed: argparse.Namespace, study: StudyOptions) -> ShapeOptions:
    """The whole of the command line; a mistake ends the program with one line and status 2."""
    options = commandline.taken(ShapeOptions, parsed, sets=list(dict.fromkeys(parsed.sets)), study=study)
    commandline.check_conflicts(parser, options, CONFLICTS)
    return options
