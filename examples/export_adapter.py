"""Θ of a `.nkat` as a small file of its own, and as a LoRA adapter for llama.cpp and KoboldCpp.

python -m examples.export_adapter model.nkat theta.bin lora.gguf
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("examples.export_adapter")

from pathlib import Path

import nkat
from nkat.host import commandline


def main() -> None:
    parser = commandline.parser(
        "Θ of a `.nkat` as a small file of its own, and as a LoRA adapter for llama.cpp and KoboldCpp.",
        "  python -m examples.export_adapter model.nkat theta.bin lora.gguf",
    )
    parser.add_argument("model", type=Path, help="a .nkat")
    parser.add_argument("theta", type=Path, help="the Θ file to write")
    parser.add_argument("lora", type=Path, help="the adapter to write")
    options = parser.parse_args()
    model = nkat.open_model(options.model)
    if model.theta is None:
        raise nkat.NKATError(f"{options.model}: holds no Θ")
    nkat.save(model.theta, options.theta, layout="theta-only")
    nkat.save(model.theta, options.lora, model, layout="lora")
    again = nkat.load_theta(options.theta, model)
    print(f"Θ of rank {again.rank} at gamma {again.gamma:g} in {options.theta} and {options.lora}")
