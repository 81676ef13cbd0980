#!/usr/bin/env python3
"""GGUF in; Θ made; `.nkat`, Θ file or LoRA adapter out."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nkat import cli, hardware, inplace, rank_search
from nkat.atomic import check_output
from nkat.calibrate import input_second_moments
from nkat.convert import (
    DEFAULT_GAMMA,
    DEFAULT_RANK,
    SOURCES,
    ThetaOptions,
    base_hash,
    check_options,
    describe_theta_set,
    make_thetas,
)
from nkat.errors import NKATError
from nkat.gguf_file import GGUFFile
from nkat.gguf_writer import Part, part_size, write_gguf
from nkat.layers import select_layers
from nkat.report import check_record, format_bytes, format_table, note, write_json
from nkat.theta import coupling
from nkat.theta_io import (
    ModelFile,
    ThetaSet,
    appended_parts,
    embedded_parts,
    lora_parts,
    open_model_file,
    scale_by_depth,
    theta_only_parts,
)

EXAMPLES = """\
  python nkat_gguf_converter.py --input model.gguf --output model.nkat
  python nkat_gguf_converter.py --input model.gguf --output model.nkat --theta-rank 4 --theta-gamma 0.97
  python nkat_gguf_converter.py --input model.gguf --output model.nkat --selective-layers 'blk.*.attn_q.weight'
  python nkat_gguf_converter.py --input model.gguf --output best.nkat --optimize-rank
  python nkat_gguf_converter.py --input model.gguf --in-place
  python nkat_gguf_converter.py --input model.nkat --export-lora theta-lora.gguf
  python nkat_gguf_converter.py --input model.nkat --output model.gguf --remove
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser("Add Θ (small antisymmetric INT8 tensors) to a GGUF language model, or take it off.", EXAMPLES)
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="FILE", help="a .gguf, or a .nkat whose Θ is to be replaced")
    add("--output", type=Path, metavar="FILE", help="the file to write")
    add("--in-place", action="store_true", help="append Θ to the input itself; its own bytes stay as they are")
    add(
        "--layout",
        choices=("tensors", "appended"),
        help="where Θ goes: among the tensors (default), or behind the "
        "unchanged model, which every program then still loads as the base model",
    )
    add("--theta-only", action="store_true", help="write a small file with Θ alone")
    add(
        "--export-lora",
        type=Path,
        metavar="FILE",
        help="also write Θ as a LoRA adapter for llama.cpp and KoboldCpp; "
        "with neither --output nor --in-place, of the Θ the input has",
    )
    add("--remove", action="store_true", help="give the base model back, byte for byte")
    add("--theta-rank", type=cli.positive_int, metavar="R", help=f"columns of each factor (default {DEFAULT_RANK})")
    add(
        "--theta-gamma",
        type=float,
        metavar="G",
        help=f"strength, 0 < G <= 1: lower is stronger, 1 is none (default {DEFAULT_GAMMA})",
    )
    add("--optimize-rank", action="store_true", help="measure ranks 2, 4, 6, 8 and keep the one with the highest TPE")
    add("--text", type=Path, metavar="FILE", help="text for --optimize-rank (default: Python's own documentation)")
    add(
        "--chunks",
        type=cli.positive_int,
        default=8,
        metavar="N",
        help="chunks of 512 tokens of it to measure on (default 8)",
    )
    add("--selective-layers", nargs="+", metavar="NAME", help="only these weights: GGUF names or globs, or LLaMA names")
    add("--target-size", type=cli.positive_int, metavar="N", help="Θ acts on the leading NxN corner only")
    add("--depth-decay", action="store_true", help="multiply block l's Θ by gamma^l: weaker with depth")
    add(
        "--theta-source",
        choices=SOURCES,
        default="weight",
        help="weight: from the model alone (default); residual: from what --reference has and the input lost",
    )
    add("--reference", type=Path, metavar="FILE", help="the same model at a higher precision, for source residual")
    add("--calibrate", type=Path, metavar="FILE", help="text whose activations weight source residual's error")
    add("--seed", type=cli.non_negative_int, default=0, help="of the randomised SVD (default 0)")
    add("--threads", type=cli.positive_int, metavar="N", help="processor threads (default: torch's choice)")
    add("--dry-run", action="store_true", help="do everything but write")
    add("--force", action="store_true", help="replace an existing output, or an existing Θ with --in-place")
    add("--json", metavar="FILE", help='write a machine-readable record; "-" for stdout')
    options = parser.parse_args(argv)
    problem = _conflict(options)
    if problem:
        parser.error(problem)
    return options


