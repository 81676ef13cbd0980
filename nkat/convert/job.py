"""GGUF in; Θ made; `.nkat`, Θ file or LoRA adapter out."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nkat.convert import merge, rank_search, tables
from nkat.convert.options import parse_arguments
from nkat.convert.outputs import check_outputs, layout, size, write, write_unless_dry
from nkat.convert.strengths import report_strengths
from nkat.convert.tables import describe_layers, print_summary
from nkat.errors import NKATError
from nkat.gguf import quantise
from nkat.gguf.file import GGUFFile
from nkat.host import commandline, console, hardware
from nkat.host.console import format_bytes, note
from nkat.host.distributed import is_first
from nkat.host.files import check_output
from nkat.host.record import check_record, write_json
from nkat.sources.fit.job import FitRequest, check_state, run_fit
from nkat.sources.fit.options import fit_settings
from nkat.sources.make import check_options, describe_theta_set, make_thetas, residual_errors
from nkat.sources.moments import input_second_moments
from nkat.sources.options import DEFAULT_GAMMA, DEFAULT_RANK, ThetaOptions
from nkat.theta import inplace
from nkat.theta.algebra import coupling
from nkat.theta.layers import select_layers
from nkat.theta.lora import lora_parts
from nkat.theta.modelfile import ModelFile, base_hash, open_model_file
from nkat.theta.set import UNFINISHED_KEY, ThetaSet, scale_by_depth, truncate_rank


def main() -> None:
    options = parse_arguments()
    if not is_first():
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            run(options)
        return
    run(options)


def run(options: argparse.Namespace) -> None:
    check_record(options.json, options.force)
    hardware.set_threads(options.threads)
    model = open_model_file(options.input)
    if model.unfinished:
        note(f"note: {options.input} ends in remains of a Θ that was not completely written; they are left out")
    if options.remove:
        record = remove_theta(options, model)
    elif options.output is None and not options.in_place and not _makes_theta_to_merge(options, model):
        record = export_existing(options, model)
    elif options.truncate_rank:
        record = truncate_existing(options, model)
    else:
        record = convert(options, model)
    if options.json and record:
        record["machine"] = hardware.describe(hardware.pick_device(allow_cuda=False))
        write_json(record, options.json, options.force)
    if not record.get("fit", {}).get("finished", True):
        sys.exit(commandline.INTERRUPTED)


def convert(options: argparse.Namespace, model: ModelFile) -> dict[str, Any]:
    """Makes Θ and writes it in the form asked for; {} in a process of torchrun's that does not write."""
    base = model.require_base()
    if options.theta_source == "fit":
        check_state(_fit_state_path(options), options.resume, options.force)
        if options.resume and _is_unfinished(options.output or model.path):
            options.force = True  # what an interrupted fit wrote is replaced by what comes of it
    check_outputs(options, model)
    tensors = base.tensors
    names = select_layers(tensors, options.selective_layers)
    theta_options = _theta_options(options, names)
    if options.optimize_rank:
        theta_options = replace(theta_options, rank=max(rank_search.RANKS))  # lower ranks are its first columns
    check_options(tensors, names, theta_options)
    trial = rank_search.prepare(model, options.text, options.chunks) if options.optimize_rank else None
    judge = _merge_judge(options, model)
    _announce(options, model, names, theta_options)

    started = time.perf_counter()
    with console.bar(model.base_size, "hashing the base", "B") as bar:
        base_sha256 = base_hash(model, bar.update)
    made_from = time.perf_counter()
    record: dict[str, Any] = {}
    validation = None
    if options.theta_source == "fit":
        fitted = run_fit(_fit_request(options, model, base_sha256, names, theta_options))
        if not fitted.writes:
            return {}
        thetas, validation, record["fit"] = fitted.thetas, fitted.validation, fitted.record
        theta_options = replace(theta_options, notes=fitted.notes)
    else:
        with console.bar(len(names), "making Θ", "layer") as bar:
            thetas = make_thetas(base.file, names, theta_options, bar.update)
    if options.theta_source == "residual":
        with console.bar(len(names), "comparing with other Θ", "layer") as bar:
            errors = residual_errors(base.file, thetas, theta_options, bar.update)
        record["residual"] = tables.describe_errors(errors, theta_options.input_weights)
    theta_set = describe_theta_set(model, thetas, theta_options, base_sha256)
    if options.depth_decay:
        theta_set = scale_by_depth(theta_set, theta_set.gamma)
    made = time.perf_counter()
    if trial is not None:
        theta_set, record["rank_search"] = rank_search.search_rank(trial, theta_set)
    searched = time.perf_counter()
    written = write(options, model, theta_set)
    if options.theta_source == "fit" and record["fit"]["finished"]:
        _fit_state_path(options).unlink(missing_ok=True)
    seconds = {
        "hash": made_from - started,
        "make": made - made_from,
        "search": searched - made,
        "write": time.perf_counter() - searched,
    }
    record |= _describe(options, model, theta_set, written, seconds)
    print_summary(record)
    if "residual" in record:
        tables.print_errors(record["residual"])
    if record.get("fit", {}).get("finished", True):
        record["merge"] = _merge(options, model, theta_set, judge)
    if options.theta_source != "weight":
        record["report"] = report_strengths(model, theta_set, options.text, validation, options.reference)
    return record


