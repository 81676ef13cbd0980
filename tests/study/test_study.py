"""The study: workers that die, resuming, determinism, constraints. The objective here is a formula, not a model."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest.mock import Mock

import optuna
import pytest
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from nkat.errors import NKATError
from nkat.study.space import proposer
from nkat.study.study import FINISHED, best_trials, history, importances, open_storage, open_study, run_trials
from tests.conftest import ROOT

WORKER = textwrap.dedent(
    """
    import sys, time
    import optuna
    from nkat.study.space import proposer
    from nkat.study.study import open_storage, open_study, run_trials
    from tests.study.test_study import Line

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    where, target, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])

    def objective(trial):
        x = trial.suggest_float("x", 0, 1)
        print("running", trial.number, flush=True)
        time.sleep(seconds)
        return -x * x

    import os
    study = open_study(open_storage(where), "s", {"a": 1}, [({"x": 0.5}, {})], resume=True,
        sampler=optuna.samplers.RandomSampler(), pruner=optuna.pruners.NopPruner())
    propose = proposer(Line(), lambda done: optuna.samplers.RandomSampler(seed=os.getpid() + done))
    run_trials(study, objective, propose, target, None, "worker")
    """
)


class Line:
    """x anywhere between 0 and 1: never used up."""

    def suggest(self, trial: optuna.Trial) -> None:
        trial.suggest_float("x", 0, 1)

    def points(self) -> list:
        return []


class Plane:
    """The objective's."""

    def suggest(self, trial: optuna.Trial) -> tuple[float, int]:
        return trial.suggest_float("x", -1, 1), trial.suggest_categorical("y", (1, 2))

    def points(self) -> list:
        return []


class Few:
    """Twelve settings in all."""

    def suggest(self, trial: optuna.Trial) -> tuple[float, int]:
        return trial.suggest_float("x", -0.5, 0.0, step=0.1), trial.suggest_categorical("y", (1, 2))

    def points(self) -> list[dict]:
        return [{"x": -0.5 + 0.1 * i, "y": y} for i in range(6) for y in (1, 2)]


def run_some(study: optuna.Study, objective, target: int, timeout=None, *, seed=0, space=None) -> bool:
    """Runs trials as the tool does, proposed by TPE."""

    def sampler(done: int) -> optuna.samplers.BaseSampler:
        return optuna.samplers.TPESampler(seed=seed + 1000 * done, n_startup_trials=3)

    return run_trials(study, objective, proposer(space or Plane(), sampler), target, timeout, "test")


def new_study(where: Path | str, *, settings=None, resume=False, first=()) -> optuna.Study:
    return open_study(
        open_storage(str(where)),
        "s",
        settings or {"a": 1},
        list(first),
        sampler=optuna.samplers.TPESampler(),
        pruner=optuna.pruners.NopPruner(),
        resume=resume,
    )


def objective(trial: optuna.Trial) -> float:
    x, y = Plane().suggest(trial)
    trial.set_user_attr("note", y)
    return -((x - 0.3) ** 2) * y


def start_worker(where: Path | str, target: int, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, str(where), str(target), str(seconds)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=subprocess.DEVNULL, text=True)


def four_workers_two_killed(where: str) -> list[dict]:
    """Runs the scenario on any storage and returns the trials at its end."""
    new_study(where, resume=True)
    workers = [start_worker(where, 16, 0.4) for _ in range(4)]
    try:
        for victim in workers[:2]:
            assert victim.stdout.readline().startswith("running")
            victim.send_signal(signal.SIGKILL)
        finished_before = {t.number: t.value for t in new_study(where, resume=True).get_trials(states=FINISHED)}
        for worker in workers:
            worker.wait(timeout=120)
        # The dead workers' trials were queued again by the line above; another worker takes what is left.
        start_worker(where, 16, 0.01).wait(timeout=60)
        trials = history(new_study(where, resume=True))
    finally:
        for worker in workers:
            worker.kill()
    numbers = [row["number"] for row in trials]
    assert numbers == list(range(len(trials)))
    assert {row["number"]: row["value"] for row in trials if row["number"] in finished_before} == finished_before
    assert sum(row["state"] == "COMPLETE" for row in trials) >= 16
    return trials


