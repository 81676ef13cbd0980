"""Accuracy against minutes on CIFAR-10: the image model beside peers, each with its own recipe in the same minutes.

    python -m benchmarks.vit_peers --data-root data --output-dir peers --minutes 20 --threads 2
    python -m benchmarks.vit_peers --data-root data --output-dir peers --minutes 20 --only cnn cct --seeds 1

`fast` is `nkat_vit.train --preset fast`; `cnn` a plain convolutional network of airbench94's kind
(`benchmarks.vit_cnn`); `cct` the compact convolutional transformer CCT-4/3x2 (Hassani et al., 2021, arXiv 2104.05704)
of the package vit-pytorch (`pip install vit-pytorch`), with AdamW, warm-up and label smoothing as there and the
pictures shifted and mirrored. Each trains for as many whole epochs as its measured speed fits into the minutes, so
that its rate falls to zero within them; run nothing else. After each epoch it is judged on held-out training pictures,
on the test set once, at its end. A run that is there is not made again; peers that were interrupted begin anew. It
writes minutes.png; the last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.vit_peers")

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.vit_cnn import CNN_RECIPE, PlainCNN
from nkat.errors import NKATError
from nkat.host import commandline, console, hardware
from nkat.host.console import note
from nkat.host.distributed import World
from nkat.host.figures import new_figure, save_figure
from nkat.host.record import print_record, write_json
from nkat.host.tables import Column, Table, show
from nkat_vit.augment import AugmentConfig, views
from nkat_vit.data import ImageSet, find_dataset, load_images, split
from nkat_vit.loop import open_run
from nkat_vit.optim import lr_factor
from nkat_vit.predict import accuracy, autocast
from nkat_vit.recipe import PRESETS, make_recipe

DATASET = "cifar10"
_TRIAL_STEPS = 6  # of which the first two warm up


@dataclass(frozen=True, slots=True)
class PeerRecipe:
    """How a peer learns.

    optimizer: makes it for a model;  factor: of the learning rate at step i of n
    settle: called after each step, with its number and how many there are: averages of weights and the like
    """

    batch: int
    smoothing: float
    augment: AugmentConfig
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    factor: Callable[[int, int], float]
    settle: Callable[[nn.Module, int, int], None] = lambda model, step, steps: None
    sums: bool = False  # the loss over the batch, instead of its mean


class Judged(nn.Module):
    """A peer as the image model's judge calls one: logits come first of what it returns."""

    def __init__(self, model: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean.view(-1, 1, 1))
        self.register_buffer("std", std.view(-1, 1, 1))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.model(((pictures - self.mean) / self.std).contiguous(memory_format=torch.channels_last)),)


def compact_transformer(train: ImageSet) -> nn.Module:
    """CCT-4/3x2 for 32 x 32 pictures, 0.5 M parameters. Raises NKATError without vit-pytorch.

    Its file is loaded by itself: the package imports all of its models, and for some of them torchvision.
    """
    package = importlib.util.find_spec("vit_pytorch")
    if package is None or package.submodule_search_locations is None:
        raise NKATError("the peer cct needs vit-pytorch: pip install vit-pytorch, or leave it out with --only")
    spec = importlib.util.spec_from_file_location("cct", Path(package.submodule_search_locations[0]) / "cct.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cct_4(
        img_size=32,
        n_conv_layers=2,
        kernel_size=3,
        stride=1,
        padding=1,
        pooling_kernel_size=3,
        pooling_stride=2,
        pooling_padding=1,
        num_classes=10,
        positional_embedding="learnable",
    )


