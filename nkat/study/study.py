"""An Optuna study that survives: storage, workers on one or many machines, resuming, and its records.

Knows nothing of what is searched: a task gives an objective and gets finished trials. The default storage is a journal
file in the output folder; any other Optuna storage is named by its URL.
"""

from __future__ import annotations

import contextlib
import math
import re
import socket
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from time import monotonic, sleep
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from nkat.errors import NKATError
from nkat.host import console
from nkat.host.console import counted, note
from nkat.host.interrupts import Gate
from nkat.host.processes import identity, is_alive
from nkat.host.programs import shell_line
from nkat.study.journal import Journal
from nkat.study.space import POINT, Propose, key_of

JOURNAL_NAME = "study.journal"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
FEWEST_FOR_IMPORTANCES = 20  # from fewer, what is drawn is the draw
_SETTINGS = "settings"
_WORKER = "worker"
_ORIGIN = "retry of"
_ID = "id"
_REPEATED = "repeated"
_INTERRUPTED = "interrupted"
_OWN = (_WORKER, POINT, _REPEATED, _INTERRUPTED)  # what is in trials for this module's sake
_DRIVERS = {
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
}  # module → package, where their names differ
_UNCLAIMED_SECONDS = 60.0  # between a trial's beginning and its worker's name in it lies one write to the storage

Objective = Callable[[optuna.Trial], float]


class _RepeatedError(Exception):
    """Two processes proposed the same setting at once; the later trial ends without having been anything."""


def open_storage(where: str) -> optuna.storages.BaseStorage:
    """A storage from what the user named: a database URL, `grpc://host:port`, or the path of a journal file.

    Raises NKATError when it cannot be reached.
    """
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # so marked since version 3
    try:
        if where.startswith("grpc://"):
            host, _, port = where.removeprefix("grpc://").partition(":")
            return optuna.storages.GrpcStorageProxy(host=host, port=int(port or 13000))
        if "://" in where:
            # With `pool_pre_ping` a server that was started anew while a trial ran is connected to again.
            return _Database(where, engine_kwargs={"pool_pre_ping": True}, heartbeat_interval=60, grace_period=180)
        return optuna.storages.JournalStorage(Journal(where))
    except NKATError:
        raise
    except Exception as error:  # each database driver has exceptions of its own
        raise NKATError(f"storage {without_password(where)}: {_first_line(error)}") from error


def check_driver(where: str) -> None:
    """Raises NKATError where the storage is a database for which this Python has no driver; connects to nothing."""
    if "://" not in where or where.startswith("grpc://"):
        return
    import sqlalchemy

    try:
        sqlalchemy.create_engine(where)
    except ModuleNotFoundError as error:
        package = _DRIVERS.get(error.name or "", error.name)
        raise NKATError(
            f"storage {without_password(where)}: this Python has no {error.name}, the driver for such a database; "
            f"install it: {shell_line([sys.executable, '-m', 'pip', 'install', str(package)])}"
        ) from None
    except sqlalchemy.exc.ArgumentError as error:
        raise NKATError(f"storage {without_password(where)}: {_first_line(error)}") from None


def without_password(where: str) -> str:
    """A storage as it may be shown to others."""
    return re.sub(r"(://[^:/@]*):.*@", r"\1:***@", where)


class _Database(optuna.storages.RDBStorage):
    """Optuna's, whose heartbeat, in a thread of its own, survives that the database is gone for a while."""

    def record_heartbeat(self, trial_id: int) -> None:
        try:
            super().record_heartbeat(trial_id)
        except Exception as error:
            found = _of_the_storage(error)
            if found is None:
                raise
            note(f"warning: the study's storage fails: {_first_line(found)}; trying again")


@contextlib.contextmanager
def storage_failures() -> Iterator[None]:
    """A storage that fails in the block (a full disk, a database that is gone) is one line."""
    try:
        yield
    except Exception as error:
        found = _of_the_storage(error)
        if found is None or (found is error and isinstance(error, NKATError)):
            raise
        if isinstance(found, NKATError):
            raise found from error
        line = _first_line(found)
        raise NKATError(f"the study's storage fails: {line}; what was finished is kept: --resume continues") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _of_the_storage(error: BaseException | None) -> BaseException | None:
    """What a storage raised, in an error or in what led to it; None where no storage did.

    Where the result of a trial cannot be stored, Optuna ends with faults of its own.
    """
    internal = (AssertionError, UnboundLocalError, optuna.exceptions.StorageInternalError)
    while isinstance(error, internal):
        error = error.__cause__ or error.__context__
    drivers = ("sqlalchemy", "grpc")
    is_driver = error is not None and type(error).__module__.partition(".")[0] in drivers
    return error if is_driver or isinstance(error, NKATError) else None


def make_sampler(seed: int, conditional: bool = False) -> optuna.samplers.BaseSampler:
    """Tree-structured Parzen estimator (Watanabe, 2023, arXiv 2304.11127) over the space as a whole.

    conditional: some parameters exist for some values of others only
    """
    return optuna.samplers.TPESampler(seed=seed % (1 << 32), n_startup_trials=5, multivariate=True, group=conditional)


