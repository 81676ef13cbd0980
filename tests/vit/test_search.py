"""The search over the image model: its space, its two stages, its rungs, its worker processes, its command line."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import optuna
import pytest
import torch
from optuna.trial import TrialState

from nkat.errors import NKATError
from nkat.host.distributed import World
from nkat.study.space import key
from nkat.study.study import best_trials, make_sampler, open_storage, open_study
from nkat_vit import checkpoint, data, search, search_job
from nkat_vit.loop import DivergedError, Trainer, open_run
from nkat_vit.metrics import global_tpe, tpe
from nkat_vit.model import STEMS
from nkat_vit.recipe import make_recipe, read_config, with_amp
from nkat_vit.search import (
    BASELINE,
    CHOICES,
    RANGES,
    SMALLEST,
    Budget,
    Shapes,
    Trials,
    in_range,
    recipe_of,
    tokens_of,
    unreachable,
)
from nkat_vit.search_options import ShapeOptions
from tests.conftest import ROOT
from tests.support.vit_data import run_module, write_cifar, write_grey

CPU = World(0, 1, torch.device("cpu"))
BUDGET = Budget(9, 0, 128, validation=32, lr=1e-3, max_tokens=0, batch_size=128, amp="off", seed=0)
# A space of the same form with models that train in milliseconds.
SMALL_CHOICES = {"conv_stem": ("tiny", "small"), "patch_size": (4,)}
SMALL_RANGES = RANGES | {"embed_dim": (16, 32, 16), "depth": (1, 2, 1)}
SMALL_BASELINE = BASELINE | {"embed_dim": 16, "depth": 1, "patch_size": 4}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small image sets, and the small space."""
    monkeypatch.setattr(data, "_CONTENTS", {})
    for name, value in (("CHOICES", SMALL_CHOICES), ("RANGES", SMALL_RANGES)):
        monkeypatch.setattr(search, name, value)
    monkeypatch.setattr(search_job, "STEMS_OF", {})
    BASELINE_BEFORE = dict(BASELINE)
    BASELINE.update(SMALL_BASELINE)  # search_job and search_plots have it by name
    write_cifar(tmp_path / "data", per_batch=40)
    for name in ("mnist", "fashion"):
        write_grey(tmp_path / "data", name, train=200, test=60)
    yield tmp_path / "data"
    BASELINE.update(BASELINE_BEFORE)


def make_trials(root: Path, folder: Path, gate: float = 0.0, budget: Budget = BUDGET, accuracy: float = 0.0) -> Trials:
    return Trials(root, folder, budget, gate, ("mnist",), CPU, accuracy)


def make_study(pruner: optuna.pruners.BasePruner | None = None) -> optuna.Study:
    return optuna.create_study(direction="maximize", pruner=pruner or optuna.pruners.NopPruner())


def test_every_point_is_a_model_that_can_be_built() -> None:
    corners = [*CHOICES.values(), *((low, high) for low, high, _ in RANGES.values())]
    for values in itertools.product(*corners):
        point = dict(zip((*CHOICES, *RANGES), values, strict=True))
        for name in ("cifar10", "mnist", "fashion", "emnist"):
            model = recipe_of(point, name, BUDGET).model
            stride = model.cell // model.patch_size
            assert model.patch_size <= model.image_size // stride  # the patch fits the stem's map
            assert 0 < model.top_k <= model.tokens
    assert recipe_of(BASELINE | {"patch_size": 4}, "cifar10", BUDGET).model.top_k == 5  # control: 6 would be too many
    assert recipe_of(BASELINE, "cifar10", BUDGET).model.top_k == 6


def test_the_space_is_the_plans() -> None:
    assert set(CHOICES["conv_stem"]) == {"off", "tiny", "small"} < set(STEMS)  # the plan's, whatever else there is
    assert CHOICES["patch_size"] == (2, 4)
    assert RANGES["embed_dim"][:2] == (384, 512)
    assert RANGES["depth"][:2] == (5, 9)
    assert RANGES["temperature"][:2] == (0.6, 1.0)
    assert RANGES["top_p"][:2] == (0.80, 0.95)
    study = make_study()
    study.enqueue_trial(BASELINE)
    assert Shapes().suggest(study.ask()) == BASELINE  # no warning, no other value: the baseline lies in the space
    points = [Shapes().suggest(study.ask()) for _ in range(30)]
    assert all(point["embed_dim"] % 8 == 0 for point in points)
    assert len({tuple(point.values()) for point in points}) > 25
    quick, study = Shapes(20, tuple(STEMS)), make_study()
    study.enqueue_trial(quick.parameters(SMALLEST))
    assert quick.suggest(study.ask()) == SMALLEST