def _conflict(o: argparse.Namespace) -> str | None:
    making = o.output is not None or o.in_place
    if o.output is not None and o.in_place:
        return "--output and --in-place exclude each other"
    if not making and (o.remove or o.export_lora is None):
        return "say where the result goes: --output FILE or --in-place (or --export-lora FILE)"
    if o.in_place and (o.theta_only or o.layout == "tensors"):
        return "--in-place always uses layout 'appended'; --theta-only and --layout tensors need --output"
    if o.theta_only and o.layout:
        return "--theta-only writes no model, so --layout has no meaning with it"
    if o.optimize_rank and o.theta_rank is not None:
        return "--optimize-rank searches the rank, so --theta-rank has no meaning with it"
    if o.theta_source == "residual" and o.reference is None:
        return "--theta-source residual needs --reference, the same model at a higher precision"
    if o.theta_source == "weight" and (o.reference or o.calibrate):
        return "--reference and --calibrate are for --theta-source residual"
    made = [o.theta_rank, o.selective_layers, o.target_size, o.theta_only or None, o.optimize_rank or None]
    made.append(o.depth_decay or None)
    if o.remove and (o.export_lora or o.theta_gamma is not None or any(value is not None for value in made)):
        return "--remove only takes Θ off: it goes with --input, --output or --in-place, --force, --dry-run, --json"
    if not making and any(value is not None for value in made):
        return "--export-lora alone exports the Θ the input has; to make a new one give --output or --in-place too"
    return None


def main() -> None:
    options = parse_arguments()
    check_record(options.json, options.force)
    hardware.set_threads(options.threads)
    model = open_model_file(options.input)
    if model.unfinished:
        note(f"note: {options.input} ends in remains of a Θ that was not completely written; they are left out")
    if options.remove:
        record = remove_theta(options, model)
    elif options.output is None and not options.in_place:
        record = export_existing(options, model)
    else:
        record = convert(options, model)
    if options.json:
        record["machine"] = hardware.describe(hardware.pick_device(allow_cuda=False))
        write_json(record, options.json, options.force)


def convert(options: argparse.Namespace, model: ModelFile) -> dict[str, Any]:
    """Makes Θ and writes it in the form asked for."""
    if model.base is None:
        raise NKATError(f"{model.path}: holds only Θ; --input must be a model")
    _check_outputs(options, model)
    tensors = model.base.tensors
    names = select_layers(tensors, options.selective_layers)
    theta_options = _theta_options(options)
    if options.optimize_rank:
        theta_options = replace(theta_options, rank=max(rank_search.RANKS))  # lower ranks are its first columns
    check_options(tensors, names, theta_options)
    trial = rank_search.prepare(model, options.text, options.chunks) if options.optimize_rank else None
    _announce(options, model, names, theta_options)

    started = time.perf_counter()
    with cli.bar(model.base_size, "hashing the base", "B") as bar:
        base_sha256 = base_hash(model, bar.update)
    made_from = time.perf_counter()
    with cli.bar(len(names), "making Θ", "layer") as bar:
        thetas = make_thetas(model.base.file, names, theta_options, bar.update)
    theta_set = describe_theta_set(model, thetas, theta_options, base_sha256)
    if options.depth_decay:
        theta_set = scale_by_depth(theta_set, theta_set.gamma)
    made = time.perf_counter()
    record: dict[str, Any] = {}
    if trial is not None:
        theta_set, record["rank_search"] = rank_search.search_rank(trial, theta_set)
    searched = time.perf_counter()
    written = _write(options, model, theta_set)
    seconds = {
        "hash": made_from - started,
        "make": made - made_from,
        "search": searched - made,
        "write": time.perf_counter() - searched,
    }
    record |= _describe(options, model, theta_set, written, seconds)
    _print_summary(record)
    return record


