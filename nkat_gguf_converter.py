#!/usr/bin/env python3
"""GGUF in; Θ made; `.nkat`, Θ file or LoRA adapter out."""

from nkat.convert.job import main
from nkat.host import commandline

if __name__ == "__main__":
    commandline.run(main)
