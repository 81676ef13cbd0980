"""The options that all searches share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nkat.host import commandline
from nkat.study.study import JOURNAL_NAME


@dataclass(frozen=True, slots=True)
class StudyOptions:
    """How a study is run: the flags of their names, None where one was not given.

    task: what is searched, "lm" or "vit"
    join: this process is a worker that another one has started: it runs trials and reports nothing
    """

    task: str
    mode: str
    trials: int | None
    output_dir: Path
    storage: str | None
    study_name: str | None
    resume: bool
    workers: int
    timeout: float | None
    seed: int
    threads: int | None
    force: bool
    json: str | None
    join: bool

    @property
    def storage_url(self) -> str:
        """Where the study is: what the user named, else a journal file in the output folder."""
        return self.storage or str(self.output_dir / JOURNAL_NAME)

    @property
    def may_join(self) -> bool:
        """Whether a study that is there already is gone on with."""
        return self.resume or self.join or bool(self.storage and self.study_name)


def add_options(parser: argparse.ArgumentParser, trials: Mapping[str, int]) -> None:
    """Adds the group of flags; `trials` says how many a mode has."""
    add = parser.add_argument_group("study").add_argument
    counts = ", ".join(f"{mode}: {count}" for mode, count in trials.items())
    add("--mode", choices=(*trials, "custom"), default="quick", help=f"how many trials ({counts}, custom: --trials)")
    add("--trials", type=commandline.positive_int, metavar="N", help="how many trials, with --mode custom")
    add("--output-dir", type=Path, default=Path("output/optimized"), metavar="DIR", help="default output/optimized")
    add(
        "--storage",
        metavar="WHERE",
        help="any Optuna storage: a database URL, grpc://host:port or a journal file "
        "(default: a journal file in --output-dir)",
    )
    add(
        "--study-name",
        metavar="NAME",
        help="with --storage: join the study of this name, or start it (default: from what is searched)",
    )
    add("--resume", action="store_true", help="continue an existing study")
    add(
        "--workers", type=commandline.thread_count, default=1, metavar="N", help="processes on this machine (default 1)"
    )
    add("--timeout", type=commandline.seconds, metavar="SECONDS", help="start no further trial after so long")
    add("--seed", type=commandline.seed, default=0, help="of everything random (default 0)")
    add("--threads", type=commandline.thread_count, metavar="N", help="processor threads of each worker")
    add(
        "--force",
        action="store_true",
        help="write the best setting even if it misses what it has to reach; replace --json, and another search's "
        "reports in --output-dir",
    )
    add("--json", metavar="FILE", help='write the summary; "-" for stdout')
    commandline.add_output_format(parser)
    add("--join", action="store_true", help=argparse.SUPPRESS)  # a worker that --workers starts: trials, no report


def study_options(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> StudyOptions:
    """The group's flags out of a parsed command line."""
    options = commandline.taken(StudyOptions, parsed)
    if (options.mode == "custom") != (options.trials is not None):
        parser.error("--trials goes with --mode custom, and --mode custom needs it")
    return options