def open_study(
    storage: optuna.storages.BaseStorage,
    name: str,
    settings: Mapping[str, Any],
    first_trials: list[tuple[dict[str, Any], dict[str, Any]]],
    *,
    sampler: optuna.samplers.BaseSampler,
    pruner: optuna.pruners.BasePruner,
    resume: bool,
) -> optuna.Study:
    """Creates the study, or joins or continues one that was made with the same settings.

    settings: all that two trials must share to be comparable; checked when joining
    first_trials: (parameters, user attributes) to run before those that are proposed
    sampler: of the kind that proposes; for the record
    resume: an existing study is continued; otherwise it is an error. Trials whose process died are tried again.
    """
    try:
        study = optuna.create_study(
            study_name=name, direction="maximize", sampler=sampler, storage=storage, pruner=pruner
        )
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
        if not resume:
            raise exists_already(study) from None
        if _is_half_begun(study, len(first_trials)):
            _begin(study, settings, first_trials)
        found = study.user_attrs.get(_SETTINGS, {})
        for key in settings:
            if found.get(key) != settings[key]:
                raise NKATError(
                    f"study {name!r} was made with another {key}: {found.get(key)!r} there, {settings[key]!r} here"
                ) from None
        retry_unfinished(study)
        return study
    _begin(study, settings, first_trials)
    return study