def export_existing(options: argparse.Namespace, model: ModelFile) -> dict[str, Any]:
    """Writes the Θ that the input has as a LoRA adapter."""
    if model.thetas is None or model.base is None:
        raise NKATError(f"{model.path}: holds no Θ with its model; add --output or --in-place to make one")
    parts = lora_parts(model.thetas, model.base, options.theta_gamma)
    _write_unless_dry(options, options.export_lora, parts, [model.path])
    return {
        "input": str(model.path),
        "lora": str(options.export_lora),
        "rank": model.thetas.rank,
        "gamma": model.thetas.gamma if options.theta_gamma is None else options.theta_gamma,
        "bytes": _size(parts),
        "dry_run": options.dry_run,
    }


def remove_theta(options: argparse.Namespace, model: ModelFile) -> dict[str, Any]:
    """Restores the base model, checked by its hash."""
    if model.base is None or (model.thetas is None and not model.unfinished):
        raise NKATError(f"{model.path}: has no Θ to remove")
    if options.in_place and model.layout == "tensors":
        raise NKATError(f"{model.path}: Θ stands among the tensors (layout 'tensors'); give --output instead")
    if options.output is not None:
        check_output(options.output, options.force, [model.path])
    with cli.bar(model.base_size, "checking the base", "B") as bar:
        base_sha256 = base_hash(model, bar.update)
    target = options.output or model.path
    if options.in_place and not options.dry_run:
        inplace.truncate(model.path, model.base.data_end)
    elif not options.in_place:
        _write_unless_dry(options, target, model.base_parts(), [model.path])
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


def _theta_options(options: argparse.Namespace) -> ThetaOptions:
    gamma = DEFAULT_GAMMA if options.theta_gamma is None else options.theta_gamma
    coupling(gamma)  # raises when out of range
    if gamma == 1.0:
        note("warning: gamma 1 couples Θ with strength 0: it will have no effect")
    elif not 0.90 <= gamma <= 0.99:
        note(f"warning: gamma {gamma:g} is outside the usual range 0.90 to 0.99")
    reference, input_weights, notes = None, None, {}
    if options.reference:
        reference = GGUFFile.open(options.reference)
        if options.calibrate:
            input_weights, notes = input_second_moments(options.input, options.calibrate)
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


def _check_outputs(options: argparse.Namespace, model: ModelFile) -> None:
    """Everything about the outputs that can be known before time is spent on Θ."""
    if options.output is not None:
        check_output(options.output, options.force, [model.path])
    if options.export_lora is not None:
        check_output(options.export_lora, options.force, [model.path])
        if options.output is not None and options.output.absolute() == options.export_lora.absolute():
            raise NKATError(f"{options.output}: --output and --export-lora are the same file")
    if options.in_place:
        if model.layout == "tensors":
            raise NKATError(f"{model.path}: Θ stands among the tensors (layout 'tensors'); give --output instead")
        if model.thetas is not None and not options.force:
            raise NKATError(f"{model.path}: has a Θ already; give --force to replace it in place")
        if model.foreign_tail:
            raise NKATError(
                f"{model.path}: has bytes of unknown origin behind its last tensor, so an append that was cut short "
                "could not be recognised; give --output instead"
            )


def _announce(options: argparse.Namespace, model: ModelFile, names: Sequence[str], made: ThetaOptions) -> None:
    target = options.output or model.path
    how = "theta-only" if options.theta_only else _layout(options)
    rank = "2, 4, 6 or 8, whichever measures best" if options.optimize_rank else str(made.rank)
    print(f"input   {model.path} ({format_bytes(model.base_size)}, {model.base.file.metadata['general.architecture']})")
    print(f"output  {target} ({how}){' — dry run, nothing will be written' if options.dry_run else ''}")
    print(
        f"Θ       {len(names)} layers, rank {rank}, gamma {made.gamma:g} (κ = {coupling(made.gamma):.6f}), "
        f"source {made.source}, seed {made.seed}"
    )
    if model.thetas is not None:
        print(f"        replaces the Θ of rank {model.thetas.rank} that the input has")


