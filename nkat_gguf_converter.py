#!/usr/bin/env python3
"""GGUF in; Θ made; `.nkat`, Θ file or LoRA adapter out."""

from nkat.commands import convert

if __name__ == "__main__":
    convert()
