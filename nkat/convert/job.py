"""GGUF in; Θ made; `.nkat`, Θ file or LoRA adapter out."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nkat.convert import exchange, merge, rank_search, repair, tables
from nkat.convert.card import write_model_card
from nkat.convert.elsewhere import check_what_is_asked, is_run_here, suggest_measuring
from nkat.convert.inputs import Inputs
from nkat.convert.options import ConvertOptions, parse_arguments
from nkat.convert.outputs import check_outputs, layout_of, size, write, write_unless_dry
from nkat.convert.strengths import CHUNKS, measure_strengths, print_strengths
from nkat.errors import NKATError
from nkat.gguf import quantise
from nkat.gguf.writer import MetadataValue
from nkat.host import console, hardware
from nkat.host.console import counted, format_bytes, note, remark
from nkat.host.distributed import is_first
from nkat.host.files import check_apart, check_output
from nkat.host.record import Recorder, check_record
from nkat.host.start import INTERRUPTED
from nkat.host.tools import suggest
from nkat.hub.fetch import local_model
from nkat.lm.adapters import open_adapter
from nkat.measure.judge import Judge, Passages
from nkat.measure.texts import load_text
from nkat.sources.fit.job import FitRequest, FitResult, check_state, run_fit
from nkat.sources.fit.options import choice_space, lower_ranks
from nkat.sources.make import (
    check_options,
    check_reference_is_better,
    check_source,
    describe_theta_set,
    make_thetas,
    residual_errors,
)
from nkat.sources.moments import input_second_moments
from nkat.sources.options import DEFAULT_GAMMA, DEFAULT_RANK, ThetaOptions
from nkat.theta import inplace
from nkat.theta.algebra import Theta, coupling
from nkat.theta.combine import combined_for
from nkat.theta.layers import select_layers
from nkat.theta.lora import lora_parts
from nkat.theta.modelfile import ModelFile, architecture_of, base_hash, open_model_file
from nkat.theta.set import UNFINISHED_KEY, ThetaSet, check_fits, part_of, scale_by_depth

NO_EFFECT = "warning: gamma 1 couples Θ with strength 0: it will have no effect"


def main() -> None:
    options = parse_arguments()
    options = replace(options, input=local_model(options.input), reference=local_model(options.reference))
    if not is_first():
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            run(options)
        return
    run(options)


def run(options: ConvertOptions) -> None:
    check_apart(options.outputs)
    check_record(options.json, options.force, options.inputs)
    hardware.set_threads(options.threads)
    changes_input = options.in_place and not options.dry_run and is_first() and options.input.is_file()
    # From before the file is read: what is put behind it must not be put in place of another process's.
    with inplace.exclusive(options.input) if changes_input else contextlib.nullcontext():
        _run(options)


def _run(options: ConvertOptions) -> None:
    model = open_model_file(options.input)
    if model.unfinished:
        note(f"note: {options.input} ends in remains of a Θ that was not completely written; they are left out")
    inputs = Inputs(model, options.reference, options.text, options.chunks)
    recorder = Recorder(
        options.json, options.force, {"machine": hardware.describe(hardware.pick_device(allow_cuda=False))}
    )
    check_what_is_asked(options, model)
    if options.save_imatrix is not None and is_first():
        recorder.add({"imatrix": (gathered := exchange.save_imatrix(options, inputs))})
        recorder.keep({})
        exchange.print_imatrix(gathered)
    if options.only_gathers:
        recorder.finish({})
        return
    if options.repair is not None:
        if not _repair(options, inputs, recorder):
            return
        options, inputs = _on_repaired(options)
        model = inputs.model
    if options.remove:
        record = remove_theta(options, model, recorder)
    elif not options.writes_model and not _makes_theta_to_merge(options, model):
        record = export_existing(options, inputs, recorder)
    elif options.keeps_theta:
        record = write_existing(options, inputs, recorder)
    else:
        record = convert(options, inputs, recorder)
    if not record:
        return
    recorder.finish(record)
    if not record.get("fit", {}).get("finished", True):
        sys.exit(INTERRUPTED)
    if not is_run_here(model) and not (options.dry_run or options.remove):
        output = record.get("output")
        suggest_measuring(options, model, None if output is None else Path(output))
        return
    suggest_next(options, record)


def _repair(options: ConvertOptions, inputs: Inputs, recorder: Recorder) -> bool:
    """Writes the repaired file; whether a Θ is to be made for it then."""
    repaired = repair.repair_model(options, inputs)
    if not repaired:
        return False
    recorder.add({"repair": repaired})
    recorder.keep({})
    repair.print_repair(repaired)
    if repaired["finished"] and not options.only_repairs:
        return True
    recorder.finish({})
    if not repaired["finished"]:
        sys.exit(INTERRUPTED)
    suggest_next(options, {})
    return False


def _on_repaired(options: ConvertOptions) -> tuple[ConvertOptions, Inputs]:
    """What is left to do, for the repaired file in place of the input."""
    assert options.repair is not None
    resume = options.fit.resume and options.fit_state.exists()  # the interrupted one may have been the repair
    options = replace(options, input=options.repair, repair=None, fit=replace(options.fit, resume=resume))
    inputs = Inputs(open_model_file(options.input), options.reference, options.text, options.chunks)
    return options, inputs


def suggest_next(options: ConvertOptions, record: Mapping[str, Any]) -> None:
    """What a user would do with what was written."""
    if options.dry_run:
        suggest("convert", *(word for word in sys.argv[1:] if word != "--dry-run"))
    elif options.remove:
        suggest("engine", "--model", record["output"], "--benchmark")
    elif record.get("output") and options.theta_only:
        suggest("engine", "--model", options.input, "--theta", record["output"], "--compare")
    elif record.get("output"):
        suggest("engine", "--model", record["output"], "--compare")
    elif options.merge is not None or options.repair is not None:
        suggest("engine", "--model", options.merge or options.repair, "--perplexity")
    else:
        suggest("kobold", "--model", options.input)


def convert(options: ConvertOptions, inputs: Inputs, recorder: Recorder) -> dict[str, Any]:
    """Makes Θ and writes it in the form asked for; {} in a process of torchrun's that does not write."""
    model = inputs.model
    base = model.require_base()
    if options.theta_source == "fit":
        check_state(options.fit_state, options.fit.resume, options.force)
        if options.fit.resume and _is_unfinished(options.output or model.path):
            options = replace(options, force=True)  # what an interrupted fit wrote is replaced by what comes of it
    check_outputs(options, model)
    names = select_layers(base.tensors, options.selective_layers)
    check_source(base.tensors, names, options.theta_source)
    made_as = _theta_options(options, inputs, names)
    check_options(base.tensors, names, made_as)
    searches = options.optimize_rank and options.theta_source != "fit"  # which chooses for itself
    rank_judge = inputs.judge if searches else None  # what cannot be judged is known before time is spent
    merge_judge = _merge_judge(options, inputs)
    _announce(options, model, f"{counted(len(names), 'layer')}, {_kind(options, made_as)}")

    clock = _Clock()
    with console.bar(model.base_size, "hashing the base", "B") as bar:
        base_sha256 = base_hash(model, bar.update)
    clock.lap("hash")
    record: dict[str, Any] = {}
    validation = None
    if options.theta_source == "fit":
        fitted = _fit(options, inputs, base_sha256, names, made_as)
        if not fitted.writes:
            return {}
        thetas, validation, record["fit"] = fitted.thetas, fitted.validation, fitted.record
        rank = max(theta.rank for theta in thetas.values())
        made_as = replace(made_as, rank=rank, gamma=fitted.gamma, notes=fitted.notes)
    else:
        thetas, made = _make(model, names, made_as)
        record |= made
    theta_set = describe_theta_set(model, thetas, made_as, base_sha256)
    if options.depth_decay:
        theta_set = scale_by_depth(theta_set, theta_set.gamma)
    clock.lap("make")
    if rank_judge is not None:
        theta_set, record["rank_search"] = rank_search.search_rank(rank_judge, theta_set)
    clock.lap("search")
    written = write(options, model, theta_set)
    finished = record.get("fit", {}).get("finished", True)
    if options.theta_source == "fit" and finished:
        options.fit_state.unlink(missing_ok=True)
    clock.lap("write")
    record |= _describe(options, model, theta_set, written, clock.seconds)
    recorder.keep(record)
    if "rank_search" in record:
        rank_search.print_decision(record["rank_search"])
    tables.print_summary(record)
    if "residual" in record:
        tables.print_errors(record["residual"])
    if "fit" in record:
        tables.print_fit(record["fit"])
    if not finished:
        return record
    _merge(options, model, theta_set, merge_judge, record, recorder)
    if options.strengths:
        judge = _strengths_judge(options, inputs, validation)
        record["report"] = measure_strengths(judge, theta_set, inputs.loaded_reference)
        recorder.keep(record)
        print_strengths(record["report"])
    write_model_card(options, model, theta_set, record)
    return record


