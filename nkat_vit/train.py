"""Trains the image model: python -m nkat_vit.train --dataset cifar10 --preset stage2

    torchrun --nproc-per-node 2 -m nkat_vit.train …      data parallel; --batch-size is over all processes

The output folder gets last.pt (continues the run), best.pt (the model to use), config.json, log.csv, curves.png,
result.json and confusion.png. The test set's files are checked before the first step. It is used once, after the last
epoch, for the weights with the best validation accuracy.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nkat.errors import NKATError
from nkat.host import commandline
from nkat.host.console import counted, note
from nkat.host.distributed import World, join_world
from nkat.host.figures import new_figure, save_figure, whole_ticks
from nkat.host.files import atomic_output, make_folder
from nkat.host.hardware import describe, set_threads
from nkat.host.record import check_record, recorded, toolkit_version, write_json
from nkat.host.start import INTERRUPTED
from nkat.host.tools import suggest
from nkat_vit import checkpoint
from nkat_vit.attention import COLOR_GROUPS
from nkat_vit.checkpoint import load_model
from nkat_vit.data import DATASETS, ImageSet, find_dataset, load_images, split
from nkat_vit.gauge import FORMS
from nkat_vit.judging import describe_classes, judge_once, kept_judgement
from nkat_vit.judging_plots import plot_confusion
from nkat_vit.loop import Trainer, measure_amp, measure_threads
from nkat_vit.metrics import GLOBAL_TARGETS, TARGETS, accuracy_needed, bought_by_size, lambda_theory, tpe
from nkat_vit.model import COLOR_NORMS, POOLS, STEMS, NKATViT
from nkat_vit.optim import lr_factor
from nkat_vit.pictures import DPI
from nkat_vit.recipe import (
    AMP,
    OPTIMIZERS,
    PRESETS,
    TTA_CHOICES,
    Recipe,
    check_schedule,
    class_names,
    describe_presets,
    make_recipe,
    read_config,
    with_amp,
    with_preset,
)

_EXAMPLES = """\
  python -m nkat_vit.train --dataset cifar10 --preset stage2
  python -m nkat_vit.train --dataset mnist --preset fast --epochs 3 --output output/vit/mnist
  python -m nkat_vit.train --resume output/vit/mnist
  python -m nkat_vit.train --resume output/vit/mnist --extend-to 6
  python -m nkat_vit.train --dataset cifar10 --conv_stem tiny --patch_size 2 --embed_dim 384 --depth 7 \\
      --temperature 0.65 --top_k 6 --top_p 0.80 --nkat_strength 0.0024 --nkat_decay 0.99 --dropout_attn 0.17 \\
      --dropout_embed 0.08 --mixup 0.1 --cutmix 0.2 --randaugment 2 9 --lr 2e-4 --epochs 40 --warmup 5 \\
      --ema 0.9995 --clip_grad 1.0
  python -m nkat_vit.train --dataset cifar10 --preset fast
  torchrun --nproc-per-node 2 -m nkat_vit.train --dataset cifar10 --preset strong"""

_CONFUSION = "confusion.png"
_NAMED = 3  # settings that a message lists one by one
_CLEARLY = 1.1  # times as fast, beyond what two measurements differ by

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
    ("gauge_form", tuple(FORMS), "the star product of query and key, or the query rotated by exp(sθ)"),
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
    parser.add_argument(
        "--extend-to",
        type=commandline.positive_int,
        metavar="EPOCHS",
        help="with --resume: a longer run; the learning rate goes on as one of that length has it, and falls again",
    )
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
    extend_to: int | None
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
    chosen = _chosen(options)
    values = with_preset(options.preset, chosen) if options.preset else chosen
    if options.model_ema and not values.get("ema", 1.0):
        raise NKATError("--model-ema and an ema of 0 contradict each other")
    return values


def _chosen(options: TrainOptions) -> dict[str, Any]:
    """Settings beside the preset's."""
    return (read_config(options.config) if options.config else {}) | dict(options.flags)


