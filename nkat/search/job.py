"""The search over a language model's Θ as a job: its study, the last word on the best, the report.

`nkat_auto_optimizer.py --task lm` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from nkat.host import console
from nkat.host.commandline import own_command
from nkat.host.console import counted, remark
from nkat.host.page import REPORT, write_page
from nkat.host.record import recorded
from nkat.lm.load import load_model
from nkat.search import report
from nkat.search.learned import has_begun
from nkat.search.objective import (
    BASE,
    GUARD,
    RANKS,
    OverheadLimit,
    Setting,
    SettingJudge,
    Space,
    apply_setting,
    make_objective,
    make_pruner,
    patterns_of,
    summary,
)
from nkat.search.optimal import write_none, write_optimal
from nkat.search.options import DESCRIPTION, EXAMPLES, SearchOptions, add_options, search_options
from nkat.search.page import search_page
from nkat.search.plots import plot_search
from nkat.search.prepare import Prepared, prepare
from nkat.sources.make import describe_theta_set, make_thetas
from nkat.study import workers
from nkat.study.folder import PICTURE, note_earlier, write_records
from nkat.study.study import best_trials, history, importances, make_sampler
from nkat.study.task import Task
from nkat.study.workers import Outcome, Search
from nkat.theta.layers import select_layers
from nkat.theta.set import CALIBRATION_KEY, ThetaSet

TRIALS = {"quick": 12, "full": 100}
TOP = 3


def run(options: SearchOptions) -> None:
    """The whole search."""
    ranks = (options.target_rank,) if options.target_rank else RANKS
    space = (Space.of_learned if options.learns else Space)(ranks, options.target_gamma)
    prepared = prepare(options, space)
    search = describe_search(options, space, prepared)
    with workers.interruptible(options.study):
        study = workers.connect(options.study, search)
        limit = None
        if options.max_overhead is not None:
            fast = load_model(prepared.loaded, thetas={}, gamma=1.0, int8_activations=True, repack=True).model
            limit = OverheadLimit(options.max_overhead, fast, prepared.held_out.passages.chunks[0, :64])
        judge = SettingJudge(prepared.seen, prepared.theta_set, options.study.seed)
        objective = make_objective(judge, space, limit, prepared.guard)
        outcome = workers.run(options.study, search, study, objective)
        if not options.study.join:
            workers.report(outcome, partial(judge_best, prepared), partial(write_report, options, space, prepared))


def describe_search(options: SearchOptions, space: Space, prepared: Prepared) -> Search:
    """The study's name, settings and first trials."""
    settings: dict[str, Any] = {
        "model_sha256": prepared.theta_set.base_sha256,
        "text_sha256": prepared.seen.passages.sha256,
        "chunks": prepared.chunks,
        "theta_source": options.theta_source,
        "reference_sha256": prepared.reference_sha256,
        "calibration_sha256": prepared.theta_set.notes.get(CALIBRATION_KEY),
        "ranks": list(space.ranks),
        "gamma": space.gamma,
        "seed": options.study.seed,
        "max_overhead": options.max_overhead,
    }
    if prepared.fit is not None:
        settings |= {
            "text": prepared.seen.passages.name,
            "fit_settings": prepared.fit["asked"],
            "fit_sha256": prepared.fit["sha256"],
            "guard": None if prepared.guard is None else [t.passages.name for t in prepared.guard.texts],
        }
    first = [({}, {BASE: True}), *((point, {}) for point in space.first())]
    return Search(study_name(options), settings, first, space, make_sampler, make_pruner(), TRIALS)


def study_name(options: SearchOptions) -> str:
    return f"nkat-{options.model.stem}"


@dataclass(frozen=True, slots=True)
class Judged:
    """The model without Θ and the best settings on held-out text: rows of the record; and the best one's Θ."""

    base: dict[str, Any]
    best: list[dict[str, Any]]
    theta: ThetaSet | None


def judge_best(prepared: Prepared, study: optuna.Study) -> Judged:
    """Measures the best settings on held-out chunks, the first with the very Θ that is written if it wins."""
    best = best_settings(study)
    chosen = made_theta(prepared, best[0][1]) if best else None
    rows: list[dict[str, Any]] = []
    judge = prepared.held_out
    count = len(judge.passages.chunks)
    with console.bar(1 + len(best), "judging on held-out text", "run") as bar:
        for number, setting in best:
            theta_set = chosen if chosen and not rows else apply_setting(prepared.theta_set, setting)
            score = judge.score(theta_set, progress=None)
            prices = {GUARD: found} if (found := study.trials[number].user_attrs.get(GUARD)) else {}
            rows.append({"trial": number, **summary(score, count, setting, theta_set), **prices})
            bar.update()
        judge.without(progress=None)  # scored beside the first of them
        base = summary(judge.base(), count)
        bar.update()
    return Judged(base, rows, chosen)


