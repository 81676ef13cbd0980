"""Trains the image model: python -m nkat_vit.train --dataset cifar10 --preset stage2

    torchrun --nproc-per-node 2 -m nkat_vit.train …      data parallel; --batch-size is over all processes

The output folder gets last.pt (continues the run), best.pt (the model to use), config.json, log.csv, curves.png and
result.json. The test set's files are checked before the first step. It is used once, after the last epoch, for the
weights with the best validation accuracy.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("nkat_vit.train")

import argparse
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.host import commandline
from nkat.host.console import note
from nkat.host.distributed import World, join_world
from nkat.host.figures import new_figure, save_figure
from nkat.host.files import atomic_output, make_folder
from nkat.host.hardware import describe, set_threads
from nkat.host.record import check_record, recorded, toolkit_version, write_json
from nkat.host.start import INTERRUPTED
from nkat_vit import checkpoint
from nkat_vit.attention import COLOR_GROUPS
from nkat_vit.checkpoint import load_model
from nkat_vit.data import DATASETS, load_images, split
from nkat_vit.loop import Trainer, measure_amp
from nkat_vit.metrics import lambda_theory, tpe
from nkat_vit.model import COLOR_NORMS, POOLS, STEMS
from nkat_vit.pictures import DPI
from nkat_vit.predict import judge_once
from nkat_vit.recipe import (
    AMP,
    OPTIMIZERS,
    PRESETS,
    TTA_CHOICES,
    Recipe,
    describe_presets,
    make_recipe,
    read_config,
    with_amp,
)

_EXAMPLES = """\
  python -m nkat_vit.train --dataset cifar10 --preset stage2
  python -m nkat_vit.train --dataset mnist --epochs 3 --amp --output output/vit/mnist
  python -m nkat_vit.train --resume output/vit/mnist
  python -m nkat_vit.train --dataset cifar10 --conv_stem tiny --patch_size 2 --embed_dim 384 --depth 7 \\
      --temperature 0.65 --top_k 6 --top_p 0.80 --nkat_strength 0.0024 --nkat_decay 0.99 --dropout_attn 0.17 \\
      --dropout_embed 0.08 --mixup 0.1 --cutmix 0.2 --randaugment 2 9 --lr 2e-4 --epochs 40 --warmup 5 \\
      --ema 0.9995 --clip_grad 1.0
  python -m nkat_vit.train --dataset cifar10 --preset fast
  torchrun --nproc-per-node 2 -m nkat_vit.train --dataset cifar10 --preset strong"""

# (name, type or choices, help); every name is accepted with hyphens as well. Defaults are those of the preset.
_MODEL_FLAGS: list[tuple[str, Any, str]] = [
    ("conv_stem", tuple(STEMS), "convolutions before the patches"),
    ("patch_size", int, "side of a patch, in the stem's cells"),
    ("embed_dim", int, "width"),
    ("depth", int, "blocks"),
    ("heads", int, "attention heads"),
    ("mlp_ratio", float, "hidden width of the MLPs over embed_dim"),
    ("color_norm", COLOR_NORMS, "LayerNorm over the colours of each pixel, in place of the picture or beside it"),
    ("split_heads", bool, f"heads in {COLOR_GROUPS} groups: red, green, blue, shared"),
    ("color_dim", int, "width of each colour's local features"),
    ("color_layers", int, "how many blocks see them, from the first"),
    ("temperature", float, "divides the attention scores"),
    ("top_k", int, "keys each query may look at, 0: all"),
    ("top_p", float, "weight of the keys each query may look at, 1: all"),
    ("nkat_strength", float, "of the gauge terms, 0: none"),
    ("nkat_decay", float, "of the strength, a layer"),
    ("gauge_rank", int, "of the gauge terms' factors"),
    ("dropout_attn", float, "of attention weights"),
    ("dropout_embed", float, "of embedded patches"),
    ("dropout", float, "in the MLPs"),
    ("drop_path", float, "stochastic depth of the last block"),
    ("pool", POOLS, "how tokens become one vector"),
]
_AUGMENT_FLAGS: list[tuple[str, Any, str]] = [
    ("crop", int, "greatest shift in pixels"),
    ("flip", bool, "mirror half of the pictures (default: where the set allows it)"),
    ("cutout", int, "side of the square left out"),
    ("mixup", float, "α of Mixup, 0: off"),
    ("cutmix", float, "α of CutMix, 0: off"),
    ("channel_shuffle", float, "probability that colours change places"),
]
_TRAIN_FLAGS: list[tuple[str, Any, str]] = [
    ("epochs", int, "passes over the training pictures"),
    ("batch_size", int, "over all processes"),
    ("opt", OPTIMIZERS, "optimiser; muon: for matrices and convolutions, AdamW for the rest"),
    ("lr", float, "AdamW's peak learning rate"),
    ("muon_lr", float, "Muon's"),
    ("warmup", float, "epochs until the peak; a cosine follows"),
    ("weight_decay", float, "decoupled"),
    ("ema", float, "decay of the averaged weights, 0: off"),
    ("clip_grad", float, "greatest norm of the gradient, 0: off"),
    ("smoothing", float, "label smoothing"),
    ("seed", int, "of everything random"),
    ("validation", int, "pictures held out of the training set"),
    ("limit_train", int, "train on so many pictures, 0: all"),
    ("tta", TTA_CHOICES, "average over the mirror image when judging; auto: where the set allows it"),
]


def make_parser() -> argparse.ArgumentParser:
    """The command line; settings of the recipe that are not given are absent from the result."""
    parser = commandline.parser("Train the image model on an image set.", f"{_EXAMPLES}\n\n{describe_presets()}")
    parser.add_argument(
        "--dataset", choices=list(DATASETS), default=argparse.SUPPRESS, metavar="SET", help=", ".join(DATASETS)
    )
    parser.add_argument("--preset", choices=list(PRESETS), help="all settings not given (stage2)")
    parser.add_argument("--config", type=Path, help="settings from a JSON file, such as a run's config.json")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder with the archives (data)")
    parser.add_argument("--output", type=Path, help="folder for the run (output/vit/SET-PRESET-seedN)")
    parser.add_argument("--resume", nargs="?", const="", metavar="FOLDER", help="go on with the run in the folder")
    parser.add_argument("--force", action="store_true", help="start anew in a folder that holds a run; replace --json")
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler)")
    parser.add_argument(
        "--save-steps", type=commandline.non_negative_int, default=0, help="checkpoints within epochs, too"
    )
    parser.add_argument("--tensorboard", action="store_true", help="log for TensorBoard (needs tensorboard)")
    parser.add_argument("--no-test", action="store_true", help="leave the test set alone")
    parser.add_argument("--no-cuda", action="store_true", help="the processor although there is a GPU")
    parser.add_argument("--threads", type=commandline.thread_count, help="processor threads")
    parser.add_argument("--json", metavar="FILE", help='record of the run; "-": last line of stdout')
    for title, flags in (("model", _MODEL_FLAGS), ("augmentation", _AUGMENT_FLAGS), ("training", _TRAIN_FLAGS)):
        group = parser.add_argument_group(f"{title} (defaults: the preset's)")
        for name, kind, text in flags:
            options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text, "dest": name}
            if kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif isinstance(kind, tuple):
                options["choices"] = kind
            else:
                options |= {"type": kind, "metavar": {int: "N", float: "X"}[kind]}
            group.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **options)
        if title == "augmentation":
            group.add_argument(
                "--randaugment", type=int, nargs=2, metavar=("N", "M"), default=argparse.SUPPRESS, help="M of 30"
            )
        if title == "training":
            group.add_argument(
                "--amp",
                nargs="?",
                const="auto",
                choices=AMP,
                default=argparse.SUPPRESS,
                help="bfloat16 autocast; without a value: where a few measured steps find it faster",
            )
            group.add_argument("--model-ema", action="store_true", help="averaged weights, at the preset's decay")
    return parser


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a run is made: the flags of their names, None where one was not given.

    flags: settings of the recipe that were given, by name
    """

    preset: str | None
    config: Path | None
    data_root: Path
    output: Path | None
    resume: str | None
    force: bool
    compile: bool
    save_steps: int
    tensorboard: bool
    no_test: bool
    no_cuda: bool
    threads: int | None
    json: str | None
    model_ema: bool
    flags: Mapping[str, Any]


