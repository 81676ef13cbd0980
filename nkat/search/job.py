"""The search over a language model's Θ as a job: its options, what trials share, the report, the best file.

`nkat_auto_optimizer.py --task lm` runs it.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from nkat.errors import NKATError
from nkat.gguf.file import GGUFFile
from nkat.gguf.writer import MetadataValue, write_gguf
from nkat.host import commandline, console
from nkat.host.console import format_table, note
from nkat.host.record import write_json
from nkat.lm.load import LoadedModel, load_model
from nkat.measure.perplexity import text_chunks
from nkat.measure.texts import Text, load_text
from nkat.search.objective import (
    BASE,
    GROUPS,
    RANKS,
    Judge,
    OverheadLimit,
    Setting,
    Space,
    apply_setting,
    make_objective,
    make_pruner,
    summary,
)
from nkat.search.plots import plot_search
from nkat.sources.make import check_options, describe_theta_set, make_thetas
from nkat.sources.moments import input_second_moments
from nkat.sources.options import DEFAULT_GAMMA, SOURCES, ThetaOptions
from nkat.study import workers
from nkat.study.study import best_trials, history, importances, make_sampler
from nkat.study.workers import Outcome, Search
from nkat.theta.algebra import coupling
from nkat.theta.layers import select_layers
from nkat.theta.modelfile import ModelFile, base_hash, embedded_parts, open_model_file
from nkat.theta.set import ThetaSet, check_judging_text

DESCRIPTION = "Search rank, gamma, layers and depth decay of a language model's Θ by measured TPE."
EXAMPLES = """\
  python nkat_auto_optimizer.py --model model.gguf --mode quick
  python nkat_auto_optimizer.py --model model.gguf --mode full --output-dir output/full --text my.txt
  python nkat_auto_optimizer.py --model model.gguf --mode custom --trials 50 --output-dir output/custom
  python nkat_auto_optimizer.py --model model.gguf --mode quick --target-rank 2
  python nkat_auto_optimizer.py --model model.gguf --mode full --resume
  python nkat_auto_optimizer.py --model model.gguf --mode full --storage postgresql://host/db --study-name seven-b
  python nkat_auto_optimizer.py --task vit --help        the image model's search has other options"""
TRIALS = {"quick": 12, "full": 100}
TOP = 3
HELD_OUT_FACTOR = 2  # held-out chunks for each one that the trials see: the last word should be the surest


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this task alone."""
    add = parser.add_argument_group("language model").add_argument
    add("--model", type=Path, required=True, metavar="FILE", help="a .gguf (or .nkat, whose Θ is left out)")
    add("--target-rank", type=commandline.positive_int, metavar="R", help="fix the rank, search the rest")
    add("--target-gamma", type=float, metavar="G", help="fix gamma, search the rest")
    add("--theta-source", choices=SOURCES, default="weight", help="how Θ is made (default weight)")
    add("--reference", type=Path, metavar="FILE", help="the same model at a higher precision, for source residual")
    add("--calibrate", type=Path, metavar="FILE", help="text that weights source residual's error")
    add("--text", type=Path, metavar="FILE", help="text to judge on (default: Python's own documentation)")
    add(
        "--chunks",
        type=commandline.positive_int,
        default=8,
        metavar="N",
        help="chunks of 512 tokens that trials see (default 8); twice as many others are held out for the last word",
    )
    add("--max-overhead", type=float, metavar="PCT", help="a Θ may slow decoding down by so many per cent at most")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What argparse cannot tell."""
    if options.theta_source == "residual" and options.reference is None:
        parser.error("--theta-source residual needs --reference, the same model at a higher precision")
    if options.theta_source == "weight" and (options.reference or options.calibrate):
        parser.error("--reference and --calibrate are for --theta-source residual")


@dataclass(frozen=True, slots=True)
class Task:
    """What all trials share: the model, Θ of the highest rank, and the two sets of chunks."""

    model: ModelFile
    loaded: LoadedModel
    options: ThetaOptions
    theta_set: ThetaSet
    text: Text
    seen: torch.Tensor
    held_out: torch.Tensor


def run(options: argparse.Namespace) -> None:
    """The whole search."""
    space = Space((options.target_rank,) if options.target_rank else RANKS, options.target_gamma)
    task = prepare(options, space)
    search = describe_search(options, space, task)
    study = workers.connect(options, search)
    limit = None
    if options.max_overhead is not None:
        fast = load_model(task.model, int8_activations=True, repack=True).model
        limit = OverheadLimit(options.max_overhead, fast, task.held_out[0, :64])
    objective = make_objective(Judge(task.loaded, task.theta_set, task.seen, options.seed), space, limit)
    outcome = workers.run(options, search, study, objective)
    if options.join:
        return
    record = report(options, task, outcome)
    if options.json:
        write_json(record, options.json, options.force)