def write_existing(options: ConvertOptions, inputs: Inputs, recorder: Recorder) -> dict[str, Any]:
    """Writes the Θ that the input or --theta has: as it is, or its first columns, for some layers, at a strength."""
    model = inputs.model
    base = model.require_base()
    if options.thetas:
        with console.bar(model.base_size, "checking the base", "B") as bar:
            summed = combined_for(model, options.thetas, options.theta_gamma, bar.update)
        if summed is None:
            raise NKATError("every --theta is of weight 0, so there is no Θ to write")
        found, whose = summed, f"{options.thetas[0].path}'s" if len(options.thetas) == 1 else "the sum's"
    elif model.theta is not None:
        found, whose = model.theta, "the input's"
    else:
        raise NKATError(f"{model.path}: holds no Θ with its model, so there is nothing to truncate")
    rank = options.truncate_rank or found.rank
    if rank > found.rank:
        holder = options.thetas[0].path if len(options.thetas) == 1 else model.path
        raise NKATError(f"{holder}: its Θ has rank {found.rank}, which is below {rank}")
    check_outputs(options, model)
    gamma = found.gamma if options.theta_gamma is None else options.theta_gamma
    coupling(gamma)  # raises when out of range
    if gamma == 1.0:
        note(NO_EFFECT)
    names = None if options.selective_layers is None else select_layers(base.tensors, options.selective_layers)
    judge = _merge_judge(options, inputs)
    clock = _Clock()
    theta_set = part_of(found, rank=rank, gamma=gamma, names=names, depth_decay=options.depth_decay)
    check_fits(theta_set, base.tensors, options.output or model.path)  # the ranks of several may come to too many
    which = f"the first {'column' if rank == 1 else f'{rank} columns'} of {whose} {found.rank}"
    _announce(options, model, f"{counted(len(theta_set.layers), 'layer')}, {which}, {_strength(gamma)}")
    written = write(options, model, theta_set)
    clock.lap("write")
    record = _describe(options, model, theta_set, written, clock.seconds)
    recorder.keep(record)
    tables.print_summary(record)
    _merge(options, model, theta_set, judge, record, recorder)
    write_model_card(options, model, theta_set, record)
    return record


