"""Whole training steps of the image model by this checkout and by another one, in turns.

    git worktree add ../before COMMIT
    python -m benchmarks.vit_against ../before --threads 2
    python -m benchmarks.vit_against ../before --preset stage2 --threads 1
    python -m benchmarks.vit_against ../before --preset stage2 --both conv_stem=deep,opt=muon --this muon_steps=3

Each checkout's own trainer, in a process of its own, makes the same recipe's steps on a processor (augmentation,
gradients, optimisers, averaged weights), one after the other in turns; the other waits meanwhile. The ratio is the
median of the paired ratios. The last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.vit_against")

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch

from benchmarks import vit_worker
from benchmarks.vit_ablation import parse_change
from nkat.errors import NKATError
from nkat.host import commandline, console
from nkat.host.console import say
from nkat.host.hardware import describe, set_threads
from nkat.host.record import print_record
from nkat.host.tables import Column, Table, show
from nkat_vit.recipe import PRESETS, make_recipe, with_preset

_WARM_UP = 1  # turns
_STEPS = 4  # of a turn: at first caches are the other's, and its threads still spin
_HERE = Path(__file__).parents[1]


class Arm:
    """A checkout's trainer in a process, to be closed."""

    def __init__(self, checkout: Path, values: dict[str, object], threads: int) -> None:
        source = Path(vit_worker.__file__).read_text(encoding="utf-8")
        command = [sys.executable, "-c", source, json.dumps(values), str(threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=checkout, stdin=pipe, stdout=pipe, text=True)
        self.checkout = checkout
        self._read()

    def step(self) -> float:
        """Seconds of a step."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise NKATError(f"{self.checkout}: its trainer ended; what it said is above")
        return line

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()


def main() -> None:
    parser = commandline.parser(__doc__.splitlines()[0], "  python -m benchmarks.vit_against ../before --threads 2")
    parser.add_argument("other", type=Path, help="folder of another checkout")
    parser.add_argument("--preset", choices=list(PRESETS), default="fast")
    parser.add_argument("--both", type=parse_change, default={}, metavar="NAME=VALUE,…", help="over the preset's")
    of_this = "settings of this checkout alone, which the other may not know"
    parser.add_argument("--this", type=parse_change, default={}, metavar="NAME=VALUE,…", help=of_this)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--amp", choices=("off", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=commandline.positive_int, default=10)
    parser.add_argument("--threads", type=commandline.thread_count)
    commandline.add_output_format(parser)
    options = parser.parse_args()
    if not (options.other / "nkat_vit" / "loop.py").is_file():
        raise NKATError(f"{options.other}: no checkout with a folder nkat_vit in it")
    threads = set_threads(options.threads)
    # With the settings that both know: those given away in JSON, so that each takes its own default for others.
    values = with_preset(options.preset, options.both | {"dataset": options.dataset, "amp": options.amp})
    batch = make_recipe(values | options.this).train.batch_size
    seconds: dict[str, list[float]] = {"other": [], "this": []}
    fastest = dict.fromkeys(seconds, float("inf"))
    with ExitStack() as opened:
        arms = {}
        for name, folder, own in (("other", options.other, {}), ("this", _HERE, options.this)):
            arms[name] = Arm(folder, values | own, threads)
            opened.callback(arms[name].close)
        with console.bar(_WARM_UP + options.rounds, "rounds", "round") as progress:
            for index in range(_WARM_UP + options.rounds):
                for name, arm in arms.items():
                    elapsed = [arm.step() for _ in range(_STEPS)]
                    if index >= _WARM_UP:
                        seconds[name].append(median(elapsed[1:]))
                        fastest[name] = min(fastest[name], *elapsed)
                progress.update()
    ratio = median(other / this for other, this in zip(seconds["other"], seconds["this"], strict=True))
    rows = [
        {
            "checkout": name,
            "median_ms": 1e3 * median(times),
            "fastest_ms": 1e3 * fastest[name],
            "images_per_second": batch / median(times),
        }
        for name, times in seconds.items()
    ]
    machine = describe(torch.device("cpu"))
    columns = [
        Column("checkout", "checkout"),
        Column("median ms", "median_ms", ".1f"),
        Column("fastest ms", "fastest_ms", ".1f"),
        Column("pictures/s", "images_per_second", ".0f"),
    ]
    title = f"{options.preset}, {options.dataset}, amp {options.amp}, {threads} threads, {machine['device_name']}"
    show(Table("steps", columns, rows, title, {}))
    best = fastest["other"] / fastest["this"]
    say(f"this against other: {ratio:.3f} times as fast, by the fastest steps {best:.3f} times")
    print_record(
        {
            "benchmark": "vit_against",
            "preset": options.preset,
            "both": options.both,
            "this": options.this,
            "dataset": options.dataset,
            "amp": options.amp,
            "rounds": options.rounds,
            "batch_size": batch,
            "median_seconds": {name: median(times) for name, times in seconds.items()},
            "fastest_seconds": fastest,
            "ratio": ratio,
            "ratio_of_fastest": best,
            "machine": machine | {"threads": threads},
        }
    )
