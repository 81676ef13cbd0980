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

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nkat.errors import NKATError
from nkat.host.console import counted, format_bytes, note
from nkat.host.distributed import World, join_world
from nkat.host.figures import new_figure, save_figure, whole_ticks
from nkat.host.files import atomic_output, make_folder
from nkat.host.hardware import describe, set_threads
from nkat.host.memory import memory
from nkat.host.record import check_record, recorded, toolkit_version, write_json
from nkat.host.start import INTERRUPTED
from nkat.host.tools import suggest
from nkat_vit import checkpoint
from nkat_vit.checkpoint import load_model
from nkat_vit.data import (
    ImageSet,
    describe_folder,
    file_name_of,
    is_folder,
    load_images,
    split,
    usual_validation,
)
from nkat_vit.judging import describe_classes, judge_once, kept_judgement
from nkat_vit.judging_plots import plot_confusion
from nkat_vit.loop import Trainer, measure_amp, measure_threads
from nkat_vit.metrics import GLOBAL_TARGETS, TARGETS, accuracy_needed, bought_by_size, lambda_theory, tpe
from nkat_vit.model import NKATViT
from nkat_vit.optim import lr_factor
from nkat_vit.pictures import DPI
from nkat_vit.recipe import (
    PRESETS,
    Recipe,
    check_schedule,
    class_names,
    folder_values,
    make_recipe,
    with_amp,
    with_preset,
)
from nkat_vit.train_options import TrainOptions, chosen_values, given_values, parse_arguments

_CONFUSION = "confusion.png"
_LEAST_STEPS = 4  # an epoch of a folder's pictures
_NAMED = 3  # settings that a message lists one by one
_CLEARLY = 1.1  # times as fast, beyond what two measurements differ by


def begin_run(options: TrainOptions, world: World) -> tuple[Recipe, Path, dict[str, Any] | None]:
    """The recipe, the folder, and the checkpoint to go on from."""
    given = given_values(options)
    if options.resume is not None:
        return _resumed(options, given)
    if options.extend_to is not None:
        raise NKATError("--extend-to makes a run longer that is there: give --resume as well")
    preset = options.preset or "stage2"
    values = with_preset(preset, given)
    folder = _folder(options, values)
    recipe = make_recipe(_with_folder(values, options, world))
    check_schedule(recipe.train)
    if world.first:
        names = ("last.pt", "best.pt", "result.json")
        if any((folder / name).exists() for name in names) and not options.force:
            raise NKATError(f"{folder}: holds a run already; give --resume to go on with it or --force to replace it")
        make_folder(folder)
        for name in (*names, _CONFUSION):
            (folder / name).unlink(missing_ok=True)
        usual = PRESETS[preset]
        if "warmup" not in chosen_values(options) and recipe.train.epochs < usual["epochs"]:
            note(
                f"warm-up: {recipe.train.warmup:.3g} epochs of {recipe.train.epochs}, "
                f"as {usual['warmup']:g} of {usual['epochs']} in {preset} (--warmup changes it)"
            )
    world.wait()
    return recipe, folder, None


