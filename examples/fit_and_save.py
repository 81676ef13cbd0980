"""Θ learned from a text, judged on another, and saved with its model.

python -m examples.fit_and_save model.gguf learn.txt judge.txt model.nkat
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("examples.fit_and_save")

from pathlib import Path

import nkat
from nkat.host import commandline


def main() -> None:
    parser = commandline.parser(
        "Θ learned from a text, judged on another, and saved with its model.",
        "  python -m examples.fit_and_save model.gguf learn.txt judge.txt model.nkat",
    )
    parser.add_argument("model", type=Path, help="a .gguf")
    parser.add_argument("learn", type=Path, help="text to learn from")
    parser.add_argument("judge", type=Path, help="text to judge on")
    parser.add_argument("output", type=Path, help="the .nkat to write")
    parser.add_argument("--steps", type=commandline.positive_int, default=60, help="of gradient descent (default 60)")
    parser.add_argument("--rank", type=commandline.positive_int, default=4, help="columns of P and of Q (default 4)")
    options = parser.parse_args()
    model = nkat.open_model(options.model)
    theta = nkat.fit_theta(model, options.learn, rank=options.rank, steps=options.steps)
    print(f"on {options.judge.name}: {nkat.perplexity(model, options.judge, theta, chunks=8).change}")
    nkat.save(theta, options.output, model)
    print(f"wrote {options.output}: {theta.nbytes:,} bytes of Θ")
