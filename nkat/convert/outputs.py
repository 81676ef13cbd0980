"""What a conversion writes, and where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nkat.convert.exchange import check_peft, write_peft
from nkat.convert.options import ConvertOptions
from nkat.errors import NKATError
from nkat.gguf.writer import Part, part_size, write_gguf
from nkat.host import console
from nkat.host.files import check_output
from nkat.theta import inplace
from nkat.theta.lora import lora_parts
from nkat.theta.modelfile import ModelFile, appended_parts, layout_parts, theta_only_parts
from nkat.theta.set import ThetaSet


def check_outputs(options: ConvertOptions, model: ModelFile) -> None:
    """Everything about the outputs that can be known before time is spent on Θ."""
    inputs = [*options.inputs_there, *model.files]
    check_peft(options)
    card = options.card_path if options.export_peft is None or options.export_peft.exists() else None
    for path in (options.output, options.export_lora, options.merge, card):
        if path is not None:
            check_output(path, options.force, inputs)
    if model.is_split and options.in_place:
        raise NKATError(f"{model.path}: is in several files, and Θ goes beside them: --output FILE --layout appended")
    if model.is_split and options.output is not None and not options.theta_only and options.layout == "appended":
        folder = model.require_base().file.path.parent
        if not options.output.parent.resolve().samefile(folder):
            raise NKATError(
                f"{options.output}: --layout appended puts Θ beside a model in several files, in {folder}; "
                "without it the model is written as one file, wherever you like"
            )
    if options.in_place:
        if model.layout == "tensors":
            raise NKATError(f"{model.path}: Θ stands among the tensors (layout 'tensors'); give --output instead")
        if model.theta is not None and not options.force:
            raise NKATError(f"{model.path}: has a Θ already; give --force to replace it in place")
        if model.foreign_tail:
            raise NKATError(
                f"{model.path}: has bytes of unknown origin behind its last tensor, so an append that was cut short "
                "could not be recognised; give --output instead"
            )


def layout_of(options: ConvertOptions, model: ModelFile) -> str:
    """Where --output or --in-place puts Θ."""
    if options.theta_only:
        return "theta-only"
    return "beside" if model.is_split and options.final_layout == "appended" else options.final_layout


def write(options: ConvertOptions, model: ModelFile, theta_set: ThetaSet) -> dict[str, int]:
    """Writes the outputs; returns the size of each by its role."""
    base = model.require_base()
    sizes = {}
    if options.in_place:
        parts = appended_parts(theta_set, base.data_end)
        if not options.dry_run:
            inplace.append(model.path, base.data_end, parts)
        sizes["output"] = base.data_end + size(parts)
    elif options.output is not None:
        parts = _output_parts(options, model, theta_set)
        write_unless_dry(options, options.output, parts, model.files)
        sizes["output"] = size(parts)
    if options.export_lora:
        parts = lora_parts(theta_set, base)
        write_unless_dry(options, options.export_lora, parts, model.files)
        sizes["lora"] = size(parts)
    if options.export_peft:
        sizes["peft"] = write_peft(options, model, theta_set, theta_set.gamma)
    return sizes


def _output_parts(options: ConvertOptions, model: ModelFile, theta_set: ThetaSet) -> list[Part]:
    if options.theta_only:
        return theta_only_parts(theta_set)
    return layout_parts(theta_set, model, options.final_layout)


def write_unless_dry(options: ConvertOptions, path: Path, parts: list[Part], inputs: list[Path]) -> None:
    if options.dry_run:
        return
    with console.bar(size(parts), f"writing {path.name}", "B") as bar:
        write_gguf(path, parts, options.force, inputs, bar.update)


def size(parts: Sequence[Part]) -> int:
    return sum(part_size(part) for part in parts)
