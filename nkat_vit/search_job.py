"""The search over the image model as a job: its budget, the report, the winner's score on the test sets.

`nkat_auto_optimizer.py --task vit` runs it.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from nkat.host.commandline import own_command
from nkat.host.console import counted, note, remark
from nkat.host.distributed import World
from nkat.host.hardware import pick_device
from nkat.host.page import REPORT, write_page
from nkat.host.programs import shell_line
from nkat.host.record import recorded, write_json
from nkat.host.tools import tool_command
from nkat.study import workers
from nkat.study.folder import PICTURE, note_earlier, write_records
from nkat.study.study import best_trials, feasible, history, importances, make_sampler
from nkat.study.task import Task
from nkat.study.workers import Outcome, Search
from nkat_vit.checkpoint import load_model
from nkat_vit.data import check_files, load_images
from nkat_vit.evaluate import remarks, run_result, stage2_rows, summarise
from nkat_vit.judging import judge_once
from nkat_vit.loop import measure_amp
from nkat_vit.metrics import GLOBAL_TARGETS
from nkat_vit.recipe import PRESETS, optimizer_of
from nkat_vit.search import (
    BASELINE,
    CHOICES,
    FIRST_SET,
    GATE,
    SMALLEST,
    Budget,
    Trials,
    model_values,
    recipe_of,
    unreachable,
)
from nkat_vit.search_options import (
    BUDGETS,
    DESCRIPTION,
    EXAMPLES,
    PRESET_OF,
    STEMS_OF,
    ShapeOptions,
    add_options,
    shape_options,
)
from nkat_vit.search_plots import plot_image_search
from nkat_vit.search_report import print_report, search_page

TRIALS = {"quick": 8, "full": 50}  # a quick one, with a trial begun last that passes, within half an hour on two cores
OPTIMAL = "optimal_vit.json"
STUDY_NAME = "nkat-vit-round2"
TOP = 5
AMP_IMAGES = 128
_OF_A_TRIAL = ("epochs", "epoch_size", "limit_train", "validation", "warmup", "amp", "seed")


def run(options: ShapeOptions) -> None:
    """The whole search."""
    for name in (FIRST_SET, *options.sets):
        check_files(name, options.data_root)
    world = World(0, 1, pick_device(not options.no_cuda))
    budget = make_budget(options, world)
    folder = options.study.output_dir / "trials"
    trials = Trials(options.data_root, folder, budget, options.local_tpe, tuple(options.sets), world, options.accuracy)
    search = describe_search(options, trials)
    with workers.interruptible(options.study):
        study = workers.connect(options.study, search)
        if not options.study.join:
            say_unreachable()
        outcome = workers.run(options.study, search, study, trials.objective)
        if not options.study.join:
            workers.report(outcome, partial(judge_best, options, trials), partial(report, options, trials))


def say_unreachable() -> None:
    """Before anything is trained: which sizes no accuracy brings to Global TPE's target."""
    least: dict[int, int] = {}
    found = unreachable()
    for width, depth in found:
        least[width] = min(depth, least.get(width, depth))
    if found:
        wanted = GLOBAL_TARGETS["Global TPE"]
        note(
            f"{len(found)} sizes of the range are too large for Global TPE {wanted:.2f} whatever their accuracy: "
            f"{', '.join(f'{width} wide from depth {depth}' for width, depth in least.items())}"
        )


