"""The converter's flags for `--repair`; what it shares with a fit of Θ are that one's flags."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.host import commandline
from nkat.lm.config import ModelConfig
from nkat.sources.fit.options import FitOptions
from nkat.sources.repair.descent import RepairSettings

_OWN = ("steps", "learning_rate")
_SHARED = tuple(field.name for field in fields(RepairSettings) if field.name not in (*_OWN, "seed"))
SHARED_FLAGS = frozenset(
    {f"--fit-{name.replace('_', '-')}" for name in _SHARED}
    | {"--fit-precision", "--fit-fast", "--beyond-context", "--resume", "--no-cuda", "--calibrate-ignore"}
)


def add_repair_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the group of flags; those not given stay None."""
    defaults = RepairSettings()
    group = parser.add_argument_group("a repaired model of the same size")
    group.add_argument(
        "--repair",
        type=Path,
        metavar="FILE",
        help="write a plain GGUF whose blocks' stored scales were learned on --calibrate, from --reference's "
        "predictions where it is given: same types, same size, for every program. With --output, Θ is made for that "
        "file. The --fit- flags that are not Θ's own hold for it too",
    )
    group.add_argument(
        "--repair-steps",
        type=commandline.positive_int,
        metavar="N",
        help=f"steps of gradient descent (default {defaults.steps})",
    )
    group.add_argument(
        "--repair-learning-rate",
        type=float,
        metavar="N",
        help=f"largest change of a scale in a step, relative to it (default {defaults.learning_rate})",
    )


def repair_settings(
    fit: FitOptions,
    config: ModelConfig,
    seed: int,
    has_reference: bool,
    steps: int | None,
    learning_rate: float | None,
) -> RepairSettings:
    """The settings of a repair of a model. steps, learning_rate: None where the flag was not given.

    Raises NKATError for values that make no sense.
    """
    if learning_rate is not None and not learning_rate > 0.0:
        raise NKATError(f"--repair-learning-rate must be above 0, got {learning_rate}")
    as_fit = fit.fit_settings(config, rank=1, gamma=0.5, seed=seed, has_reference=has_reference)
    settings = RepairSettings(seed=seed, **{name: getattr(as_fit, name) for name in _SHARED})
    own: dict[str, Any] = dict(zip(_OWN, (steps, learning_rate), strict=True))
    return replace(settings, **{name: value for name, value in own.items() if value is not None})
