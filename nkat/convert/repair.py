"""`--repair`: a plain GGUF of the same size whose stored scales were learned; what it gained, and on to Θ."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nkat.convert.inputs import Inputs
from nkat.convert.options import ConvertOptions
from nkat.convert.outputs import write_unless_dry
from nkat.errors import NKATError
from nkat.gguf.file import GGUFFile
from nkat.gguf.scales import differ_in_scales_only
from nkat.gguf.writer import replaced_parts
from nkat.host import console
from nkat.host.console import counted, note, remark, say
from nkat.host.files import check_output
from nkat.host.tables import Column, Table, show
from nkat.measure.columns import CHANGE, PERPLEXITY_3
from nkat.measure.texts import load_text
from nkat.sources.fit.job import check_state
from nkat.sources.repair.job import RepairRequest, RepairResult, repairable, run_repair
from nkat.sources.repair.options import repair_settings
from nkat.theta.layers import select_layers
from nkat.theta.modelfile import ModelFile, architecture_of, base_hash


def repair_model(options: ConvertOptions, inputs: Inputs) -> dict[str, Any]:
    """Writes the repaired file and returns its record; {} in a process of torchrun's that does not write."""
    assert options.repair is not None
    model, output, state = inputs.model, options.repair, options.repair_state
    if options.writes_model and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise NKATError("--repair and --output together are for one process; under torchrun give one after the other")
    if model.theta is not None:
        note("note: the input's Θ is left out: scales come first, and a Θ is made for what they leave")
    if _is_repaired_already(options, model):
        note(f"{options.repair}: is a finished repair of the input; going on with Θ")
        return {"output": str(options.repair), "resumed": True, "finished": True}
    check_state(state, options.fit.resume, options.force, "repair")
    unfinished = options.fit.resume and options.repair.exists() and _is_repair(model, options)
    if unfinished:
        options = replace(options, force=True)  # what an interrupted repair wrote is replaced by what comes of it
    check_output(output, options.force, [path for path in options.inputs if path is not None])
    names = repairable(inputs.loaded, select_layers(model.require_base().tensors, options.selective_layers))
    _announce(options, inputs, len(names))
    with console.bar(model.base_size, "hashing the base", "B") as bar:
        base_sha256 = base_hash(model, bar.update)
    result = run_repair(_request(options, inputs, base_sha256, names))
    if not result.writes:
        return {}
    _write(options, model, result)
    if result.finished:
        state.unlink(missing_ok=True)
    return {
        "input": str(model.path),
        "output": str(options.repair),
        "bytes": model.base_size,
        "types": _types(inputs, names),
        "dry_run": options.dry_run,
        **result.record,
    }


def print_repair(record: Mapping[str, Any]) -> None:
    """What was gained where it did not learn, and what was written."""
    if record.get("resumed"):
        return
    kept = f"the scales of step {record['kept_step']} of {record['steps']}"
    rows = [
        {"model": "input", **record["base"], **record["before"]},
        {"model": "repaired", **record["repaired"], **record["after"]},
    ]
    if "reference" in record:
        rows.append({"model": "reference", **record["reference"]})
    columns = [
        Column("", "model"),
        PERPLEXITY_3,
        CHANGE,
        Column("KL to the reference", "validation_kl", ".4f", "nats"),
    ]
    scales = f"{counted(record['scales'], 'scale')} of {record['types']}"
    show(Table("repair", columns, rows, f"repair: {scales}; {kept} on the part that was kept back:"))
    if record.get("won_back_percent") is not None:
        say(
            f"\nwon back: {record['won_back_percent']:.0f} % of the perplexity that the input has above the reference's"
        )
    if record["dry_run"]:
        say("dry run: nothing was written")
        return
    remark(f"wrote {record['output']} ({record['bytes']:,} bytes, as many as the input)")
    if not record["finished"]:
        say("the repair was interrupted: these are the best scales so far, and the same command with --resume goes on")


def _request(options: ConvertOptions, inputs: Inputs, base_sha256: str, names: list[str]) -> RepairRequest:
    fit, has_reference = options.fit, options.reference is not None
    return RepairRequest(
        model=inputs.loaded,
        base_sha256=base_sha256,
        names=names,
        settings=repair_settings(
            fit,
            inputs.loaded.config,
            options.seed,
            has_reference,
            options.repair_steps,
            options.repair_learning_rate,
        ),
        calibrate=load_text(options.calibrate),
        reference=inputs.loaded_reference,
        imatrix=options.imatrix,
        ignore=fit.ignore,
        precision=fit.precision,
        fast=fit.fast,
        state=options.repair_state,
        resume=fit.resume,
        allow_cuda=fit.allow_cuda,
    )


def _write(options: ConvertOptions, model: ModelFile, result: RepairResult) -> None:
    assert options.repair is not None
    base = model.require_base()
    parts = list(replaced_parts(model.base_parts(), base.file, result.packed, lambda info: result.packed[info.name]))
    write_unless_dry(options, options.repair, parts, model.files)


def _announce(options: ConvertOptions, inputs: Inputs, count: int) -> None:
    model = inputs.model
    architecture = architecture_of(model.require_base().file)
    learned = "its predictions are learned" if options.reference is not None else "the text is learned"
    remark(f"input   {model.path} ({console.format_bytes(model.base_size)}, {architecture})")
    remark(f"repair  {options.repair}{' — dry run, nothing will be written' if options.dry_run else ''}")
    remark(f"scales  of {counted(count, 'weight')}; {learned}, seed {options.seed}")


def _types(inputs: Inputs, names: list[str]) -> str:
    """The weights' types and how many have each: "180 Q4_0, 30 Q3_K"."""
    found: dict[str, int] = {}
    for name in names:
        kind = inputs.loaded.tensors[name].type_name
        found[kind] = found.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in found.items())


def _is_repaired_already(options: ConvertOptions, model: ModelFile) -> bool:
    """With --resume and a Θ to make: whether the repair was finished before, so that only Θ is left."""
    assert options.repair is not None
    if not (options.fit.resume and options.writes_model and options.repair.exists()):
        return False
    return not options.repair_state.exists() and _is_repair(model, options)


def _is_repair(model: ModelFile, options: ConvertOptions) -> bool:
    assert options.repair is not None
    with GGUFFile.open(options.repair) as written:
        return differ_in_scales_only(model.require_base(), written)