def parse_arguments(argv: Sequence[str] | None = None) -> TrainOptions:
    """The command line; a mistake ends the program with one line and status 2."""
    parsed = make_parser().parse_args(argv)
    names = {"dataset", "randaugment", "amp"} | {f[0] for f in (*_MODEL_FLAGS, *_AUGMENT_FLAGS, *_TRAIN_FLAGS)}
    flags = {name: value for name, value in vars(parsed).items() if name in names}
    return commandline.taken(TrainOptions, parsed, flags=flags)


def given_values(options: TrainOptions) -> dict[str, Any]:
    """Settings that the user chose: an explicit preset, then the file, then the flags."""
    values = dict(PRESETS[options.preset]) if options.preset else {}
    if options.config:
        values |= read_config(options.config)
    values |= options.flags
    if options.model_ema and not values.get("ema", 1.0):
        raise NKATError("--model-ema and an ema of 0 contradict each other")
    return values


def begin_run(options: TrainOptions, world: World) -> tuple[Recipe, Path, dict[str, Any] | None]:
    """The recipe, the folder, and the checkpoint to go on from."""
    given = given_values(options)
    if options.resume is None:
        recipe = make_recipe(PRESETS[options.preset or "stage2"] | given)
        folder = _folder(options, recipe)
        if world.first:
            names = ("last.pt", "best.pt", "result.json")
            if any((folder / name).exists() for name in names) and not options.force:
                raise NKATError(
                    f"{folder}: holds a run already; give --resume to go on with it or --force to replace it"
                )
            make_folder(folder)
            for name in names:
                (folder / name).unlink(missing_ok=True)
        world.wait()
        return recipe, folder, None
    folder = Path(options.resume) if options.resume else _folder(options, make_recipe(PRESETS["stage2"] | given))
    folder = folder.parent if folder.suffix == ".pt" else folder
    content = checkpoint.load(folder / "last.pt", "run")
    checkpoint.recipe_of(content, folder / "last.pt")
    saved = content["recipe"]
    wanted = make_recipe(saved | given).values()
    for name, value in given.items():
        if wanted[name] != saved[name] and not (name == "amp" and value == "auto"):
            raise NKATError(f"{folder}: was begun with {name} {saved[name]}, which --resume cannot change to {value}")
    return make_recipe(saved), folder, content