def test_long_sequences_can_be_left_out() -> None:
    study = make_study()
    points = [Shapes(100).suggest(study.ask()) for _ in range(60)]
    shapes = {(point["conv_stem"], point["patch_size"]) for point in points}
    assert shapes == set(itertools.product(CHOICES["conv_stem"], (2, 4))) - {("off", 2)}
    assert tokens_of("off", 2) == 257 > 100 > tokens_of("off", 4) == 65
    study = make_study()
    points = [Shapes(20).suggest(study.ask()) for _ in range(60)]
    assert {(p["conv_stem"], p["patch_size"]) for p in points} == set(itertools.product(("tiny", "small"), (2, 4)))
    with pytest.raises(NKATError, match="no stem and patch have as few as 4 tokens"):
        Shapes(4).suggest(make_study().ask())


def test_every_shape_is_listed_as_trials_have_it() -> None:
    """A trial's parameters and the list's must be equal, or a shape that was tried would be tried again."""
    for limit in (0, 20, 100):
        space, study = Shapes(limit), make_study()
        listed = {key(point) for point in space.points()}
        assert all(key(trial.params) in listed for trial in asked(study, space, 40))
        assert key(space.parameters(BASELINE)) in listed
    assert len({key(point) for point in Shapes().points()}) == 3 * 2 * 5 * 5 * 9 * 16
    assert len({key(point) for point in Shapes(100).points()}) == 5 * 5 * 5 * 9 * 16  # without the longest


def asked(study: optuna.Study, space: Shapes, count: int) -> list[optuna.Trial]:
    trials = [study.ask() for _ in range(count)]
    for trial in trials:
        space.suggest(trial)
    return trials


def test_a_trial_that_passes_is_scored_on_all_sets(root: Path, tmp_path: Path) -> None:
    trials = make_trials(root, tmp_path / "trials")
    study = make_study()
    study.optimize(trials.objective, n_trials=1)
    trial = study.trials[0]
    facts = trial.user_attrs
    assert set(facts["accuracies"]) == {"cifar10", "mnist"}
    assert trial.value == pytest.approx(global_tpe(list(facts["accuracies"].values()), facts["lambda_theory"]))
    assert facts["local_tpe"] == pytest.approx(tpe(facts["accuracies"]["cifar10"], facts["lambda_theory"]))
    assert len(trial.intermediate_values) == facts["epochs"] == BUDGET.epochs
    kept = sorted(str(path.relative_to(tmp_path / "trials")) for path in (tmp_path / "trials").rglob("*.pt"))
    assert kept == ["trial-000/cifar10/best.pt", "trial-000/mnist/best.pt"]
    best = checkpoint.load_model(tmp_path / "trials" / "trial-000" / "mnist")
    assert best.facts["validation"] == facts["accuracies"]["mnist"]


def test_a_trial_below_the_gate_ends_after_cifar_and_breaks_the_constraint(root: Path, tmp_path: Path) -> None:
    trials = make_trials(root, tmp_path / "trials", gate=5.0)
    study = make_study()
    study.optimize(trials.objective, n_trials=1)
    trial = study.trials[0]
    assert trial.state == TrialState.COMPLETE
    accuracy = trial.user_attrs["accuracies"]["cifar10"]
    assert trial.constraints == {
        "local_tpe": pytest.approx(5.0 - trial.value),
        "accuracy on cifar10": -accuracy,
        "accuracy on mnist": 0.0,
    }
    assert trial.value == trial.user_attrs["local_tpe"]
    assert best_trials(study, 1) == []
    assert not list((tmp_path / "trials").rglob("*.pt"))
    assert not (tmp_path / "trials" / "trial-000" / "mnist").exists()


