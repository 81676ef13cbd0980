#!/usr/bin/env python3
"""Searches the best Θ of a language model with Optuna, on measured perplexity."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch

from nkat import cli, hardware
from nkat.calibrate import input_second_moments
from nkat.convert import DEFAULT_GAMMA, SOURCES, ThetaOptions, base_hash, check_options, describe_theta_set, make_thetas
from nkat.errors import NKATError
from nkat.gguf_file import GGUFFile
from nkat.gguf_writer import MetadataValue, write_gguf
from nkat.layers import select_layers
from nkat.load import LoadedModel, load_model
from nkat.perplexity import text_chunks
from nkat.plots import plot_search
from nkat.report import check_record, format_table, git_commit, note, write_json
from nkat.search import (
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
    make_sampler,
    summary,
)
from nkat.study import JOURNAL_NAME, best_trials, history, importances, open_storage, open_study, run_trials
from nkat.texts import Text, load_text
from nkat.theta import coupling
from nkat.theta_io import ModelFile, ThetaSet, check_judging_text, embedded_parts, open_model_file

EXAMPLES = """\
  python nkat_auto_optimizer.py --model model.gguf --mode quick
  python nkat_auto_optimizer.py --model model.gguf --mode full --output-dir output/full --text my.txt
  python nkat_auto_optimizer.py --model model.gguf --mode custom --trials 50 --output-dir output/custom
  python nkat_auto_optimizer.py --model model.gguf --mode quick --target-rank 2
  python nkat_auto_optimizer.py --model model.gguf --mode full --resume
  python nkat_auto_optimizer.py --model model.gguf --mode full --storage postgresql://host/db --study-name seven-b
