"""The converter's command line: its flags, and which of them go together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nkat.host import commandline
from nkat.hub.fetch import is_name
from nkat.sources.fit.options import FitOptions, add_fit_arguments, fit_options
from nkat.sources.options import DEFAULT_GAMMA, DEFAULT_RANK, SOURCES
from nkat.sources.repair.options import SHARED_FLAGS, add_repair_arguments
from nkat.theta.card import CARD
from nkat.theta.combine import WeightedFile
from nkat.theta.options import add_theta_arguments

EXAMPLES = """\
  python nkat_gguf_converter.py --input model.gguf --output model.nkat
  python nkat_gguf_converter.py --input model.gguf --output model.nkat --theta-rank 4 --theta-gamma 0.97
  python nkat_gguf_converter.py --input hf:OWNER/REPO:Q4_K_M --output model.nkat
  python nkat_gguf_converter.py --input model.gguf --output model.nkat --selective-layers 'blk.*.attn_q.weight'
  python nkat_gguf_converter.py --input model.gguf --output best.nkat --optimize-rank
  python nkat_gguf_converter.py --input model.gguf --output model.nkat --theta-source fit --calibrate text.txt
  python nkat_gguf_converter.py --input q3.gguf --repair q3-repaired.gguf --reference better.gguf --calibrate text.txt
  python nkat_gguf_converter.py --input model.gguf --output both.nkat --theta style.bin --theta facts.bin:0.5
  python nkat_gguf_converter.py --input model.gguf --in-place
  python nkat_gguf_converter.py --input model.nkat --export-lora theta-lora.gguf
  python nkat_gguf_converter.py --input model.nkat --export-peft theta-peft
  python nkat_gguf_converter.py --input model.gguf --save-imatrix model.imatrix.gguf --calibrate text.txt
  python nkat_gguf_converter.py --input model.nkat --merge merged.gguf --text text.txt
  python nkat_gguf_converter.py --input model.nkat --output model.gguf --remove
"""


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What is asked of a conversion: the flags of their names, None where one was not given. `fit`: how it learns."""

    input: Path
    output: Path | None
    in_place: bool
    layout: str | None
    theta_only: bool
    export_lora: Path | None
    export_peft: Path | None
    model_card: bool
    merge: Path | None
    save_imatrix: Path | None
    imatrix_chunks: int | None
    repair: Path | None
    repair_steps: int | None
    repair_learning_rate: float | None
    remove: bool
    theta_rank: int | None
    theta_gamma: float | None
    optimize_rank: bool
    text: Path | None
    chunks: int
    selective_layers: list[str] | None
    target_size: int | None
    depth_decay: bool
    theta_source: str
    reference: Path | None
    calibrate: Path | None
    imatrix: Path | None
    start_from: Path | None
    keep: Path | None
    thetas: tuple[WeightedFile, ...]
    truncate_rank: int | None
    strengths: bool
    seed: int
    threads: int | None
    dry_run: bool
    force: bool
    json: str | None
    fit: FitOptions

    @property
    def writes_model(self) -> bool:
        """Whether --output or --in-place says where the model or its Θ goes."""
        return self.output is not None or self.in_place

    @property
    def keeps_theta(self) -> bool:
        """Whether no new Θ is made: that of the input, or of a file of its own, is written, or a part of it."""
        return bool(self.thetas) or self.truncate_rank is not None

    @property
    def makes_theta(self) -> bool:
        """Whether a flag asks for a new Θ of a certain kind."""
        asked = (self.theta_rank, self.selective_layers, self.target_size)
        return any(value is not None for value in asked) or self.optimize_rank or self.depth_decay

    @property
    def final_layout(self) -> str:
        """Where Θ goes in a file that holds the model too."""
        return "appended" if self.in_place else self.layout or "tensors"

    @property
    def inputs(self) -> list[Path | None]:
        """What is read, and never to be replaced by what is written."""
        thetas = [file.path for file in self.thetas]
        texts = (self.text, self.calibrate, self.keep, *(self.fit.guard or ()))
        return [self.input, self.reference, self.imatrix, self.start_from, *thetas, *texts]

    @property
    def inputs_there(self) -> list[Path]:
        """Those of the inputs that were given."""
        return [path for path in self.inputs if path is not None]

    @property
    def card_path(self) -> Path | None:
        """The page in PEFT's folder, else beside the adapter, --output, or the input that is changed in place."""
        if not self.model_card:
            return None
        beside = (self.export_lora or self.output or self.input).with_name(CARD)
        return beside if self.export_peft is None else self.export_peft / CARD

    @property
    def outputs(self) -> dict[str, Path | str | None]:
        """The files to write, by the flags that name them."""
        named = {"--output": self.output, "--export-lora": self.export_lora, "--merge": self.merge}
        named |= {"--export-peft": self.export_peft, "--save-imatrix": self.save_imatrix}
        named["--model-card"] = self.card_path
        return {**named, "--repair": self.repair, "--json": self.json}

    @property
    def fit_state(self) -> Path:
        """Where an interrupted fit is kept: beside what it makes."""
        target = self.output or self.input
        return target.with_name(target.name + ".fit")

    @property
    def repair_state(self) -> Path:
        """The same of an interrupted repair."""
        assert self.repair is not None
        return self.repair.with_name(self.repair.name + ".fit")

    @property
    def only_repairs(self) -> bool:
        """Whether a repaired model is all that is asked for, and no Θ for it."""
        return self.repair is not None and not self.writes_model and self.merge is None

    @property
    def exports(self) -> bool:
        """Whether an adapter for other programs is asked for."""
        return self.export_lora is not None or self.export_peft is not None

    @property
    def only_gathers(self) -> bool:
        """Whether an importance matrix is all that is asked for."""
        others = self.writes_model or self.exports or self.remove
        return self.save_imatrix is not None and not others and self.merge is None and self.repair is None

    @property
    def flags_of_a_fit(self) -> list[str]:
        """Those given that only a fit of Θ understands."""
        return [flag for flag in self.fit.given if self.repair is None or flag not in SHARED_FLAGS]


