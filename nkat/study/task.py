"""One thing that can be searched, as the optimiser's command line sees it."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from nkat.host import commandline
from nkat.host.files import output_folder
from nkat.host.record import check_record
from nkat.study import options as study
from nkat.study import workers
from nkat.study.folder import check_place
from nkat.study.options import StudyOptions
from nkat.study.study import check_driver, storage_failures

Options = TypeVar("Options")


@dataclass(frozen=True, slots=True)
class Task(Generic[Options]):
    """A search: what its help says, its own flags, and the job.

    trials: how many a mode has
    name: of the study, where the user gives none
    inputs: the files that are read, which nothing may replace
    options: makes the frozen options out of the parsed command line; ends the program for flags that do not go together
    has_begun: whether something in the output folder, made before there is a study, is to be gone on with
    """

    description: str
    examples: str
    trials: Mapping[str, int]
    name: Callable[[Options], str]
    inputs: Callable[[Options], Iterable[Path | None]]
    add_options: Callable[[argparse.ArgumentParser], None]
    options: Callable[[argparse.ArgumentParser, argparse.Namespace, StudyOptions], Options]
    run: Callable[[Options], None]
    has_begun: Callable[[Options], bool] = lambda _: False


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
    options = task.options(parser, parsed, shared)
    if not shared.join:
        check_record(shared.json, shared.force, task.inputs(options))
        check_driver(shared.storage_url)
        check_place(shared, task.name(options), task.has_begun(options))
    with output_folder(shared.output_dir), storage_failures():
        task.run(task.options(parser, parsed, workers.prepare(shared)))
