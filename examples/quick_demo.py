"""The image model in a few minutes: train a small one on MNIST, look at what it looks at.

    python -m examples.quick_demo --download        fetches MNIST (12 MB) first
    python -m examples.quick_demo --data-root data

Runs the commands as a user would and shows each. Files go to output/quick_demo.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("examples.quick_demo")

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
    parser = commandline.parser(
        "Train a small image model and show its attention.", "  python -m examples.quick_demo --download"
    )
    parser.add_argument("--data-root", type=Path, default=ROOT / "data", help="folder with the archives (data)")
    parser.add_argument("--dataset", choices=("mnist", "fashion", "emnist-digits"), default="mnist")
    parser.add_argument("--download", action="store_true", help="fetch the data set when it is not there")
    parser.add_argument("--epochs", type=commandline.positive_int, default=3)
    parser.add_argument(
        "--limit-train", type=commandline.non_negative_int, default=20000, help="pictures, 0: all (20000)"
    )
    parser.add_argument("--validation", type=commandline.positive_int, default=2000)
    parser.add_argument("--batch-size", type=commandline.positive_int, default=128)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "quick_demo")
    options = parser.parse_args()
    data = ["--data-root", options.data_root.resolve()]
    if options.download:
        run("nkat_vit.download", options.dataset, *data)
    small = ["--embed-dim", 128, "--depth", 4, "--heads", 4, "--dropout-attn", 0.05, "--nkat-strength", 0.05]
    gentle = ["--randaugment", 1, 5, "--crop", 2, "--cutout", 0, "--lr", 2e-3, "--warmup", 0.5, "--ema", 0.99]
    size = ["--epochs", options.epochs, "--limit-train", options.limit_train, "--validation", options.validation]
    size += ["--batch-size", options.batch_size]
    output = options.output.resolve()
    run("nkat_vit.train", "--dataset", options.dataset, *data, *small, *gentle, *size, "--output", output, "--force")
    pictures = ["--output-dir", output / "pictures", "--curve-pictures", 10]  # enough for a first look
    run("nkat_vit.interpret", "--checkpoint", output, *data, *pictures)
    print(f"\nthe model is {output / 'best.pt'}, its pictures are in {output / 'pictures'}")
