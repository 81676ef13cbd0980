"""The toolkit in one go: fetch a real model, add Θ, measure perplexity without and with it.

    python -m examples.demo
    python -m examples.demo --text my.txt

Runs the scripts as a user would and shows each command. Files go to output/demo.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("examples.demo")

import subprocess
import sys
from pathlib import Path

from nkat.errors import NKATError
from nkat.host import commandline
from nkat.models import fetch

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *arguments: object) -> None:
    """Shows and runs a command. Raises NKATError when it fails; it has said why itself."""
    words = [script, *map(str, arguments)]
    print(f"\n$ python {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, check=False)
    if done.returncode:
        raise NKATError(f"{script} ended with status {done.returncode}")


def main() -> None:
    parser = commandline.parser(
        "Fetch SmolLM2-135M, add Θ to it, measure it.", "  python -m examples.demo --text my.txt"
    )
    parser.add_argument("--text", type=Path, help="measure on this text too")
    parser.add_argument("--chunks", type=commandline.positive_int, default=16, help="chunks of 512 tokens (default 16)")
    options = parser.parse_args()
    model = fetch("smollm2")
    folder = Path("output") / "demo"
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    nkat = folder / "smollm2-rank4.nkat"
    converted = [nkat, "--theta-rank", 4, "--theta-gamma", 0.97, "--force", "--json", folder / "conversion.json"]
    run("nkat_gguf_converter.py", "--input", model, "--output", *converted)
    measurements = {"documentation": []}
    if options.text:
        measurements["text"] = ["--text", options.text.resolve()]
    for name, text in measurements.items():
        record = folder / f"perplexity-{name}.json"
        arguments = ["--perplexity", "--chunks", options.chunks, *text, "--json", record, "--force"]
        run("nkat_inference_engine.py", "--model", nkat, *arguments)
    print(f"\nfiles are in {folder}: the model with Θ and the records of what was done and measured")