def begin_run(options: TrainOptions, world: World) -> tuple[Recipe, Path, dict[str, Any] | None]:
    """The recipe, the folder, and the checkpoint to go on from."""
    given = given_values(options)
    if options.resume is not None:
        return _resumed(options, given)
    if options.extend_to is not None:
        raise NKATError("--extend-to makes a run longer that is there: give --resume as well")
    preset = options.preset or "stage2"
    recipe = make_recipe(with_preset(preset, given))
    check_schedule(recipe.train)
    folder = _folder(options, recipe)
    if world.first:
        names = ("last.pt", "best.pt", "result.json")
        if any((folder / name).exists() for name in names) and not options.force:
            raise NKATError(f"{folder}: holds a run already; give --resume to go on with it or --force to replace it")
        make_folder(folder)
        for name in (*names, _CONFUSION):
            (folder / name).unlink(missing_ok=True)
        usual = PRESETS[preset]
        if "warmup" not in _chosen(options) and recipe.train.epochs < usual["epochs"]:
            note(
                f"warm-up: {recipe.train.warmup:.3g} epochs of {recipe.train.epochs}, "
                f"as {usual['warmup']:g} of {usual['epochs']} in {preset} (--warmup changes it)"
            )
    world.wait()
    return recipe, folder, None


def check_finished(folder: Path, words: Sequence[object]) -> None:
    """Raises NKATError unless the run in a folder was begun with what these words of a command line ask for."""
    options = parse_arguments([*map(str, words), "--resume", str(folder)])
    preset = options.preset or "stage2"
    _resumed(options, with_preset(preset, _chosen(options)))


def _resumed(options: TrainOptions, given: dict[str, Any]) -> tuple[Recipe, Path, dict[str, Any]]:
    """What the folder's run was begun with, and its checkpoint; settings given now may repeat it but not differ."""
    named = options.resume
    folder = Path(named) if named else _folder(options, make_recipe(with_preset(options.preset or "stage2", given)))
    folder = folder.parent if folder.suffix == ".pt" else folder
    content = checkpoint.load(folder / "last.pt", "run")
    recipe = checkpoint.recipe_of(content, folder / "last.pt")
    saved = recipe.values()
    changed = [name for name, value in given.items() if not _same_setting(saved, name, value)]
    if changed:
        begun = ", ".join(f"{name} {saved[name]}" for name in changed[:_NAMED])
        wanted = ", ".join(str(given[name]) for name in changed[:_NAMED])
        others = f" (and {len(changed) - _NAMED} more)" if len(changed) > _NAMED else ""
        longer = "; --extend-to makes a run longer" if "epochs" in changed else ""
        raise NKATError(f"{folder}: was begun with {begun}{others}, which --resume cannot change to {wanted}{longer}")
    if options.extend_to is not None:
        recipe = _extended(recipe, options.extend_to, content, folder)
    return recipe, folder, content


def _same_setting(saved: dict[str, Any], name: str, value: Any) -> bool:
    """Whether a run with these settings has this one, in whatever form it was given."""
    if name not in saved:
        make_recipe({"dataset": saved["dataset"], name: value})  # says that there is no such setting
    if name == "amp" and value == "auto":
        return True
    try:
        return bool(make_recipe(saved | {name: value}).values()[name] == saved[name])
    except NKATError:  # it does not even go with the others, as a grey set with colour heads
        return False


def _extended(recipe: Recipe, epochs: int, content: dict[str, Any], folder: Path) -> Recipe:
    """The recipe with more epochs. Says what becomes of the learning rate."""
    history = content.get("history")
    if not isinstance(history, list):
        raise checkpoint.damaged(folder / "last.pt", "history")
    before, done = recipe.train.epochs, len(history)
    if epochs < before:
        raise NKATError(f"{folder}: was to have {before} epochs; --extend-to {epochs} is no longer run")
    if epochs > before:
        rates = [100 * lr_factor(done, total, round(recipe.train.warmup)) for total in (before, epochs)]
        note(
            f"from {counted(before, 'epoch')} to {epochs}: after epoch {done} the learning rate goes on at "
            f"{rates[1]:.0f} % of its peak (it was at {rates[0]:.0f} %) and falls to zero once more, which is not what "
            f"{epochs} epochs from the start give"
        )
    return replace(recipe, train=replace(recipe.train, epochs=epochs))


def train(options: TrainOptions, world: World) -> dict[str, Any] | None:
    """The whole run; returns its record on rank 0."""
    recipe, folder, content = begin_run(options, world)
    begun = recipe if content is None else checkpoint.recipe_of(content, folder / "last.pt")
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
    if options.threads is None and content is None and world.size == 1 and world.device.type == "cpu":
        _advise_threads(recipe, train_set)
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
        note(
            f"{recipe.dataset}: {len(train_set)} to train on, {len(held)} to validate; {_describe_model(trainer.model)}"
        )
        if recipe.dataset in TARGETS:
            _say_targets(recipe.dataset, trainer.model)
    if content is not None:
        trainer.restore(content)
        if begun.train.epochs < config.epochs:
            trainer.extended_from.append(begun.train.epochs)
        note(f"going on after step {trainer.step}, epoch {trainer.step // trainer.epoch_steps}")
    trainer.run()
    if not world.first:
        return None
    _plot_curves(folder / "curves.png", trainer.history, recipe)
    return _finish(options, folder, trainer)


