#!/usr/bin/env python3
"""Searches with Optuna, on measured scores: the best Θ of a language model, or the best image model."""

from nkat.host import commandline
from nkat.search.main import main

if __name__ == "__main__":
    commandline.run(main)