def make_budget(options: ShapeOptions, world: World) -> Budget:
    """The mode's, with what the user changed; --mode custom starts from that of "full"."""
    usual = dict(BUDGETS.get(options.study.mode, BUDGETS["full"]))
    given = {name: getattr(options, name) for name in usual}
    preset, opt = options.learning, options.optimizer
    # What a mode has of its own goes with its epochs, and with its preset.
    if options.epochs is not None:
        usual |= {"other_epochs": 0}
    if preset != PRESET_OF.get(options.study.mode):
        usual |= {"randaugment": None}
    # An optimiser that is not the preset's own has the rates of a preset whose it is.
    rates = PRESETS[preset if opt == optimizer_of(preset) else "strong" if opt == "muon" else "stage2"]
    budget = Budget(
        **{name: default if given[name] is None else given[name] for name, default in usual.items()},
        lr=rates["lr"] if options.lr is None else options.lr,
        amp=options.amp,
        seed=options.study.seed,
        opt=opt,
        muon_lr=rates.get("muon_lr", PRESETS["strong"]["muon_lr"]) if options.muon_lr is None else options.muon_lr,
        stems=tuple(dict.fromkeys(options.stems or STEMS_OF.get(options.study.mode, ()))),
        preset=preset,
    )
    if options.amp != "auto":
        return budget
    some = load_images(FIRST_SET, options.data_root, train=True).take(torch.arange(AMP_IMAGES)).to(world.device)
    amp, seconds = measure_amp(recipe_of(BASELINE, FIRST_SET, budget), some, world.device)
    note(f"--amp: {amp} (a step of the baseline: {', '.join(f'{n} {1e3 * s:.0f} ms' for n, s in seconds.items())})")
    return replace(budget, amp=amp)


def describe_search(options: ShapeOptions, trials: Trials) -> Search:
    """The study's name, settings and first trial."""
    settings = {
        "gate": trials.gate,
        "accuracy": trials.accuracy,
        "sets": list(trials.sets),
        "data_sha256": trials.images(FIRST_SET).sha256,
        **{name: value for name, value in asdict(trials.budget).items() if name != "amp"},
        # As a storage gives them back.
        "stems": list(trials.budget.stems),
        "randaugment": trials.budget.randaugment and list(trials.budget.randaugment),
    }
    sampler = partial(make_sampler, conditional=True)
    space = trials.budget.space
    there = trials.budget.stems or CHOICES["conv_stem"]
    first: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (space.parameters(point), {}) for point in (BASELINE, SMALLEST) if point["conv_stem"] in there
    ]
    return Search(STUDY_NAME, settings, first, space, sampler, trials.budget.pruner(), TRIALS)


def judge_best(options: ShapeOptions, trials: Trials, study: optuna.Study) -> dict[str, Any] | None:
    """The best one on the test sets, where it passed the gate."""
    ranked = _ranked(study)
    return judge_winner(options, trials, ranked[0]) if ranked and best_trials(study, 1) else None


def report(options: ShapeOptions, trials: Trials, outcome: Outcome, test: dict[str, Any] | None) -> None:
    """Writes every file of the output folder and prints what came out. test: of the winner; None: it was not judged"""
    study, budget, folder = outcome.study, trials.budget, options.study.output_dir
    ranked = _ranked(study)
    passed = best_trials(study, len(ranked))
    # Where all trials were: at the first rung.
    rung = budget.first_rung
    first_scores = [(t, t.intermediate_values[rung]) for t in ranked if rung in t.intermediate_values]
    record = workers.base_record(options.study, outcome, trials.world.device) | {
        "sets": [FIRST_SET, *trials.sets],
        "data_sha256": trials.images(FIRST_SET).sha256,
        "local_tpe": trials.gate,
        "accuracy": {name: trials.floor(name) for name in (FIRST_SET, *trials.sets)},
        "unreachable": [list(shape) for shape in unreachable()],
        "budget": asdict(budget),
        "importances": importances(first_scores),
        "importances_of": f"Local TPE after {rung} epochs",
        "passed": len(passed),
        "best": [_row(trial) for trial in ranked[:TOP]],
        "baseline": next((_row(trial) for trial in ranked if trial.user_attrs["setting"] == BASELINE), None),
        "optimal": None,
    }
    if not outcome.interrupted and ranked and (passed or options.study.force):
        record["optimal"] = write_optimal(options, budget, ranked[0], test)
    rows = history(study)
    write_records(folder, rows, record)
    with recorded(record, options.study.json, options.study.force):
        print_report(record)
        most = f"{counted(budget.epochs, 'epoch')} of {budget.epoch_size or budget.limit_train or 'all'} pictures"
        title = f"Round-2: {counted(len(ranked), 'trial')}, up to {most}"
        plot_image_search(folder / PICTURE, rows, record["importances"], trials.gate, trials.accuracy, title)
        write_page(folder / REPORT, search_page(record, title, own_command(), folder / PICTURE), force=True)
        if not outcome.interrupted:
            note_earlier(folder, OPTIMAL, record["optimal"] and record["optimal"]["file"])
        remark(f"files are in {folder}")


