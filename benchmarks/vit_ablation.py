"""What each setting of an image recipe is worth: runs that differ in one thing, with the same seeds.

    python -m benchmarks.vit_ablation --data-root data --output-dir ablation --seeds 3 nkat_strength=0 top_k=0,top_p=1
    python -m benchmarks.vit_ablation … --ladder lr=1e-3 pool=seq opt=muon      each on top of those before it

Each change is one or more settings of `nkat_vit.train` (as `name=value,name=value`) put over --preset. Judged on
held-out training pictures, never on the test set. The difference to the preset (of a ladder: to the step before) is
paired by seed. Finished runs are kept and unfinished ones go on; `--share 0/2` does every second run, so that several
processes can share the work. The last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.vit_ablation")

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from nkat.errors import NKATError
from nkat.host import commandline
from nkat.host.console import say
from nkat.host.distributed import World
from nkat.host.hardware import describe, pick_device, set_threads
from nkat.host.record import print_record
from nkat.host.tables import Column, Table, show
from nkat_vit.data import DATASETS, load_images
from nkat_vit.loop import open_run
from nkat_vit.recipe import PRESETS, make_recipe


def parse_change(text: str) -> dict[str, Any]:
    """`top_k=0,pool=seq,randaugment=[1,9]` → {"top_k": 0, "pool": "seq", "randaugment": [1, 9]}."""
    values = {}
    for part in re.split(r",(?![^\[]*\])", text):
        name, equals, value = part.partition("=")
        if not equals:
            raise NKATError(f"{part!r}: a change is name=value")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def steps_of(changes: Sequence[str], ladder: bool) -> list[tuple[str, dict[str, Any]]]:
    """(title, settings over the preset) of each run, the preset itself first."""
    steps: list[tuple[str, dict[str, Any]]] = [("preset", {})]
    for text in changes:
        below = steps[-1][1] if ladder else {}
        steps.append((("+ " if ladder else "") + text.replace(",", ", "), below | parse_change(text)))
    return steps


def train(values: dict[str, Any], data_root: Path, folder: Path, world: World) -> dict[str, float]:
    """Best validation accuracy and seconds of a run; only what is missing is trained."""
    recipe = make_recipe(values)
    trainer = open_run(recipe, load_images(recipe.dataset, data_root, train=True), world, folder, f"{folder.name}, ")
    trainer.run()
    return {"accuracy": trainer.best, "seconds": sum(row["seconds"] for row in trainer.history)}


def spread(values: Sequence[float]) -> str:
    """`+1.23 ± 0.45`"""
    return f"{fmean(values):+.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = commandline.parser(
        __doc__.splitlines()[0], "  python -m benchmarks.vit_ablation --output-dir out nkat_strength=0"
    )
    parser.add_argument("changes", nargs="+", metavar="NAME=VALUE,…")
    parser.add_argument("--ladder", action="store_true", help="each change on top of those before it")
    parser.add_argument("--dataset", choices=list(DATASETS), default="cifar10")
    parser.add_argument("--preset", choices=list(PRESETS), default="stage2")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=commandline.positive_int, default=3)
    parser.add_argument("--epochs", type=commandline.positive_int, default=10)
    parser.add_argument("--warmup", type=float, default=1.0)
    parser.add_argument("--limit-train", type=commandline.non_negative_int, default=10000)
    parser.add_argument("--validation", type=commandline.positive_int, default=5000)
    parser.add_argument("--amp", choices=("off", "bf16"), default="bf16")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every Nth run, from the Ith")
    parser.add_argument("--threads", type=commandline.thread_count)
    parser.add_argument("--no-cuda", action="store_true")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    set_threads(options.threads)
    world = World(0, 1, pick_device(not options.no_cuda))
    common = PRESETS[options.preset] | {
        name: getattr(options, name) for name in ("dataset", "epochs", "warmup", "limit_train", "validation", "amp")
    }
    steps = steps_of(options.changes, options.ladder)
    first, jobs = map(int, options.share.split("/"))
    runs = [(number, seed) for seed in range(options.seeds) for number in range(len(steps))]
    results: dict[tuple[int, int], dict[str, float]] = {}
    for number, seed in runs[first::jobs]:
        title, change = steps[number]
        name = f"{'ladder' if options.ladder else 'change'}-{title.strip('+ ').replace(', ', '_')}-seed{seed}"
        values = common | change | {"seed": seed}
        results[number, seed] = train(values, options.data_root, options.output_dir / name, world)
    if jobs > 1:
        say("this share is done; without --share come the figures")
        return
    rows, record = [], []
    for number, (title, change) in enumerate(steps):
        scores = [100 * results[number, seed]["accuracy"] for seed in range(options.seeds)]
        against = number - 1 if options.ladder else 0
        base = [100 * results[against, seed]["accuracy"] for seed in range(options.seeds)] if number else scores
        changes = [score - other for score, other in zip(scores, base, strict=True)]
        seconds = fmean(results[number, seed]["seconds"] for seed in range(options.seeds))
        rows.append({"settings": title, "accuracy": scores, "change": changes if number else None, "seconds": seconds})
        record.append({"title": title, "settings": change, "accuracy": scores, "change": changes, "seconds": seconds})
    against = "step before" if options.ladder else "preset"
    columns = [
        Column("settings", "settings"),
        Column("accuracy %", "accuracy", lambda scores: spread(scores).lstrip("+")),
        Column(f"against the {against}", "change", spread),
        Column("seconds", "seconds", ".0f"),
    ]
    show(Table("ablation", columns, rows, conditions=common))
    say(
        f"\n{options.dataset}, {options.preset}, {options.epochs} epochs of {options.limit_train or 'all'} pictures, "
        f"{options.validation} to validate, n = {options.seeds}, ± one standard deviation"
    )
    machine = describe(world.device)
    print_record({"benchmark": "vit_ablation", "settings": common, "steps": record, "machine": machine})
