"""The Stage-2 table: accuracy, TPE, Global TPE, Consistency and Robustness beside the plan's targets.

    python -m nkat_vit.evaluate output/vit/mnist-* output/vit/cifar10-*      runs that are there
    python -m nkat_vit.evaluate --train --seeds 3 --output output/stage2     trains what is missing first
    python -m nkat_vit.evaluate RUN --classes --confusion pictures           class by class, and what is taken for what

A set's figure is the mean over its runs (seeds) with the standard deviation and their number. Global TPE and
Consistency are made for each seed that all sets share, at the largest λ of the models taking part; without a common
seed, from the means, and no spread is given. A target counts as met only where the set's accuracy target is met as well
(all four sets' for the figures over all of them), since TPE rises without bound for smaller models. Robustness is
measured on the first pictures of CIFAR-10's test set.

Top-5 accuracy, accuracy by class and confusion matrices come from what a run found on the test set at its end. Runs
that were judged before that was kept are named; --judge-again reads the test set once more for those.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("nkat_vit.evaluate")

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from nkat.errors import NKATError
from nkat.host import commandline, output
from nkat.host.console import counted, note, say
from nkat.host.files import check_output, output_folder
from nkat.host.hardware import describe, pick_device, set_threads
from nkat.host.record import check_record, recorded, toolkit_version
from nkat.host.tables import Column, Table, show
from nkat.host.tools import suggest
from nkat_vit.answer_options import add_answer_options
from nkat_vit.by_class import ClassFigures, class_table
from nkat_vit.checkpoint import TrainedModel, load_model, load_set
from nkat_vit.corruptions import Frost, load_frost
from nkat_vit.data import check_files, dataset_name, file_name_of, title_of
from nkat_vit.judging import Judgement, describe_classes, judged_facts, kept_judgement
from nkat_vit.judging_plots import plot_confusion
from nkat_vit.metrics import (
    GLOBAL_TARGETS,
    TARGETS,
    Spread,
    accuracy_needed,
    bought_by_size,
    consistency,
    global_tpe,
    lambda_theory,
    measure_robustness,
    tpe,
)
from nkat_vit.predict import predict_logits
from nkat_vit.recipe import PRESETS, class_names
from nkat_vit.train import check_finished


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run: what it was judged on, and how it did.

    top5: share of pictures whose class is among the five likeliest; None where it was not measured, or has no sense
    images_per_second: of judging, when and where that was; None where it was not measured
    """

    dataset: str
    seed: int
    accuracy: float
    images: int
    lam: float
    path: str
    top5: float | None = None
    images_per_second: float | None = None


def run_result(trained: TrainedModel, data_root: Path, device: torch.device) -> RunResult:
    """The run's test accuracy: the one found at its end, or measured now when the run left the test set alone."""
    recipe, facts = trained.recipe, judged_facts(trained, data_root, device)
    lam = lambda_theory(sum(p.numel() for p in trained.model.parameters()))
    kept = kept_judgement(replace(trained, facts=facts))
    more = (kept.top5, kept.images_per_second) if kept else ()
    return RunResult(
        recipe.dataset, recipe.train.seed, facts["test"], facts["test_images"], lam, str(trained.path), *more
    )


def judged_model(trained: TrainedModel, data_root: Path, device: torch.device, again: bool) -> TrainedModel:
    """The model with its figures on the test set among its facts. again: where those by class are missing, anew."""
    anew = again and "test" in trained.facts and kept_judgement(trained) is None
    if not anew:
        return replace(trained, facts=judged_facts(trained, data_root, device))
    facts = judged_facts(trained, data_root, device, again=True)
    before, now = (100 * found["test"] for found in (trained.facts, facts))
    note(f"{trained.path}: the test set was read again: {now:.2f} % right, {before:.2f} % when it was first judged")
    return replace(trained, facts=facts)


def confusion_file(folder: Path, dataset: str) -> Path:
    """Where a set's confusion matrix is drawn."""
    return folder / f"confusion_{re.sub(r'[^A-Za-z0-9.-]+', '_', file_name_of(dataset))}.png"


def check_confusion(folder: Path | None, datasets: Sequence[str], force: bool) -> None:
    """Raises NKATError where `draw_confusion` would replace something: before hours are spent."""
    if folder is not None and folder.is_dir():
        for name in datasets:
            check_output(confusion_file(folder, name), force)


def draw_confusion(folder: Path, classes: Sequence[ClassFigures], force: bool) -> None:
    """A picture a set, of all its runs together."""
    with output_folder(folder):
        for figures in classes:
            path = confusion_file(folder, figures.dataset)
            runs = f", {counted(figures.runs, 'run')}" if figures.runs > 1 else ""
            right = 100 * int(figures.confusion.trace()) / int(figures.confusion.sum())
            title = f"{title_of(figures.dataset)}, test set{runs}: {right:.2f} % right"
            plot_confusion(path, figures.confusion, figures.names, title, force)
            say(str(path))