def write_optimal(
    options: ShapeOptions, budget: Budget, winner: FrozenTrial, test: dict[str, Any] | None
) -> dict[str, Any]:
    """Writes the winner's settings and how it was trained. test: its scores there, where it passed the gate"""
    setting, path = winner.user_attrs["setting"], options.study.output_dir / OPTIMAL
    # How long and on what a trial was trained, and from which seed, is not its user's, nor is the RandAugment that
    # suits a mode's few pictures.
    learning = replace(budget, randaugment=options.randaugment).train_values()
    trained = {name: value for name, value in learning.items() if name not in _OF_A_TRIAL}
    write_json(model_values(setting, FIRST_SET) | trained, str(path), force=True)
    words: list[object] = [*tool_command("vit train"), "--dataset", FIRST_SET]
    words += ["--config", path.absolute(), "--data-root", options.data_root.absolute()]
    record = {"file": str(path), "trial": winner.number, "setting": setting, "passed": test is not None}
    return record | {"command": shell_line(words)} | ({} if test is None else {"test": test})


def judge_winner(options: ShapeOptions, trials: Trials, winner: FrozenTrial) -> dict[str, Any]:
    """The winner on the test sets: the search's own models, and for each further seed models trained alike."""
    device = trials.world.device
    seeds = options.final_seeds or (3 if device.type == "cuda" else 1)
    results = []
    for seed in range(options.study.seed, options.study.seed + seeds):
        budget = replace(trials.budget, seed=seed)
        place = (
            trials.place(winner) if seed == options.study.seed else options.study.output_dir / "final" / f"seed{seed}"
        )
        for name in (FIRST_SET, *trials.sets):
            best = place / name / "best.pt"
            if not best.exists() or (best.parent / "last.pt").exists():  # of another machine, or unfinished
                recipe = recipe_of(winner.user_attrs["setting"], name, budget)
                trials.trainer(recipe, best.parent, f"winner, seed {seed}, {name}, ").run()
                (best.parent / "last.pt").unlink()
            judged = judge_once(load_model(best, device), options.data_root, device)
            results.append(run_result(judged, options.data_root, device))
    summary = summarise(results)
    return {
        "seeds": seeds,
        "lambda_theory": summary["lambda"],
        "global_tpe": summary["Global TPE"].record(),
        "consistency": summary["Consistency"].record(),
        "runs": [asdict(result) for result in results],
        "table": stage2_rows(summary, None),
        "remarks": remarks(summary),
    }


def _ranked(study: optuna.Study) -> list[FrozenTrial]:
    """The finished trials, best first."""
    return sorted(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)), key=_rank, reverse=True)


def _rank(trial: FrozenTrial) -> tuple[bool, float, float]:
    """Trials that passed by Global TPE; then, accuracy first, by what is missing of it, and by Local TPE.

    However long they were trained.
    """
    if feasible(trial) and trial.value is not None:
        return True, 0.0, trial.value
    missing = sum(by for name, by in trial.constraints.items() if name != GATE and by > 0)
    return False, -missing, trial.user_attrs["local_tpe"]


def _row(trial: FrozenTrial) -> dict[str, Any]:
    facts = trial.user_attrs
    return {
        "trial": trial.number,
        "state": trial.state.name,
        "global_tpe": trial.value if feasible(trial) else None,
        "constraints": dict(trial.constraints),
        **{
            name: facts[name]
            for name in ("setting", "epochs", "local_tpe", "lambda_theory", "parameters", "accuracies")
        },
    }


TASK = Task(DESCRIPTION, EXAMPLES, TRIALS, lambda _: STUDY_NAME, lambda _: (), add_options, shape_options, run)
