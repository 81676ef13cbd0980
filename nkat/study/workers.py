"""What every search does around its study: its worker processes, interruptions, what its record says."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import optuna
import torch
from optuna.trial import TrialState

from nkat.host import hardware
from nkat.host.console import counted, note
from nkat.host.files import check_output
from nkat.host.record import toolkit_version
from nkat.host.start import INTERRUPTED
from nkat.study.options import StudyOptions
from nkat.study.space import Space, proposer
from nkat.study.study import (
    Objective,
    best_trials,
    is_interrupted,
    is_repeated,
    open_storage,
    open_study,
    retry_unfinished,
    run_trials,
    study_id,
    without_password,
)

_STOP_SECONDS = 20  # for the other processes to put their trials back into the queue
_HELD = "NKAT_WORKER_STDIN"  # in a worker's environment: its stdin is held open by the process that started it

Judged = TypeVar("Judged")


@dataclass(frozen=True, slots=True)
class Search:
    """What a task's study is made of.

    name: of the study, where the user gives none
    settings: all that two trials must share to be comparable
    first_trials: (parameters, user attributes) to run before the sampler's own
    space: what may be tried
    make_sampler: from a seed
    trials: how many, by mode
    """

    name: str
    settings: Mapping[str, Any]
    first_trials: list[tuple[dict[str, Any], dict[str, Any]]]
    space: Space
    make_sampler: Callable[[int], optuna.samplers.BaseSampler]
    pruner: optuna.pruners.BasePruner
    trials: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A study after its trials, and the seconds they took.

    interrupted: by Ctrl-C or the like, so that nothing more is to be measured
    used_up: every setting was tried
    """

    study: optuna.Study
    interrupted: bool
    used_up: bool
    seconds: float


def prepare(options: StudyOptions) -> StudyOptions:
    """Threads of this process, Optuna's messages; returns the options with each worker's threads."""
    if options.join and os.environ.get(_HELD):
        threading.Thread(target=_end_with_the_parent, daemon=True).start()
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
        sampler=search.make_sampler(options.seed),
        pruner=search.pruner,
        resume=options.may_join,
    )


def run(options: StudyOptions, search: Search, study: optuna.Study, objective: Objective) -> Outcome:
    """All trials, with as many processes as the user wants. After an interruption the trials that ran wait again."""
    # A worker must not propose what another one proposes at the same time.
    salt = os.getpid() if options.join else 0
    propose = proposer(search.space, lambda done: search.make_sampler(options.seed + 1000 * done + salt))
    target = options.trials or search.trials[options.mode]
    started = time.perf_counter()
    helpers: list[subprocess.Popen] = []
    interrupted = used_up = False
    try:
        for number in range(1, options.workers):
            helpers.append(_start_worker(options, study.study_name, number))
        label = "worker" if options.join else "searching"
        used_up = run_trials(study, objective, propose, target, options.timeout, label)
        if used_up and not options.join:
            note("every setting that may be tried was tried: the search ends here")
        for number, helper in enumerate(helpers, 1):
            if helper.wait():
                log = _worker_log(options, number)
                note(f"warning: worker {number} ended with status {helper.returncode}; see {log}")
    except KeyboardInterrupt:
        interrupted = True
        _stop(helpers)
        # What was being read when it came may be half read.
        reopened = open_storage(options.storage_url)
        study = optuna.load_study(
            study_name=study.study_name, storage=reopened, sampler=study.sampler, pruner=study.pruner
        )
        retry_unfinished(study)
        if options.join:
            raise
    return Outcome(study, interrupted, used_up, time.perf_counter() - started)


@contextlib.contextmanager
def interruptible(options: StudyOptions) -> Iterator[None]:
    """Around a study's trials and its report: Ctrl-C, however often, ends with status 130 and says what there is."""
    try:
        yield
    except KeyboardInterrupt:
        note(
            f"interrupted; finished trials are in {without_password(options.storage_url)}, --resume goes on from there"
        )
        sys.exit(INTERRUPTED)


def report(
    outcome: Outcome, judge: Callable[[optuna.Study], Judged], write: Callable[[Outcome, Judged | None], None]
) -> None:
    """Judges the best trials and has the report written; without a judgement where the search or it was interrupted."""
    judged = None
    if not outcome.interrupted:
        try:
            judged = judge(outcome.study)
        except KeyboardInterrupt:
            outcome = replace(outcome, interrupted=True)
    write(outcome, judged)
    if outcome.interrupted:
        raise KeyboardInterrupt


def _stop(helpers: Sequence[subprocess.Popen]) -> None:
    """Interrupts the other processes; those that do not end are killed, as all are when the user is impatient."""
    for helper in helpers:
        helper.send_signal(signal.SIGINT)
    try:
        deadline = time.monotonic() + _STOP_SECONDS
        for helper in helpers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                helper.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for helper in helpers:
            helper.kill()
            helper.wait()


def base_record(options: StudyOptions, outcome: Outcome, device: torch.device) -> dict[str, Any]:
    """What the record of any search says."""
    study = outcome.study
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    begun = [trial for trial in study.trials if not is_repeated(trial) and not is_interrupted(trial)]
    return {
        "task": options.task,
        "mode": options.mode,
        "study": study.study_name,
        "study_id": study_id(study),
        "storage": without_password(options.storage_url),
        "sampler": type(study.sampler).__name__,
        "pruner": type(study.pruner).__name__,
        "seed": options.seed,
        "trials": {state.name: sum(t.state == state for t in begun) for state in states},
        "interrupted": outcome.interrupted,
        "space_used_up": outcome.used_up,
        "best_trial": next((trial.number for trial in best_trials(study, 1)), None),
        "search_seconds": round(outcome.seconds, 1),
        "machine": hardware.describe(device),
        "versions": {"optuna": optuna.__version__},
        **toolkit_version(),
    }


def counts_line(record: Mapping[str, Any]) -> str:
    """How the trials ended, for people."""
    counts = record["trials"]
    return (
        f"{counted(counts['COMPLETE'], 'trial')} completed, {counts['PRUNED']} stopped early, {counts['FAIL']} failed, "
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
