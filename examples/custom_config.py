"""A model and a training run of one's own, from Python: what do the gauge terms do at this strength?

    python -m examples.custom_config --dataset fashion --strength 0.05 --seeds 3

Trains the same small model with and without gauge terms, from equal seeds, and prints both validation accuracies and
the paired difference. The test set is not touched.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("examples.custom_config")

import tempfile
from pathlib import Path
from statistics import fmean, stdev

from nkat.host import commandline
from nkat.host.distributed import World
from nkat.host.hardware import pick_device
from nkat_vit.data import DATASETS, load_images, split
from nkat_vit.loop import Trainer
from nkat_vit.recipe import make_recipe

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = commandline.parser(
        "Gauge terms on and off, same seeds.", "  python -m examples.custom_config --dataset fashion"
    )
    parser.add_argument("--dataset", choices=list(DATASETS), default="mnist")
    parser.add_argument("--data-root", type=Path, default=ROOT / "data", help="folder with the archives (data)")
    parser.add_argument("--strength", type=float, default=0.05)
    parser.add_argument("--seeds", type=commandline.positive_int, default=3)
    parser.add_argument("--epochs", type=commandline.positive_int, default=2)
    parser.add_argument("--limit-train", type=commandline.positive_int, default=10000)
    parser.add_argument("--validation", type=commandline.positive_int, default=5000)
    options = parser.parse_args()
    whole = load_images(options.dataset, options.data_root, train=True)
    world = World(rank=0, size=1, device=pick_device(allow_cuda=True))
    differences = []
    for seed in range(options.seeds):
        accuracies = []
        for strength in (options.strength, 0.0):
            recipe = make_recipe(
                {
                    "dataset": options.dataset,
                    "embed_dim": 128,
                    "depth": 4,
                    "heads": 4,
                    "nkat_strength": strength,
                    "randaugment": (1, 5),
                    "epochs": options.epochs,
                    "lr": 2e-3,
                    "warmup": 0.5,
                    "ema": 0.99,
                    "seed": seed,
                    "validation": options.validation,
                }
            )
            train, held = split(whole, options.validation, seed, options.limit_train)
            with tempfile.TemporaryDirectory() as folder:
                trainer = Trainer(recipe, train, held, world, Path(folder))
                trainer.run()
            accuracies.append(100 * trainer.history[-1]["validation"])
        differences.append(accuracies[0] - accuracies[1])
        print(f"seed {seed}: with {accuracies[0]:.2f} %, without {accuracies[1]:.2f} %", flush=True)
    spread = f" ± {stdev(differences):.2f} (sd)" if len(differences) > 1 else ""
    print(f"gauge terms change accuracy by {fmean(differences):+.2f}{spread} points, n = {len(differences)}")