def _warm_and_cosine(step: int, steps: int) -> float:
    return lr_factor(step, steps, max(1, steps // 10))


CCT_RECIPE = PeerRecipe(
    batch=128,
    smoothing=0.1,
    augment=AugmentConfig(crop=4, flip=True, cutout=0, mixup=0.0, cutmix=0.0, randaugment=(0, 0)),
    optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.06, fused=True),
    factor=_warm_and_cosine,
)
PEERS: dict[str, tuple[Callable[[ImageSet], nn.Module], PeerRecipe]] = {
    "cnn": (PlainCNN.for_pictures, PeerRecipe(**CNN_RECIPE)),
    "cct": (compact_transformer, CCT_RECIPE),
}
RUNS = ("fast", *PEERS)


@dataclass(slots=True)
class PeerRun:
    """One peer, from its first step to its last."""

    model: Judged
    recipe: PeerRecipe
    train: ImageSet
    seed: int
    steps: int = 0  # of the whole run
    step: int = 0
    optimizer: torch.optim.Optimizer | None = None

    def advance(self) -> torch.Tensor:
        """A step of the optimiser; its loss."""
        recipe, model = self.recipe, self.model
        if self.optimizer is None:
            self.optimizer = recipe.optimizer(model.model)
            for group in self.optimizer.param_groups:
                group["peak"] = group["lr"]
        factor = recipe.factor(self.step, max(self.steps, self.step + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        index = self.index()
        random = np.random.default_rng([self.seed, self.step])
        torch.manual_seed(int(random.integers(2**62)))
        mean = tuple(self.model.mean.flatten().tolist())
        pictures = views(self.train.images[index], recipe.augment, mean, random)
        with autocast(torch.device("cpu"), "bf16"):
            logits = model(pictures)[0]
        labels, reduction = self.train.labels[index], "sum" if recipe.sums else "mean"
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.smoothing, reduction=reduction)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        recipe.settle(model.model, self.step, self.steps)
        return loss.detach() / (len(index) if recipe.sums else 1)

    @property
    def epoch_steps(self) -> int:
        return len(self.train) // self.recipe.batch

    def index(self) -> torch.Tensor:
        epoch, position = divmod(self.step, self.epoch_steps)
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(1000 * self.seed + epoch))
        return order[position * self.recipe.batch :][: self.recipe.batch]


def train_peer(name: str, data: tuple[ImageSet, ImageSet], seed: int, minutes: float) -> tuple[Judged, dict[str, Any]]:
    """A peer after its minutes, and its record: rows of minutes, loss and validation accuracy by epoch."""
    train, held = data
    make, recipe = PEERS[name]
    facts = find_dataset(DATASET)

    def begin() -> PeerRun:
        torch.manual_seed(seed)
        model = Judged(make(train), torch.tensor(facts.mean), torch.tensor(facts.std)).train()
        return PeerRun(model.to(memory_format=torch.channels_last), recipe, train, seed)

    trial = begin()
    seconds = step_seconds(trial.advance)
    run = begin()
    epochs = whole_epochs(minutes, seconds * run.epoch_steps)
    run.steps = epochs * run.epoch_steps
    rows: list[dict[str, float]] = []
    spent = 0.0
    for epoch in range(epochs):
        started, losses = perf_counter(), torch.zeros(())
        with console.bar(run.epoch_steps, f"{name}, seed {seed}, epoch {epoch + 1}/{epochs}", "step") as bar:
            for _ in range(run.epoch_steps):
                losses += run.advance()
                bar.update()
        spent += perf_counter() - started
        row = {"minutes": spent / 60, "loss": float(losses) / run.epoch_steps}
        rows.append(row | {"validation": accuracy(run.model, held, "flip", "bf16")})
        note(f"{name}, seed {seed}: {rows[-1]['validation']:.2%} after {spent / 60:.1f} minutes")
    return run.model, {"epochs": epochs, "rows": rows}


def train_fast(
    data: ImageSet, folder: Path, seed: int, minutes: float, validation: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The preset's model after the same minutes: a peer's record."""
    values = PRESETS["fast"] | {"dataset": DATASET, "seed": seed, "validation": validation, "amp": "bf16"}
    trial = open_run(make_recipe(values), data, World(0, 1, torch.device("cpu")), folder / "trial", "")
    epochs = whole_epochs(minutes, step_seconds(trial.train_step) * trial.epoch_steps)
    recipe = make_recipe(values | {"epochs": epochs, "warmup": min(1.0, epochs / 10)})
    world = World(0, 1, torch.device("cpu"))
    trainer = open_run(recipe, data, world, folder / f"{epochs}-epochs", f"fast, seed {seed}, ")
    trainer.run()
    rows, spent = [], 0.0
    for row in trainer.history:
        spent += row["seconds"]
        rows.append({"minutes": spent / 60, "loss": row["loss"], "validation": row["validation"]})
    return trainer.judge, {"epochs": epochs, "rows": rows}


def step_seconds(step: Callable[[], object]) -> float:
    """The fastest of some steps, the first two left out."""
    times = []
    for _ in range(_TRIAL_STEPS):
        started = perf_counter()
        step()
        times.append(perf_counter() - started)
    return min(times[2:])


def whole_epochs(minutes: float, seconds: float) -> int:
    """How many epochs of so many seconds fit into the minutes. Raises NKATError for less than one."""
    epochs = int(60 * minutes / seconds)
    if epochs < 1:
        raise NKATError(f"an epoch takes {seconds / 60:.1f} minutes here, and --minutes gives {minutes:g}")
    return epochs


def main() -> None:
    example = "  python -m benchmarks.vit_peers --data-root data --output-dir peers --minutes 20"
    parser = commandline.parser(__doc__.splitlines()[0], example)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--output-dir", type=Path, required=True, metavar="FOLDER", help="where runs are kept")
    parser.add_argument("--minutes", type=float, default=20.0, metavar="N", help="of training, each (default 20)")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--seeds", type=commandline.positive_int, default=3, metavar="N", help="runs of each (3)")
    parser.add_argument("--peer-seeds", type=commandline.positive_int, metavar="N", help="of the peers (as --seeds)")
    parser.add_argument("--validation", type=commandline.positive_int, default=2000, metavar="N", help="pictures")
    parser.add_argument("--threads", type=commandline.thread_count, metavar="N")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    threads = hardware.set_threads(options.threads)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for name, seed in planned(options.only, options.seeds, options.peer_seeds or options.seeds):
        path = options.output_dir / f"{name}-{options.minutes:g}-{seed}.json"
        if not path.exists():
            write_json(one_run(name, seed, options), str(path))
        results.setdefault(name, []).append(json.loads(path.read_text(encoding="utf-8")))
    draw(options.output_dir / "minutes.png", results, f"CIFAR-10, {threads} threads of a processor")
    show(table(results))
    print_record({"benchmark": "vit_peers", "machine": hardware.describe(torch.device("cpu")), "runs": results})


def planned(names: Sequence[str], seeds: int, peer_seeds: int) -> list[tuple[str, int]]:
    """Names and seeds of the runs, the first seed of each before the second of any."""
    counts = {name: peer_seeds if name in PEERS else seeds for name in names}
    return [(name, seed) for seed in range(max(counts.values())) for name in names if seed < counts[name]]


def one_run(name: str, seed: int, options: Any) -> dict[str, Any]:
    whole = load_images(DATASET, options.data_root, train=True)
    if name == "fast":
        folder = options.output_dir / f"{name}-{options.minutes:g}-{seed}"
        model, record = train_fast(whole, folder, seed, options.minutes, options.validation)
    else:
        model, record = train_peer(name, split(whole, options.validation, seed), seed, options.minutes)
    test = accuracy(model, load_images(DATASET, options.data_root, train=False), "flip", "bf16")
    parameters = sum(p.numel() for p in model.parameters())
    return {"name": name, "seed": seed, "test": test, "parameters": parameters, **record}


def table(results: dict[str, list[dict[str, Any]]]) -> Table:
    """A row a model: test accuracy over the seeds."""
    rows = []
    for name, runs in results.items():
        tests = [100 * run["test"] for run in runs]
        row = {"name": name, "n": len(runs), "test": fmean(tests), "spread": stdev(tests) if len(tests) > 1 else None}
        row |= {"epochs": fmean(run["epochs"] for run in runs), "parameters": runs[0]["parameters"]}
        rows.append(row | {"minutes": fmean(run["rows"][-1]["minutes"] for run in runs)})

    def score(test: float, spread: float | None) -> str:
        return f"{test:.2f}" + ("" if spread is None else f" ± {spread:.2f}")

    columns = [
        Column("model", "name"),
        Column("parameters", "parameters", ","),
        Column("n", "n"),
        Column("epochs", "epochs", ".0f"),
        Column("minutes", "minutes", ".1f"),
        Column("test %", ("test", "spread"), score),
    ]
    return Table("peers", columns, rows)


def draw(path: Path, results: dict[str, list[dict[str, Any]]], title: str) -> None:
    """Held-out accuracy against minutes, a line a run."""
    figure = new_figure(title, (8, 5))
    axes = figure.subplots()
    for colour, (name, runs) in enumerate(results.items()):
        for run in runs:
            minutes, scores = zip(*((row["minutes"], 100 * row["validation"]) for row in run["rows"]), strict=True)
            axes.plot(minutes, scores, ".-", color=f"C{colour}", label=name if run is runs[0] else None)
    axes.set(xlabel="minutes of training", ylabel="% of held-out pictures right")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    save_figure(figure, path, force=True)


if __name__ == "__main__":
    main()