def export_existing(options: ConvertOptions, inputs: Inputs, recorder: Recorder) -> dict[str, Any]:
    """Writes the Θ that the input has as a LoRA adapter, or merged into the model's weights, or both."""
    model = inputs.model
    if model.theta is None or model.base is None:
        raise NKATError(f"{model.path}: holds no Θ with its model; add --output or --in-place to make one")
    check_outputs(options, model)
    judge = _merge_judge(options, inputs)
    gamma = model.theta.gamma if options.theta_gamma is None else options.theta_gamma
    parts = lora_parts(model.theta, model.base, gamma) if options.export_lora else []
    if options.export_lora:
        write_unless_dry(options, options.export_lora, parts, model.files)
    peft_bytes = exchange.write_peft(options, model, model.theta, gamma) if options.export_peft else None
    record = {
        "input": str(model.path),
        "lora": str(options.export_lora) if options.export_lora else None,
        "peft": str(options.export_peft) if options.export_peft else None,
        "rank": model.theta.rank,
        "gamma": gamma,
        "bytes": size(parts),
        "peft_bytes": peft_bytes,
        "merge": None,
        "dry_run": options.dry_run,
    }
    recorder.keep(record)
    exported = ((options.export_lora, "bytes", "a LoRA adapter"), (options.export_peft, "peft_bytes", "a PEFT LoRA"))
    for path, key, what in exported:
        if path is not None:
            remark(
                f"{'would write' if options.dry_run else 'wrote'} {path} ({record[key]:,} bytes): Θ of rank "
                f"{record['rank']} at gamma {gamma:g} as {what}"
            )
    if gamma == 1.0 and options.exports:
        note(NO_EFFECT)
    _merge(options, model, model.theta, judge, record, recorder)
    write_model_card(options, model, model.theta, record)
    return record