def train(options: TrainOptions, world: World) -> dict[str, Any] | None:
    """The whole run; returns its record on rank 0."""
    recipe, folder, content = begin_run(options, world)
    whole = load_images(recipe.dataset, options.data_root, train=True)
    if not options.no_test:
        load_images(recipe.dataset, options.data_root, train=False)  # a bad file is found now, not after the last epoch
    config = recipe.train
    train_set, held = split(whole, config.validation, config.seed, config.limit_train or None)
    if config.amp == "auto":
        # Ranks measure together and could differ: one that is not alone must not decide for itself.
        amp, seconds = (
            measure_amp(recipe, train_set.to(world.device), world.device) if world.size == 1 else ("bf16", {})
        )
        measured = ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in seconds.items()) or "not measured with processes"
        note(f"--amp: {amp} (a step without augmentation: {measured})")
        recipe = with_amp(recipe, amp)
    writer = _tensorboard(folder) if options.tensorboard and world.first else None

    def on_epoch(history: list[dict[str, float]]) -> None:
        _write_log(folder / "log.csv", history)
        row = history[-1]
        note(
            f"epoch {row['epoch']:.0f}/{config.epochs}: loss {row['loss']:.4f}, validation "
            f"{100 * row['validation']:.2f} % ({row['seconds']:.0f} s, {row['images_per_second']:.0f} images/s)"
        )
        if writer is not None:
            for name, value in row.items():
                writer.add_scalar(name, value, int(row["epoch"]))
            writer.flush()

    trainer = Trainer(
        recipe,
        train_set,
        held,
        world,
        folder,
        save_steps=options.save_steps,
        compiled=options.compile,
        on_epoch=on_epoch,
    )
    if world.first:
        write_json(recipe.values(), str(folder / "config.json"), force=True)
        parameters = sum(p.numel() for p in trainer.model.parameters())
        note(f"{recipe.dataset}: {len(train_set)} to train on, {len(held)} to validate; {parameters:,} parameters")
    if content is not None:
        trainer.restore(content)
        note(f"going on after step {trainer.step}, epoch {trainer.step // trainer.epoch_steps}")
    trainer.run()
    if not world.first:
        return None
    _plot_curves(folder / "curves.png", trainer.history, recipe)
    return _finish(options, folder, trainer)