def write_report(
    options: SearchOptions, space: Space, prepared: Prepared, outcome: Outcome, judged: Judged | None
) -> None:
    """Writes every file of the output folder and prints what came out. judged: None after an interruption"""
    study, folder = outcome.study, options.study.output_dir
    trials = history(study)
    base = next((row for row in trials if not row["parameters"] and row["state"] == "COMPLETE"), None)
    first = next((row for number, _ in best_settings(study) for row in trials if row["number"] == number), None)
    record = workers.base_record(options.study, outcome, torch.device("cpu")) | {
        "model": str(options.model),
        **prepared.described,
        "chunks": prepared.chunks,
        "importances": importances(
            (t, t.value) for t in study.get_trials(states=(TrialState.COMPLETE,)) if t.value is not None
        ),
        "fit": prepared.fit,
        "turned_away": sum(not row[GUARD]["admitted"] for row in trials if GUARD in row),
        "gamma_range": None if space.gamma is not None else list(space.gammas[:2]),
        "gamma_edge": space.edge(judged.best[0]["setting"]["gamma"]) if judged and judged.best else None,
        "held_out": judged and {"base": judged.base, "best": judged.best},
        "optimal": None,
    }
    tried = any(row["parameters"] for row in trials)
    won = False
    if judged:
        if judged.theta and first:
            won = base is not None and first["value"] > base["value"] and judged.best[0]["tpe"] > judged.base["tpe"]
        if won or (judged.theta and options.study.force):
            assert judged.theta is not None
            record["optimal"] = write_optimal(options, prepared, judged.theta, judged.best[0], won)
        else:
            write_none(options, prepared, report.why_none(record, tried))
    write_records(folder, trials, record)
    words = report.what_came_out(record, won, tried) if judged else [f"interrupted: {workers.counts_line(record)}"]
    with recorded(record, options.study.json, options.study.force):
        if judged:
            if prepared.fit is not None:
                report.print_fit(prepared.fit)
            report.print_report(record, words)
            note_earlier(folder, "optimal_*.nkat", record["optimal"] and record["optimal"]["file"])
        else:
            report.print_interrupted(record, base, first)
        on = f"{counted(prepared.chunks, 'chunk')} of {prepared.seen.passages.name}"
        title = f"{options.model.name}: {counted(len(trials), 'trial')} on {on}"
        plot_search(folder / PICTURE, trials, record, title)
        page = search_page(record, trials, words, own_command(), folder / PICTURE)
        write_page(folder / REPORT, page, force=True)
        remark(f"files are in {folder}")
    report.suggest_next(options, record, won)


def best_settings(study: optuna.Study) -> list[tuple[int, Setting]]:
    """(trial, setting) of the best, the best first."""
    return distinct_settings(best_trials(study, len(study.trials)))[:TOP]


def distinct_settings(trials: Sequence[optuna.trial.FrozenTrial]) -> list[tuple[int, Setting]]:
    """(trial number, setting) of the trials that have one, each setting once, in the given order."""
    seen: dict[Setting, int] = {}
    for trial in trials:
        if trial.params:
            seen.setdefault(Setting(**trial.user_attrs["setting"]), trial.number)
    return [(number, setting) for setting, number in seen.items()]


def made_theta(prepared: Prepared, setting: Setting) -> ThetaSet:
    """The Θ of a setting as the converter makes it: one that was learned is cut, any other made at its own rank."""
    if prepared.fit is not None:
        return apply_setting(prepared.theta_set, setting)
    model = prepared.loaded.file
    base = model.require_base()
    patterns = None if setting.layers == "both" else patterns_of(setting.layers, prepared.theta_set.layers)
    names = select_layers(base.tensors, patterns)
    made_as = replace(prepared.made_as, rank=setting.rank, gamma=setting.gamma)
    thetas = make_thetas(base.file, names, made_as)
    return apply_setting(describe_theta_set(model, thetas, made_as, prepared.theta_set.base_sha256), setting)


def inputs_of(options: SearchOptions) -> list[Path | None]:
    return [options.model, options.reference, options.calibrate, options.text, *(options.fit.guard or ())]


TASK = Task(DESCRIPTION, EXAMPLES, TRIALS, study_name, inputs_of, add_options, search_options, run, has_begun)