def remove_theta(options: ConvertOptions, model: ModelFile, recorder: Recorder) -> dict[str, Any]:
    """Restores the base model, checked by its hash."""
    if model.base is None or (model.theta is None and not model.unfinished):
        raise NKATError(f"{model.path}: has no Θ to remove")
    if options.in_place and model.layout == "tensors":
        raise NKATError(f"{model.path}: Θ stands among the tensors (layout 'tensors'); give --output instead")
    if options.in_place and model.layout == "beside":
        raise NKATError(f"{model.path}: holds Θ alone, beside the model, which is as it was: delete this file")
    if options.output is not None:
        check_output(options.output, options.force, model.files)
    with console.bar(model.base_size, "checking the base", "B") as bar:
        base_sha256 = base_hash(model, bar.update)
    target = options.output or model.path
    if options.in_place and not options.dry_run:
        inplace.truncate(model.path, model.base.data_end)
    elif not options.in_place:
        write_unless_dry(options, target, model.base_parts(), model.files)
    record = {
        "input": str(model.path),
        "output": str(target),
        "base_sha256": base_sha256,
        "bytes": model.base_size,
        "dry_run": options.dry_run,
    }
    recorder.keep(record)
    remark(
        f"{'would restore' if options.dry_run else 'restored'} {target}: {model.base_size:,} bytes, "
        f"sha256 {base_sha256}"
    )
    return record


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 3), now


def _make(model: ModelFile, names: Sequence[str], made_as: ThetaOptions) -> tuple[dict[str, Theta], dict[str, Any]]:
    """Θ from the weights or from the reference; and the record of what the latter achieved."""
    file = model.require_base().file
    with console.bar(len(names), "making Θ", "layer") as bar:
        thetas = make_thetas(file, names, made_as, bar.update)
    if made_as.source != "residual":
        return thetas, {}
    with console.bar(len(names), "comparing with other Θ", "layer") as bar:
        errors = residual_errors(file, thetas, made_as, bar.update)
    return thetas, {"residual": tables.describe_errors(errors, made_as.input_weights)}


def _fit(
    options: ConvertOptions, inputs: Inputs, base_sha256: str, names: Sequence[str], made_as: ThetaOptions
) -> FitResult:
    fit, has_reference = options.fit, options.reference is not None
    ranks = lower_ranks(made_as.rank) if options.theta_rank is None and fit.nested else (made_as.rank,)
    ranks = tuple(rank_search.RANKS) if options.optimize_rank else ranks
    request = FitRequest(
        model=inputs.loaded,
        base_sha256=base_sha256,
        names=names,
        settings=fit.fit_settings(inputs.loaded.config, made_as.rank, made_as.gamma, options.seed, has_reference),
        calibrate=load_text(options.calibrate),
        reference=inputs.loaded_reference,
        keep=None if options.keep is None else load_text(options.keep),
        ignore=fit.ignore,
        start=fit.start,
        precision=fit.precision,
        fast=fit.fast,
        state=options.fit_state,
        resume=fit.resume,
        allow_cuda=fit.allow_cuda,
        start_from=None if options.start_from is None else open_adapter(options.start_from, inputs.model),
        space=choice_space(ranks, options.theta_gamma, guarded=fit.guard is not None),
        guard=None if fit.guard is None else [load_text(path) for path in fit.guard],
    )
    return run_fit(request)


def _theta_options(options: ConvertOptions, inputs: Inputs, names: Sequence[str]) -> ThetaOptions:
    gamma = DEFAULT_GAMMA if options.theta_gamma is None else options.theta_gamma
    coupling(gamma)  # raises when out of range
    if gamma == 1.0 and options.theta_source == "fit":
        raise NKATError("--theta-source fit needs gamma below 1: at 1 the coupling is 0, and Θ acts on nothing")
    if gamma == 1.0:
        note(NO_EFFECT)
    elif not 0.90 <= gamma <= 0.99:
        note(f"warning: gamma {gamma:g} is outside the usual range 0.90 to 0.99")
    reference, input_weights = None, None
    notes: dict[str, MetadataValue] = {}
    if options.theta_source == "residual" and inputs.reference is not None:
        reference = inputs.reference.require_base().file
        check_reference_is_better(inputs.model.require_base().file, reference, names)
        if options.imatrix:
            input_weights, notes = exchange.moments_of_file(options.imatrix, inputs.model, names)
        elif options.calibrate:
            input_weights, notes = input_second_moments(inputs.loaded, load_text(options.calibrate), names=names)
    # with --optimize-rank the lower ranks are the first columns of the highest
    rank = max(rank_search.RANKS) if options.optimize_rank else options.theta_rank or DEFAULT_RANK
    return ThetaOptions(
        rank=rank,
        gamma=gamma,
        seed=options.seed,
        target_size=options.target_size,
        source=options.theta_source,
        reference=reference,
        input_weights=input_weights,
        notes=notes,
    )


