"""The search over a language model's Θ as a job: what trials share, the report, the best file.

`nkat_auto_optimizer.py --task lm` runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from nkat.errors import NKATError
from nkat.gguf.writer import MetadataValue, write_gguf
from nkat.host import console
from nkat.host.console import counted, format_table, note
from nkat.host.programs import shell_line
from nkat.host.record import recorded, write_json
from nkat.host.tools import suggest, tool_command
from nkat.lm.load import LoadedModel, load_model
from nkat.measure.judge import Judge, text_passages
from nkat.measure.perplexity import change_text, perplexity_text
from nkat.measure.texts import load_text
from nkat.search.objective import (
    BASE,
    GROUPS,
    RANKS,
    OverheadLimit,
    Setting,
    SettingJudge,
    Space,
    apply_setting,
    make_objective,
    make_pruner,
    summary,
)
from nkat.search.options import DESCRIPTION, EXAMPLES, SearchOptions, add_options, search_options
from nkat.search.plots import plot_search
from nkat.sources.make import check_options, check_reference_is_better, describe_theta_set, make_thetas
from nkat.sources.moments import input_second_moments
from nkat.sources.options import DEFAULT_GAMMA, ThetaOptions
from nkat.study import workers
from nkat.study.folder import PICTURE, note_earlier, write_records
from nkat.study.study import best_trials, history, importances, make_sampler
from nkat.study.task import Task
from nkat.study.workers import Outcome, Search
from nkat.theta.algebra import coupling
from nkat.theta.layers import select_layers
from nkat.theta.modelfile import base_hash, embedded_parts, open_model_file
from nkat.theta.set import CALIBRATION_KEY, ThetaSet

TRIALS = {"quick": 12, "full": 100}
TOP = 3
HELD_OUT_FACTOR = 2  # held-out chunks for each one that the trials see: the last word should be the surest


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all trials share: the model, Θ of the highest rank, and judges on the two sets of chunks."""

    loaded: LoadedModel
    made_as: ThetaOptions
    theta_set: ThetaSet
    seen: Judge
    held_out: Judge
    reference_sha256: str | None

    @property
    def chunks(self) -> int:
        """How many chunks the trials see."""
        return len(self.seen.passages.chunks)

    @property
    def described(self) -> dict[str, Any]:
        """For records: what is judged, and on what."""
        passages = self.held_out.passages
        return {
            "model_sha256": self.theta_set.base_sha256,
            "text": passages.name,
            "text_sha256": passages.sha256,
            "held_out_chunks": len(passages.chunks),
        }


def run(options: SearchOptions) -> None:
    """The whole search."""
    space = Space((options.target_rank,) if options.target_rank else RANKS, options.target_gamma)
    prepared = prepare(options, space)
    search = describe_search(options, space, prepared)
    with workers.interruptible(options.study):
        study = workers.connect(options.study, search)
        limit = None
        if options.max_overhead is not None:
            fast = load_model(prepared.loaded, thetas={}, gamma=1.0, int8_activations=True, repack=True).model
            limit = OverheadLimit(options.max_overhead, fast, prepared.held_out.passages.chunks[0, :64])
        judge = SettingJudge(prepared.seen, prepared.theta_set, options.study.seed)
        outcome = workers.run(options.study, search, study, make_objective(judge, space, limit))
        if not options.study.join:
            workers.report(outcome, partial(judge_best, prepared), partial(report, options, prepared))


