"""Θ made in a notebook or a script, and what it changes about a text.

python -m examples.measure_theta model.gguf my.txt
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("examples.measure_theta")

from pathlib import Path

import nkat
from nkat.host import commandline


def main() -> None:
    parser = commandline.parser(
        "Θ made in a notebook or a script, and what it changes about a text.",
        "  python -m examples.measure_theta model.gguf my.txt",
    )
    parser.add_argument("model", type=Path, help="a .gguf")
    parser.add_argument("text", type=Path, help="UTF-8 text")
    parser.add_argument("--chunks", type=commandline.positive_int, default=8, help="of 512 tokens (default 8)")
    options = parser.parse_args()
    model = nkat.open_model(options.model)
    for gamma in (0.99, 0.97, 0.95):
        theta = nkat.make_theta(model, rank=4, gamma=gamma)
        score = nkat.perplexity(model, options.text, theta, chunks=options.chunks)
        print(f"gamma {gamma:g}: perplexity {score.perplexity}, {score.change}, TPE {score.tpe:.6f}")