def test_four_workers_of_which_two_are_killed(tmp_path: Path) -> None:
    trials = four_workers_two_killed(str(tmp_path / "study.journal"))
    assert sum(row["state"] == "FAIL" for row in trials) == 2
    assert not any(row["state"] == "RUNNING" for row in trials)


def test_postgresql(tmp_path: Path) -> None:
    url = os.environ.get("NKAT_TEST_POSTGRESQL")
    if url is None:
        pytest.skip("NKAT_TEST_POSTGRESQL names no database (see benchmarks/optimizer_postgresql.py)")
    four_workers_two_killed(url)


def test_a_killed_trial_is_tried_again_with_its_parameters(tmp_path: Path) -> None:
    where = tmp_path / "study.journal"
    new_study(where, first=[({"x": 0.25}, {"base": True})])
    worker = start_worker(where, 3, 60)
    worker.stdout.readline()
    worker.kill()
    worker.wait()
    study = new_study(where, resume=True)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    run_some(study, lambda trial: trial.suggest_float("x", 0, 1), 1, space=Line())
    assert study.trials[1].params == {"x": 0.25}
    assert study.trials[1].user_attrs["base"] is True


def test_a_trial_that_nobody_claims_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process was killed between beginning it and putting its name to it."""
    monkeypatch.setattr("nkat.study.study._UNCLAIMED_SECONDS", 0.3)
    where = tmp_path / "study.journal"
    new_study(where, first=[({"x": 0.25, "y": 1}, {"base": True})]).ask()
    study = new_study(where, resume=True)
    assert [t.state for t in study.trials] == [TrialState.RUNNING]  # it may have been begun this moment
    run_some(study, objective, 1)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert study.trials[1].params == {"x": 0.25, "y": 1}
    assert study.trials[1].user_attrs["base"] is True


@pytest.mark.skipif(os.name == "nt", reason="Windows has no zombies")
def test_a_killed_worker_that_nobody_has_waited_for_is_dead(tmp_path: Path) -> None:
    where = tmp_path / "study.journal"
    new_study(where, first=[({"x": 0.25}, {})])
    worker = start_worker(where, 3, 60)
    try:
        worker.stdout.readline()
        living = new_study(where, resume=True)
        assert [t.state for t in living.trials] == [TrialState.RUNNING]  # control
        worker.kill()
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
        assert [t.state for t in new_study(where, resume=True).trials] == [TrialState.FAIL, TrialState.WAITING]
    finally:
        worker.kill()
        worker.wait()


def test_a_torn_journal_is_resumed_from_its_last_whole_record(tmp_path: Path, capsys) -> None:
    where = tmp_path / "study.journal"
    run_some(new_study(where), objective, 4)
    whole = where.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    ends = {
        "half a record": (whole[:-10], whole[:last], 1),
        "no line break": (whole[:-1], whole, 0),
        "zeros": (whole + bytes(300), whole, 1),
        "garbage": (whole + b"\xff{]\n[1]\n", whole, 1),
        "torn and written on": (whole[:-10] + whole[last:] * 3, whole[:last], 1),
        "whole": (whole, whole, 0),
    }
    for name, (content, good, notes) in ends.items():
        where.write_bytes(content)
        capsys.readouterr()
        open_storage(str(where))
        assert where.read_bytes() == good, name
        assert capsys.readouterr().err.count("note: ") == notes, name
        cut = sorted(tmp_path.glob("study.journal.cut-*"))
        assert len(cut) == notes, name
        for path in cut:
            assert path.read_bytes() == content[len(good) :], name
            path.unlink()
        study = new_study(where, resume=True)
        run_some(study, objective, 6)
        # where the last record of a trial is lost it counts as running, as long as this process is there
        assert len(new_study(where, resume=True).get_trials(states=FINISHED)) == (6 if good == whole else 5), name
    assert not list(tmp_path.glob("*.lock"))


def test_a_journal_torn_while_others_go_on(tmp_path: Path, capsys) -> None:
    """What a killed worker had half written is cut off by the next that writes, not written on."""
    where = tmp_path / "study.journal"
    here, there = new_study(where), new_study(where, resume=True)
    run_some(here, objective, 2)
    run_some(there, objective, 3)
    for number, torn in enumerate((b'{"op_code":6,"worker_id":"', bytes(40), b"\xff"), 1):
        with where.open("ab") as file:
            file.write(torn)
        assert len(there.get_trials(states=FINISHED)) == 2 + number  # reading alone leaves it
        run_some(here if number % 2 else there, objective, 3 + number)
        assert (tmp_path / f"study.journal.cut-{number}").read_bytes() == torn
        assert capsys.readouterr().err.count("note: ") == 1
    for study in (here, there, new_study(where, resume=True)):
        assert len(study.get_trials(states=FINISHED)) == 6
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.skipif(os.name == "nt", reason="no limit of a file's size")
@pytest.mark.parametrize("room", [0, 1, 50, 300])
def test_a_full_disk_is_one_line_and_tears_nothing(tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the system's limit of a file's size: like a full disk, it takes the first part of what is written."""
    import resource

    where = tmp_path / "study.journal"
    study = new_study(where)
    run_some(study, objective, 2)
    before = where.read_bytes()
    program = f"from nkat.host.commandline import run\ndef main():\n{textwrap.indent(WORKER, '    ')}\nrun(main)\n"
    limit = len(before) + room
    done = subprocess.run(
        [sys.executable, "-c", program, str(where), "5", "0.01"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {where}: cannot be written: File too large (nothing was changed)"]
    assert "Traceback" not in done.stderr
    after = where.read_bytes()
    assert after.startswith(before)
    assert len(after) <= limit
    assert after.endswith(b"\n")
    assert not list(tmp_path.glob("*.cut-*"))
    monkeypatch.setattr("nkat.study.study._UNCLAIMED_SECONDS", 0.2)  # a trial may have been begun, and no more
    run_some(study, objective, 4)  # who was there all the time goes on
    assert len(new_study(where, resume=True).get_trials(states=FINISHED)) == 4


def test_a_seed_gives_the_same_trials(tmp_path: Path) -> None:
    def run(name: str, seed: int) -> list[tuple]:
        study = new_study(tmp_path / name)
        run_some(study, objective, 8, seed=seed)
        return [(t.params["x"], t.params["y"], t.value) for t in study.trials]

    assert run("a", 1) == run("b", 1)
    assert run("c", 2) != run("d", 1)


def test_a_study_that_had_not_begun_begins_when_it_is_resumed(tmp_path: Path) -> None:
    first = [({"x": 0.5}, {"why": "a"}), ({"x": 0.25}, {"why": "b"})]

    def begin(where: Path, settings: dict[str, int]) -> optuna.Study:
        return new_study(where, settings=settings, resume=True, first=first)

    begin(tmp_path / "whole", {"a": 1})
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    assert len(lines) > 4
    for kept in range(1, len(lines)):  # killed behind each of its records
        path = tmp_path / f"cut-{kept}"
        path.write_bytes(b"".join(lines[:kept]))
        study = begin(path, {"a": 1})
        assert study.user_attrs["settings"] == {"a": 1}
        assert [(trial.state, trial.user_attrs["why"]) for trial in study.trials] == [
            (TrialState.WAITING, "a"), (TrialState.WAITING, "b"),
        ]  # fmt: skip
        with pytest.raises(NKATError, match="another a"):
            begin(path, {"a": 2})
    foreign = optuna.create_study(study_name="s", storage=open_storage(str(tmp_path / "foreign")))
    foreign.ask()
    with pytest.raises(NKATError, match="another a"):
        begin(tmp_path / "foreign", {"a": 1})


def test_resuming_runs_only_what_is_missing(tmp_path: Path) -> None:
    where = tmp_path / "study.journal"
    run_some(new_study(where), objective, 4)
    with pytest.raises(NKATError, match="exists already with 4 trials: give --resume"):
        new_study(where)
    with pytest.raises(NKATError, match="was made with another a: 1 there, 2 here"):
        new_study(where, settings={"a": 2}, resume=True)
    study = new_study(where, resume=True)
    run_some(study, objective, 6)
    assert len(study.trials) == 6
    run_some(study, objective, 6)
    assert len(study.trials) == 6


def test_a_timeout_starts_no_further_trial(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.journal")
    run_some(study, lambda trial: time.sleep(0.2) or objective(trial), 100, 0.3)
    assert 1 <= len(study.trials) <= 3


def test_trials_that_break_a_constraint_are_never_best(tmp_path: Path) -> None:
    def constrained(trial: optuna.Trial) -> float:
        value = objective(trial)
        trial.set_constraint("cost", trial.number - 2.5)  # only the first three are allowed
        return value + trial.number  # the last would win

    study = new_study(tmp_path / "s.journal")
    run_some(study, constrained, 6)
    assert {t.number for t in best_trials(study, 10)} == {0, 1, 2}
    assert best_trials(study, 1)[0].number == 2
    assert history(study)[5]["constraints"] == {"cost": 2.5}


def test_importances_name_the_parameter_that_matters(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.journal")
    assert importances([]) == {}
    run_some(study, objective, 40)
    found = importances((trial, trial.value) for trial in study.trials)
    assert found["x"] > found["y"]
    few = study.trials[:20]
    assert importances((trial, trial.value) for trial in few)
    assert importances((trial, trial.value) for trial in few[:-1]) == {}  # the draw alone


def test_nothing_is_important_where_all_score_alike(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    study = new_study(tmp_path / "s.journal")
    run_some(study, lambda trial: 0 * objective(trial), 20)
    assert importances((trial, 1.0) for trial in study.trials) == {}
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    assert importances((trial, float(trial.number)) for trial in study.trials)  # the control


def test_an_interrupted_trial_ends_at_once_and_is_tried_again(tmp_path: Path) -> None:
    where = tmp_path / "s.journal"
    study = new_study(where, first=[({"x": 0.25, "y": 2}, {"base": True})])

    def interrupted(trial: optuna.Trial) -> float:
        objective(trial)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_some(study, interrupted, 5)
    resumed = new_study(where, resume=True)
    new_study(where, resume=True)  # again: one that waits already is not queued twice
    assert [t.state for t in resumed.trials] == [TrialState.FAIL, TrialState.WAITING]
    run_some(resumed, objective, 1)
    assert resumed.trials[1].params == {"x": 0.25, "y": 2}
    assert resumed.trials[1].user_attrs["base"] is True


def test_no_setting_is_tried_twice_and_the_search_ends_with_the_last(tmp_path: Path) -> None:
    def settings(study: optuna.Study) -> list[tuple]:
        return [tuple(t.params.values()) for t in study.get_trials(states=FINISHED)]

    def few(trial: optuna.Trial) -> float:
        x, y = Few().suggest(trial)
        return -((x + 0.2) ** 2) * y

    study = new_study(tmp_path / "s.journal", first=[({"x": -0.3, "y": 2}, {})])
    assert not run_some(study, few, 7, space=Few())
    assert len(set(settings(study))) == 7
    study = new_study(tmp_path / "s.journal", resume=True)
    assert run_some(study, few, 100, space=Few())  # used up
    assert len(settings(study)) == len(set(settings(study))) == 12
    assert run_some(new_study(tmp_path / "s.journal", resume=True), few, 100, space=Few())  # on resume, at once
    assert len(settings(study)) == 12


def test_of_two_that_proposed_the_same_the_later_counts_for_nothing(tmp_path: Path) -> None:
    """As two processes do that look at the trials at the same time."""
    study = new_study(tmp_path / "s.journal")
    run_some(study, objective, 1)
    ours = iter([study.trials[0].params, {"x": 0.5, "y": 1}])
    run_trials(study, objective, lambda trials: next(ours), 2, None, "test")
    assert [row["state"] for row in history(study)] == ["COMPLETE", "REPEATED", "COMPLETE"]
    assert best_trials(study, 5)[0].number != 1
    assert study.trials[2].params == {"x": 0.5, "y": 1}


@pytest.mark.parametrize("call", ["set_trial_state_values", "set_trial_user_attr", "get_trial", "get_all_trials"])
@pytest.mark.parametrize("of_the_database", [True, False])
def test_a_database_that_is_gone_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, of_the_database: bool
) -> None:
    """Whatever is asked of it when it goes; a fault of ours keeps its traceback."""
    study = new_study(f"sqlite:///{tmp_path}/s.db")
    run_some(study, objective, 2)
    gone = OperationalError("select", {}, Exception("the server closed the connection\nunexpectedly"))

    def fail(*_: object, **__: object) -> None:
        if of_the_database:
            raise optuna.exceptions.StorageInternalError("during the commit") from gone
        raise KeyError("ours")

    def objective_then_gone(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        for owner in (optuna.storages.RDBStorage, _CachedStorage):
            monkeypatch.setattr(owner, call, fail)
        return 1.0

    with pytest.raises(NKATError if of_the_database else (KeyError, AssertionError, UnboundLocalError)) as ended:
        run_some(study, objective_then_gone, 4)
    if of_the_database:
        assert str(ended.value).startswith("the study's storage fails: (builtins.Exception) the server closed")
        assert "\n" not in str(ended.value)


def test_a_heartbeat_survives_a_database_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    gone = OperationalError("select", {}, Exception("no route"))
    for error, survives in ((gone, True), (KeyError("ours"), False)):
        monkeypatch.setattr(optuna.storages.RDBStorage, "record_heartbeat", Mock(side_effect=error))
        with contextlib.nullcontext() if survives else pytest.raises(KeyError):
            storage.record_heartbeat(0)
    assert capsys.readouterr().err.count("warning: the study's storage fails: (builtins.Exception) no route") == 1


@pytest.mark.skipif(os.name == "nt", reason="POSIX's kinds of file")
def test_a_journal_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "study.journal")
    with pytest.raises(NKATError, match="this is a pipe"):
        open_storage(str(tmp_path / "study.journal"))
    (tmp_path / "folder.journal").mkdir()
    with pytest.raises(NKATError, match="this is a folder"):
        open_storage(str(tmp_path / "folder.journal"))


def test_storages_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(NKATError, match="storage nosuch://"):
        open_storage("nosuch://host/db")
    with pytest.raises(NKATError, match="storage"):
        open_storage(str(tmp_path / "no" / "folder" / "study.journal"))


def test_a_database_without_a_driver_is_told_which_one(fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for driver in ("psycopg2", "psycopg", "MySQLdb"):
        monkeypatch.setitem(sys.modules, driver, None)  # as where it is not installed
    asked = ("nkat_auto_optimizer.py", "--model", "no.gguf", "--storage")
    said = fails(*asked, "postgresql+psycopg2://me:secret@host/db")  # before the model is looked for
    assert "no psycopg2, the driver" in said
    assert "pip install psycopg2-binary" in said
    assert "secret" not in said
    assert "no MySQLdb, the driver" in fails(*asked, "mysql://host/db")
    assert "storage foo://host/db: Can't load plugin" in fails(*asked, "foo://host/db")
    assert "no.gguf" in fails(*asked, f"sqlite:///{tmp_path}/x.db")  # the control