def summarise(runs: Sequence[RunResult]) -> dict[str, Any]:
    """Spreads of accuracy and TPE a set, and of Global TPE and Consistency over common seeds."""
    by_set: dict[str, list[RunResult]] = {}
    for run in runs:
        by_set.setdefault(run.dataset, []).append(run)
    for name, group in by_set.items():
        if len({run.seed for run in group}) < len(group):
            raise NKATError(f"{name}: two runs have the same seed; they are no independent measurements")
    accuracies = {name: Spread.of([run.accuracy for run in group]) for name, group in by_set.items()}
    sets = {
        name: {
            "accuracy": accuracies[name],
            "tpe": Spread.of([tpe(run.accuracy, run.lam) for run in group]),
            "top5": _spread_of_all([run.top5 for run in group]),
            "images": group[0].images,
        }
        for name, group in by_set.items()
    }
    lam = max(run.lam for run in runs)
    common = set.intersection(*({run.seed for run in group} for group in by_set.values()))
    if common:
        rows = [[next(r for r in group if r.seed == seed) for group in by_set.values()] for seed in sorted(common)]
    else:
        # A stand-in run of mean accuracy for each set: one value, no spread.
        rows = [[RunResult(n, -1, accuracies[n].mean, 0, g[0].lam, "") for n, g in by_set.items()]]
    return {
        "sets": sets,
        "lambda": lam,
        "mean accuracy": Spread.of([fmean(run.accuracy for run in row) for row in rows]),
        "Global TPE": Spread.of([global_tpe([run.accuracy for run in row], lam) for row in rows]),
        "Consistency": Spread.of([consistency([tpe(run.accuracy, run.lam) for run in row]) for row in rows]),
    }


def _spread_of_all(values: Sequence[float | None]) -> Spread | None:
    """The spread of values that are all there."""
    there = [value for value in values if value is not None]
    return Spread.of(there) if len(there) == len(values) else None


