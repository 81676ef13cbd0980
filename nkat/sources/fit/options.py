"""The converter's flags for `--theta-source fit`, and what they say."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.host import commandline
from nkat.lm.config import ModelConfig
from nkat.sources.fit.choice import GAMMAS, Space
from nkat.sources.fit.descent import FitSettings

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(FitSettings)}
_FLAGS: dict[str, tuple[Callable[[str], float], str]] = {  # field of FitSettings: (type, help)
    "steps": (commandline.positive_int, "steps of gradient descent"),
    "batch": (commandline.positive_int, "sequences a step, in each process"),
    "context": (commandline.positive_int, "tokens of a sequence"),
    "learning_rate": (float, "highest learning rate; it warms up and then falls to 0 along a cosine"),
    "warmup": (commandline.non_negative_int, "steps until the learning rate is reached"),
    "weight_decay": (float, "of AdamW"),
    "clip": (float, "largest norm of a step's gradients"),
    "int8_share": (float, "share of the steps, the last ones, with the factors rounded as INT8 will have them"),
    "keep_weight": (float, "weight of --keep's part of the loss"),
    "keep_batch": (commandline.positive_int, "sequences of --keep's text a step"),
    "start_steps": (
        commandline.positive_int,
        "steps that --fit-start auto takes from each start, where there are several; the best one goes on",
    ),
    "validate_every": (commandline.positive_int, "steps between validations"),
    "patience": (
        commandline.non_negative_int,
        "validations without a better one before the fit ends; 0: go on to the end",
    ),
}
STARTS = ("auto", "zero", "weight", "residual")


def add_fit_arguments(parser: argparse.ArgumentParser, resume: bool = True) -> None:
    """Adds the group of flags; those not given stay None. resume: --resume too; a search has one of its own."""
    group = parser.add_argument_group("how --theta-source fit learns")
    for name, (kind, text) in _FLAGS.items():
        default = f"{_DEFAULTS[name]}{', less for small weights' if name == 'learning_rate' else ''}"
        group.add_argument(
            f"--fit-{name.replace('_', '-')}", type=kind, metavar="N", help=f"{text} (default {default})"
        )
    group.add_argument(
        "--fit-reference-share",
        type=float,
        metavar="S",
        help="with --reference: share of its prediction in what is learned, the rest is the text itself (default 1)",
    )
    group.add_argument(
        "--fit-start",
        choices=STARTS,
        help="where P and Q begin; auto: zero, or residual where that is better after a few steps (default)",
    )
    group.add_argument(
        "--fit-precision",
        choices=("auto", "float32", "bfloat16"),
        help="of the products with the frozen weights; auto: bfloat16 where the processor computes in it (default)",
    )
    group.add_argument(
        "--fit-fast",
        action=argparse.BooleanOptionalAction,
        help="keep activations and unpacked weights in memory, instead of making them again for the backward pass "
        "(default: what half of the free memory holds); the result is the same",
    )
    group.add_argument(
        "--no-nested", action="store_true", help="learn this rank only, not the lower ones in its first columns"
    )
    group.add_argument(
        "--beyond-context", action="store_true", help="let --fit-context be more than what the model was made for"
    )
    group.add_argument(
        "--guard",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="further texts on which perplexity may rise by 0.5 %% at most; beside Python's documentation, sixteen "
        "kinds of English text, and the first tenth of --calibrate, which is not learned",
    )
    group.add_argument(
        "--no-guard",
        action="store_true",
        help="take the rank, gamma and step that gain most, whatever they cost elsewhere",
    )
    if resume:
        group.add_argument("--resume", action="store_true", help="go on with a fit that was interrupted")
    group.add_argument("--no-cuda", action="store_true", help="fit on the processor even where there is a GPU")
    group.add_argument(
        "--calibrate-ignore", nargs="+", metavar="STRING", help='parts of the text not to be learned, such as "<unk>"'
    )


@dataclass(frozen=True, slots=True)
class FitOptions:
    """What the group of flags says.

    given: the flags of the group that were given, as the user writes them
    settings: fields of FitSettings that were given, each of its field's type;  reference_share: None where it was not
    start: one of STARTS;  precision: "auto", "float32" or "bfloat16";  nested: learn lower ranks in the first columns
    fast: keep activations and unpacked weights; None: what fits
    ignore: parts of the text that are not to be learned
    beyond_context: sequences may be longer than what the model was made for
    guard: a user's texts beside the default ones; None: no guard
    """

    given: tuple[str, ...]
    settings: Mapping[str, Any]
    reference_share: float | None
    start: str
    precision: str
    fast: bool | None
    nested: bool
    resume: bool
    allow_cuda: bool
    ignore: tuple[str, ...]
    beyond_context: bool
    guard: tuple[Path, ...] | None

    def fit_settings(self, config: ModelConfig, rank: int, gamma: float, seed: int, has_reference: bool) -> FitSettings:
        """The settings of a fit of a model. Raises NKATError for values that make no sense.

        Sequences are no longer than what the model was made for, unless more is asked for twice.
        """
        if "context" in self.settings:
            config.check_length(self.settings["context"], "--fit-context", self.beyond_context)
        share = self.reference_share
        if share is None:
            share = 1.0 if has_reference else 0.0
        settings = FitSettings(
            rank=rank,
            gamma=gamma,
            seed=seed,
            nested=self.nested and rank > 1,
            reference_share=share,
            scaled="learning_rate" not in self.settings,
            **{"context": min(_DEFAULTS["context"], config.context_length), **self.settings},
        )
        _check(settings)
        return settings


def choice_space(ranks: Sequence[int], gamma: float | None, *, guarded: bool) -> Space:
    """What a fit's rank and γ are chosen from. gamma: None: any; without a guard the weak ones have no merit."""
    return Space(tuple(ranks), GAMMAS[: None if guarded else 5] if gamma is None else (gamma,))