def truncate_existing(options: argparse.Namespace, model: ModelFile) -> dict[str, Any]:
    """Writes the input with fewer columns of the Θ it has, at another strength where one is given."""
    if model.theta is None or model.base is None:
        raise NKATError(f"{model.path}: holds no Θ with its model, so there is nothing to truncate")
    if options.truncate_rank > model.theta.rank:
        raise NKATError(f"{model.path}: its Θ has rank {model.theta.rank}, which is below {options.truncate_rank}")
    check_outputs(options, model)
    gamma = model.theta.gamma if options.theta_gamma is None else options.theta_gamma
    coupling(gamma)  # raises when out of range
    judge = _merge_judge(options, model)
    started = time.perf_counter()
    theta_set = replace(truncate_rank(model.theta, options.truncate_rank), gamma=gamma)
    written = write(options, model, theta_set)
    record = _describe(options, model, theta_set, written, {"write": time.perf_counter() - started})
    print_summary(record)
    record["merge"] = _merge(options, model, theta_set, judge)
    return record


def export_existing(options: argparse.Namespace, model: ModelFile) -> dict[str, Any]:
    """Writes the Θ that the input has as a LoRA adapter, or merged into the model's weights, or both."""
    if model.theta is None or model.base is None:
        raise NKATError(f"{model.path}: holds no Θ with its model; add --output or --in-place to make one")
    check_outputs(options, model)
    judge = _merge_judge(options, model)
    parts = lora_parts(model.theta, model.base, options.theta_gamma) if options.export_lora else []
    if options.export_lora:
        write_unless_dry(options, options.export_lora, parts, [model.path])
    return {
        "input": str(model.path),
        "lora": str(options.export_lora) if options.export_lora else None,
        "rank": model.theta.rank,
        "gamma": model.theta.gamma if options.theta_gamma is None else options.theta_gamma,
        "bytes": size(parts),
        "merge": _merge(options, model, model.theta, judge),
        "dry_run": options.dry_run,
    }


def _makes_theta_to_merge(options: argparse.Namespace, model: ModelFile) -> bool:
    """--merge alone takes the Θ that the input has, unless it has none or the flags ask for another."""
    another = options.optimize_rank or options.depth_decay or options.theta_source != "weight"
    asked = [options.theta_rank, options.selective_layers, options.target_size, options.truncate_rank]
    asks = another or any(value is not None for value in asked)
    return options.merge is not None and (model.theta is None or asks)


def _merge_judge(options: argparse.Namespace, model: ModelFile) -> merge.Judge | None:
    """What --merge needs, so that it fails before time is spent; None where nothing is to be measured."""
    if options.merge is None:
        return None
    quantise.check_quantiser()
    return None if options.dry_run else merge.prepare_judge(model, options.text, options.chunks)


def _merge(
    options: argparse.Namespace, model: ModelFile, theta_set: ThetaSet, judge: merge.Judge | None
) -> dict[str, Any] | None:
    if options.merge is None:
        return None
    gamma = theta_set.gamma if options.theta_gamma is None else options.theta_gamma
    record = merge.merge_model(options.merge, model, theta_set, gamma, judge, options.force)
    merge.print_merge(record)
    return record


def remove_theta(options: argparse.Namespace, model: ModelFile) -> dict[str, Any]:
    """Restores the base model, checked by its hash."""
    if model.base is None or (model.theta is None and not model.unfinished):
        raise NKATError(f"{model.path}: has no Θ to remove")
    if options.in_place and model.layout == "tensors":
        raise NKATError(f"{model.path}: Θ stands among the tensors (layout 'tensors'); give --output instead")
    if options.output is not None:
        check_output(options.output, options.force, [model.path])
    with console.bar(model.base_size, "checking the base", "B") as bar:
        base_sha256 = base_hash(model, bar.update)
    target = options.output or model.path
    if options.in_place and not options.dry_run:
        inplace.truncate(model.path, model.base.data_end)
    elif not options.in_place:
        write_unless_dry(options, target, model.base_parts(), [model.path])
    print(
        f"{'would restore' if options.dry_run else 'restored'} {target}: {model.base_size:,} bytes, "
        f"sha256 {base_sha256}"
    )
    return {
        "input": str(model.path),
        "output": str(target),
        "base_sha256": base_sha256,
        "bytes": model.base_size,
        "dry_run": options.dry_run,
    }


