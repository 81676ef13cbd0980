"""One thing that can be searched, as the optimiser's command line sees it."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from nkat.host import commandline
from nkat.host.record import check_record
from nkat.study import options as study
from nkat.study import workers
from nkat.study.options import StudyOptions
from nkat.study.study import storage_failures

Options = TypeVar("Options")


@dataclass(frozen=True, slots=True)
class Task(Generic[Options]):
    """A search: what its help says, its own flags, and the job.

    trials: how many a mode has
    options: makes the frozen options out of the parsed command line; ends the program for flags that do not go together
    """

    description: str
    examples: str
    trials: Mapping[str, int]
    add_options: Callable[[argparse.ArgumentParser], None]
    options: Callable[[argparse.ArgumentParser, argparse.Namespace, StudyOptions], Options]
    run: Callable[[Options], None]


def run_task(modules: Mapping[str, str], argv: Sequence[str] | None = None) -> None:
    """Runs the search that --task names; modules: where the `TASK` of each is, imported when it is asked for."""
    first = commandline.Parser(add_help=False, allow_abbrev=False)
    names = list(modules)
    first.add_argument("--task", choices=names, default=names[0], help=f"what to search (default {names[0]})")
    task: Task = importlib.import_module(modules[first.parse_known_args(argv)[0].task]).TASK
    parser = commandline.parser(task.description, task.examples, parents=[first])
    task.add_options(parser)
    study.add_options(parser, task.trials)
    parsed = parser.parse_args(argv)
    shared = study.study_options(parser, parsed)
    task.options(parser, parsed, shared)  # what does not go together is said before a folder is made
    if not shared.join:
        check_record(shared.json, shared.force)
    with storage_failures():
        task.run(task.options(parser, parsed, workers.prepare(shared)))