def test_accuracy_comes_first(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models so small have a Local TPE beyond any gate, whatever they do: that alone lets none pass."""
    trials = make_trials(root, tmp_path / "trials", gate=0.6, accuracy=0.99)
    assert (trials.floor("cifar10"), trials.floor("mnist")) == (0.99, 0.91)
    assert make_trials(root, tmp_path, accuracy=0.3).floor("mnist") == pytest.approx(0.455)
    study = make_study()
    study.optimize(trials.objective, n_trials=1)
    facts = study.trials[0].user_attrs
    assert facts["local_tpe"] > 0.6 > facts["accuracies"]["cifar10"]
    assert set(facts["accuracies"]) == {"cifar10"}
    assert study.trials[0].constraints["accuracy on cifar10"] == pytest.approx(0.99 - facts["accuracies"]["cifar10"])
    assert study.trials[0].constraints["accuracy on mnist"] == trials.floor("mnist")  # it was not trained
    assert best_trials(study, 1) == []
    assert not list((tmp_path / "trials").rglob("*.pt"))
    # One that passes on CIFAR-10 has to reach the other sets' accuracies as well.
    monkeypatch.setattr(Trials, "floor", lambda _, name: {"cifar10": 0.0, "mnist": 1.01}[name])
    study.optimize(make_trials(root, tmp_path / "other", gate=0.6).objective, n_trials=1)
    trial = study.trials[1]
    assert trial.constraints["accuracy on mnist"] == pytest.approx(1.01 - trial.user_attrs["accuracies"]["mnist"])
    assert trial.value == trial.user_attrs["local_tpe"]
    assert best_trials(study, 1) == []
    assert not list((tmp_path / "other").rglob("*.pt"))


def test_trials_are_ranked_by_accuracy_before_tpe() -> None:
    facts = {"passed": (0.7, 0.7), "best": (0.65, 0.5), "accurate": (0.5, 0.4), "small": (0.1, 9.0)}  # accuracy, TPE
    study = make_study()

    def objective(trial: optuna.Trial) -> float:
        cifar, local = facts[trial.user_attrs["name"]]
        trial.set_user_attr("local_tpe", local)
        for name, short in (("local_tpe", 0.6 - local), ("accuracy on cifar10", 0.6 - cifar)):
            trial.set_constraint(name, short)
        return local

    for name in ("small", "best", "passed", "accurate"):
        study.enqueue_trial({}, user_attrs={"name": name})
    study.optimize(objective, n_trials=4)
    assert [trial.user_attrs["name"] for trial in search_job._ranked(study)] == list(facts)


def test_the_optimiser_is_a_choice_and_the_plans_is_the_default() -> None:
    assert recipe_of(BASELINE, "cifar10", BUDGET).train.opt == "adamw"
    train = recipe_of(BASELINE, "cifar10", replace(BUDGET, opt="muon", lr=1e-3, muon_lr=0.01)).train
    assert (train.opt, train.lr, train.muon_lr) == ("muon", 1e-3, 0.01)


def asked_for(mode: str, **given: object) -> ShapeOptions:
    """Options of which nothing is given but these."""
    absent = dict.fromkeys(
        ("epochs", "other_epochs", "epoch_size", "limit_train", "validation", "preset", "opt", "lr", "muon_lr", "stems")
    )
    absent |= dict.fromkeys(("max_tokens", "batch_size", "randaugment", "final_seeds"))
    study = cast(Any, SimpleNamespace(mode=mode, seed=0))
    usual = {"data_root": Path(), "local_tpe": 0.6, "accuracy": 0.6, "sets": [], "amp": "off", "no_cuda": True}
    return ShapeOptions(**cast(Any, absent | usual | given), study=study)


def test_the_winner_is_trained_with_the_presets_randaugment_unless_one_is_given(tmp_path: Path) -> None:
    """A quick search's own, none, is for its few pictures."""
    winner = optuna.create_study().ask()
    winner.set_user_attr("setting", SMALLEST)
    for given, kept in ((None, [1, 9]), ((2, 5), [2, 5])):
        options = asked_for("quick", randaugment=given)
        cast(Any, options.study).output_dir = tmp_path
        budget = search_job.make_budget(options, CPU)
        search_job.write_optimal(options, budget, cast(Any, winner), None)
        values = read_config(tmp_path / "optimal_vit.json")
        assert values["randaugment"] == kept
        assert (values["lr"], values["batch_size"], "epoch_size" in values) == (0.012, 256, False)


def test_a_quick_search_learns_as_the_preset_fast() -> None:
    def learns(mode: str, **given: object) -> tuple[object, ...]:
        train = recipe_of(SMALLEST, "cifar10", search_job.make_budget(asked_for(mode, **given), CPU))
        chosen = train.train
        augment = train.augment.crop, train.augment.randaugment, train.augment.cutout
        return chosen.opt, chosen.lr, chosen.muon_lr, chosen.smoothing, *augment, train.model.dropout_attn

    assert learns("quick") == ("muon", 0.012, 0.2, 0.2, 2, (0, 0), 0, 0.0)
    assert learns("quick", opt="adamw") == ("adamw", 2e-4, 0.01, 0.2, 2, (0, 0), 0, 0.0)
    assert learns("quick", preset="stage2") == learns("full") == ("adamw", 2e-4, 0.01, 0.0, 4, (2, 9), 8, 0.17)
    assert learns("full", randaugment=(1, 5))[5] == (1, 5)
    assert learns("full", opt="muon") == ("muon", 1e-3, 0.01, 0.0, 4, (2, 9), 8, 0.17)
    assert learns("full", preset="fast", lr=1e-3)[:3] == ("muon", 1e-3, 0.2)
    model = recipe_of(SMALLEST, "cifar10", search_job.make_budget(asked_for("quick"), CPU)).model
    assert (model.conv_stem, model.embed_dim, model.depth, model.top_k) == (
        "white",
        384,
        5,
        6,
    )  # STAGE2's but the point


def test_the_other_sets_have_epochs_of_their_own() -> None:
    def epochs(mode: str, **given: object) -> tuple[tuple[int, float], ...]:
        budget = search_job.make_budget(asked_for(mode, **given), CPU)
        runs = (recipe_of(BASELINE, name, budget).train for name in ("cifar10", "mnist"))
        return tuple((run.epochs, run.warmup) for run in runs)

    assert epochs("quick") == ((9, 9 / 8), (5, 5 / 8))
    assert epochs("quick", epochs=3) == ((3, 3 / 8), (3, 3 / 8))
    assert epochs("quick", epochs=3, other_epochs=2) == ((3, 3 / 8), (2, 2 / 8))
    assert epochs("full") == ((27, 27 / 8), (27, 27 / 8))
    assert epochs("full", other_epochs=9) == ((27, 27 / 8), (9, 9 / 8))


def test_other_stems_are_in_the_space_of_a_quick_search_and_where_asked_for() -> None:
    spaces = {
        (mode, stems): search_job.make_budget(asked_for(mode, stems=stems and [*stems]), CPU).space
        for mode, stems in (("quick", None), ("full", None), ("quick", ("tiny",)))
    }
    found = {key: {point["conv_stem"] for point in space.points()} for key, space in spaces.items()}
    assert found["quick", None] == {"tiny", "small", "deep", "white"}  # without a stem there are too many tokens
    assert found["full", None] == {"off", "tiny", "small"}
    assert found["quick", ("tiny",)] == {"tiny"}
    assert {point["conv_stem"] for point in Shapes().points()} == {"off", "tiny", "small"}
    asked = Shapes(stems=("tiny", "deep"))
    assert {point["conv_stem"] for point in asked.points()} == {"tiny", "deep"}
    study = make_study()
    points = [asked.suggest(study.ask()) for _ in range(20)]
    deep = [point for point in points if point["conv_stem"] == "deep"]
    assert deep
    assert {point["patch_size"] for point in deep} == {1}
    assert [in_range(stem) for stem in ("tiny", "deep")] == [True, False]
    for name in ("cifar10", "mnist"):
        assert recipe_of(deep[0], name, BUDGET).model.tokens == 17


def test_sizes_that_no_accuracy_brings_to_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "RANGES", RANGES | {"embed_dim": (384, 416, 32), "depth": (7, 9, 1)})
    assert unreachable() == [(416, 8), (416, 9)]  # 0.70 · log10(1 + λ) is 0.997 for 384 x 9 and 1.010 for 416 x 8


