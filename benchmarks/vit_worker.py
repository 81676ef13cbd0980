"""A trainer that makes a step for each line of its input and says its seconds: one arm of `benchmarks.vit_against`.

Its text is run by `python -c` in the folder of a checkout, whose own `nkat_vit` it then times, an older one's too: it
uses nothing but what those have had since there was a trainer. Arguments: a recipe as JSON, threads. Pictures are
random bytes, of which a step's time is the same.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import torch

from nkat.host.distributed import World
from nkat_vit.data import ImageSet
from nkat_vit.loop import Trainer
from nkat_vit.recipe import make_recipe

_BATCHES = 4


def serve(values: dict[str, object], folder: Path) -> None:
    """Steps until the input ends."""
    recipe = make_recipe(values)
    model, count = recipe.model, _BATCHES * recipe.train.batch_size
    generator = torch.Generator().manual_seed(0)
    shape = (count, model.channels, model.image_size, model.image_size)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(model.classes, (count,), generator=generator)
    pictures = ImageSet(recipe.dataset, images, labels, "")
    trainer = Trainer(recipe, pictures, pictures, World(0, 1, torch.device("cpu")), folder)
    trainer.model.train()
    print("ready", flush=True)
    for _ in sys.stdin:
        started = perf_counter()
        trainer.train_step().item()
        print(perf_counter() - started, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(f"{__doc__}\nIt is a part of another command: python -m benchmarks.vit_against --help")
    torch.set_num_threads(int(sys.argv[2]))
    with tempfile.TemporaryDirectory() as name:
        serve(json.loads(sys.argv[1]), Path(name))