def prepare(options: SearchOptions, space: Space) -> Prepared:
    """Opens model and text, cuts the chunks, and makes Θ of the highest rank once."""
    text = load_text(options.text)
    loaded = load_model(options.model, thetas={}, gamma=1.0)
    model, base = loaded.file, loaded.file.require_base()
    passages = text_passages(loaded, text, options.chunks * (1 + HELD_OUT_FACTOR))
    if passages.counted is not None:
        raise NKATError(f"{text.name}: a search compares chunk by chunk, on plain text, and not on chats")
    chunks = len(passages.chunks)
    seen = chunks // (1 + HELD_OUT_FACTOR)
    if seen < 2:
        raise NKATError(
            f"{text.name}: the text is too short: it gives {counted(chunks, 'chunk')}, and a search with held-out text "
            f"needs {2 * (1 + HELD_OUT_FACTOR)}"
        )
    if seen < options.chunks:
        context = passages.chunks.shape[1]
        note(
            f"note: {text.name} has {counted(chunks, 'chunk')} of {context} tokens only: trials see {seen} of them "
            f"instead of {options.chunks}"
        )
    gamma = DEFAULT_GAMMA if options.target_gamma is None else options.target_gamma
    coupling(gamma)  # raises when out of range
    names = select_layers(base.tensors, None)
    reference = None if options.reference is None else open_model_file(options.reference)
    if reference is not None:
        check_reference_is_better(base.file, reference.require_base().file, names)
    moments: dict[str, torch.Tensor] | None = None
    notes: dict[str, MetadataValue] = {}
    if options.calibrate:
        moments, notes = input_second_moments(loaded, load_text(options.calibrate))
    made_as = ThetaOptions(
        rank=max(space.ranks),
        gamma=gamma,
        seed=options.study.seed,
        source=options.theta_source,
        reference=None if reference is None else reference.require_base().file,
        input_weights=moments,
        notes=notes,
    )
    check_options(base.tensors, names, made_as)
    with console.bar(len(names), f"making Θ of rank {made_as.rank}", "layer") as bar:
        thetas = make_thetas(base.file, names, made_as, bar.update)
    with console.bar(model.base_size, "hashing the base", "B") as bar:
        theta_set = describe_theta_set(model, thetas, made_as, base_hash(model, bar.update))
    reference_sha256 = None
    if reference is not None:
        with console.bar(reference.base_size, "hashing the reference", "B") as bar:
            reference_sha256 = base_hash(reference, bar.update)
    judges = Judge(loaded, passages.pick(slice(seen))), Judge(loaded, passages.pick(slice(seen, None)))
    judges[0].check(theta_set)
    return Prepared(loaded, made_as, theta_set, *judges, reference_sha256)


def describe_search(options: SearchOptions, space: Space, prepared: Prepared) -> Search:
    """The study's name, settings and first trials."""
    settings = {
        "model_sha256": prepared.theta_set.base_sha256,
        "text_sha256": prepared.seen.passages.sha256,
        "chunks": prepared.chunks,
        "theta_source": options.theta_source,
        "reference_sha256": prepared.reference_sha256,
        "calibration_sha256": prepared.theta_set.notes.get(CALIBRATION_KEY),
        "ranks": list(space.ranks),
        "gamma": space.gamma,
        "seed": options.study.seed,
        "max_overhead": options.max_overhead,
    }
    first = [({}, {BASE: True}), (space.guide_default(), {})]
    return Search(study_name(options), settings, first, space, make_sampler, make_pruner(), TRIALS)


def study_name(options: SearchOptions) -> str:
    return f"nkat-{options.model.stem}"


@dataclass(frozen=True, slots=True)
class Judged:
    """The model without Θ and the best settings on held-out text: rows of the record; and the best one's Θ."""

    base: dict[str, Any]
    best: list[dict[str, Any]]
    theta: ThetaSet | None


def judge_best(prepared: Prepared, study: optuna.Study) -> Judged:
    """Measures the best settings on held-out chunks, the first with the very Θ that is written if it wins."""
    best = best_settings(study)
    chosen = made_theta(prepared, best[0][1]) if best else None
    rows: list[dict[str, Any]] = []
    with console.bar(1 + len(best), "judging on held-out text", "run") as bar:
        prepared.held_out.without(progress=None)
        base = summary(prepared.held_out.base())
        bar.update()
        for number, setting in best:
            theta_set = chosen if chosen and not rows else apply_setting(prepared.theta_set, setting)
            score = prepared.held_out.score(theta_set, progress=None)
            rows.append({"trial": number, **summary(score, setting, theta_set)})
            bar.update()
    return Judged(base, rows, chosen)


