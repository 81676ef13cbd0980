"""Whether the quick image search ranks shapes as longer training does: the same shapes with both budgets.

    python -m benchmarks.vit_search --data-root data --output-dir vit_search
    python -m benchmarks.vit_search --data-root data --output-dir vit_search --longer 4 --share 0/2      one of two jobs

Shapes are the baseline and others drawn from the space by seed. Each is trained on CIFAR-10 with the budget of --mode
quick, without rungs, and again with --longer times its pictures. Printed is Spearman's rank correlation of the Local
TPE at each rung and at the end of the quick run with that at the end of the longer run; and the same of the accuracy
alone, for Local TPE also ranks by size, which training does not change. Interrupted, it goes on where it was. The last
line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.vit_search")

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from scipy.stats import spearmanr

from nkat.host import commandline
from nkat.host.console import say
from nkat.host.distributed import World
from nkat.host.hardware import describe, pick_device, set_threads
from nkat.host.record import print_record
from nkat.host.tables import Column, Table, show
from nkat_vit.metrics import lambda_theory, tpe
from nkat_vit.model import count_parameters
from nkat_vit.recipe import PRESETS
from nkat_vit.search import BASELINE, FIRST_SET, REDUCTION, Budget, Shapes, Trials, recipe_of
from nkat_vit.search_options import BUDGETS


def draw_shapes(count: int, seed: int, max_tokens: int) -> list[dict[str, Any]]:
    """The baseline and `count` − 1 random points of the space."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [dict(BASELINE), *(Shapes(max_tokens).suggest(study.ask()) for _ in range(count - 1))]


def accuracies(trials: Trials, shape: dict[str, Any], folder: Path, label: str) -> list[float]:
    """Validation accuracy after each epoch; only the missing epochs are trained."""
    trainer = trials.trainer(recipe_of(shape, FIRST_SET, trials.budget), folder, label)
    trainer.run()
    return [row["validation"] for row in trainer.history]


def local_tpes(curves: list[list[float]], shapes: list[dict[str, Any]], budget: Budget) -> list[list[float]]:
    """The shapes' curves of accuracy as Local TPE."""
    lams = [lambda_theory(count_parameters(recipe_of(shape, FIRST_SET, budget).model)) for shape in shapes]
    return [[tpe(value, lam) for value in curve] for curve, lam in zip(curves, lams, strict=True)]


def main() -> None:
    parser = commandline.parser(
        __doc__.splitlines()[0], "  python -m benchmarks.vit_search --data-root data --output-dir out"
    )
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--shapes", type=commandline.positive_int, default=8)
    parser.add_argument(
        "--longer", type=commandline.positive_int, default=4, help="times the pictures of the quick budget (4)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every Nth shape, from the Ith: several jobs")
    parser.add_argument("--amp", choices=("off", "bf16"), default="bf16")
    parser.add_argument("--threads", type=commandline.thread_count)
    parser.add_argument("--no-cuda", action="store_true")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    set_threads(options.threads)
    world = World(0, 1, pick_device(not options.no_cuda))
    quick = Budget(**BUDGETS["quick"], lr=PRESETS["stage2"]["lr"], amp=options.amp, seed=options.seed)
    budgets = {"quick": quick, "longer": replace(quick, epoch_size=quick.epoch_size * options.longer)}
    shapes = draw_shapes(options.shapes, options.seed, quick.max_tokens)
    first, step = map(int, options.share.split("/"))
    curves: dict[str, list[list[float]]] = {name: [] for name in budgets}
    by_budget = {n: Trials(options.data_root, options.output_dir, b, 0.0, (), world) for n, b in budgets.items()}
    for number, shape in list(enumerate(shapes))[first::step]:
        for name, trials in by_budget.items():
            folder = options.output_dir / f"shape{number}-{name}"
            curves[name].append(accuracies(trials, shape, folder, f"shape {number}, {name}, "))
    if step > 1:
        say(f"shapes {first}, {first + step}, … are done; run it once more without --share for the figures")
        return
    scores = {name: local_tpes(curve, shapes, quick) for name, curve in curves.items()}
    rungs = [quick.first_rung, quick.first_rung * REDUCTION, quick.epochs]
    longer = f"{options.longer}x pictures"
    rows = [
        {
            **s,
            **{f"local_tpe_{epoch}": short[epoch - 1] for epoch in rungs},
            "local_tpe_longer": long[-1],
            **{f"accuracy_{name}": curve[n][-1] for name, curve in curves.items()},
        }
        for n, (s, short, long) in enumerate(zip(shapes, scores["quick"], scores["longer"], strict=True))
    ]
    shape = ("conv_stem", "patch_size", "embed_dim", "depth", "temperature", "top_p")
    columns = [
        Column("shape", shape, "{}, patch {}, {} x {}, T {:g}, p {:g}".format),
        *(Column(f"{epoch} epochs", f"local_tpe_{epoch}", ".4f") for epoch in rungs),
        Column(longer, "local_tpe_longer", ".4f"),
        Column("accuracy %", "accuracy_quick", lambda share: f"{100 * share:.1f}"),
        Column(f"{longer} %", "accuracy_longer", lambda share: f"{100 * share:.1f}"),
    ]
    show(Table("shapes", columns, rows))
    ranks = {}
    for title, values in (("local_tpe", scores), ("accuracy", curves)):
        ends = [curve[-1] for curve in values["longer"]]
        for epoch in rungs:
            result = spearmanr([curve[epoch - 1] for curve in values["quick"]], ends)
            ranks[title, epoch] = float(result.statistic)
            say(f"{title} after {epoch} epochs: rank correlation {result.statistic:.3f} (p = {result.pvalue:.3f})")
    record = {
        "benchmark": "vit_search",
        "shapes": shapes,
        "accuracies": curves,
        "local_tpes": scores,
        "rank_correlation": {
            title: {str(epoch): ranks[title, epoch] for epoch in rungs} for title in ("local_tpe", "accuracy")
        },
        "ratio": ranks["local_tpe", quick.epochs],
        "machine": describe(world.device),
    }
    print_record(record)