def robustness_of(
    trained: TrainedModel, data_root: Path, device: torch.device, count: int, seed: int, frost: Frost
) -> dict[str, Any]:
    """The record of `measure_robustness` on the first `count` test pictures (0: all)."""
    test = load_set(trained, data_root, train=False)
    chosen = test.take(torch.arange(min(count or len(test), len(test))))
    settings = trained.recipe.train

    def predict(images: np.ndarray) -> np.ndarray:
        logits = predict_logits(trained.model, torch.from_numpy(images).to(device), settings.tta, settings.amp)
        return logits.argmax(dim=1).cpu().numpy()

    return measure_robustness(predict, chosen.images.numpy(), chosen.labels.numpy(), seed, frost).record()


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Which runs --train makes where they are missing: the flags of their names, None where one was not given."""

    output: Path
    sets: list[str]
    seeds: int
    preset: str | None
    config: Path | None
    epochs: int | None
    amp: str | None
    threads: int | None
    data_root: Path
    no_cuda: bool


def train_missing(options: TrainingOptions) -> list[Path]:
    """A run for each set and seed below --output, in processes of their own; finished ones are kept."""
    folders = []
    for name in options.sets:
        check_files(name, options.data_root)
    for name in options.sets:
        for seed in range(options.seeds):
            folder = options.output / f"{file_name_of(name)}-seed{seed}"
            folders.append(folder)
            words: list[object] = ["--dataset", name, "--data-root", options.data_root, "--seed", seed]
            for flag in ("preset", "config", "epochs", "amp", "threads"):
                value = getattr(options, flag)
                words += [f"--{flag}", value] if value is not None else []
            if (folder / "result.json").exists():
                check_finished(folder, words)
                note(f"{folder}: done already")
                continue
            words += ["--output", folder]
            words += ["--resume"] if (folder / "last.pt").exists() else []
            words += ["--no-cuda"] if options.no_cuda else []
            words += ["--quiet"] if output.is_quiet() else []
            note(f"training {name}, seed {seed}")
            command = [sys.executable, "-m", "nkat_vit.train", *map(str, words)]
            done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
            if done.returncode != 0:
                raise NKATError(f"training {name} with seed {seed} ended with status {done.returncode}; see above")
    return folders


def verdicts(summary: dict[str, Any], robustness: Spread | None) -> dict[str, dict[str, str]]:
    """By set, and for "all": what is met of STAGE2's targets: "yes", "no", or "not with this accuracy".

    A figure counts only where its set's accuracy target is met, of the figures over all sets where all four are
    (Robustness: CIFAR-10's). Those are left out where a set is missing.
    """
    sets = summary["sets"]
    accurate = {name: sets[name]["accuracy"].mean >= t.accuracy for name, t in TARGETS.items() if name in sets}

    def verdict(value: float, target: float, counts: bool = True) -> str:
        return "no" if value < target else "yes" if counts else "not with this accuracy"

    met = {
        name: {
            "accuracy": verdict(sets[name]["accuracy"].mean, TARGETS[name].accuracy),
            "tpe": verdict(sets[name]["tpe"].mean, TARGETS[name].tpe, counts),
        }
        for name, counts in accurate.items()
    }
    whole = {}
    if len(accurate) == len(TARGETS):
        for name in ("Global TPE", "Consistency"):
            whole[name] = verdict(summary[name].mean, GLOBAL_TARGETS[name], all(accurate.values()))
    if robustness is not None:
        whole["Robustness"] = verdict(robustness.mean, GLOBAL_TARGETS["Robustness"], accurate.get("cifar10", False))
    return met | {"all": whole}


def remarks(summary: dict[str, Any]) -> list[str]:
    """Lines below the table: what size alone has bought, and what mean accuracy Global TPE's target takes."""
    lines = []
    for name, target in TARGETS.items():
        if name not in summary["sets"]:
            continue
        accuracy, score = (summary["sets"][name][key].mean for key in ("accuracy", "tpe"))
        if bought_by_size(accuracy, score, target):
            lines.append(
                f"{name}: TPE {score:.4f} is bought by size alone: the accuracy, {accuracy:.4f}, is below "
                f"{target.accuracy:.2f}"
            )
    wanted, lam = GLOBAL_TARGETS["Global TPE"], summary["lambda"]
    needed = accuracy_needed(wanted, lam)
    if needed > 1:
        lines.append(f"Global TPE {wanted:.2f} cannot be reached at lambda {lam:.2f}, whatever the accuracy")
    else:
        lines.append(
            f"Global TPE {wanted:.2f} takes a mean accuracy of {needed:.4f} at lambda {lam:.2f}; it is "
            f"{summary['mean accuracy'].mean:.4f}"
        )
    return lines


def stage2_rows(summary: dict[str, Any], robustness: Spread | None) -> list[dict[str, Any]]:
    """The Stage-2 table's rows, as JSON has them: what was measured, with its spread, beside the plan's targets."""
    met = verdicts(summary, robustness)
    rows = []

    def add(label: str, dataset: str | None, measure: str, spread: Spread, target: float | None, verdict: str) -> None:
        what = {"label": label, "dataset": dataset, "measure": measure}
        rows.append({**what, **spread.record(), "target": target, "met": verdict or None})

    for name, result in summary["sets"].items():
        target = TARGETS.get(name)
        title = f"{title_of(name)}, {counted(result['images'], 'picture')}"
        for label, key in ((f"{title}: accuracy", "accuracy"), ("  TPE", "tpe")):
            judged = (getattr(target, key), met[name][key]) if target else (None, "")
            add(label, name, key, result[key], *judged)
        if result["top5"] is not None:
            add("  top-5 accuracy", name, "top5", result["top5"], None, "")
    whole = {name: summary[name] for name in ("Global TPE", "Consistency")}
    if robustness is not None:
        whole["Robustness"] = robustness
    missing = [name for name in TARGETS if name not in summary["sets"]]
    for name, spread in whole.items():
        judged = (GLOBAL_TARGETS[name], met["all"][name]) if name in met["all"] else (None, "")
        add(name if name in met["all"] else f"{name} (without {', '.join(missing)})", None, name, spread, *judged)
    return rows


def stage2_table(rows: Sequence[dict[str, Any]], lam: float, caption: str = "") -> Table:
    """The table of such rows. lam: the models' λ"""
    columns = [
        Column(f"lambda {lam:.2f}", ("label", "dataset", "measure"), lambda label, *_: label),
        Column("measured", ("mean", "sd", "n"), lambda *spread: Spread(*spread).text()),
        Column("target", "target", ".2f"),
        Column("met", "met"),
    ]
    return Table("stage 2", columns, rows, caption, {"lambda": lam})


def main() -> None:
    parser = commandline.parser(
        "The Stage-2 table of trained models beside the plan's targets.",
        "  python -m nkat_vit.evaluate output/vit/mnist-stage2-seed0 output/vit/cifar10-stage2-seed0\n"
        "  python -m nkat_vit.evaluate --train --seeds 3 --epochs 10 --amp auto --output output/stage2",
    )
    parser.add_argument("runs", nargs="*", type=Path, help="runs' folders, or best.pt files")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder with the archives (data)")
    parser.add_argument("--train", action="store_true", help="train what is missing below --output")
    parser.add_argument("--output", type=Path, default=Path("output/stage2"), help="folder for --train's runs")
    parser.add_argument("--sets", nargs="+", type=dataset_name, default=list(TARGETS), help="for --train (four)")
    parser.add_argument("--seeds", type=commandline.positive_int, default=1, help="runs a set for --train (1)")
    parser.add_argument("--preset", choices=list(PRESETS), help="for --train")
    parser.add_argument("--config", type=Path, help="for --train: settings from a JSON file")
    parser.add_argument("--epochs", type=commandline.positive_int, help="for --train")
    parser.add_argument("--amp", choices=("off", "bf16", "auto"), help="for --train")
    parser.add_argument(
        "--robustness-images", type=commandline.non_negative_int, default=1000, help="test pictures, 0: all (1000)"
    )
    parser.add_argument("--no-robustness", action="store_true", help="leave robustness out")
    parser.add_argument("--classes", action="store_true", help="a table of each set's classes as well")
    parser.add_argument(
        "--confusion", type=Path, metavar="FOLDER", help="draw each set's confusion matrix there: confusion_SET.png"
    )
    parser.add_argument(
        "--judge-again",
        action="store_true",
        help="read the test set again for runs that were judged before figures by class were kept",
    )
    parser.add_argument("--frost", type=Path, help="folder with CIFAR-10-C's frost textures (else procedural ones)")
    parser.add_argument("--seed", type=commandline.seed, default=0, help="of the corruptions (0)")
    add_answer_options(parser, "an existing record, and pictures")
    options = parser.parse_args()
    if not options.runs and not options.train:
        parser.error("give runs, or --train")
    check_record(options.json, options.force)
    set_threads(options.threads)
    device, frost = pick_device(not options.no_cuda), load_frost(options.frost)
    if options.train:
        check_confusion(options.confusion, options.sets, options.force)
    paths = [*options.runs, *(train_missing(commandline.taken(TrainingOptions, options)) if options.train else [])]
    models = [load_model(path, device) for path in paths]
    check_confusion(options.confusion, [trained.recipe.dataset for trained in models], options.force)
    runs, robust, without = [], [], []
    judged: dict[str, list[Judgement]] = {}
    for trained in (judged_model(trained, options.data_root, device, options.judge_again) for trained in models):
        runs.append(run_result(trained, options.data_root, device))
        kept = kept_judgement(trained)
        if kept is None:
            without.append(str(trained.path))
        else:
            judged.setdefault(trained.recipe.dataset, []).append(kept)
        if not options.no_robustness and trained.recipe.dataset == "cifar10":
            robust.append(
                robustness_of(trained, options.data_root, device, options.robustness_images, options.seed, frost)
            )
    summary = summarise(runs)
    names = {trained.recipe.dataset: class_names(trained.recipe) for trained in models}
    classes = [ClassFigures.of(name, names[name], found) for name, found in judged.items()]
    robustness = Spread.of([record["robustness"] for record in robust]) if robust else None
    sets = {
        name: {key: value.record() if isinstance(value, Spread) else value for key, value in result.items()}
        for name, result in summary["sets"].items()
    }
    record = {
        "sets": sets,
        "lambda_theory": summary["lambda"],
        "mean_accuracy": summary["mean accuracy"].record(),
        "global_tpe": summary["Global TPE"].record(),
        "consistency": summary["Consistency"].record(),
        "classes": {figures.dataset: figures.record() for figures in classes},
        "judged_without_classes": without,
        "robustness": robustness.record() if robustness else None,
        "corruptions": robust,
        "targets": {"sets": {n: [t.accuracy, t.tpe] for n, t in TARGETS.items()}, **GLOBAL_TARGETS},
        "met": verdicts(summary, robustness),
        "remarks": remarks(summary),
        "runs": [{name: getattr(run, name) for name in RunResult.__slots__} for run in runs],
        "machine": describe(device),
        **toolkit_version(),
    }
    with recorded(record, options.json, options.force):
        show(stage2_table(stage2_rows(summary, robustness), summary["lambda"]))
        say("\n" + "\n".join(record["remarks"]))
        for figures in classes:
            say(f"{file_name_of(figures.dataset)}: {describe_classes(figures.confusion, figures.names)}")
        if options.classes:
            for figures in classes:
                show(class_table(figures, f"\n{title_of(figures.dataset)} by class"))
        if options.confusion is not None and classes:
            draw_confusion(options.confusion, classes, options.force)
        if without:
            note(
                f"judged before figures by class were kept: {', '.join(without)}; "
                "--judge-again reads the test set once more for them"
            )
        if robust:
            errors, flips = (100 * fmean(r[key] for r in robust) for key in ("mean_corruption_error", "flip_rate"))
            say(
                f"\nCIFAR-10-C style, {counted(robust[0]['images'], 'picture')}, frost {frost.source}: "
                f"mean corruption error {errors:.2f} %, predictions changed {flips:.2f} %"
            )
    suggest("vit interpret", "--checkpoint", paths[0], "--data-root", options.data_root)
