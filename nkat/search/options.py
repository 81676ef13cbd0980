"""The options of the search over a language model's Θ."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nkat.host import commandline
from nkat.sources.options import SOURCES
from nkat.study.options import StudyOptions

DESCRIPTION = "Search rank, gamma, layers and depth decay of a language model's Θ by measured TPE."
EXAMPLES = """\
  python nkat_auto_optimizer.py --model model.gguf --mode quick
  python nkat_auto_optimizer.py --model model.gguf --mode full --output-dir output/full --text my.txt
  python nkat_auto_optimizer.py --model model.gguf --mode custom --trials 50 --output-dir output/custom
  python nkat_auto_optimizer.py --model model.gguf --mode quick --target-rank 2
  python nkat_auto_optimizer.py --model model.gguf --mode full --resume
  python nkat_auto_optimizer.py --model model.gguf --mode full --storage postgresql://host/db --study-name seven-b
  python nkat_auto_optimizer.py --task vit --help        the image model's search has other options"""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What is searched: the flags of their names, None where one was not given. `study`: how the search is run."""

    model: Path
    target_rank: int | None
    target_gamma: float | None
    theta_source: str
    reference: Path | None
    calibrate: Path | None
    text: Path | None
    chunks: int
    max_overhead: float | None
    study: StudyOptions


CONFLICTS: tuple[tuple[Callable[[SearchOptions], object], str], ...] = (
    (
        lambda o: o.theta_source == "residual" and o.reference is None,
        "--theta-source residual needs --reference, the same model at a higher precision",
    ),
    (
        lambda o: o.theta_source == "weight" and (o.reference or o.calibrate),
        "--reference and --calibrate are for --theta-source residual",
    ),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of this task alone."""
    add = parser.add_argument_group("language model").add_argument
    add("--model", type=Path, required=True, metavar="FILE", help="a .gguf (or .nkat, whose Θ is left out)")
    add("--target-rank", type=commandline.positive_int, metavar="R", help="fix the rank, search the rest")
    add("--target-gamma", type=float, metavar="G", help="fix gamma, search the rest")
    add("--theta-source", choices=SOURCES, default="weight", help="how Θ is made (default weight)")
    add("--reference", type=Path, metavar="FILE", help="the same model at a higher precision, for source residual")
    add("--calibrate", type=Path, metavar="FILE", help="text that weights source residual's error")
    add("--text", type=Path, metavar="FILE", help="text to judge on (default: Python's own documentation)")
    add(
        "--chunks",
        type=commandline.positive_int,
        default=8,
        metavar="N",
        help="chunks of 512 tokens that trials see (default 8); twice as many others are held out for the last word",
    )
    add("--max-overhead", type=float, metavar="PCT", help="a Θ may slow decoding down by so many per cent at most")


def search_options(parser: argparse.ArgumentParser, parsed: argparse.Namespace, study: StudyOptions) -> SearchOptions:
    """The whole of the command line; a mistake ends the program with one line and status 2."""
    options = commandline.taken(SearchOptions, parsed, study=study)
    commandline.check_conflicts(parser, options, CONFLICTS)
    return options
