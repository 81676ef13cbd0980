"""The options of the search over a language model's Θ."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from nkat.host import commandline
from nkat.hub.fetch import local_model
from nkat.sources.fit.options import FitOptions, add_fit_arguments, fit_options
from nkat.sources.options import SOURCES
from nkat.study.options import StudyOptions

DESCRIPTION = "Search rank, gamma, layers and depth decay of a language model's Θ by measured TPE."
EXAMPLES = """\
  python nkat_auto_optimizer.py --model model.gguf --mode quick
  python nkat_auto_optimizer.py --model model.gguf --mode quick --calibrate my.txt
  python nkat_auto_optimizer.py --model model.gguf --mode full --output-dir output/full --text my.txt
  python nkat_auto_optimizer.py --model model.gguf --mode custom --trials 50 --output-dir output/custom
  python nkat_auto_optimizer.py --model model.gguf --mode quick --target-rank 2
  python nkat_auto_optimizer.py --model model.gguf --mode full --resume
  python nkat_auto_optimizer.py --model model.gguf --mode full --storage postgresql://host/db --study-name seven-b
  python nkat_auto_optimizer.py --task vit --help        the image model's search has other options"""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What is searched: the flags of their names, None where one was not given. `study`: how the search is run.

    theta_source: with a text to learn from "fit" where the user names none, else "weight";  fit: how it learns
    """

    model: Path
    target_rank: int | None
    target_gamma: float | None
    theta_source: str
    reference: Path | None
    calibrate: Path | None
    text: Path | None
    chunks: int
    max_overhead: float | None
    fit: FitOptions
    study: StudyOptions

    @property
    def learns(self) -> bool:
        return self.theta_source == "fit"

    @property
    def fit_flags_given(self) -> list[str]:
        """What of the fit's group the user gave; --resume is the search's own."""
        return [flag for flag in self.fit.given if flag != "--resume"]


CONFLICTS: tuple[tuple[Callable[[SearchOptions], object], str], ...] = (
    (
        lambda o: o.theta_source == "residual" and o.reference is None,
        "--theta-source residual needs --reference, the same model at a higher precision",
    ),
    (
        lambda o: o.theta_source == "weight" and (o.reference or o.calibrate),
        "--reference and --calibrate are for --theta-source residual or fit",
    ),
    (
        lambda o: o.learns and o.calibrate is None,
        "--theta-source fit needs --calibrate, the text to learn from",
    ),
    (lambda o: not o.learns and o.fit_flags_given, "{o.fit_flags_given[0]} is for --theta-source fit"),
    (
        lambda o: o.learns and not o.fit.nested and o.target_rank is None,
        "--no-nested learns one rank only, so it needs --target-rank",
    ),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of this task alone."""
    add = parser.add_argument_group("language model").add_argument
    add(
        "--model",
        type=Path,
        required=True,
        metavar="FILE",
        help="a .gguf (or .nkat, whose Θ is left out), or hf:OWNER/REPO[:QUANT]",
    )
    add("--target-rank", type=commandline.positive_int, metavar="R", help="fix the rank, search the rest")
    add("--target-gamma", type=float, metavar="G", help="fix gamma, search the rest")
    add(
        "--theta-source",
        choices=(*SOURCES, "fit"),
        help="how Θ is made (default fit with --calibrate, weight without)",
    )
    add(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="text to learn from; for source residual: whose activations weight the error",
    )
    add("--reference", type=Path, metavar="FILE", help="the same model at a higher precision, for residual and fit")
    add(
        "--text",
        type=Path,
        metavar="FILE",
        help="text to judge on (default: the part of --calibrate that a fit keeps back, without one Python's own "
        "documentation)",
    )
    add(
        "--chunks",
        type=commandline.positive_int,
        default=8,
        metavar="N",
        help="chunks of 512 tokens that trials see (default 8); twice as many others are held out for the last word",
    )
    add("--max-overhead", type=float, metavar="PCT", help="a Θ may slow decoding down by so many per cent at most")
    add_fit_arguments(parser, resume=False)


def search_options(parser: argparse.ArgumentParser, parsed: argparse.Namespace, study: StudyOptions) -> SearchOptions:
    """The whole of the command line; a mistake ends the program with one line and status 2."""
    source = parsed.theta_source or ("fit" if parsed.calibrate else "weight")
    options = commandline.taken(SearchOptions, parsed, theta_source=source, fit=fit_options(parsed), study=study)
    commandline.check_conflicts(parser, options, CONFLICTS)
    return replace(options, model=local_model(options.model), reference=local_model(options.reference))