"""
TRIALS = {"quick": 12, "full": 100}
TOP = 3
HELD_OUT_FACTOR = 2  # held-out chunks for each one that the trials see: the last word should be the surest


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser("Search rank, gamma, layers and depth decay of Θ by measured TPE.", EXAMPLES)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FILE", help="a .gguf (or .nkat, whose Θ is left out)")
    add("--mode", choices=("quick", "full", "custom"), default="quick", help="12, 100 or --trials trials")
    add("--trials", type=cli.positive_int, metavar="N", help="how many trials, with --mode custom")
    add("--output-dir", type=Path, default=Path("output/optimized"), metavar="DIR", help="default output/optimized")
    add("--target-rank", type=cli.positive_int, metavar="R", help="fix the rank, search the rest")
    add("--target-gamma", type=float, metavar="G", help="fix gamma, search the rest")
    add("--theta-source", choices=SOURCES, default="weight", help="how Θ is made (default weight)")
    add("--reference", type=Path, metavar="FILE", help="the same model at a higher precision, for source residual")
    add("--calibrate", type=Path, metavar="FILE", help="text that weights source residual's error")
    add("--text", type=Path, metavar="FILE", help="text to judge on (default: Python's own documentation)")
    add(
        "--chunks",
        type=cli.positive_int,
        default=8,
        metavar="N",
        help="chunks of 512 tokens that trials see (default 8); twice as many others are held out for the last word",
    )
    add("--max-overhead", type=float, metavar="PCT", help="a Θ may slow decoding down by so many per cent at most")
    add(
        "--storage",
        metavar="WHERE",
        help="any Optuna storage: a database URL, grpc://host:port or a journal file "
        "(default: a journal file in --output-dir)",
    )
    add(
        "--study-name",
        metavar="NAME",
        help="with --storage: join the study of this name, or start it (default: from the model's name)",
    )
    add("--resume", action="store_true", help="continue an existing study")
    add("--workers", type=cli.positive_int, default=1, metavar="N", help="processes on this machine (default 1)")
    add("--timeout", type=float, metavar="SECONDS", help="start no further trial after so long")
    add("--seed", type=cli.non_negative_int, default=0, help="of Θ, sampler and chunk order (default 0)")
    add("--threads", type=cli.positive_int, metavar="N", help="processor threads of each worker")
    add(
        "--force",
        action="store_true",
        help="write the best Θ even if it does not beat the model without it; replace --json",
    )
    add("--json", metavar="FILE", help='write the summary; "-" for stdout')
    add("--join", action="store_true", help=argparse.SUPPRESS)  # a worker that --workers starts: trials, no report
    options = parser.parse_args(argv)
    if (options.mode == "custom") != (options.trials is not None):
        parser.error("--trials goes with --mode custom, and --mode custom needs it")
    if options.theta_source == "residual" and options.reference is None:
        parser.error("--theta-source residual needs --reference, the same model at a higher precision")
    if options.theta_source == "weight" and (options.reference or options.calibrate):
        parser.error("--reference and --calibrate are for --theta-source residual")
    return options


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


def main() -> None:
    options = parse_arguments()
    check_record(options.json, options.force)
    make_folder(options.output_dir)
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # its warnings are about features marked experimental
    threads = hardware.set_threads(options.threads)
    if options.workers > 1 and options.threads is None:
        options.threads = hardware.set_threads(max(1, threads // options.workers))
    space = Space((options.target_rank,) if options.target_rank else RANKS, options.target_gamma)
    task = prepare(options, space)
    study = connect(options, space, task)
    target = options.trials or TRIALS[options.mode]

    started = time.perf_counter()
    helpers = [start_worker(study.study_name, options, number) for number in range(1, options.workers)]
    limit = None
    if options.max_overhead is not None:
        fast = load_model(task.model, int8_activations=True, repack=True).model
        limit = OverheadLimit(options.max_overhead, fast, task.held_out[0, :64])
    objective = make_objective(Judge(task.loaded, task.theta_set, task.seen, options.seed), space, limit)
    completed = run_trials(study, objective, target, options.timeout, "worker" if options.join else "searching")
    for number, helper in enumerate(helpers, 1):
        if not completed:
            helper.send_signal(signal.SIGINT)
        if helper.wait():
            note(f"warning: worker {number} ended with status {helper.returncode}; see {worker_log(options, number)}")
    if options.join:
        return
    if not completed:
        note("interrupted: reporting on what there is; --resume continues")
    record = report(options, task, study, time.perf_counter() - started)
    if options.json:
        write_json(record, options.json, options.force)


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NKATError(f"{path}: cannot be made a folder: {error.strerror}") from None


def prepare(options: argparse.Namespace, space: Space) -> Task:
    """Opens model and text, cuts the chunks, and makes Θ of the highest rank once."""
    model = open_model_file(options.model)
    if model.base is None:
        raise NKATError(f"{model.path}: holds only Θ; --model must be a model")
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
    names = select_layers(model.base.tensors, None)
    check_options(model.base.tensors, names, theta_options)
    with cli.bar(len(names), f"making Θ of rank {theta_options.rank}", "layer") as bar:
        thetas = make_thetas(model.base.file, names, theta_options, bar.update)
    with cli.bar(model.base_size, "hashing the base", "B") as bar:
        theta_set = describe_theta_set(model, thetas, theta_options, base_hash(model, bar.update))
    check_judging_text(theta_set, text.sha256, model.path)
    return Task(model, loaded, theta_options, theta_set, text, chunks[:seen], chunks[seen:])


def connect(options: argparse.Namespace, space: Space, task: Task) -> optuna.Study:
    """Creates or joins the study."""
    name = options.study_name or f"nkat-{options.model.stem}"
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
    return open_study(
        open_storage(storage_of(options)),
        name,
        settings,
        first,
        # A worker or a resumed run must not propose again what another one has proposed.
        sampler=lambda finished: make_sampler(options.seed + 1000 * finished + (os.getpid() if options.join else 0)),
        pruner=make_pruner(),
        resume=options.resume or options.join or bool(options.storage and options.study_name),
    )


def storage_of(options: argparse.Namespace) -> str:
    """Where the study is: what the user named, else a journal file in the output folder."""
    return options.storage or str(options.output_dir / JOURNAL_NAME)


def worker_log(options: argparse.Namespace, number: int) -> Path:
    return options.output_dir / f"worker-{number}.log"


def start_worker(study_name: str, options: argparse.Namespace, number: int) -> subprocess.Popen:
    """Another process of this script that joins the study and runs trials; its messages go to a log.

    In a session of its own, so that Ctrl-C reaches it once, from here, and not twice.
    """
    command = [sys.executable, __file__, "--join", "--study-name", study_name, "--model", str(options.model)]
    command += ["--storage", storage_of(options), "--mode", options.mode]
    passed = ("output_dir", "trials", "target_rank", "target_gamma", "theta_source", "reference", "calibrate", "text")
    for name in (*passed, "chunks", "max_overhead", "timeout", "seed", "threads"):
        value = getattr(options, name)
        if value is not None:
            command += ["--" + name.replace("_", "-"), str(value)]
    with worker_log(options, number).open("w") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def report(options: argparse.Namespace, task: Task, study: optuna.Study, seconds: float) -> dict[str, Any]:
    """Judges the best on held-out chunks, writes every file of the output folder, prints what came out."""
    held_out = Judge(task.loaded, task.theta_set, task.held_out, options.seed)
    best = distinct_settings(best_trials(study, len(study.trials)))[:TOP]
    with cli.bar(1 + len(best), "judging on held-out text", "run") as bar:
        base_row = summary(held_out, held_out.base(), None, None)
        bar.update()
        rows = []
        for number, setting in best:
            measured = held_out.measure(setting)
            rows.append({"trial": number, **summary(held_out, measured, setting, held_out.apply(setting))})
            bar.update()
    record: dict[str, Any] = {
        "model": str(options.model),
        "model_sha256": task.theta_set.base_sha256,
        "mode": options.mode,
        "study": study.study_name,
        "storage": storage_of(options),
        "sampler": type(study.sampler).__name__,
        "pruner": type(study.pruner).__name__,
        "seed": options.seed,
        "text": task.text.name,
        "text_sha256": task.text.sha256,
        "chunks": len(task.seen),
        "held_out_chunks": len(task.held_out),
        "trials": {state: sum(t.state.name == state for t in study.trials) for state in ("COMPLETE", "PRUNED", "FAIL")},
        "best_trial": next((trial.number for trial in best_trials(study, 1)), None),
        "importances": importances(study),
        "held_out": {"base": base_row, "best": rows},
        "optimal": None,
        "search_seconds": round(seconds, 1),
        "machine": hardware.describe(torch.device("cpu")),
        "versions": {"optuna": optuna.__version__},
        "git_commit": git_commit(),
    }
    trials = history(study)
    base_trial = next((row for row in trials if not row["parameters"] and row["state"] == "COMPLETE"), None)
    winner = rows[0] if rows else None
    won = winner is not None and base_trial is not None and _value(trials, winner["trial"]) > base_trial["value"]
    won = won and winner["tpe"] > base_row["tpe"]
    if winner is not None and (won or options.force):
        record["optimal"] = write_optimal(options, task, Setting(**winner["setting"]), won)
    folder = options.output_dir
    write_json({"trials": trials}, str(folder / "optimization_history.json"), force=True)
    write_json(record, str(folder / "optuna_study.json"), force=True)
    title = f"{options.model.name}: {len(trials)} trials on {len(task.seen)} chunks of {task.text.name}"
    plot_search(folder / "optimization_results.png", trials, record["importances"], title)
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
    assert task.model.base is not None
    names = select_layers(task.model.base.tensors, GROUPS[setting.layers] if setting.layers != "both" else None)
    made = replace(task.options, rank=setting.rank, gamma=setting.gamma)
    thetas = make_thetas(task.model.base.file, names, made)
    plain = describe_theta_set(task.model, thetas, made, task.theta_set.base_sha256)
    judge = Judge(task.loaded, plain, task.held_out, options.seed)
    measured = judge.measure(setting)
    chosen = apply_setting(plain, setting)
    stem = f"optimal_rank{setting.rank}_gamma{setting.gamma:.2f}"
    path = options.output_dir / f"{stem}.nkat"
    write_gguf(path, embedded_parts(chosen, task.model.base), force=True, inputs=[task.model.path])
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
    counts = record["trials"]
    print(
        f"\n{counts['COMPLETE']} trials completed, {counts['PRUNED']} stopped early, {counts['FAIL']} failed, "
        f"in {record['search_seconds']:.0f} s"
    )
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


if __name__ == "__main__":
    cli.run(main)
