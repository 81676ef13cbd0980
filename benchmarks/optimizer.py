"""How many trials each sampler needs to find the best of an exhaustive grid.

    python -m benchmarks.optimizer --model model.gguf --chunks 2 --seeds 20

First every setting of the grid (rank × γ × layers × decay: 240) is measured on the model. Then each sampler searches
that table, many times with other seeds: TPE as the optimiser uses it, random, and the grid in random order. Reported
are the trials until the best setting was tried, and until one within 2 % of the way from best to median; and what a
trial costs beside the bare perplexity run. The last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.optimizer")

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

import optuna
import torch

from nkat.host import commandline, console
from nkat.host.console import say
from nkat.host.hardware import describe, set_threads
from nkat.host.record import print_record
from nkat.host.tables import Column, Table, show
from nkat.lm.load import load_model
from nkat.measure.judge import Judge
from nkat.measure.texts import load_text
from nkat.search.objective import (
    GROUPS,
    GUIDE_DEFAULT,
    RANKS,
    Setting,
    SettingJudge,
    Space,
    make_objective,
    make_pruner,
)
from nkat.sources.make import describe_theta_set, make_thetas
from nkat.sources.options import ThetaOptions
from nkat.study.study import make_sampler
from nkat.theta.layers import select_layers
from nkat.theta.modelfile import base_hash, open_model_file

MOST_TRIALS = 240
NEAR = 0.02


def grid() -> list[Setting]:
    """Every setting of the search's space."""
    gammas = [round(0.90 + 0.01 * i, 2) for i in range(10)]
    return [Setting(*point) for point in itertools.product(RANKS, gammas, GROUPS, (False, True))]


def measure_grid(judge: SettingJudge) -> dict[Setting, float]:
    """TPE of every setting, measured."""
    settings = grid()
    table = {}
    with console.bar(len(settings), "measuring the grid", "setting") as bar:
        for setting in settings:
            table[setting] = judge.measure(setting).tpe
            bar.update()
    return table


def trial_cost(judge: SettingJudge, rounds: int = 3) -> float:
    """Seconds of a whole trial over those of the bare perplexity run of the same Θ, in turns; median of the ratios."""
    study = optuna.create_study(direction="maximize", pruner=make_pruner())
    objective = make_objective(judge, Space())
    ratios = []
    for _ in range(rounds):
        study.enqueue_trial(GUIDE_DEFAULT)
        started = perf_counter()
        study.optimize(objective, n_trials=1)
        trial = perf_counter() - started
        started = perf_counter()
        judge.judge.passages.score(judge.judge.loaded.model)  # the trial's Θ is still in place
        ratios.append(trial / (perf_counter() - started))
    return median(ratios)


def by_sampler(sampler: optuna.samplers.BaseSampler) -> Iterator[Setting]:
    """The settings that a sampler tries, one after another; `send` it the score of each."""
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial(GUIDE_DEFAULT)
    while True:
        trial = study.ask()
        setting = Space().suggest(trial)
        study.tell(trial, (yield setting))


def shuffled_grid(seed: int) -> Iterator[Setting]:
    """The grid in a random order; takes the scores that are sent to it and does not use them."""
    settings = grid()
    random.Random(seed).shuffle(settings)
    while settings:
        yield settings.pop()


def trials_to_reach(order: Iterator[Setting], table: dict[Setting, float], goal: float) -> int:
    """Trials until a score of at least `goal`; MOST_TRIALS when it was not reached in so many."""
    setting = next(order)
    for count in range(1, MOST_TRIALS + 1):
        if table[setting] >= goal:
            return count
        try:
            setting = order.send(table[setting])
        except StopIteration:
            break
    return MOST_TRIALS


def main() -> None:
    parser = commandline.parser(__doc__.splitlines()[0], "  python -m benchmarks.optimizer --model model.gguf")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--chunks", type=commandline.positive_int, default=2)
    parser.add_argument("--seeds", type=commandline.positive_int, default=20)
    parser.add_argument("--threads", type=commandline.thread_count)
    commandline.add_output_format(parser)
    options = parser.parse_args()
    set_threads(options.threads)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    model = open_model_file(options.model)
    loaded, text = load_model(model), load_text(options.text)
    made = ThetaOptions(rank=max(RANKS))
    names = select_layers(model.base.tensors, None)
    theta_set = describe_theta_set(model, make_thetas(model.base.file, names, made), made, base_hash(model))
    judge = SettingJudge(Judge.open(loaded, text, options.chunks), theta_set)
    judge.base()
    cost = trial_cost(judge)
    say(f"a trial takes {cost:.3f}x the bare perplexity run")
    started = perf_counter()
    table = measure_grid(judge)
    seconds = perf_counter() - started
    best = max(table, key=lambda setting: table[setting])
    near = table[best] - NEAR * (table[best] - median(table.values()))
    searches: dict[str, Callable[[int], Iterator[Setting]]] = {
        "TPE": lambda seed: by_sampler(make_sampler(seed)),
        "random": lambda seed: by_sampler(optuna.samplers.RandomSampler(seed=seed)),
        "grid, shuffled": shuffled_grid,
    }
    results = {}
    for name, search in searches.items():
        with console.bar(options.seeds, name, "seed") as bar:
            counts = []
            for seed in range(options.seeds):
                counts.append([trials_to_reach(search(seed), table, goal) for goal in (table[best], near)])
                bar.update()
        to_best, to_near = (sorted(column) for column in zip(*counts, strict=True))
        results[name] = {
            "best": median(to_best),
            "near": median(to_near),
            "near_range": [to_near[0], to_near[-1]],
        }
    say(f"best of {len(table)}: {best}, TPE {table[best]:.6f}; without Θ {judge.base().tpe:.6f}")
    rows = [
        {"sampler": name, "best": r["best"], "near": r["near"], "range": r["near_range"]} for name, r in results.items()
    ]
    columns = [
        Column("sampler", "sampler"),
        Column("trials to best", "best", "g"),
        Column("to within 2 %", "near", "g"),
        Column("range", "range", lambda ends: "{}-{}".format(*ends)),
    ]
    show(Table("samplers", columns, rows))
    ratio = results["random"]["near"] / results["TPE"]["near"]
    say(
        f"random needs {ratio:.2f}x the trials of TPE (medians of {options.seeds} seeds; {MOST_TRIALS} means not found)"
    )
    record = {
        "benchmark": "optimizer",
        "model": options.model.name,
        "text": text.name,
        "chunks": options.chunks,
        "seeds": options.seeds,
        "best": best.parameters(),
        "best_tpe": table[best],
        "grid_seconds": seconds,
        "results": results,
        "ratio": ratio,
        "trial_cost": cost,
        "machine": describe(torch.device("cpu")),
    }
    print_record(record)