def _with_folder(values: dict[str, Any], options: TrainOptions, world: World) -> dict[str, Any]:
    """The values, with what is measured of a folder of pictures, where the data set is one.

    A preset's batch may be larger than such a set: unless a size is chosen, an epoch has four steps at least.
    """
    dataset = values.get("dataset")
    if not isinstance(dataset, str) or not is_folder(dataset):
        return values
    size = values.get("image_size")
    if size is not None and (type(size) is not int or size < 1):
        raise NKATError(f"image_size must be a whole number, got {size!r:.80}")
    spec, words = describe_folder(dataset, options.data_root, size)
    whole = load_images(dataset, options.data_root, True, spec)
    measured = {"validation": usual_validation(dataset, options.data_root)} | values | folder_values(spec)
    usual = make_recipe(measured).train
    pictures = min(max(len(whole) - usual.validation, 1), usual.limit_train or len(whole))
    batch = max(1 << (pictures // _LEAST_STEPS).bit_length() >> 1, 1)
    if "batch_size" not in chosen_values(options) and batch < usual.batch_size:
        measured["batch_size"] = batch
        words += f"; batch size {batch}, as an epoch has {counted(pictures, 'picture')} (--batch-size changes it)"
    if world.first:
        note(words)
    return measured


def check_finished(folder: Path, words: Sequence[object]) -> None:
    """Raises NKATError unless the run in a folder was begun with what these words of a command line ask for."""
    options = parse_arguments([*map(str, words), "--resume", str(folder)])
    preset = options.preset or "stage2"
    _resumed(options, with_preset(preset, chosen_values(options)))


def _resumed(options: TrainOptions, given: dict[str, Any]) -> tuple[Recipe, Path, dict[str, Any]]:
    """What the folder's run was begun with, and its checkpoint; settings given now may repeat it but not differ."""
    named = options.resume
    folder = Path(named) if named else _folder(options, given)
    folder = folder.parent if folder.suffix == ".pt" else folder
    content = checkpoint.load(folder / "last.pt", "run")
    recipe = checkpoint.recipe_of(content, folder / "last.pt")
    saved = recipe.values()
    if is_folder(recipe.dataset) and "batch_size" not in chosen_values(options):
        given.pop("batch_size", None)  # a preset's, which was made to fit the folder
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
    whole = load_images(recipe.dataset, options.data_root, True, recipe.spec)
    if not options.no_test:  # a bad file is found now, not after the last epoch
        load_images(recipe.dataset, options.data_root, False, recipe.spec)
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
        sizes = f"{len(train_set)} to train on, {len(held)} to validate"
        note(f"{file_name_of(recipe.dataset)}: {sizes}; {_describe_model(trainer.model)}")
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
    judged = [row["judged_per_second"] for row in trainer.history if "judged_per_second" in row]
    held = memory()
    record = {
        "output": str(folder),
        "parameters": parameters,
        "lambda_theory": lam,
        "tpe": tpe(facts["test"], lam) if "test" in facts else None,
        "seconds": sum(row["seconds"] for row in trainer.history),
        "train_images_per_second": median(row["images_per_second"] for row in trainer.history),
        "judge_images_per_second": median(judged) if judged else None,
        "memory": {"peak": held.peak, "gpu_peak": held.gpu_peak},
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
        title = f"{trainer.recipe.spec.title}, test set: {100 * kept.accuracy:.2f} % right"
        plot_confusion(folder / _CONFUSION, kept.confusion, record["classes"], title, force=True)
    return record


def _folder(options: TrainOptions, values: Mapping[str, Any]) -> Path:
    if options.output is not None:
        return options.output
    if "dataset" not in values:
        raise NKATError("no data set is given (--dataset)")
    recipe = options.preset or ("custom" if options.config else "stage2")
    return Path("output") / "vit" / f"{file_name_of(str(values['dataset']))}-{recipe}-seed{values.get('seed', 0)}"


def _write_log(path: Path, history: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    data = text.getvalue().encode()
    with atomic_output(path, len(data), force=True) as file:
        file.write(data)


def _plot_curves(path: Path, history: list[dict[str, float]], recipe: Recipe) -> None:
    figure = new_figure(f"{recipe.spec.title}, {len(history)} epochs", (9, 3.6))
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
    judged = record["judge_images_per_second"]
    speed = f"{record['train_images_per_second']:,.0f} pictures a second in training"
    print(f"speed       {speed}{f', {judged:,.0f} in judging' if judged else ''}")
    most = [(record["memory"][name], where) for name, where in (("peak", "memory"), ("gpu_peak", "GPU memory"))]
    if any(count for count, _ in most):
        print(f"at most     {', '.join(f'{format_bytes(count)} of {where}' for count, where in most if count)}")
    print(f"model       {record['output']}/best.pt")
