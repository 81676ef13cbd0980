"""The converter's command line: its flags, and which of them go together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nkat.host import commandline
from nkat.sources.fit.options import add_fit_arguments, given_fit_flags
from nkat.sources.options import DEFAULT_GAMMA, DEFAULT_RANK, SOURCES

EXAMPLES = """\
  python nkat_gguf_converter.py --input model.gguf --output model.nkat
  python nkat_gguf_converter.py --input model.gguf --output model.nkat --theta-rank 4 --theta-gamma 0.97
  python nkat_gguf_converter.py --input model.gguf --output model.nkat --selective-layers 'blk.*.attn_q.weight'
  python nkat_gguf_converter.py --input model.gguf --output best.nkat --optimize-rank
  python nkat_gguf_converter.py --input model.gguf --output model.nkat --theta-source fit --calibrate text.txt
  python nkat_gguf_converter.py --input model.gguf --in-place
  python nkat_gguf_converter.py --input model.nkat --export-lora theta-lora.gguf
  python nkat_gguf_converter.py --input model.nkat --merge merged.gguf --text text.txt
  python nkat_gguf_converter.py --input model.nkat --output model.gguf --remove
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, checked against one another; a mistake ends the program with one line and status 2."""
    parser = commandline.parser(
        "Add Θ (small antisymmetric INT8 tensors) to a GGUF language model, or take it off.", EXAMPLES
    )
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
    add(
        "--merge",
        type=Path,
        metavar="FILE",
        help="also write a plain GGUF with Θ folded into the weights, re-quantised in their own types, and measure "
        "what that loses on --text; with neither --output nor --in-place, of the Θ the input has, or of a new one",
    )
    add("--remove", action="store_true", help="give the base model back, byte for byte")
    add(
        "--theta-rank",
        type=commandline.positive_int,
        metavar="R",
        help=f"columns of each factor (default {DEFAULT_RANK})",
    )
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
        type=commandline.positive_int,
        default=8,
        metavar="N",
        help="chunks of 512 tokens of it to measure on (default 8)",
    )
    add("--selective-layers", nargs="+", metavar="NAME", help="only these weights: GGUF names or globs, or LLaMA names")
    add("--target-size", type=commandline.positive_int, metavar="N", help="Θ acts on the leading NxN corner only")
    add("--depth-decay", action="store_true", help="multiply block l's Θ by gamma^l: weaker with depth")
    add(
        "--theta-source",
        choices=(*SOURCES, "fit"),
        default="weight",
        help="weight: from the model alone (default); residual: from what --reference has and the input lost; "
        "fit: learned from --calibrate, and from --reference where given",
    )
    add("--reference", type=Path, metavar="FILE", help="the same model at a higher precision, for residual and fit")
    add(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="residual: text whose activations weight the error; fit: text to learn from",
    )
    add("--keep", type=Path, metavar="FILE", help="fit: another text, on which the model is to stay as it is")
    add(
        "--truncate-rank",
        type=commandline.positive_int,
        metavar="R",
        help="make no new Θ: keep the first R columns of the one the input has",
    )
    add("--seed", type=commandline.non_negative_int, default=0, help="of whatever is random in making Θ (default 0)")
    add("--threads", type=commandline.positive_int, metavar="N", help="processor threads (default: torch's choice)")
    add("--dry-run", action="store_true", help="do everything but write")
    add("--force", action="store_true", help="replace an existing output, or an existing Θ with --in-place")
    add("--json", metavar="FILE", help='write a machine-readable record; "-" for stdout')
    add_fit_arguments(parser)
    options = parser.parse_args(argv)
    problem = _conflict(options)
    if problem:
        parser.error(problem)
    return options


def _conflict(o: argparse.Namespace) -> str | None:
    making = o.output is not None or o.in_place
    if o.output is not None and o.in_place:
        return "--output and --in-place exclude each other"
    if not making and (o.remove or (o.export_lora is None and o.merge is None)):
        return "say where the result goes: --output FILE or --in-place (or --export-lora FILE, --merge FILE)"
    if o.merge and o.output is None and (o.theta_only or o.layout):
        return "--theta-only and --layout say what --output is to be, which is not given"
    if o.in_place and (o.theta_only or o.layout == "tensors"):
        return "--in-place always uses layout 'appended'; --theta-only and --layout tensors need --output"
    if o.theta_only and o.layout:
        return "--theta-only writes no model, so --layout has no meaning with it"
    if o.optimize_rank and o.theta_rank is not None:
        return "--optimize-rank searches the rank, so --theta-rank has no meaning with it"
    if o.theta_source == "residual" and o.reference is None:
        return "--theta-source residual needs --reference, the same model at a higher precision"
    if o.theta_source == "weight" and (o.reference or o.calibrate):
        return "--reference and --calibrate are for --theta-source residual or fit"
    problem = _fit_conflict(o)
    if problem:
        return problem
    made = [o.theta_rank, o.selective_layers, o.target_size, o.optimize_rank or None, o.depth_decay or None]
    if o.truncate_rank and (o.theta_source != "weight" or any(value is not None for value in made)):
        return "--truncate-rank keeps the Θ that the input has, so flags for making one have no meaning with it"
    made += [o.theta_only or None, o.truncate_rank]
    if o.remove and (o.export_lora or o.merge or o.theta_gamma is not None or any(value is not None for value in made)):
        return "--remove only takes Θ off: it goes with --input, --output or --in-place, --force, --dry-run, --json"
    if not making and o.merge is None and any(value is not None for value in made):
        return "--export-lora alone exports the Θ the input has; to make a new one give --output or --in-place too"
    return None


def _fit_conflict(o: argparse.Namespace) -> str | None:
    if o.theta_source != "fit":
        given = given_fit_flags(o) + ["--keep"] * (o.keep is not None)
        return f"{given[0]} is for --theta-source fit" if given else None
    if o.calibrate is None:
        return "--theta-source fit needs --calibrate, the text to learn from"
    if o.target_size or o.depth_decay:
        return "--target-size and --depth-decay are not for --theta-source fit, which learns every entry's strength"
    if o.fit_start == "residual" and o.reference is None:
        return "--fit-start residual needs --reference, the same model at a higher precision"
    if o.fit_reference_share is not None and o.reference is None:
        return "--fit-reference-share needs --reference, the same model at a higher precision"
    return None