CONFLICTS: tuple[tuple[Callable[[ConvertOptions], object], str], ...] = (
    (lambda o: o.output is not None and o.in_place, "--output and --in-place exclude each other"),
    (
        lambda o: o.in_place and is_name(o.input),
        "--in-place would change the copy of {o.input} in the cache: give --output",
    ),
    (
        lambda o: o.repair is None and (o.repair_steps or o.repair_learning_rate is not None),
        "--repair-steps and --repair-learning-rate are for --repair",
    ),
    (
        lambda o: o.repair and (o.in_place or o.remove or o.truncate_rank),
        "--repair writes a model of its own: --in-place, --remove and --truncate-rank do not go with it",
    ),
    (
        lambda o: o.repair and o.calibrate is None,
        "--repair needs --calibrate, the text to learn on (and --reference, to win back what was lost)",
    ),
    (
        lambda o: (
            o.only_repairs
            and (
                o.exports
                or o.theta_only
                or o.layout
                or o.theta_source != "weight"
                or o.theta_gamma is not None
                or o.theta_rank
                or o.target_size
                or o.optimize_rank
                or o.depth_decay
            )
        ),
        "--repair alone makes no Θ; to make one for the repaired model give --output too",
    ),
    (
        lambda o: o.repair and not o.only_repairs and o.dry_run,
        "--dry-run writes no repaired model that a Θ could be made for: give --repair alone, or leave --dry-run out",
    ),
    (
        lambda o: o.save_imatrix and o.calibrate is None,
        "--save-imatrix needs --calibrate, the text to gather the importance matrix on",
    ),
    (lambda o: o.imatrix_chunks and o.save_imatrix is None, "--imatrix-chunks is for --save-imatrix"),
    (
        lambda o: (
            not (o.writes_model or o.only_gathers)
            and (o.remove or not (o.exports or o.merge is not None or o.repair is not None))
        ),
        "say where the result goes: --output FILE or --in-place (or --export-lora FILE, --export-peft DIR, --merge "
        "FILE, --repair FILE, --save-imatrix FILE)",
    ),
    (
        lambda o: o.merge and o.output is None and (o.theta_only or o.layout),
        "--theta-only and --layout say what --output is to be, which is not given",
    ),
    (
        lambda o: o.in_place and (o.theta_only or o.layout == "tensors"),
        "--in-place always uses layout 'appended'; --theta-only and --layout tensors need --output",
    ),
    (
        lambda o: o.model_card and (o.remove or (not o.exports and not o.writes_model)),
        "--model-card describes a Θ that is written: it goes with --export-lora, --export-peft, --output or --in-place",
    ),
    (lambda o: o.theta_only and o.layout, "--theta-only writes no model, so --layout has no meaning with it"),
    (
        lambda o: o.optimize_rank and o.theta_rank is not None,
        "--optimize-rank searches the rank, so --theta-rank has no meaning with it",
    ),
    (
        lambda o: o.theta_source == "residual" and o.reference is None,
        "--theta-source residual needs --reference, the same model at a higher precision",
    ),
    (
        lambda o: (
            o.theta_source == "weight"
            and o.repair is None
            and (o.reference or (o.calibrate and o.save_imatrix is None))
        ),
        "--reference and --calibrate are for --theta-source residual or fit, and for --repair",
    ),
    (
        lambda o: o.imatrix and o.theta_source != "residual" and (o.repair is None or o.reference is None),
        "--imatrix is for --theta-source residual, and for --repair with --reference",
    ),
    (
        lambda o: (
            o.imatrix and o.calibrate and o.theta_source == "residual" and o.repair is None and o.save_imatrix is None
        ),
        "--imatrix says what --calibrate would be run for: give one of them",
    ),
    (
        lambda o: o.start_from and (o.theta_source != "fit" or o.fit.start != "auto"),
        "--start-from is where --theta-source fit begins, in place of --fit-start",
    ),
    (lambda o: o.theta_source != "fit" and o.flags_of_a_fit, "{o.flags_of_a_fit[0]} is for --theta-source fit"),
    (lambda o: o.theta_source != "fit" and o.keep is not None, "--keep is for --theta-source fit"),
    (
        lambda o: o.fit.guard is None and "--guard" in o.fit.given,
        "--no-guard lets a fit cost whatever it does, so --guard has no meaning with it",
    ),
    (
        lambda o: o.theta_source == "fit" and o.calibrate is None,
        "--theta-source fit needs --calibrate, the text to learn from",
    ),
    (
        lambda o: o.theta_source == "fit" and o.optimize_rank and not o.fit.nested,
        "--optimize-rank needs lower ranks in the first columns, which --no-nested does not learn",
    ),
    (
        lambda o: o.theta_source == "fit" and (o.target_size or o.depth_decay),
        "--target-size and --depth-decay are not for --theta-source fit, which learns every entry's strength",
    ),
    (
        lambda o: o.fit.start == "residual" and o.reference is None,
        "--fit-start residual needs --reference, the same model at a higher precision",
    ),
    (
        lambda o: o.fit.reference_share is not None and o.reference is None,
        "--fit-reference-share needs --reference, the same model at a higher precision",
    ),
    (
        lambda o: o.keeps_theta and (o.theta_source != "weight" or o.theta_rank or o.target_size or o.optimize_rank),
        "--theta and --truncate-rank write a Θ that there is, so flags for making one have no meaning with them",
    ),
    (
        lambda o: (
            o.remove
            and (o.exports or o.merge or o.theta_gamma is not None or o.makes_theta or o.theta_only or o.keeps_theta)
        ),
        "--remove only takes Θ off: it goes with --input, --output or --in-place, --force, --dry-run, --json",
    ),
    (
        lambda o: (
            not o.writes_model
            and o.merge is None
            and o.repair is None
            and (o.makes_theta or o.theta_only or o.keeps_theta)
        ),
        "without --output or --in-place no new Θ is made: --export-lora and --export-peft take the one the input has",
    ),
    (
        lambda o: o.strengths and (o.keeps_theta or o.remove or (not o.writes_model and not o.merge)),
        "--strengths measures a Θ that is made; for the one a file has use the inference engine's --theta-gamma",
    ),
)  # the first that holds is what the user is told


