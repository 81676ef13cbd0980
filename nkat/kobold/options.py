"""The backend selector's command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = commandline.parser(
        "Run a model with its Θ in KoboldCpp: the base model, and Θ as a LoRA adapter made from it.", EXAMPLES
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="FILE", help="a .nkat, or a .gguf (default in the menu: the newest .nkat here)")
    add("--theta", type=Path, metavar="FILE", help="Θ in a file of its own, for --model")
    add("--base", type=Path, metavar="FILE", help="the base model, where it is not beside the .nkat")
    add("--kobold", type=Path, metavar="PATH", help="KoboldCpp: its program or its folder (default: $KOBOLDCPP, …)")
    add(
        "--backend",
        choices=("auto", *(backend.name for backend in BACKENDS)),
        default="auto",
        help="default auto: the best one that can run",
    )
    add("--contextsize", type=commandline.positive_int, default=4096, metavar="N", help="tokens (default 4096)")
    add("--gpulayers", type=_layers, metavar="N", help="layers on the GPU, or auto: as many as fit (default)")
    add("--threads", type=commandline.positive_int, metavar="N", help="default: the processor's physical cores")
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
    add("--force", action="store_true", help="replace --save-config's and --json's files")
    add("--json", nargs="?", const="-", metavar="FILE", help="a machine-readable record, to stdout's last line")
    words, extra = list(argv), []
    if "--" in words:
        extra = words[words.index("--") + 1 :]
        words = words[: words.index("--")]
    options = parser.parse_args(words)
    options.extra = extra
    actions = [name for name in ("list", "benchmark", "launch", "dry_run") if getattr(options, name)]
    if len(actions) > 1:
        parser.error(f"--{actions[0].replace('_', '-')} and --{actions[1].replace('_', '-')} exclude each other")
    options.action = actions[0] if actions else "save" if options.save_config else None
    if options.model is None and (options.theta or options.base or options.action not in (None, "list")):
        parser.error("--model FILE is needed")
    if not 256 <= options.contextsize <= 262144:
        parser.error(f"--contextsize must be from 256 to 262144, got {options.contextsize}")
    if options.port > 65535:
        parser.error(f"--port must be at most 65535, got {options.port}")
    return options


def _layers(text: str) -> int | None:
    return None if text == "auto" else commandline.non_negative_int(text)
