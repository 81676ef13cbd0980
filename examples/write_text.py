"""The same prompt continued without Θ and with it.

python -m examples.write_text model.nkat 'Once upon a time'
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("examples.write_text")

from pathlib import Path

import nkat
from nkat.host import commandline


def main() -> None:
    parser = commandline.parser(
        "The same prompt continued without Θ and with it.",
        "  python -m examples.write_text model.nkat 'Once upon a time'",
    )
    parser.add_argument("model", type=Path, help="a .nkat")
    parser.add_argument("prompt", help="what to continue")
    parser.add_argument("--max-tokens", type=commandline.positive_int, default=60, help="at most so many (default 60)")
    options = parser.parse_args()
    model = nkat.open_model(options.model)
    for name, theta in (("without Θ", None), ("with Θ", model.theta)):
        print(f"--- {name}")
        nkat.generate(model, options.prompt, theta, max_tokens=options.max_tokens, temperature=0.0, on_text=print_piece)
        print()


def print_piece(piece: str) -> None:
    print(piece, end="", flush=True)