def lower_ranks(rank: int) -> tuple[int, ...]:
    """A rank, its half, its quarter."""
    return tuple(sorted({rank, -(-rank // 2), -(-rank // 4)}))


def fit_options(parsed: argparse.Namespace) -> FitOptions:
    """The group's flags out of a parsed command line."""
    settings = {name: getattr(parsed, f"fit_{name}") for name in _FLAGS}
    names = [
        *(f"fit_{name}" for name in (*_FLAGS, "reference_share", "start", "precision", "fast")),
        "calibrate_ignore",
        "guard",
    ]
    given = [name for name in names if getattr(parsed, name) is not None]
    given += [
        name for name in ("no_nested", "no_guard", "resume", "no_cuda", "beyond_context") if getattr(parsed, name)
    ]
    return FitOptions(
        given=tuple("--" + name.replace("_", "-") for name in given),
        settings={name: value for name, value in settings.items() if value is not None},
        reference_share=parsed.fit_reference_share,
        start=parsed.fit_start or "auto",
        precision=parsed.fit_precision or "auto",
        fast=parsed.fit_fast,
        nested=not parsed.no_nested,
        resume=parsed.resume,
        allow_cuda=not parsed.no_cuda,
        ignore=tuple(parsed.calibrate_ignore or ()),
        beyond_context=parsed.beyond_context,
        guard=None if parsed.no_guard else tuple(parsed.guard or ()),
    )


def fit_flags(options: FitOptions) -> list[object]:
    """The group's flags that say the same on another command line, but for --resume."""
    words: list[object] = []
    for name, value in options.settings.items():
        words += [f"--fit-{name.replace('_', '-')}", value]
    if options.reference_share is not None:
        words += ["--fit-reference-share", options.reference_share]
    words += ["--fit-start", options.start, "--fit-precision", options.precision]
    given = {
        "--fit-fast": options.fast is True,
        "--no-fit-fast": options.fast is False,
        "--no-nested": not options.nested,
        "--no-cuda": not options.allow_cuda,
        "--beyond-context": options.beyond_context,
        "--no-guard": options.guard is None,
    }
    words += [flag for flag, wanted in given.items() if wanted]
    words += ["--guard", *options.guard] if options.guard else []
    return words + (["--calibrate-ignore", *options.ignore] if options.ignore else [])


def _check(settings: FitSettings) -> None:
    for name in ("int8_share", "reference_share"):
        if not 0.0 <= getattr(settings, name) <= 1.0:
            raise NKATError(f"--fit-{name.replace('_', '-')} must lie between 0 and 1, got {getattr(settings, name)}")
    for name in ("learning_rate", "clip"):
        if not getattr(settings, name) > 0.0:
            raise NKATError(f"--fit-{name.replace('_', '-')} must be above 0, got {getattr(settings, name)}")
    for name in ("weight_decay", "keep_weight"):
        if not getattr(settings, name) >= 0.0:
            raise NKATError(f"--fit-{name.replace('_', '-')} must not be negative, got {getattr(settings, name)}")
    if settings.context < 8:
        raise NKATError(f"--fit-context must be at least 8 tokens, got {settings.context}")