def _makes_theta_to_merge(options: ConvertOptions, model: ModelFile) -> bool:
    """--merge alone takes the Θ that the input has, unless it has none or the flags ask for another."""
    asks = options.makes_theta or options.theta_source != "weight" or options.keeps_theta
    return options.merge is not None and (model.theta is None or asks)


def _merge_judge(options: ConvertOptions, inputs: Inputs) -> Judge | None:
    """What --merge needs, so that it fails before time is spent; None where nothing is to be measured."""
    if options.merge is None:
        return None
    quantise.check_quantiser()
    return None if options.dry_run else inputs.judge


def _strengths_judge(options: ConvertOptions, inputs: Inputs, validation: Passages | None) -> Judge:
    """On the user's text, else on a fit's validation chunks, else on the text that every Python carries."""
    if options.text is None and validation is not None:
        return Judge(inputs.loaded, validation.pick(slice(CHUNKS)))
    return Judge.open(inputs.loaded, options.text, CHUNKS)


def _merge(
    options: ConvertOptions,
    model: ModelFile,
    theta_set: ThetaSet,
    judge: Judge | None,
    record: dict[str, Any],
    recorder: Recorder,
) -> None:
    """Writes and measures what --merge asks for, and adds it to the record."""
    record["merge"] = None
    if options.merge is None:
        return
    gamma = theta_set.gamma if options.theta_gamma is None else options.theta_gamma
    record["merge"] = merge.merge_model(options.merge, model, theta_set, gamma, judge, options.force)
    recorder.keep(record)
    merge.print_merge(record["merge"])


def _is_unfinished(path: Path) -> bool:
    """Whether a file holds the Θ of a fit that was interrupted."""
    theta = open_model_file(path).theta if path.exists() else None
    return theta is not None and bool(theta.notes.get(UNFINISHED_KEY))


def _kind(options: ConvertOptions, made: ThetaOptions) -> str:
    """What Θ is to be made, for people."""
    rank = "2, 4, 6 or 8, whichever measures best" if options.optimize_rank else str(made.rank)
    strength = _strength(made.gamma)
    if made.source == "fit" and options.theta_rank is None and not options.optimize_rank and options.fit.nested:
        rank = f"{rank} or less"
    if made.source == "fit" and options.theta_gamma is None:
        strength = "gamma as is best" if options.fit.guard is None else "gamma as the guard admits"
    return f"rank {rank}, {strength}, source {made.source}, seed {made.seed}"


def _strength(gamma: float) -> str:
    return f"gamma {gamma:g} (κ = {coupling(gamma):.6f})"


def _announce(options: ConvertOptions, model: ModelFile, theta: str) -> None:
    """The head: what is read, what is written, and which Θ."""
    target = options.output or (model.path if options.in_place else options.merge)
    layout = layout_of(options, model)
    how = layout if target != options.merge else "Θ merged"
    architecture = architecture_of(model.require_base().file)
    of = f" and {counted(len(model.files) - 1, 'more file')}" if model.is_split else ""
    nbytes = sum(path.stat().st_size for path in model.files)
    remark(f"input   {model.path}{of} ({format_bytes(nbytes)}, {architecture})")
    remark(f"output  {target} ({how}){' — dry run, nothing will be written' if options.dry_run else ''}")
    remark(f"Θ       {theta}")
    if model.theta is not None:
        remark(f"        replaces the Θ of rank {model.theta.rank} that the input has")


def _describe(
    options: ConvertOptions, model: ModelFile, theta_set: ThetaSet, sizes: dict[str, int], seconds: dict[str, float]
) -> dict[str, Any]:
    written = sizes.get("output")  # None: only --merge or --export-lora writes
    alone = layout_of(options, model) in ("theta-only", "beside")
    added = None if written is None else written - (0 if alone else model.base_size)
    return {
        "input": str(model.path),
        "output": None if written is None else str(options.output or model.path),
        "layout": None if written is None else layout_of(options, model),
        "lora": str(options.export_lora) if options.export_lora else None,
        "peft": str(options.export_peft) if options.export_peft else None,
        "dry_run": options.dry_run,
        "metadata": theta_set.metadata(),
        "coupling": coupling(theta_set.gamma),
        "layers": tables.describe_layers(model, theta_set),
        "theta_bytes": theta_set.nbytes,
        "bytes_added": added,
        "bytes_added_percent": None if added is None else 100.0 * added / model.base_size,
        "base_bytes": model.base_size,
        "output_bytes": written,
        "lora_bytes": sizes.get("lora"),
        "peft_bytes": sizes.get("peft"),
        "seconds": seconds,
    }