def _begin(
    study: optuna.Study, settings: Mapping[str, Any], first_trials: list[tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    """What is not yet there of what a study begins with. Its settings come last: with them it has begun."""
    if _ID not in study.user_attrs:
        study.set_user_attr(_ID, uuid.uuid4().hex)
    for parameters, attributes in first_trials[len(study.trials) :]:
        _queue(study, parameters, attributes)
    study.set_user_attr(_SETTINGS, dict(settings))


def _is_half_begun(study: optuna.Study, first_trials: int) -> bool:
    """Whether a process was killed, or its disk was full, after it made a study and before the study had begun."""
    states = [trial.state for trial in study.trials]
    return _SETTINGS not in study.user_attrs and states == [TrialState.WAITING] * min(len(states), first_trials)


def find_study(storage: optuna.storages.BaseStorage, name: str) -> optuna.Study | None:
    """The study of this name, if there is one."""
    if name not in optuna.get_all_study_names(storage):
        return None
    return optuna.load_study(study_name=name, storage=storage)


def exists_already(study: optuna.Study) -> NKATError:
    """What to tell a user who did not ask to go on with it."""
    return NKATError(
        f"study {study.study_name!r} exists already with {counted(len(study.trials), 'trial')}: give --resume to "
        "continue or join it, or another --output-dir or --study-name"
    )


def study_id(study: optuna.Study) -> str | None:
    """Another one for each study, whatever its name and storage; None for one that an earlier version made."""
    return study.user_attrs.get(_ID)


@storage_failures()
def run_trials(
    study: optuna.Study, objective: Objective, propose: Propose, target: int, timeout: float | None, label: str
) -> bool:
    """Runs trials until the study has `target` finished ones, all workers' together. True: every setting was tried.

    propose: the parameters of the next trial. A KeyboardInterrupt ends the running trial at once; then
    `retry_unfinished`, on a study that is opened anew, puts it back.
    """
    bar = console.bar(target, label, "trial", at_once=True)
    with bar, Gate().closed() as gate:  # outside the objective an interruption could leave a trial that is nobody's

        def update(*_: object) -> None:
            finished = study.get_trials(deepcopy=False, states=FINISHED)
            best = best_trials(study, 1)
            if best:
                bar.set_postfix_str(f"best {best[0].value:.6f} (trial {best[0].number})", refresh=False)
            bar.update(len(finished) - bar.n)

        def marked(trial: optuna.Trial) -> float:
            if _comes_second(study, trial):
                trial.set_user_attr(_REPEATED, True)
                raise _RepeatedError
            trial.set_user_attr(_WORKER, f"{socket.gethostname()}:{identity()}")
            try:
                with gate.let_through():
                    return objective(trial)
            except KeyboardInterrupt:
                trial.set_user_attr(_INTERRUPTED, True)
                raise

        update()
        deadline = math.inf if timeout is None else monotonic() + timeout
        unclaimed: dict[int, float] = {}
        while monotonic() < deadline:
            gate.check()
            retry_unfinished(study, unclaimed)  # of other workers
            if not _room(study, target):
                if not unclaimed:
                    return False
                sleep(0.1)
                continue
            if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                proposed = propose(study.get_trials(deepcopy=False))
                if proposed is None:
                    return True
                _queue(study, proposed, {})
            study.optimize(marked, n_trials=1, catch=(_RepeatedError,), callbacks=[update])
    return False


def best_trials(study: optuna.Study, count: int) -> list[FrozenTrial]:
    """The completed trials with the highest values that break no constraint, best first."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    valued = [(-trial.value, trial.number, trial) for trial in complete if trial.value is not None and feasible(trial)]
    return [trial for _, _, trial in sorted(valued, key=lambda row: row[:2])[:count]]


def feasible(trial: FrozenTrial) -> bool:
    """Whether the trial completed and breaks no constraint."""
    return trial.state == TrialState.COMPLETE and all(value <= 0 for value in trial.constraints.values())


def history(study: optuna.Study) -> list[dict[str, Any]]:
    """Every trial that was begun: number, state, value, parameters, what its objective recorded, seconds.

    The state is Optuna's, or REPEATED: another process was trying the same setting already.
    """
    rows = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.WAITING:
            continue
        attributes = {name: value for name, value in trial.user_attrs.items() if name not in _OWN}
        rows.append(
            {
                "number": trial.number,
                "state": "REPEATED" if is_repeated(trial) else trial.state.name,
                "value": trial.value if trial.state == TrialState.COMPLETE else None,
                "parameters": {k: round(v, 9) if isinstance(v, float) else v for k, v in trial.params.items()},
                **attributes,
                "constraints": dict(trial.constraints),
                "feasible": feasible(trial),
                "worker": trial.user_attrs.get(_WORKER),
                "seconds": trial.duration.total_seconds() if trial.duration else None,
            }
        )
    return rows


def is_repeated(trial: FrozenTrial) -> bool:
    """Whether it ended because another process was trying its setting already."""
    return bool(trial.user_attrs.get(_REPEATED))


def is_interrupted(trial: FrozenTrial) -> bool:
    """Whether it ended because the user wanted to: another one tries its setting again."""
    return bool(trial.user_attrs.get(_INTERRUPTED))


def origin(trial: FrozenTrial | optuna.Trial) -> int:
    """The trial's number; of one that repeats a trial whose process died, the number of that."""
    return trial.user_attrs.get(_ORIGIN, trial.number)


def importances(trials: Iterable[tuple[FrozenTrial, float]]) -> dict[str, float]:
    """Share of the scores' variation among the best trials by parameter (PED-ANOVA); empty when there are too few,
    or all score alike.

    Watanabe et al., 2023, "PED-ANOVA", arXiv 2304.10255.
    trials: each with the score to explain; those without parameters do not take part
    """
    scored = [
        optuna.trial.create_trial(params=t.params, distributions=t.distributions, value=value)
        for t, value in trials
        if t.params
    ]
    if len(scored) < FEWEST_FOR_IMPORTANCES or len({trial.value for trial in scored}) < 2:
        return {}
    narrowed = optuna.create_study(direction="maximize")
    narrowed.add_trials(scored)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of few trials for a parameter that exists for some others only
        return optuna.importance.get_param_importances(narrowed, evaluator=evaluator)


def _room(study: optuna.Study, target: int) -> bool:
    """Whether another trial may start: those that are running count as if they were finished."""
    states = (*FINISHED, TrialState.RUNNING)
    return len(study.get_trials(deepcopy=False, states=states)) < target


def retry_unfinished(study: optuna.Study, unclaimed: dict[int, float] | None = None) -> None:
    """Queues again what interrupted trials, and those of processes that died on this machine, were trying.

    unclaimed: running trials that no worker has put its name to, and since when that is known here; kept up to date.
    One that stays so was begun by a process that died at once.
    """
    unclaimed = {} if unclaimed is None else unclaimed
    unfinished = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.FAIL))
    nameless = {t.number for t in unfinished if t.state == TrialState.RUNNING and _WORKER not in t.user_attrs}
    for number in unclaimed.keys() - nameless:
        del unclaimed[number]
    for trial in unfinished:
        if trial.state == TrialState.FAIL:
            if not trial.user_attrs.get(_INTERRUPTED) or _is_retried(study, trial):
                continue
        elif trial.number in nameless:
            if monotonic() - unclaimed.setdefault(trial.number, monotonic()) < _UNCLAIMED_SECONDS:
                continue
        else:
            host, _, process = trial.user_attrs[_WORKER].partition(":")
            if host != socket.gethostname() or is_alive(process):
                continue
        if trial.state == TrialState.RUNNING:
            try:
                study.tell(trial.number, state=TrialState.FAIL)
            except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
                continue  # another worker saw it first
        attributes = {name: value for name, value in trial.user_attrs.items() if name not in _OWN}
        _queue(study, trial.user_attrs.get(POINT, trial.params), attributes | {_ORIGIN: origin(trial)})


def _is_retried(study: optuna.Study, trial: FrozenTrial) -> bool:
    later = study.get_trials(deepcopy=False)[trial.number + 1 :]
    return any(other.user_attrs.get(_ORIGIN) == origin(trial) for other in later)


def _queue(study: optuna.Study, parameters: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
    study.enqueue_trial(dict(parameters), user_attrs={**attributes, POINT: dict(parameters)})


def _comes_second(study: optuna.Study, trial: optuna.Trial) -> bool:
    """Whether an earlier trial has the same setting, or this one none: another process took the one from the queue."""
    if POINT not in trial.user_attrs:
        return True
    # A trial has its number and its setting from the same moment, so that all processes see the same one first.
    *earlier, this = study.get_trials(deepcopy=False)[: trial.number + 1]
    tried = {key_of(other) for other in earlier if other.state != TrialState.FAIL}
    return bool(this.user_attrs[POINT]) and key_of(this) in tried