def _finish(options: TrainOptions, folder: Path, trainer: Trainer) -> dict[str, Any]:
    """Judges the best weights on the test set, once; a run that was judged before keeps its result."""
    best = load_model(folder / "best.pt", trainer.world.device)
    if not options.no_test:
        best = judge_once(best, options.data_root, trainer.world.device)
    facts = best.facts
    parameters = sum(p.numel() for p in best.model.parameters())
    lam = lambda_theory(parameters)
    record = {
        "output": str(folder),
        "parameters": parameters,
        "lambda_theory": lam,
        "tpe": tpe(facts["test"], lam) if "test" in facts else None,
        "seconds": sum(row["seconds"] for row in trainer.history),
        **facts,
        "recipe": best.recipe.values(),
        "history": trainer.history,
        "machine": describe(trainer.world.device),
        "processes": trainer.world.size,
        **toolkit_version(),
    }
    write_json(record, str(folder / "result.json"), force=True)
    return record


def _folder(options: TrainOptions, recipe: Recipe) -> Path:
    name = f"{recipe.dataset}-{options.preset or ('custom' if options.config else 'stage2')}-seed{recipe.train.seed}"
    return options.output or Path("output") / "vit" / name


def _write_log(path: Path, history: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    data = text.getvalue().encode()
    with atomic_output(path, len(data), force=True) as file:
        file.write(data)


def _plot_curves(path: Path, history: list[dict[str, float]], recipe: Recipe) -> None:
    figure = new_figure(f"{recipe.dataset}, {len(history)} epochs", (9, 3.6))
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["loss"] for row in history], ".-")
    left.set(title="training loss (augmented, mixed labels)", xlabel="epoch")
    right.plot(epochs, [100 * row["validation"] for row in history], ".-", label="averaged weights")
    right.plot(epochs, [100 * row["validation_last"] for row in history], ".-", label="last weights")
    right.set(title="validation accuracy, %", xlabel="epoch")
    right.legend()
    save_figure(figure, path, force=True, dpi=DPI)


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise NKATError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter(str(folder))


def main() -> None:
    options = parse_arguments()
    check_record(options.json, options.force, [options.config])
    set_threads(options.threads)
    with join_world(allow_cuda=not options.no_cuda) as world:
        try:
            record = train(options, world)
        except KeyboardInterrupt:
            note("interrupted; what was finished is saved, --resume goes on from there")
            sys.exit(INTERRUPTED)
    if record is None:
        return
    with recorded(record, options.json, options.force):
        print_result(record)


def print_result(record: Mapping[str, Any]) -> None:
    """The record's figures, for people."""
    print(f"validation  {100 * record['validation']:.2f} % after epoch {record['epoch']}")
    if "test" in record:
        print(f"test        {100 * record['test']:.2f} % of {record['test_images']} pictures")
        print(f"TPE         {record['tpe']:.4f} at lambda {record['lambda_theory']:.2f}")
    print(f"model       {record['output']}/best.pt")
