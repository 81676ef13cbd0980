"""What every search does around its study: its worker processes, the files of its output folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from nkat.host import hardware
from nkat.host.console import note
from nkat.host.files import check_output, make_folder
from nkat.host.record import toolkit_version, write_json
from nkat.study.options import StudyOptions
from nkat.study.study import Objective, best_trials, open_storage, open_study, run_trials

_HISTORY, _STUDY = "optimization_history.json", "optuna_study.json"
PICTURE = "optimization_results.png"
_HELD = "NKAT_WORKER_STDIN"  # in a worker's environment: its stdin is held open by the process that started it


@dataclass(frozen=True, slots=True)
class Search:
    """What a task's study is made of.

    name: of the study, where the user gives none
    settings: all that two trials must share to be comparable
    first_trials: (parameters, user attributes) to run before the sampler's own
    make_sampler: from a seed
    trials: how many, by mode
    """

    name: str
    settings: Mapping[str, Any]
    first_trials: list[tuple[dict[str, Any], dict[str, Any]]]
    make_sampler: Callable[[int], optuna.samplers.BaseSampler]
    pruner: optuna.pruners.BasePruner
    trials: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A study after its trials: whether it was brought to its end, and the seconds that took."""

    study: optuna.Study
    completed: bool
    seconds: float


def prepare(options: StudyOptions) -> StudyOptions:
    """Output folder, threads of this process, Optuna's messages; returns the options with each worker's threads."""
    if options.join and os.environ.get(_HELD):
        threading.Thread(target=_end_with_the_parent, daemon=True).start()
    make_folder(options.output_dir)
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # its warnings are about features marked experimental
    threads = hardware.set_threads(options.threads)
    if options.workers > 1 and options.threads is None:
        return replace(options, threads=hardware.set_threads(max(1, threads // options.workers)))
    return options


def connect(options: StudyOptions, search: Search) -> optuna.Study:
    """Creates or joins the study."""
    return open_study(
        open_storage(options.storage_url),
        options.study_name or search.name,
        search.settings,
        search.first_trials,
        # A worker or a resumed run must not propose again what another one has proposed.
        sampler=lambda done: search.make_sampler(options.seed + 1000 * done + (os.getpid() if options.join else 0)),
        pruner=search.pruner,
        resume=options.resume or options.join or bool(options.storage and options.study_name),
    )


def run(options: StudyOptions, search: Search, study: optuna.Study, objective: Objective) -> Outcome:
    """All trials, with as many processes as the user wants."""
    started = time.perf_counter()
    helpers = [_start_worker(options, study.study_name, number) for number in range(1, options.workers)]
    target = options.trials or search.trials[options.mode]
    completed = run_trials(study, objective, target, options.timeout, "worker" if options.join else "searching")
    for number, helper in enumerate(helpers, 1):
        if not completed:
            helper.send_signal(signal.SIGINT)
        if helper.wait():
            log = _worker_log(options, number)
            note(f"warning: worker {number} ended with status {helper.returncode}; see {log}")
    if not completed and not options.join:
        note("interrupted: reporting on what there is; --resume continues")
    return Outcome(study, completed, time.perf_counter() - started)


def base_record(options: StudyOptions, outcome: Outcome, device: torch.device) -> dict[str, Any]:
    """What the record of any search says."""
    study = outcome.study
    counted = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    return {
        "task": options.task,
        "mode": options.mode,
        "study": study.study_name,
        "storage": options.storage_url,
        "sampler": type(study.sampler).__name__,
        "pruner": type(study.pruner).__name__,
        "seed": options.seed,
        "trials": {state.name: sum(t.state == state for t in study.trials) for state in counted},
        "best_trial": next((trial.number for trial in best_trials(study, 1)), None),
        "search_seconds": round(outcome.seconds, 1),
        "machine": hardware.describe(device),
        "versions": {"optuna": optuna.__version__},
        **toolkit_version(),
    }


def write_records(folder: Path, trials: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> None:
    """Every trial, and the summary."""
    write_json({"trials": list(trials)}, str(folder / _HISTORY), force=True)
    write_json(dict(record), str(folder / _STUDY), force=True)


def counts_line(record: Mapping[str, Any]) -> str:
    """How the trials ended, for people."""
    counts = record["trials"]
    return (
        f"{counts['COMPLETE']} trials completed, {counts['PRUNED']} stopped early, {counts['FAIL']} failed, "
        f"in {record['search_seconds']:.0f} s"
    )


def _worker_log(options: StudyOptions, number: int) -> Path:
    return options.output_dir / f"worker-{number}.log"


def own_program() -> str:
    """What this process runs. Windows' console scripts are NAME.exe, which Python can run, but call themselves NAME."""
    name = sys.argv[0]
    return name if Path(name).is_file() else f"{name}.exe"


def _start_worker(options: StudyOptions, study_name: str, number: int) -> subprocess.Popen:
    """Another process of the same command that joins the study and runs trials; its messages go to a log.

    In a session of its own, so that Ctrl-C reaches it once, from here, and not twice. Its stdin is a pipe that this
    process holds open: when that ends, this process has ended, however it did.
    """
    command = [sys.executable, own_program(), *sys.argv[1:], "--join", "--workers", "1", "--study-name", study_name]
    command += ["--storage", options.storage_url]
    command += ["--threads", str(options.threads)] if options.threads else []
    check_output(_worker_log(options, number), force=True)  # a pipe would wait for ever
    with _worker_log(options, number).open("w") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, _HELD: "1"},
        )


def _end_with_the_parent() -> None:
    """A worker's: its running trial is tried again by whoever goes on with the study."""
    os.read(0, 1)  # nothing is ever written there
    os.kill(os.getpid(), signal.SIGTERM)
