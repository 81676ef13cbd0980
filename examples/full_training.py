"""Stage 2 from end to end: train on the four sets, print the table, draw the pictures, export the CIFAR-10 model.

    python -m examples.full_training --seeds 3 --amp auto
    python -m examples.full_training --epochs 10 --amp auto          a shorter run

Finished runs are kept and unfinished ones go on, so that the command can be stopped and given again. On a processor
40 epochs of four sets take days; 10 are a start.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("examples.full_training")

import subprocess
import sys
from pathlib import Path

from nkat.errors import NKATError
from nkat.host import commandline

ROOT = Path(__file__).resolve().parent.parent


def run(module: str, *arguments: object) -> None:
    """Shows and runs a command. Raises NKATError when it fails; it has said why itself."""
    words = ["-m", module, *map(str, arguments)]
    print(f"\n$ python {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, check=False)
    if done.returncode:
        raise NKATError(f"{module} ended with status {done.returncode}")


def main() -> None:
    parser = commandline.parser("Stage 2 from end to end.", "  python -m examples.full_training --seeds 3 --amp auto")
    parser.add_argument("--data-root", type=Path, default=ROOT / "data", help="folder with the archives (data)")
    parser.add_argument("--download", action="store_true", help="fetch the data sets that are not there")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "stage2")
    parser.add_argument("--seeds", type=commandline.positive_int, default=1)
    parser.add_argument("--preset", choices=("stage2", "strong"), default="stage2")
    parser.add_argument("--epochs", type=commandline.positive_int, help="instead of the preset's 40")
    parser.add_argument("--amp", choices=("off", "bf16", "auto"), default="auto")
    options = parser.parse_args()
    data, output = ["--data-root", options.data_root.resolve()], options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if options.download:
        run("nkat_vit.download", "mnist", "fashion", "emnist", "cifar10", *data)
    trained = ["--preset", options.preset, "--seeds", options.seeds, "--amp", options.amp]
    trained += ["--epochs", options.epochs] if options.epochs else []
    run(
        "nkat_vit.evaluate", "--train", *trained, *data, "--output", output, "--json", output / "stage2.json", "--force"
    )
    cifar = output / "cifar10-seed0"
    run("nkat_vit.interpret", "--checkpoint", cifar, *data, "--output-dir", output / "pictures")
    run("nkat_vit.export", "--checkpoint", cifar, "--output", output / "cifar10.pt2", "--force")