def _theta_options(options: argparse.Namespace, names: Sequence[str]) -> ThetaOptions:
    gamma = DEFAULT_GAMMA if options.theta_gamma is None else options.theta_gamma
    coupling(gamma)  # raises when out of range
    if gamma == 1.0 and options.theta_source == "fit":
        raise NKATError("--theta-source fit needs theta gamma below 1: at 1 the coupling is 0, and Θ acts on nothing")
    if gamma == 1.0:
        note("warning: gamma 1 couples Θ with strength 0: it will have no effect")
    elif not 0.90 <= gamma <= 0.99:
        note(f"warning: gamma {gamma:g} is outside the usual range 0.90 to 0.99")
    reference, input_weights, notes = None, None, {}
    if options.theta_source != "fit" and options.reference:
        reference = GGUFFile.open(options.reference)
        if options.calibrate:
            input_weights, notes = input_second_moments(options.input, options.calibrate, names=names)
    return ThetaOptions(
        rank=options.theta_rank or DEFAULT_RANK,
        gamma=gamma,
        seed=options.seed,
        target_size=options.target_size,
        source=options.theta_source,
        reference=reference,
        input_weights=input_weights,
        notes=notes,
    )


def _fit_request(
    options: argparse.Namespace, model: ModelFile, base_sha256: str, names: Sequence[str], theta_options: ThetaOptions
) -> FitRequest:
    return FitRequest(
        model=model,
        base_sha256=base_sha256,
        names=names,
        settings=fit_settings(options, theta_options.rank, theta_options.gamma),
        calibrate=options.calibrate,
        reference=options.reference,
        keep=options.keep,
        ignore=options.calibrate_ignore or [],
        start=options.fit_start or "auto",
        precision=options.fit_precision or "auto",
        state=_fit_state_path(options),
        resume=options.resume,
        allow_cuda=not options.no_cuda,
    )


def _fit_state_path(options: argparse.Namespace) -> Path:
    """Where an interrupted fit is kept: beside what it makes."""
    target = options.output or options.input
    return target.with_name(target.name + ".fit")


def _is_unfinished(path: Path) -> bool:
    """Whether a file holds the Θ of a fit that was interrupted."""
    thetas = open_model_file(path).theta if path.exists() else None
    return thetas is not None and bool(thetas.notes.get(UNFINISHED_KEY))


def _announce(options: argparse.Namespace, model: ModelFile, names: Sequence[str], made: ThetaOptions) -> None:
    target = options.output or (model.path if options.in_place else options.merge)
    how = "theta-only" if options.theta_only else layout(options) if target != options.merge else "Θ merged"
    rank = "2, 4, 6 or 8, whichever measures best" if options.optimize_rank else str(made.rank)
    print(f"input   {model.path} ({format_bytes(model.base_size)}, {model.base.file.metadata['general.architecture']})")
    print(f"output  {target} ({how}){' — dry run, nothing will be written' if options.dry_run else ''}")
    print(
        f"Θ       {len(names)} layers, rank {rank}, gamma {made.gamma:g} (κ = {coupling(made.gamma):.6f}), "
        f"source {made.source}, seed {made.seed}"
    )
    if model.theta is not None:
        print(f"        replaces the Θ of rank {model.theta.rank} that the input has")


def _describe(
    options: argparse.Namespace, model: ModelFile, theta_set: ThetaSet, sizes: dict[str, int], seconds: dict[str, float]
) -> dict[str, Any]:
    size = sizes.get("output")  # None: only --merge or --export-lora writes
    added = None if size is None else size - (0 if options.theta_only else model.base_size)
    return {
        "input": str(model.path),
        "output": None if size is None else str(options.output or model.path),
        "layout": None if size is None else "theta-only" if options.theta_only else layout(options),
        "lora": str(options.export_lora) if options.export_lora else None,
        "dry_run": options.dry_run,
        "metadata": theta_set.metadata(),
        "coupling": coupling(theta_set.gamma),
        "layers": describe_layers(model, theta_set),
        "theta_bytes": theta_set.nbytes,
        "bytes_added": added,
        "bytes_added_percent": None if added is None else 100.0 * added / model.base_size,
        "base_bytes": model.base_size,
        "output_bytes": size,
        "lora_bytes": sizes.get("lora"),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