def prepare(options: argparse.Namespace, space: Space) -> Task:
    """Opens model and text, cuts the chunks, and makes Θ of the highest rank once."""
    model = open_model_file(options.model)
    base = model.require_base()
    text = load_text(options.text)
    loaded = load_model(model)
    wanted = options.chunks * (1 + HELD_OUT_FACTOR)
    chunks = text_chunks(loaded.tokenizer, text.content, wanted)
    seen = len(chunks) // (1 + HELD_OUT_FACTOR)
    if seen < 2:
        raise NKATError(
            f"{text.name}: the text is too short: it gives {len(chunks)} chunks, and a search with held-out text "
            f"needs {2 * (1 + HELD_OUT_FACTOR)}"
        )
    if seen < options.chunks:
        note(f"note: the text has {len(chunks)} chunks only: trials see {seen} of them instead of {options.chunks}")
    gamma = DEFAULT_GAMMA if options.target_gamma is None else options.target_gamma
    coupling(gamma)  # raises when out of range
    moments: dict[str, torch.Tensor] | None = None
    notes: dict[str, MetadataValue] = {}
    if options.calibrate:
        moments, notes = input_second_moments(options.model, options.calibrate)
    theta_options = ThetaOptions(
        rank=max(space.ranks),
        gamma=gamma,
        seed=options.seed,
        source=options.theta_source,
        reference=GGUFFile.open(options.reference) if options.reference else None,
        input_weights=moments,
        notes=notes,
    )
    names = select_layers(base.tensors, None)
    check_options(base.tensors, names, theta_options)
    with console.bar(len(names), f"making Θ of rank {theta_options.rank}", "layer") as bar:
        thetas = make_thetas(base.file, names, theta_options, bar.update)
    with console.bar(model.base_size, "hashing the base", "B") as bar:
        theta_set = describe_theta_set(model, thetas, theta_options, base_hash(model, bar.update))
    check_judging_text(theta_set, text.sha256, model.path)
    return Task(model, loaded, theta_options, theta_set, text, chunks[:seen], chunks[seen:])


def describe_search(options: argparse.Namespace, space: Space, task: Task) -> Search:
    """The study's name, settings and first trials."""
    settings = {
        "model_sha256": task.theta_set.base_sha256,
        "text_sha256": task.text.sha256,
        "chunks": len(task.seen),
        "theta_source": options.theta_source,
        "ranks": list(space.ranks),
        "gamma": space.gamma,
        "seed": options.seed,
        "max_overhead": options.max_overhead,
    }
    first = [({}, {BASE: True}), (space.guide_default(), {})]
    return Search(f"nkat-{options.model.stem}", settings, first, make_sampler, make_pruner(), TRIALS)


def report(options: argparse.Namespace, task: Task, outcome: Outcome) -> dict[str, Any]:
    """Judges the best on held-out chunks, writes every file of the output folder, prints what came out."""
    study = outcome.study
    held_out = Judge(task.loaded, task.theta_set, task.held_out, options.seed)
    best = distinct_settings(best_trials(study, len(study.trials)))[:TOP]
    with console.bar(1 + len(best), "judging on held-out text", "run") as bar:
        base_row = summary(held_out, held_out.base(), None, None)
        bar.update()
        rows = []
        for number, setting in best:
            measured = held_out.measure(setting)
            rows.append({"trial": number, **summary(held_out, measured, setting, held_out.apply(setting))})
            bar.update()
    record = workers.base_record(options, outcome, torch.device("cpu")) | {
        "model": str(options.model),
        "model_sha256": task.theta_set.base_sha256,
        "text": task.text.name,
        "text_sha256": task.text.sha256,
        "chunks": len(task.seen),
        "held_out_chunks": len(task.held_out),
        "importances": importances((trial, trial.value) for trial in study.get_trials(states=(TrialState.COMPLETE,))),
        "held_out": {"base": base_row, "best": rows},
        "optimal": None,
    }
    trials = history(study)
    base_trial = next((row for row in trials if not row["parameters"] and row["state"] == "COMPLETE"), None)
    winner = rows[0] if rows else None
    won = winner is not None and base_trial is not None and _value(trials, winner["trial"]) > base_trial["value"]
    won = won and winner["tpe"] > base_row["tpe"]
    if winner is not None and (won or options.force):
        record["optimal"] = write_optimal(options, task, Setting(**winner["setting"]), won)
    folder = options.output_dir
    workers.write_records(folder, trials, record)
    title = f"{options.model.name}: {len(trials)} trials on {len(task.seen)} chunks of {task.text.name}"
    plot_search(folder / workers.PICTURE, trials, record["importances"], title)
    print_report(record, won, folder)
    return record


