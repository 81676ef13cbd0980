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
from nkat.study.study import FINISHED, best_trials, history, importances, open_storage, open_study, run_trials
from tests.conftest import ROOT

WORKER = textwrap.dedent(
    """
    import sys, time
    import optuna
    from nkat.study.study import open_storage, open_study, run_trials

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    where, target, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])

    def objective(trial):
        x = trial.suggest_float("x", 0, 1)
        print("running", trial.number, flush=True)
        time.sleep(seconds)
        return -x * x

    import os
    study = open_study(open_storage(where), "s", {"a": 1}, [({"x": 0.5}, {})], resume=True,
        sampler=lambda finished: optuna.samplers.RandomSampler(seed=os.getpid() + finished),
        pruner=optuna.pruners.NopPruner())
    run_trials(study, objective, target, None, "worker")
    """
)


def new_study(where: Path | str, *, settings=None, resume=False, seed=0, first=()) -> optuna.Study:
    return open_study(
        open_storage(str(where)),
        "s",
        settings or {"a": 1},
        list(first),
        sampler=lambda finished: optuna.samplers.TPESampler(seed=seed + finished, n_startup_trials=3),
        pruner=optuna.pruners.NopPruner(),
        resume=resume,
    )


def objective(trial: optuna.Trial) -> float:
    x, y = trial.suggest_float("x", -1, 1), trial.suggest_categorical("y", (1, 2))
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
    run_trials(study, lambda trial: trial.suggest_float("x", 0, 1), 1, None, "test")
    assert study.trials[1].params == {"x": 0.25}
    assert study.trials[1].user_attrs["base"] is True


def test_a_trial_that_nobody_claims_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process was killed between beginning it and putting its name to it."""
    monkeypatch.setattr("nkat.study.study._UNCLAIMED_SECONDS", 0.3)
    where = tmp_path / "study.journal"
    new_study(where, first=[({"x": 0.25, "y": 1}, {"base": True})]).ask()
    study = new_study(where, resume=True)
    assert [t.state for t in study.trials] == [TrialState.RUNNING]  # it may have been begun this moment
    run_trials(study, objective, 1, None, "test")
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
    run_trials(new_study(where), objective, 4, None, "test")
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
        run_trials(study, objective, 6, None, "test")
        # where the last record of a trial is lost it counts as running, as long as this process is there
        assert len(new_study(where, resume=True).get_trials(states=FINISHED)) == (6 if good == whole else 5), name
    assert not list(tmp_path.glob("*.lock"))


def test_a_journal_torn_while_others_go_on(tmp_path: Path, capsys) -> None:
    """What a killed worker had half written is cut off by the next that writes, not written on."""
    where = tmp_path / "study.journal"
    here, there = new_study(where), new_study(where, resume=True)
    run_trials(here, objective, 2, None, "test")
    run_trials(there, objective, 3, None, "test")
    for number, torn in enumerate((b'{"op_code":6,"worker_id":"', bytes(40), b"\xff"), 1):
        with where.open("ab") as file:
            file.write(torn)
        assert len(there.get_trials(states=FINISHED)) == 2 + number  # reading alone leaves it
        run_trials(here if number % 2 else there, objective, 3 + number, None, "test")
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
    run_trials(study, objective, 2, None, "test")
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
    run_trials(study, objective, 4, None, "test")  # who was there all the time goes on
    assert len(new_study(where, resume=True).get_trials(states=FINISHED)) == 4


def test_a_seed_gives_the_same_trials(tmp_path: Path) -> None:
    def run(name: str, seed: int) -> list[tuple]:
        study = new_study(tmp_path / name, seed=seed)
        assert run_trials(study, objective, 8, None, "test")
        return [(t.params["x"], t.params["y"], t.value) for t in study.trials]

    assert run("a", 1) == run("b", 1)
    assert run("c", 2) != run("d", 1)


def test_resuming_runs_only_what_is_missing(tmp_path: Path) -> None:
    where = tmp_path / "study.journal"
    run_trials(new_study(where), objective, 4, None, "test")
    with pytest.raises(NKATError, match="exists already with 4 trials: give --resume"):
        new_study(where)
    with pytest.raises(NKATError, match="was made with another a: 1 there, 2 here"):
        new_study(where, settings={"a": 2}, resume=True)
    study = new_study(where, resume=True)
    run_trials(study, objective, 6, None, "test")
    assert len(study.trials) == 6
    run_trials(study, objective, 6, None, "test")
    assert len(study.trials) == 6


def test_a_timeout_starts_no_further_trial(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.journal")
    run_trials(study, lambda trial: time.sleep(0.2) or objective(trial), 100, 0.3, "test")
    assert 1 <= len(study.trials) <= 3


def test_trials_that_break_a_constraint_are_never_best(tmp_path: Path) -> None:
    def constrained(trial: optuna.Trial) -> float:
        value = objective(trial)
        trial.set_constraint("cost", trial.number - 2.5)  # only the first three are allowed
        return value + trial.number  # the last would win

    study = new_study(tmp_path / "s.journal")
    run_trials(study, constrained, 6, None, "test")
    assert {t.number for t in best_trials(study, 10)} == {0, 1, 2}
    assert best_trials(study, 1)[0].number == 2
    assert history(study)[5]["constraints"] == {"cost": 2.5}


def test_importances_name_the_parameter_that_matters(tmp_path: Path) -> None:
    study = new_study(tmp_path / "s.journal")
    assert importances([]) == {}
    run_trials(study, objective, 40, None, "test")
    found = importances((trial, trial.value) for trial in study.trials)
    assert found["x"] > found["y"]


def test_interrupt_lets_the_running_trial_finish(tmp_path: Path) -> None:
    where = tmp_path / "s.journal"
    worker = start_worker(where, 50, 0.5)
    assert worker.stdout.readline().startswith("running")
    worker.send_signal(signal.SIGINT)
    assert worker.wait(timeout=60) == 0
    states = [t.state for t in new_study(where, resume=True).trials]
    assert states == [TrialState.COMPLETE]


@pytest.mark.parametrize("call", ["set_trial_state_values", "set_trial_user_attr", "get_trial", "get_all_trials"])
@pytest.mark.parametrize("of_the_database", [True, False])
def test_a_database_that_is_gone_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, of_the_database: bool
) -> None:
    """Whatever is asked of it when it goes; a fault of ours keeps its traceback."""
    study = new_study(f"sqlite:///{tmp_path}/s.db")
    run_trials(study, objective, 2, None, "test")
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
        run_trials(study, objective_then_gone, 4, None, "test")
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
