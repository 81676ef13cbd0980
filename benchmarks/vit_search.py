"""Whether the quick image search ranks shapes as longer training does: the same shapes with both budgets.

    python -m benchmarks.vit_search --data-root data --output-dir vit_search
    python -m benchmarks.vit_search --data-root data --output-dir vit_search --longer 4 --share 0/2      one of two jobs

Shapes are the baseline and others drawn from the space by seed. Each is trained on CIFAR-10 with the budget of --mode
quick, without rungs, and again with --longer times its pictures. Printed is Spearman's rank correlation of the Local
TPE at each rung and at the end of the quick run with that at the end of the longer run. Interrupted, it goes on where
it was. The last line of stdout is JSON.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from scipy.stats import spearmanr

from nkat import cli
from nkat.distributed import World
from nkat.hardware import describe, pick_device, set_threads
from nkat.report import format_table, write_json
from nkat_vit.metrics import lambda_theory, tpe
from nkat_vit.model import count_parameters
from nkat_vit.recipe import PRESETS
from nkat_vit.search import BASELINE, FIRST_SET, REDUCTION, Budget, Trials, recipe_of, suggest
from nkat_vit.search_job import BUDGETS


def draw_shapes(count: int, seed: int, max_tokens: int) -> list[dict[str, Any]]:
    """The baseline and `count` − 1 random points of the space."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [dict(BASELINE), *(suggest(study.ask(), max_tokens) for _ in range(count - 1))]


def local_tpes(trials: Trials, shape: dict[str, Any], folder: Path, label: str) -> list[float]:
    """Local TPE after each epoch; only the missing epochs are trained."""
    recipe = recipe_of(shape, FIRST_SET, trials.budget)
    trainer = trials.trainer(recipe, folder, label)
    trainer.run()
    lam = lambda_theory(count_parameters(recipe.model))
    return [tpe(row["validation"], lam) for row in trainer.history]


def main() -> None:
    parser = cli.parser(__doc__.splitlines()[0], "  python -m benchmarks.vit_search --data-root data --output-dir out")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--shapes", type=cli.positive_int, default=8)
    parser.add_argument("--longer", type=cli.positive_int, default=4, help="times the pictures of the quick budget (4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every Nth shape, from the Ith: several jobs")
    parser.add_argument("--amp", choices=("off", "bf16"), default="bf16")
    parser.add_argument("--threads", type=cli.positive_int)
    parser.add_argument("--no-cuda", action="store_true")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    set_threads(options.threads)
    world = World(0, 1, pick_device(not options.no_cuda))
    quick = Budget(*BUDGETS["quick"], lr=PRESETS["stage2"]["lr"], amp=options.amp, seed=options.seed)
    budgets = {"quick": quick, "longer": replace(quick, limit_train=quick.limit_train * options.longer)}
    shapes = draw_shapes(options.shapes, options.seed, quick.max_tokens)
    first, step = map(int, options.share.split("/"))
    curves: dict[str, list[list[float]]] = {name: [] for name in budgets}
    by_budget = {n: Trials(options.data_root, options.output_dir, b, 0.0, (), world) for n, b in budgets.items()}
    for number, shape in list(enumerate(shapes))[first::step]:
        for name, trials in by_budget.items():
            folder = options.output_dir / f"shape{number}-{name}"
            curves[name].append(local_tpes(trials, shape, folder, f"shape {number}, {name}, "))
    if step > 1:
        print(f"shapes {first}, {first + step}, … are done; run it once more without --share for the figures")
        return
    ends = [curve[-1] for curve in curves["longer"]]
    rungs = [quick.first_rung, quick.first_rung * REDUCTION, quick.epochs]
    rows = [
        [
            f"{s['conv_stem']}, patch {s['patch_size']}, {s['embed_dim']} x {s['depth']}, T {s['temperature']:g}, "
            f"p {s['top_p']:g}",
            *(f"{curve[epoch - 1]:.4f}" for epoch in rungs),
            f"{end:.4f}",
        ]
        for s, curve, end in zip(shapes, curves["quick"], ends, strict=True)
    ]
    print(format_table(rows, ["shape", *(f"{epoch} epochs" for epoch in rungs), f"{options.longer}x pictures"]))
    ranks = {epoch: spearmanr([curve[epoch - 1] for curve in curves["quick"]], ends) for epoch in rungs}
    for epoch, result in ranks.items():
        print(f"after {epoch} epochs: rank correlation {result.statistic:.3f} (p = {result.pvalue:.3f})")
    record = {
        "benchmark": "vit_search",
        "shapes": shapes,
        "curves": curves,
        "rank_correlation": {str(epoch): float(result.statistic) for epoch, result in ranks.items()},
        "ratio": float(ranks[quick.epochs].statistic),
        "machine": describe(world.device),
    }
    write_json(record, "-")


if __name__ == "__main__":
    cli.run(main)
