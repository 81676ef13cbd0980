"""The backend selector's command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nkat.host import commandline
from nkat.kobold.command import CACHE_TYPES, F16
from nkat.kobold.runtime import Runtime
from nkat.kobold.runtimes import RUNTIMES
from nkat.theta.combine import WeightedFile
from nkat.theta.options import add_theta_arguments

EXAMPLES = """\
  python backend_selector.py                                    a menu of what this machine can run
  python backend_selector.py --model model.nkat --launch
  python backend_selector.py --model model.nkat --dry-run       the command, to be pasted into a shell
  python backend_selector.py --model model.nkat --benchmark --contextsize 2048
  python backend_selector.py --model base.gguf --theta theta_rank4.bin --backend vulkan --gpulayers 20 --launch
  python backend_selector.py --model base.gguf --theta a.bin --theta-scaled b.bin:0.5 --runtime llama-server --launch
  python backend_selector.py --model model.nkat --quantkv q8_0 --draftmodel small.gguf --launch
  python backend_selector.py --model model.nkat --save-config model.kcpps
  python backend_selector.py --runtime llama-server --router models --launch      every model there, by name
  python backend_selector.py --model model.nkat --launch -- --quiet --noflashattention
"""
AUTO = "auto"
_ACTIONS = ("list", "benchmark", "launch", "dry_run")
_NUMBERED_TYPES = {"0": F16, "1": "q8_0", "2": "q4_0", "3": "bf16"}  # as KoboldCpp numbers them


@dataclass(frozen=True, slots=True)
class KoboldOptions:
    """What the user asked for, as checked.

    model: the file to run; thetas: Θ in files of their own; base: the model Θ was made for; None, (): not named
    runtime: which program runs it; kobold, llama_server: those programs or their folders; None: to be looked for
    backend: a name, or "auto" for the best that can run
    contextsize: tokens; threads: None for the processor's cores
    gpulayers: layers on the GPU; None: as many as fit; autofit: the program itself decides
    quantkv: the KV cache's type; draftmodel: what guesses tokens, draftamount of them at a time
    router, admin: the folder whose models are served by name, or switched between
    host, port: where the program listens
    action: "list", "benchmark", "launch", "dry_run", "save" where only --save-config is given, else None
    save_config: the program's own file to write
    timeout: seconds, for loading or for one benchmark
    force: replace what --save-config and --json name
    json: the record's file, "-" for stdout, None for no record
    extra: flags for the program, from behind --
    """

    model: Path | None
    thetas: tuple[WeightedFile, ...]
    base: Path | None
    runtime: Runtime
    kobold: Path | None
    llama_server: Path | None
    backend: str
    contextsize: int
    gpulayers: int | None
    autofit: bool
    quantkv: str
    draftmodel: Path | None
    draftamount: int | None
    router: Path | None
    admin: Path | None
    threads: int | None
    host: str
    port: int
    action: str | None
    save_config: Path | None
    timeout: int
    force: bool
    json: str | None
    extra: tuple[str, ...]

    @property
    def program(self) -> Path | None:
        """The program that the user names."""
        return {"koboldcpp": self.kobold, "llama-server": self.llama_server}[self.runtime.name]

    @property
    def folder(self) -> Path | None:
        """Whose models are served."""
        return self.router or self.admin


def _needs_model(o: KoboldOptions) -> bool:
    if o.folder is not None:
        return bool(o.thetas) or o.base is not None
    return bool(o.thetas) or o.base is not None or o.action not in (None, "list")


def _names_another(o: KoboldOptions) -> bool:
    return o.program is None and (o.kobold or o.llama_server) is not None


CONFLICTS: tuple[tuple[Callable[[KoboldOptions], object], str], ...] = (
    (lambda o: o.model is None and _needs_model(o), "--model FILE is needed"),
    (lambda o: not 256 <= o.contextsize <= 262144, "--contextsize must be from 256 to 262144, got {o.contextsize}"),
    (lambda o: o.port > 65535, "--port must be at most 65535, got {o.port}"),
    (_names_another, "the program that was named is not the one of --runtime {o.runtime.name}"),
    (
        lambda o: o.backend not in (AUTO, *(backend.name for backend in o.runtime.backends)),
        "--runtime {o.runtime.name} has no backend {o.backend} (--list shows which there are)",
    ),
    (lambda o: o.autofit and o.gpulayers is not None, "--autofit and --gpulayers N exclude each other"),
    (lambda o: o.autofit and o.action == "benchmark", "--benchmark measures splits, so --autofit has no meaning there"),
    (lambda o: o.draftamount is not None and o.draftmodel is None, "--draftamount needs --draftmodel"),
    (lambda o: o.router is not None and o.admin is not None, "--router and --admin exclude each other"),
    (
        lambda o: o.admin is not None and o.runtime.admin is None,
        "--runtime {o.runtime.name} has no --admin; --router serves several models",
    ),
    (
        lambda o: o.folder is not None and o.action in ("list", "benchmark"),
        "--router and --admin serve models: give --launch or --dry-run",
    ),
    (lambda o: o.folder is not None and o.thetas, "--router and --admin take models with their own Θ, not --theta"),
    (
        lambda o: o.folder is not None and o.save_config is not None,
        "--router and --admin write files of their own, so --save-config has no meaning",
    ),
)


def parse_arguments(argv: Sequence[str]) -> KoboldOptions:
    """The options of a command line; ends the process with one line on stderr for flags that do not go together."""
    words: list[str] = list(argv)
    extra: tuple[str, ...] = ()
    if "--" in words:
        at = words.index("--")
        words, extra = words[:at], tuple(words[at + 1 :])
    parser = _make_parser()
    parsed = parser.parse_args(words)
    actions = [name for name in _ACTIONS if getattr(parsed, name)]
    if len(actions) > 1:
        parser.error(f"{' and '.join(f'--{name}'.replace('_', '-') for name in actions[:2])} exclude each other")
    action = actions[0] if actions else "save" if parsed.save_config else None
    if parsed.output_format and action != "benchmark":
        parser.error("--output-format is of what --benchmark measures")
    options = commandline.taken(
        KoboldOptions,
        parsed,
        action=action,
        extra=extra,
        runtime=RUNTIMES[parsed.runtime],
    )
    commandline.check_conflicts(parser, options, CONFLICTS)
    return options


def _make_parser() -> argparse.ArgumentParser:
    parser = commandline.parser(
        "Run a model with its Θ in KoboldCpp or llama-server: the base model, and Θ as a LoRA adapter made from it.",
        EXAMPLES,
    )
    add = parser.add_argument
    backends = dict.fromkeys(backend.name for runtime in RUNTIMES.values() for backend in runtime.backends)
    add(
        "--model",
        type=Path,
        metavar="FILE",
        help="a .nkat, a .gguf, or hf:OWNER/REPO[:QUANT] (default in the menu: the newest .nkat here)",
    )
    add_theta_arguments(
        parser,
        "a Θ made for this model, in place of the model's own; again: several, added up, each times its weight "
        "(default 1)",
    )
    add("--base", type=Path, metavar="FILE", help="the base model, where it is not beside the .nkat")
    add("--runtime", choices=tuple(RUNTIMES), default=next(iter(RUNTIMES)), help="what runs it (default koboldcpp)")
    add("--kobold", type=Path, metavar="PATH", help="KoboldCpp: its program or its folder (default: $KOBOLDCPP, …)")
    add("--llama-server", type=Path, metavar="PATH", help="llama-server or its folder (default: $LLAMA_SERVER, …)")
    add("--backend", choices=(AUTO, *backends), default=AUTO, help="default auto: the best one that can run")
    add("--contextsize", type=commandline.positive_int, default=4096, metavar="N", help="tokens (default 4096)")
    add("--gpulayers", type=_layers, metavar="N", help="layers on the GPU; auto or -1: as many as fit (default)")
    add("--autofit", action="store_true", help="let the program itself decide what goes onto the GPU")
    add(
        "--quantkv",
        type=_cache_type,
        default=F16,
        metavar="TYPE",
        help=f"the KV cache's type: {', '.join(CACHE_TYPES)} (default {F16})",
    )
    add("--draftmodel", type=Path, metavar="FILE", help="a small model with the same tokens, which guesses ahead")
    add("--draftamount", type=commandline.positive_int, metavar="N", help="tokens it guesses at a time")
    add("--router", type=Path, metavar="FOLDER", help="serve every model there by its name, each with its Θ")
    add(
        "--admin",
        type=Path,
        metavar="FOLDER",
        help="KoboldCpp's admin mode: its page switches between the models there",
    )
    add("--threads", type=commandline.thread_count, metavar="N", help="default: the processor's physical cores")
    add("--port", type=commandline.positive_int, default=5001, metavar="N", help="default 5001")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="default 127.0.0.1: this machine only")
    add("--list", action="store_true", help="show what there is and what can run, start nothing")
    add("--benchmark", action="store_true", help="measure every usable backend and split, keep the fastest as default")
    add("--launch", action="store_true", help="start the program and stay until it ends")
    add(
        "--save-config",
        type=Path,
        metavar="FILE",
        help="write the settings: a .kcpps for koboldcpp --config, presets for llama-server --models-preset",
    )
    add("--dry-run", action="store_true", help="print the exact command (the files it needs are made), start nothing")
    add(
        "--timeout",
        type=commandline.positive_int,
        default=900,
        metavar="SECONDS",
        help="for loading, or one benchmark (default 900)",
    )
    commandline.add_output_format(parser)
    add("--force", action="store_true", help="replace --save-config's and --json's files")
    add("--json", nargs="?", const="-", metavar="FILE", help="a machine-readable record, to stdout's last line")
    return parser


def _layers(text: str) -> int | None:
    if text in (AUTO, "-1"):  # -1: as KoboldCpp and llama.cpp say it
        return None
    try:
        return commandline.non_negative_int(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; or {AUTO}") from None


def _cache_type(text: str) -> str:
    named = _NUMBERED_TYPES.get(text, text.lower())
    if named not in CACHE_TYPES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(CACHE_TYPES)}, got {text!r}")
    return named