def _layout(options: argparse.Namespace) -> str:
    return "appended" if options.in_place else options.layout or "tensors"


def _write(options: argparse.Namespace, model: ModelFile, theta_set: ThetaSet) -> dict[str, int]:
    """Writes the outputs; returns the size of each by its role."""
    sizes = {}
    if options.in_place:
        parts = appended_parts(theta_set, model.base.data_end)
        if not options.dry_run:
            inplace.append(model.path, model.base.data_end, parts)
        sizes["output"] = model.base.data_end + _size(parts)
    else:
        parts = _output_parts(options, model, theta_set)
        _write_unless_dry(options, options.output, parts, [model.path])
        sizes["output"] = _size(parts)
    if options.export_lora:
        parts = lora_parts(theta_set, model.base)
        _write_unless_dry(options, options.export_lora, parts, [model.path])
        sizes["lora"] = _size(parts)
    return sizes


def _output_parts(options: argparse.Namespace, model: ModelFile, theta_set: ThetaSet) -> list[Part]:
    if options.theta_only:
        return theta_only_parts(theta_set)
    if _layout(options) == "appended":
        return [*model.base_parts(), *appended_parts(theta_set, model.base_size)]
    return embedded_parts(theta_set, model.base)


def _write_unless_dry(options: argparse.Namespace, path: Path, parts: list[Part], inputs: list[Path]) -> None:
    if options.dry_run:
        return
    with cli.bar(_size(parts), f"writing {path.name}", "B") as bar:
        write_gguf(path, parts, options.force, inputs, bar.update)


def _size(parts: Sequence[Part]) -> int:
    return sum(part_size(part) for part in parts)


def _describe(
    options: argparse.Namespace, model: ModelFile, theta_set: ThetaSet, sizes: dict[str, int], seconds: dict[str, float]
) -> dict[str, Any]:
    added = sizes["output"] - (0 if options.theta_only else model.base_size)
    layers = [
        {
            "name": name,
            "shape": model.base.tensors[name].shape,
            "type": model.base.tensors[name].type_name,
            "rank": theta.rank,
            "bytes": theta.nbytes,
        }
        for name, theta in theta_set.thetas.items()
    ]
    return {
        "input": str(model.path),
        "output": str(options.output or model.path),
        "layout": "theta-only" if options.theta_only else _layout(options),
        "lora": str(options.export_lora) if options.export_lora else None,
        "dry_run": options.dry_run,
        "metadata": theta_set.metadata(),
        "coupling": coupling(theta_set.gamma),
        "layers": layers,
        "theta_bytes": theta_set.nbytes,
        "bytes_added": added,
        "bytes_added_percent": 100.0 * added / model.base_size,
        "base_bytes": model.base_size,
        "output_bytes": sizes["output"],
        "lora_bytes": sizes.get("lora"),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def _print_summary(record: dict[str, Any]) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for layer in record["layers"]:
        groups.setdefault(layer["name"].removesuffix(".weight").rpartition(".")[2], []).append(layer)
    rows = [
        [
            kind,
            str(len(layers)),
            "x".join(str(n) for n in layers[0]["shape"]),
            layers[0]["type"],
            str(layers[0]["rank"]),
            f"{sum(layer['bytes'] for layer in layers):,}",
        ]
        for kind, layers in groups.items()
    ]
    rows.append(["all", str(len(record["layers"])), "", "", "", f"{record['theta_bytes']:,}"])
    print()
    print(format_table(rows, ["layer", "count", "shape", "type", "rank", "Θ bytes"]))
    print()
    print(
        f"added {record['bytes_added']:,} bytes ({record['bytes_added_percent']:.2f} % of the base) "
        f"in {sum(record['seconds'].values()):.1f} s"
    )
    if record["dry_run"]:
        print("dry run: nothing was written")
        return
    print(f"wrote {record['output']} ({record['output_bytes']:,} bytes)")
    if record["lora"]:
        print(f"wrote {record['lora']} ({record['lora_bytes']:,} bytes)")


if __name__ == "__main__":
    cli.run(main)
