"""The optimiser's command line: which task, and that task's own options.

A task's job is imported by name: the language side does not know the image side.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from types import ModuleType

from nkat.host import commandline
from nkat.host.record import check_record
from nkat.study import workers

JOBS = {"lm": "nkat.search.job", "vit": "nkat_vit.search_job"}


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[ModuleType, argparse.Namespace]:
    """The task's job and the options: each task has its own."""
    first = commandline.Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", choices=list(JOBS), default="lm", help="what to search (default lm)")
    job = importlib.import_module(JOBS[first.parse_known_args(argv)[0].task])
    parser = commandline.parser(job.DESCRIPTION, job.EXAMPLES, parents=[first])
    job.add_options(parser)
    workers.add_options(parser, job.TRIALS)
    options = parser.parse_args(argv)
    if (options.mode == "custom") != (options.trials is not None):
        parser.error("--trials goes with --mode custom, and --mode custom needs it")
    job.check(parser, options)
    return job, options


def main() -> None:
    job, options = parse_arguments()
    if not options.join:
        check_record(options.json, options.force)
    workers.prepare(options)
    job.run(options)