def distinct_settings(trials: Sequence[optuna.trial.FrozenTrial]) -> list[tuple[int, Setting]]:
    """(trial number, setting) of the trials that have one, each setting once, in the given order."""
    seen: dict[Setting, int] = {}
    for trial in trials:
        if trial.params:
            seen.setdefault(Setting(**trial.user_attrs["setting"]), trial.number)
    return [(number, setting) for setting, number in seen.items()]


def write_optimal(options: argparse.Namespace, task: Task, setting: Setting, won: bool) -> dict[str, Any]:
    """Makes the Θ of a setting as the converter would, judges that very Θ, writes it and its description."""
    base = task.model.require_base()
    names = select_layers(base.tensors, GROUPS[setting.layers] if setting.layers != "both" else None)
    made = replace(task.options, rank=setting.rank, gamma=setting.gamma)
    thetas = make_thetas(base.file, names, made)
    plain = describe_theta_set(task.model, thetas, made, task.theta_set.base_sha256)
    judge = Judge(task.loaded, plain, task.held_out, options.seed)
    measured = judge.measure(setting)
    chosen = apply_setting(plain, setting)
    stem = f"optimal_rank{setting.rank}_gamma{setting.gamma:.2f}"
    path = options.output_dir / f"{stem}.nkat"
    write_gguf(path, embedded_parts(chosen, base), force=True, inputs=[task.model.path])
    record = {
        "file": str(path),
        "beats_base": won,
        "setting": setting.parameters(),
        "held_out": summary(judge, measured, setting, chosen),
        "model": str(options.model),
        "model_sha256": task.theta_set.base_sha256,
        "text": task.text.name,
        "text_sha256": task.text.sha256,
        "held_out_chunks": len(task.held_out),
        "metadata": chosen.metadata(),
        "command": converter_command(options, setting, path),
    }
    write_json(record, str(options.output_dir / f"{stem}.json"), force=True)
    return record


def converter_command(options: argparse.Namespace, setting: Setting, path: Path) -> str:
    """The command that makes the same file again."""
    words = ["python", "nkat_gguf_converter.py", "--input", options.model, "--output", path]
    words += ["--theta-rank", setting.rank, "--theta-gamma", f"{setting.gamma:g}", "--seed", options.seed]
    if setting.layers != "both":
        words += ["--selective-layers", *GROUPS[setting.layers]]
    if setting.depth_decay:
        words.append("--depth-decay")
    if options.theta_source == "residual":
        words += ["--theta-source", "residual", "--reference", options.reference]
        words += ["--calibrate", options.calibrate] if options.calibrate else []
    return shlex.join(str(word) for word in words)


def print_report(record: dict[str, Any], won: bool, folder: Path) -> None:
    held_out = record["held_out"]
    print(f"\nheld-out: {record['held_out_chunks']} chunks of {record['text']} that no trial saw\n")
    rows = [["without Θ", "", *_cells(held_out["base"])]]
    for row in held_out["best"]:
        s = row["setting"]
        decay = ", decay" if s["depth_decay"] else ""
        name = f"rank {s['rank']}, gamma {s['gamma']:.2f}, {s['layers']}{decay}"
        rows.append([name, str(row["trial"]), *_cells(row)])
    print(format_table(rows, ["setting", "trial", "perplexity", "change %", "TPE"]))
    print(f"\n{workers.counts_line(record)}")
    if won:
        best = record["optimal"]
        row = best["held_out"]
        print(
            f"best: {best['file']}, TPE {row['tpe']:.6f} against {held_out['base']['tpe']:.6f} without Θ; "
            f"perplexity {row['change_percent']:+.3f} % ± {row['change_percent_stderr']:.3f}"
        )
    else:
        print(
            "no Θ beats the model without it"
            + (" (written all the same: --force)" if record["optimal"] else ": none was written")
        )
    print(f"files are in {folder}")


def _cells(row: dict[str, Any]) -> list[str]:
    change = f"{row['change_percent']:+.3f} ± {row['change_percent_stderr']:.3f}" if "setting" in row else ""
    return [f"{row['perplexity']:.4f} ± {row['perplexity_stderr']:.4f}", change, f"{row['tpe']:.6f}"]


def _value(trials: list[dict[str, Any]], number: int) -> float:
    return next(row["value"] for row in trials if row["number"] == number)