def _say_targets(dataset: str, model: NKATViT) -> None:
    """What STAGE2's targets take of a model of this size, before it is trained."""
    lam = lambda_theory(sum(p.numel() for p in model.parameters()))
    local, whole = (accuracy_needed(t, lam) for t in (TARGETS[dataset].tpe, GLOBAL_TARGETS["Global TPE"]))
    takes = [f"{100 * n:.1f} %" if n <= 1 else "what no accuracy gives" for n in (local, whole)]
    note(
        f"STAGE2's targets: {100 * TARGETS[dataset].accuracy:.0f} % on {dataset}; at lambda {lam:.2f} its TPE "
        f"{TARGETS[dataset].tpe:.2f} takes {takes[0]}, and Global TPE {GLOBAL_TARGETS['Global TPE']:.2f}, over the "
        f"four sets, takes {takes[1]}"
    )


def _describe_model(model: NKATViT) -> str:
    """Its size, and what a token of it is."""
    config, parameters = model.config, sum(p.numel() for p in model.parameters())
    side = config.grid * config.cell
    padded = f", padded to {side} x {side}" if side > config.image_size else ""
    return f"{parameters:,} parameters, {config.grid**2} tokens of {config.cell} x {config.cell} pixels{padded}"


def _advise_threads(recipe: Recipe, images: ImageSet) -> None:
    """One line where fewer threads than torch chose are clearly faster now, as beside other work."""
    speeds = measure_threads(recipe, images)
    chosen, best = max(speeds), max(speeds, key=lambda count: speeds[count])
    if speeds[best] > _CLEARLY * speeds[chosen]:
        note(
            f"{speeds[chosen]:.0f} pictures a second with {chosen} threads, {speeds[best]:.0f} with {best}: beside "
            f"other work --threads {best} is faster, and two such runs side by side do more than one after the other"
        )


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
        "classes": class_names(trainer.recipe),
        "recipe": trainer.recipe.values(),
        "history": trainer.history,
        "machine": describe(trainer.world.device),
        "processes": trainer.world.size,
        "extended_from": trainer.extended_from,
        **toolkit_version(),
    }
    write_json(record, str(folder / "result.json"), force=True)
    kept = kept_judgement(best)
    if kept is not None:
        title = f"{find_dataset(trainer.recipe.dataset).title}, test set: {100 * kept.accuracy:.2f} % right"
        plot_confusion(folder / _CONFUSION, kept.confusion, record["classes"], title, force=True)
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
    left.set(title="training loss, on augmented pictures", xlabel="epoch", ylabel="cross entropy, nats a picture")
    right.plot(epochs, [100 * row["validation"] for row in history], ".-", label="averaged weights")
    right.plot(epochs, [100 * row["validation_last"] for row in history], ".-", label="last weights")
    right.set(title="validation accuracy", xlabel="epoch", ylabel="right answers, %")
    right.legend()
    whole_ticks(left.xaxis, right.xaxis)
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
    suggest("vit interpret", "--checkpoint", record["output"], "--data-root", options.data_root)


def print_result(record: Mapping[str, Any]) -> None:
    """The record's figures, for people."""
    print(f"validation  {100 * record['validation']:.2f} % after epoch {record['epoch']}")
    if "test" in record:
        print(f"test        {100 * record['test']:.2f} % of {counted(record['test_images'], 'picture')}")
        if record.get("test_top5") is not None:
            print(f"top 5       {100 * record['test_top5']:.2f} %")
        if "test_confusion" in record:
            print(f"classes     {describe_classes(torch.tensor(record['test_confusion']), record['classes'])}")
        print(f"TPE         {record['tpe']:.4f} at lambda {record['lambda_theory']:.2f}")
        target = TARGETS.get(record["recipe"]["dataset"])
        if target and bought_by_size(record["test"], record["tpe"], target):
            print(f"            bought by size alone: STAGE2 asks for {100 * target.accuracy:.0f} % as well")
    print(f"model       {record['output']}/best.pt")
