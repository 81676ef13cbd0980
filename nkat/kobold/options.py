"""The backend selector's command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nkat.host import commandline
from nkat.kobold.backends import BACKENDS

EXAMPLES = """\
  python backend_selector.py                                    a menu of what this machine can run
  python backend_selector.py --model model.nkat --launch
  python backend_selector.py --model model.nkat --dry-run       the command, to be pasted into a shell
  python backend_selector.py --model model.nkat --benchmark --contextsize 2048
  python backend_selector.py --model base.gguf --theta theta_rank4.bin --backend vulkan --gpulayers 20 --launch
  python backend_selector.py --model model.nkat --save-config model.kcpps
  python backend_selector.py --model model.nkat --launch -- --quiet --flashattention
"""
AUTO = "auto"
_ACTIONS = ("list", "benchmark", "launch", "dry_run")


@dataclass(frozen=True, slots=True)
class KoboldOptions:
    """What the user asked for, as checked.

    model: the file to run; theta: a Θ in a file of its own; base: the model Θ was made for; None: not named
    kobold: KoboldCpp's program or folder; None: to be looked for
    backend: a name, or "auto" for the best that can run
    contextsize: tokens; threads: None for the processor's cores
    gpulayers: layers on the GPU; None: as many as fit
    host, port: where KoboldCpp listens
    action: "list", "benchmark", "launch", "dry_run", "save" where only --save-config is given, else None
    save_config: the `.kcpps` file to write
    timeout: seconds, for loading or for one benchmark
    force: replace what --save-config and --json name
    json: the record's file, "-" for stdout, None for no record
    extra: flags for KoboldCpp, from behind --
    """

    model: Path | None
    theta: Path | None
    base: Path | None
    kobold: Path | None
    backend: str
    contextsize: int
    gpulayers: int | None
    threads: int | None
    host: str
    port: int
    action: str | None
    save_config: Path | None
    timeout: int
    force: bool
    json: str | None
    extra: tuple[str, ...]


def _needs_model(o: KoboldOptions) -> bool:
    return o.theta is not None or o.base is not None or o.action not in (None, "list")


CONFLICTS: tuple[tuple[Callable[[KoboldOptions], object], str], ...] = (
    (lambda o: o.model is None and _needs_model(o), "--model FILE is needed"),
    (lambda o: not 256 <= o.contextsize <= 262144, "--contextsize must be from 256 to 262144, got {o.contextsize}"),
    (lambda o: o.port > 65535, "--port must be at most 65535, got {o.port}"),
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
    options = commandline.taken(KoboldOptions, parsed, action=action, extra=extra)
    commandline.check_conflicts(parser, options, CONFLICTS)
    return options


def _make_parser() -> argparse.ArgumentParser:
    parser = commandline.parser(
        "Run a model with its Θ in KoboldCpp: the base model, and Θ as a LoRA adapter made from it.", EXAMPLES
    )
    add = parser.add_argument
    backends = (AUTO, *(backend.name for backend in BACKENDS))
    add("--model", type=Path, metavar="FILE", help="a .nkat, or a .gguf (default in the menu: the newest .nkat here)")
    add("--theta", type=Path, metavar="FILE", help="Θ in a file of its own, for --model")
    add("--base", type=Path, metavar="FILE", help="the base model, where it is not beside the .nkat")
    add("--kobold", type=Path, metavar="PATH", help="KoboldCpp: its program or its folder (default: $KOBOLDCPP, …)")
    add("--backend", choices=backends, default=AUTO, help="default auto: the best one that can run")
    add("--contextsize", type=commandline.positive_int, default=4096, metavar="N", help="tokens (default 4096)")
    add("--gpulayers", type=_layers, metavar="N", help="layers on the GPU, or auto: as many as fit (default)")
    add("--threads", type=commandline.thread_count, metavar="N", help="default: the processor's physical cores")
    add("--port", type=commandline.positive_int, default=5001, metavar="N", help="default 5001")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="default 127.0.0.1: this machine only")
    add("--list", action="store_true", help="show what there is and what can run, start nothing")
    add("--benchmark", action="store_true", help="measure every usable backend and split, keep the fastest as default")
    add("--launch", action="store_true", help="start KoboldCpp and stay until it ends")
    add("--save-config", type=Path, metavar="FILE", help="write the settings for koboldcpp --config FILE.kcpps")
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
    if text == AUTO:
        return None
    try:
        return commandline.non_negative_int(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; or {AUTO}") from None