def report(options: SearchOptions, prepared: Prepared, outcome: Outcome, judged: Judged | None) -> None:
    """Writes every file of the output folder and prints what came out. judged: None after an interruption"""
    study, folder = outcome.study, options.study.output_dir
    trials = history(study)
    base = next((row for row in trials if not row["parameters"] and row["state"] == "COMPLETE"), None)
    first = next((row for number, _ in best_settings(study) for row in trials if row["number"] == number), None)
    record = workers.base_record(options.study, outcome, torch.device("cpu")) | {
        "model": str(options.model),
        **prepared.described,
        "chunks": prepared.chunks,
        "importances": importances(
            (t, t.value) for t in study.get_trials(states=(TrialState.COMPLETE,)) if t.value is not None
        ),
        "held_out": judged and {"base": judged.base, "best": judged.best},
        "optimal": None,
    }
    won = False
    if judged and judged.theta and first:
        won = base is not None and first["value"] > base["value"] and judged.best[0]["tpe"] > judged.base["tpe"]
        if won or options.study.force:
            record["optimal"] = write_optimal(options, prepared, judged.theta, judged.best[0], won)
    write_records(folder, trials, record)
    with recorded(record, options.study.json, options.study.force):
        if judged:
            print_report(record, won, any(row["parameters"] for row in trials))
            note_earlier(folder, "optimal_*.nkat", record["optimal"] and record["optimal"]["file"])
        else:
            print_interrupted(record, base, first)
        on = f"{counted(prepared.chunks, 'chunk')} of {prepared.seen.passages.name}"
        title = f"{options.model.name}: {counted(len(trials), 'trial')} on {on}"
        plot_search(folder / PICTURE, trials, record["importances"], title)
        print(f"files are in {folder}")
    suggest_next(options, record, won)


def suggest_next(options: SearchOptions, record: Mapping[str, Any], won: bool) -> None:
    """What a user would do with what was found."""
    if record["held_out"] is None:  # interrupted: the way on is said there
        return
    if won:
        suggest("engine", "--model", record["optimal"]["file"], "--compare")
    elif options.study.mode != "full":
        suggest("optimize", "--model", options.model, "--mode", "full", "--output-dir", "output/full")
    else:
        words = ("--input", options.model, "--output", options.model.with_suffix(".nkat"))
        suggest("convert", *words, "--theta-source", "fit", "--calibrate", "TEXT", why="a Θ that learns from a text")


def best_settings(study: optuna.Study) -> list[tuple[int, Setting]]:
    """(trial, setting) of the best, the best first."""
    return distinct_settings(best_trials(study, len(study.trials)))[:TOP]


def distinct_settings(trials: Sequence[optuna.trial.FrozenTrial]) -> list[tuple[int, Setting]]:
    """(trial number, setting) of the trials that have one, each setting once, in the given order."""
    seen: dict[Setting, int] = {}
    for trial in trials:
        if trial.params:
            seen.setdefault(Setting(**trial.user_attrs["setting"]), trial.number)
    return [(number, setting) for setting, number in seen.items()]


def made_theta(prepared: Prepared, setting: Setting) -> ThetaSet:
    """The Θ of a setting as the converter makes it: not cut from one of a higher rank."""
    model = prepared.loaded.file
    base = model.require_base()
    names = select_layers(base.tensors, GROUPS[setting.layers] if setting.layers != "both" else None)
    made_as = replace(prepared.made_as, rank=setting.rank, gamma=setting.gamma)
    thetas = make_thetas(base.file, names, made_as)
    return apply_setting(describe_theta_set(model, thetas, made_as, prepared.theta_set.base_sha256), setting)


def write_optimal(
    options: SearchOptions, prepared: Prepared, chosen: ThetaSet, judged: dict[str, Any], won: bool
) -> dict[str, Any]:
    """Writes the best Θ and its description. judged: its row of the held-out record"""
    setting = Setting(**judged["setting"])
    path = options.study.output_dir / f"optimal_rank{setting.rank}_gamma{setting.gamma:.2f}.nkat"
    model = prepared.loaded.file
    write_gguf(path, embedded_parts(chosen, model.require_base()), force=True, inputs=[model.path])
    record = {
        "file": str(path),
        "beats_base": won,
        "trial": judged["trial"],
        "setting": setting.parameters(),
        "held_out": {name: value for name, value in judged.items() if name != "trial"},
        "model": str(options.model),
        **prepared.described,
        "metadata": chosen.metadata(),
        "command": converter_command(options, setting, path),
    }
    write_json(record, str(path.with_suffix(".json")), force=True)
    return record