def parse_arguments(argv: Sequence[str] | None = None) -> ConvertOptions:
    """The flags, checked against one another; a mistake ends the program with one line and status 2."""
    parser = commandline.parser(
        "Add Θ (small antisymmetric INT8 tensors) to a GGUF language model, or take it off.", EXAMPLES
    )
    add = parser.add_argument
    add(
        "--input",
        type=Path,
        required=True,
        metavar="FILE",
        help="a .gguf, a .nkat whose Θ is to be replaced, or hf:OWNER/REPO[:QUANT]",
    )
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
        "--export-peft",
        type=Path,
        metavar="DIR",
        help="the same as a LoRA for PEFT and transformers: a folder with adapter_config.json and "
        "adapter_model.safetensors (needs the package safetensors)",
    )
    add(
        "--model-card",
        action="store_true",
        help="also write README.md in PEFT's folder, beside the adapter or --output: what Θ is from, gains and costs",
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
        help=f"columns of each factor (default {DEFAULT_RANK}; fit: {DEFAULT_RANK} or fewer, whatever is best)",
    )
    add(
        "--theta-gamma",
        type=float,
        metavar="G",
        help=f"strength, 0 < G <= 1: lower is stronger, 1 is none (default {DEFAULT_GAMMA}; fit: the strongest that "
        "--guard admits)",
    )
    add("--optimize-rank", action="store_true", help="measure ranks 2, 4, 6, 8 and keep the one with the highest TPE")
    add(
        "--text",
        type=Path,
        metavar="FILE",
        help="text to judge on, for --optimize-rank, --merge and the report (default: Python's own documentation)",
    )
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
        help="residual: text whose activations weight the error; fit and --repair: text to learn from, or chats: a "
        ".jsonl of rows with messages, or with prompt and completion, of which the assistant's words are learned",
    )
    add(
        "--imatrix",
        type=Path,
        metavar="FILE",
        help="residual, and --repair with --reference: weight the error by this importance matrix of llama-imatrix's "
        "(GGUF or .dat) instead of running a text",
    )
    add(
        "--save-imatrix",
        type=Path,
        metavar="FILE",
        help="write the importance matrix that the input has on --calibrate, for llama-quantize; .dat: the old form",
    )
    add(
        "--imatrix-chunks",
        type=commandline.positive_int,
        metavar="N",
        help="chunks of 512 tokens of --calibrate for --save-imatrix, at most (default: all, as llama-imatrix)",
    )
    add(
        "--start-from",
        type=Path,
        metavar="LORA",
        help="fit: begin at the Θ that comes nearest to this LoRA, a folder of PEFT's or a GGUF of llama.cpp's; "
        "how near that is, is said",
    )
    add("--keep", type=Path, metavar="FILE", help="fit: another text, on which the model is to stay as it is")
    add_theta_arguments(
        parser,
        "make no new Θ: write the one in this file, or with --selective-layers, --truncate-rank, --theta-gamma or "
        "--depth-decay a part of it; again: several, written as one, their sum, each times its weight (default 1)",
    )
    add(
        "--truncate-rank",
        type=commandline.positive_int,
        metavar="R",
        help="make no new Θ: keep the first R columns of the one the input or --theta has",
    )
    add(
        "--strengths",
        action="store_true",
        help="also measure perplexity at gamma 0.90 to 0.99 and, with --reference, beside the larger file",
    )
    add("--seed", type=commandline.seed, default=0, help="of whatever is random in making Θ (default 0)")
    add("--threads", type=commandline.thread_count, metavar="N", help="processor threads (default: torch's choice)")
    add("--dry-run", action="store_true", help="do everything but write")
    add("--force", action="store_true", help="replace an existing output, or an existing Θ with --in-place")
    add("--json", metavar="FILE", help='write a machine-readable record; "-" for stdout')
    commandline.add_output_format(parser)
    add_repair_arguments(parser)
    add_fit_arguments(parser)
    parsed = parser.parse_args(argv)
    options = commandline.taken(ConvertOptions, parsed, fit=fit_options(parsed))
    commandline.check_conflicts(parser, options, CONFLICTS)
    return options