def test_promotion_trains_on_and_not_anew(root: Path, tmp_path: Path) -> None:
    """A trial that passed both rungs has the weights of a run without any, bit by bit."""
    trials = make_trials(root, tmp_path / "trials")
    study = make_study(BUDGET.pruner())
    study.enqueue_trial(SMALL_BASELINE)
    study.optimize(trials.objective, n_trials=1)
    assert {f"completed_rung_{rung}" for rung in (0, 1)} <= set(study.trials[0].system_attrs)
    straight = trials.trainer(recipe_of(SMALL_BASELINE, "cifar10", BUDGET), tmp_path / "straight", "")
    straight.run()
    ours, theirs = (
        checkpoint.load(path / "best.pt", "weights")["weights"]
        for path in (tmp_path / "trials" / "trial-000" / "cifar10", tmp_path / "straight")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    other = trials.trainer(recipe_of(SMALL_BASELINE, "cifar10", replace(BUDGET, seed=1)), tmp_path / "o", "")
    other.run()
    control = checkpoint.load(tmp_path / "o" / "best.pt", "weights")["weights"]
    assert not all(torch.equal(ours[name], control[name]) for name in ours)


def test_an_open_run_keeps_its_precision_and_refuses_other_settings(root: Path, tmp_path: Path) -> None:
    images = data.load_images("cifar10", root, train=True)
    recipe = recipe_of(SMALL_BASELINE, "cifar10", replace(BUDGET, epochs=2))
    begun = open_run(recipe, images, CPU, tmp_path, "")
    next(begun.epochs())
    again = open_run(with_amp(recipe, "bf16"), images, CPU, tmp_path, "")
    assert again.recipe == recipe
    assert again.step == begun.step > 0
    control = open_run(with_amp(recipe, "bf16"), images, CPU, tmp_path / "new", "")
    assert (control.recipe.train.amp, control.step) == ("bf16", 0)
    with pytest.raises(NKATError, match="other settings"):
        open_run(replace(recipe, train=replace(recipe.train, lr=1.0)), images, CPU, tmp_path, "")


def test_an_interrupted_trial_goes_on_from_its_checkpoint(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = make_trials(root, tmp_path / "trials")
    steps = []
    train_step = Trainer.train_step

    def counted(self: Trainer) -> torch.Tensor:
        steps.append(self.step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return train_step(self)

    monkeypatch.setattr(Trainer, "train_step", counted)
    study = make_study()
    study.enqueue_trial(SMALL_BASELINE)
    with pytest.raises(KeyboardInterrupt):
        study.optimize(trials.objective, n_trials=1)
    study.enqueue_trial(SMALL_BASELINE, user_attrs={"retry of": 0})
    study.optimize(trials.objective, n_trials=1)
    assert steps[:15] == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 0, 1, 2, 3, 4]  # CIFAR-10 went on, then MNIST from 0
    retried = study.trials[1]
    assert list(retried.intermediate_values) == list(range(1, 10))
    whole = make_study()
    whole.enqueue_trial(SMALL_BASELINE)
    whole.optimize(make_trials(root, tmp_path / "other").objective, n_trials=1)
    assert retried.value == whole.trials[0].value


def test_a_hopeless_trial_ends_at_a_rung(root: Path, tmp_path: Path) -> None:
    """Its constraint is broken by what is missing there, so the sampler sees how far it was."""
    study = make_study(BUDGET.pruner())
    distributions = {n: optuna.distributions.CategoricalDistribution(c) for n, c in SMALL_CHOICES.items()}
    for _ in range(3):
        study.add_trial(
            optuna.trial.create_trial(
                params={"conv_stem": "tiny", "patch_size": 4},
                distributions=distributions,
                value=9.0,
                intermediate_values={1: 9.0},
                system_attrs={"completed_rung_0": 9.0},
            )
        )
    study.optimize(make_trials(root, tmp_path / "trials", gate=0.9).objective, n_trials=1)
    trial = study.trials[-1]
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["epochs"] == len(trial.intermediate_values) == 1
    assert trial.constraints["local_tpe"] == pytest.approx(0.9 - trial.user_attrs["local_tpe"])
    assert not list((tmp_path / "trials").rglob("*.pt"))


def test_a_trial_that_diverges_does_not_end_the_search(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(self: Trainer, loss: float) -> None:
        raise DivergedError("the loss is no number any more")

    monkeypatch.setattr(Trainer, "_check_finite", diverge)
    study = make_study()
    study.optimize(make_trials(root, tmp_path / "trials", gate=0.5).objective, n_trials=1)
    assert study.trials[0].state == TrialState.PRUNED
    assert study.trials[0].user_attrs["accuracies"] == {"cifar10": 0.0}
    assert study.trials[0].constraints == {"local_tpe": 0.5, "accuracy on cifar10": 0.0, "accuracy on mnist": 0.0}


WORKER = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    import optuna, torch
    from nkat.study.space import proposer
    from nkat.study.study import make_sampler, open_storage, open_study, run_trials
    from nkat_vit import data, search
    from nkat_vit.loop import Trainer
    from nkat_vit.search import Budget, Shapes, Trials
    from tests.vit.test_search import BUDGET, CPU, SMALL_BASELINE, SMALL_CHOICES, SMALL_RANGES

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    data._CONTENTS.clear()
    search.CHOICES, search.RANGES = SMALL_CHOICES, SMALL_RANGES
    root, folder, storage, target, role = sys.argv[1:]
    if role == "victim":  # stands still at its first checkpoint, to be killed there

        def save_and_wait(trainer, save=Trainer._save_run):
            save(trainer)
            print("saved", flush=True)
            time.sleep(600)

        Trainer._save_run = save_and_wait
    trials = Trials(Path(root), Path(folder), BUDGET, 0.0, ("mnist",), CPU, accuracy=0.0)
    space = Shapes()
    study = open_study(open_storage(storage), "s", {}, [(space.parameters(SMALL_BASELINE), {})], resume=True,
        sampler=make_sampler(0), pruner=BUDGET.pruner())
    propose = proposer(space, lambda done: make_sampler(done + os.getpid(), conditional=True))

    def objective(trial):
        print("running", trial.number, flush=True)
        return trials.objective(trial)

    run_trials(study, objective, propose, int(target), None, "worker")
    """
)


def test_two_processes_of_which_one_is_killed(root: Path, tmp_path: Path) -> None:
    storage, target = str(tmp_path / "study.journal"), 4
    arguments = [str(root), str(tmp_path / "trials"), storage, str(target)]

    def start(role: str) -> subprocess.Popen:
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", WORKER, *arguments, role]
        return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    workers = [start("victim")]
    try:
        victim = workers[0]
        number = int(victim.stdout.readline().removeprefix("running "))
        assert victim.stdout.readline() == "saved\n"
        workers.append(survivor := start("survivor"))
        assert survivor.stdout.readline().startswith("running ")
        victim.send_signal(signal.SIGKILL)
        victim.wait(timeout=60)
        assert survivor.wait(timeout=240) == 0
    finally:
        for worker in workers:
            worker.kill()
    study = open_study(open_storage(storage), "s", {}, [], resume=True, sampler=make_sampler(0), pruner=BUDGET.pruner())
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.FAIL) == 1
    assert sum(state in (TrialState.COMPLETE, TrialState.PRUNED) for state in states) == target
    dead = next(trial for trial in study.trials if trial.state == TrialState.FAIL)
    again = next(trial for trial in study.trials if trial.user_attrs.get("retry of") == dead.number)
    assert dead.number == number
    assert again.params == dead.params
    # It may end at a rung where the dead one would have gone on, but the epochs both have are the same ones.
    assert again.intermediate_values
    assert all(again.intermediate_values.get(k, v) == v for k, v in dead.intermediate_values.items())


def optimize(root: Path, out: Path, *more: object):
    small = ["--epochs", 3, "--limit-train", 128, "--validation", 32, "--amp", "off", "--threads", 1]
    return run_module(
        "nkat.search.main",
        "--task",
        "vit",
        "--data-root",
        root,
        "--output-dir",
        out,
        "--sets",
        "mnist",
        "fashion",
        "--mode",
        "custom",
        "--trials",
        5,
        *small,
        *more,
    )


LOW = ["--local-tpe", 0.01, "--accuracy", 0]


def test_the_whole_search(root: Path, tmp_path: Path) -> None:
    out, fast = tmp_path / "out", ["--opt", "muon", "--lr", 2e-3]
    done = optimize(root, out, *LOW, *fast, "--json", out.parent / "record.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record == json.loads((out / "optuna_study.json").read_text())
    trials = json.loads((out / "optimization_history.json").read_text())["trials"]
    assert len(trials) == 5
    assert trials[0]["setting"] == SMALL_BASELINE  # the baseline comes first
    assert (out / "optimization_results.png").stat().st_size > 20_000
    optimal = record["optimal"]
    assert optimal["passed"]
    runs = optimal["test"]["runs"]
    assert [run["dataset"] for run in runs] == ["cifar10", "mnist", "fashion"]
    assert [run["images"] for run in runs] == [40, 60, 60]
    scores = [run["accuracy"] for run in runs]
    assert optimal["test"]["global_tpe"]["mean"] == pytest.approx(global_tpe(scores, optimal["test"]["lambda_theory"]))
    assert "on the test sets, 1 seed" in done.stdout
    assert "at the baseline's size Local TPE 0.01 takes 1.3 %; STAGE2's target there is 0.45" in done.stdout
    # The settings are a --config of training, and how they were trained is in them.
    values = read_config(out / "optimal_vit.json") | {"dataset": "mnist"}
    assert (values["opt"], values["lr"], values["batch_size"]) == ("muon", 2e-3, record["budget"]["batch_size"])
    assert make_recipe(values).model.embed_dim == optimal["setting"]["embed_dim"]
    again = optimize(root, out, *LOW, *fast)
    assert again.returncode == 2
    assert "give --resume" in again.stderr
    resumed = optimize(root, out, *LOW, *fast, "--resume")
    assert resumed.returncode == 0
    assert "5 trials" not in resumed.stderr
    assert json.loads((out / "optuna_study.json").read_text())["optimal"]["test"] == optimal["test"]


def test_when_no_trial_passes_the_report_says_how_far_the_best_was(root: Path, tmp_path: Path) -> None:
    done = optimize(root, tmp_path / "out", "--local-tpe", 500, "--workers", 1)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "optuna_study.json").read_text())
    assert record["passed"] == 0
    assert record["optimal"] is None
    best = record["best"][0]
    assert f"has Local TPE {best['local_tpe']:.4f} after" in done.stdout
    assert f"short of local_tpe by {500 - best['local_tpe']:.4f}" in done.stdout
    assert not (tmp_path / "out" / "optimal_vit.json").exists()
    forced = optimize(root, tmp_path / "out", "--local-tpe", 500, "--resume", "--force")
    assert forced.returncode == 0, forced.stderr
    assert (tmp_path / "out" / "optimal_vit.json").exists()
    assert "test" not in json.loads((tmp_path / "out" / "optuna_study.json").read_text())["optimal"]


def test_what_size_buys_and_what_lies_outside_the_range_is_said(root: Path, tmp_path: Path) -> None:
    more = ["--local-tpe", 0.01, "--accuracy", 0.99, "--opt", "muon", "--trials", 2, "--epochs", 1, "--stems", "deep"]
    done = optimize(root, tmp_path / "out", *more)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "optuna_study.json").read_text())
    assert record["passed"] == 0
    assert "is bought by size alone, with" in done.stdout
    assert re.search(r"deep, patch 1, \d+ x \d \(outside STAGE2's range\)", done.stdout)
    assert record["accuracy"] == {"cifar10": 0.99, "mnist": 0.91, "fashion": 0.87}
    assert {name: record["budget"][name] for name in ("opt", "lr", "muon_lr")} == {
        "opt": "muon",
        "lr": 1e-3,
        "muon_lr": 0.01,
    }
    other = optimize(root, tmp_path / "out", *more[:-2], "--resume")
    assert other.returncode == 2
    assert "was made with another stems: ['deep'] there, [] here" in other.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--local-tpe", "nan"], "--local-tpe must be"),
        (["--accuracy", "60"], "--accuracy must be a share from 0 to 1, got 60"),
        (["--muon-lr", "0.01"], "--muon-lr is for --opt muon"),
        (["--model", "x.gguf"], "unrecognized arguments: --model"),
        (["--limit-train", "100000"], "is more than the"),
        (["--data-root", "nowhere"], "nkat_vit.download cifar10"),
    ],
)
def test_mistakes_are_one_line(root: Path, tmp_path: Path, more: list[str], message: str) -> None:
    done = optimize(root, tmp_path / "out", *more)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


def test_a_bad_test_set_is_found_before_the_first_trial(root: Path, tmp_path: Path) -> None:
    broken = root / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"  # only the winner would read it
    broken.write_bytes(broken.read_bytes()[:-9])
    done = optimize(root, tmp_path / "out")
    assert done.returncode == 2
    assert f"{broken}: damaged" in done.stderr
    assert not (tmp_path / "out" / "trials").exists()