def converter_command(options: SearchOptions, setting: Setting, path: Path) -> str:
    """The command that makes the same file again, in its place, from whatever folder it is run in."""
    words: list[object] = [*tool_command("convert")]
    words += ["--input", options.model.absolute(), "--output", path.absolute(), "--force"]
    words += ["--theta-rank", setting.rank, "--theta-gamma", f"{setting.gamma:g}", "--seed", options.study.seed]
    if setting.layers != "both":
        words += ["--selective-layers", *GROUPS[setting.layers]]
    if setting.depth_decay:
        words.append("--depth-decay")
    if options.theta_source == "residual" and options.reference is not None:
        words += ["--theta-source", "residual", "--reference", options.reference.absolute()]
        words += ["--calibrate", options.calibrate.absolute()] if options.calibrate else []
    return shell_line(words)


def print_report(record: dict[str, Any], won: bool, tried: bool) -> None:
    """What came out, for people. tried: whether any trial had a Θ"""
    held_out = record["held_out"]
    print(f"\nheld-out: {counted(record['held_out_chunks'], 'chunk')} of {record['text']} that no trial saw\n")
    rows = [["without Θ", "", *_cells(held_out["base"])]]
    rows += [[_name(row["setting"]), str(row["trial"]), *_cells(row)] for row in held_out["best"]]
    print(format_table(rows, ["setting", "trial", "perplexity", "change %", "TPE"]))
    print(f"\n{workers.counts_line(record)}")
    if won:
        best = record["optimal"]
        row = best["held_out"]
        print(
            f"best: {best['file']} (trial {best['trial']}), TPE {row['tpe']:.6f} against {held_out['base']['tpe']:.6f} "
            f"without Θ; perplexity {change_text(row['change_percent'], row['change_percent_stderr'])}"
        )
    elif not tried:
        print("no Θ was tried, only the model without it")
    elif not held_out["best"]:
        print("no trial was measured to its end within the limits: none was written")
    else:
        written = " (written all the same: --force)" if record["optimal"] else ": none was written"
        better = any(row["tpe"] > held_out["base"]["tpe"] for row in held_out["best"])
        print(("the best of the trials does not beat" if better else "no Θ beats") + f" the model without it{written}")
    if ahead := [str(row["trial"]) for row in held_out["best"][1:] if row["tpe"] > held_out["best"][0]["tpe"]]:
        which = f"trial {ahead[0]} comes" if len(ahead) == 1 else f"trials {' and '.join(ahead)} come"
        print(
            f"on the held-out text {which} out ahead of trial {held_out['best'][0]['trial']}; the trials' own chunks "
            "alone decide, because a choice made on the held-out text would be flattered by it"
        )


def print_interrupted(record: dict[str, Any], base: Mapping[str, Any] | None, best: Mapping[str, Any] | None) -> None:
    """What the trials found so far, for people; base, best: their rows of the history."""
    print(f"\ninterrupted: {workers.counts_line(record)}")
    if best is None:
        print("no Θ was measured to its end yet" + ("" if base is None else ", only the model without it was"))
        return
    beside = "" if base is None else f" against {base['tpe']:.6f} without Θ"
    print(
        f"best so far: trial {best['number']}, {_name(best['setting'])}: TPE {best['tpe']:.6f}{beside} on the "
        f"{counted(record['chunks'], 'chunk')} that trials see; not judged on held-out text, so nothing was made of it"
    )


def _name(setting: Mapping[str, Any]) -> str:
    decay = ", decay" if setting["depth_decay"] else ""
    return f"rank {setting['rank']}, gamma {setting['gamma']:.2f}, {setting['layers']}{decay}"


def _cells(row: dict[str, Any]) -> list[str]:
    change = change_text(row["change_percent"], row["change_percent_stderr"], "") if "setting" in row else ""
    return [perplexity_text(row["perplexity"], row["perplexity_stderr"]), change, f"{row['tpe']:.6f}"]


def inputs_of(options: SearchOptions) -> list[Path | None]:
    return [options.model, options.reference, options.calibrate, options.text]


TASK = Task(DESCRIPTION, EXAMPLES, TRIALS, study_name, inputs_of, add_options, search_options, run)
