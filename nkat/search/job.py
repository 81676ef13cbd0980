"""The search over a language model's Θ as a job: what trials share, the report, the best file.

`nkat_auto_optimizer.py --task lm` runs it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from nkat.errors import NKATError
from nkat.gguf.writer import MetadataValue, write_gguf
from nkat.host import console
from nkat.host.console import counted, format_table, note
from nkat.host.record import write_json
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
from nkat.sources.make import check_options, describe_theta_set, make_thetas
from nkat.sources.moments import input_second_moments
from nkat.sources.options import DEFAULT_GAMMA, ThetaOptions
from nkat.study import workers
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
    study = workers.connect(options.study, search)
    limit = None
    if options.max_overhead is not None:
        fast = load_model(prepared.loaded, thetas={}, gamma=1.0, int8_activations=True, repack=True).model
        limit = OverheadLimit(options.max_overhead, fast, prepared.held_out.passages.chunks[0, :64])
    judge = SettingJudge(prepared.seen, prepared.theta_set, options.study.seed)
    outcome = workers.run(options.study, search, study, make_objective(judge, space, limit))
    if options.study.join:
        return
    record = report(options, prepared, outcome)
    if options.study.json:
        write_json(record, options.study.json, options.study.force)


def prepare(options: SearchOptions, space: Space) -> Prepared:
    """Opens model and text, cuts the chunks, and makes Θ of the highest rank once."""
    text = load_text(options.text)
    loaded = load_model(options.model, thetas={}, gamma=1.0)
    model, base = loaded.file, loaded.file.require_base()
    passages = text_passages(loaded, text, options.chunks * (1 + HELD_OUT_FACTOR))
    chunks = len(passages.chunks)
    seen = chunks // (1 + HELD_OUT_FACTOR)
    if seen < 2:
        raise NKATError(
            f"{text.name}: the text is too short: it gives {chunks} chunks, and a search with held-out text "
            f"needs {2 * (1 + HELD_OUT_FACTOR)}"
        )
    if seen < options.chunks:
        note(f"note: the text has {chunks} chunks only: trials see {seen} of them instead of {options.chunks}")
    gamma = DEFAULT_GAMMA if options.target_gamma is None else options.target_gamma
    coupling(gamma)  # raises when out of range
    moments: dict[str, torch.Tensor] | None = None
    notes: dict[str, MetadataValue] = {}
    if options.calibrate:
        moments, notes = input_second_moments(loaded, load_text(options.calibrate))
    reference = None if options.reference is None else open_model_file(options.reference)
    made_as = ThetaOptions(
        rank=max(space.ranks),
        gamma=gamma,
        seed=options.study.seed,
        source=options.theta_source,
        reference=None if reference is None else reference.require_base().file,
        input_weights=moments,
        notes=notes,
    )
    names = select_layers(base.tensors, None)
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
    return Search(f"nkat-{options.model.stem}", settings, first, make_sampler, make_pruner(), TRIALS)


def report(options: SearchOptions, prepared: Prepared, outcome: Outcome) -> dict[str, Any]:
    """Judges the best on held-out chunks, writes every file of the output folder, prints what came out."""
    study = outcome.study
    held_out = SettingJudge(prepared.held_out, prepared.theta_set, options.study.seed)
    best = distinct_settings(best_trials(study, len(study.trials)))[:TOP]
    with console.bar(1 + len(best), "judging on held-out text", "run") as bar:
        base_row = summary(held_out.base())
        bar.update()
        rows = []
        for number, setting in best:
            rows.append({"trial": number, **summary(held_out.score(setting), setting, held_out.apply(setting))})
            bar.update()
    record = workers.base_record(options.study, outcome, torch.device("cpu")) | {
        "model": str(options.model),
        **prepared.described,
        "chunks": prepared.chunks,
        "importances": importances(
            (t, t.value) for t in study.get_trials(states=(TrialState.COMPLETE,)) if t.value is not None
        ),
        "held_out": {"base": base_row, "best": rows},
        "optimal": None,
    }
    trials = history(study)
    base_trial = next((row for row in trials if not row["parameters"] and row["state"] == "COMPLETE"), None)
    won = False
    if rows:
        winner = rows[0]
        won = base_trial is not None and _value(trials, winner["trial"]) > base_trial["value"]
        won = won and winner["tpe"] > base_row["tpe"]
        if won or options.study.force:
            record["optimal"] = write_optimal(options, prepared, Setting(**winner["setting"]), won)
    folder = options.study.output_dir
    workers.write_records(folder, trials, record)
    on = f"{prepared.chunks} chunks of {prepared.seen.passages.name}"
    title = f"{options.model.name}: {counted(len(trials), 'trial')} on {on}"
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


def write_optimal(options: SearchOptions, prepared: Prepared, setting: Setting, won: bool) -> dict[str, Any]:
    """Makes the Θ of a setting as the converter would, judges that very Θ, writes it and its description."""
    model = prepared.loaded.file
    base = model.require_base()
    names = select_layers(base.tensors, GROUPS[setting.layers] if setting.layers != "both" else None)
    made_as = replace(prepared.made_as, rank=setting.rank, gamma=setting.gamma)
    plain = describe_theta_set(model, make_thetas(base.file, names, made_as), made_as, prepared.theta_set.base_sha256)
    chosen = apply_setting(plain, setting)
    score = SettingJudge(prepared.held_out, plain, options.study.seed).score(setting)
    stem = f"optimal_rank{setting.rank}_gamma{setting.gamma:.2f}"
    path = options.study.output_dir / f"{stem}.nkat"
    write_gguf(path, embedded_parts(chosen, base), force=True, inputs=[model.path])
    record = {
        "file": str(path),
        "beats_base": won,
        "setting": setting.parameters(),
        "held_out": summary(score, setting, chosen),
        "model": str(options.model),
        **prepared.described,
        "metadata": chosen.metadata(),
        "command": converter_command(options, setting, path),
    }
    write_json(record, str(path.with_suffix(".json")), force=True)
    return record


def converter_command(options: SearchOptions, setting: Setting, path: Path) -> str:
    """The command that makes the same file again."""
    words = ["python", "nkat_gguf_converter.py", "--input", options.model, "--output", path]
    words += ["--theta-rank", setting.rank, "--theta-gamma", f"{setting.gamma:g}", "--seed", options.study.seed]
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
            f"perplexity {change_text(row['change_percent'], row['change_percent_stderr'])}"
        )
    else:
        print(
            "no Θ beats the model without it"
            + (" (written all the same: --force)" if record["optimal"] else ": none was written")
        )
    print(f"files are in {folder}")


def _cells(row: dict[str, Any]) -> list[str]:
    change = change_text(row["change_percent"], row["change_percent_stderr"], "") if "setting" in row else ""
    return [perplexity_text(row["perplexity"], row["perplexity_stderr"]), change, f"{row['tpe']:.6f}"]


def _value(trials: list[dict[str, Any]], number: int) -> float:
    return next(row["value"] for row in trials if row["number"] == number)


TASK = Task(DESCRIPTION, EXAMPLES, TRIALS, add_options, search_options, run)
