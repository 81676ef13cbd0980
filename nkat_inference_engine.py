#!/usr/bin/env python3
"""Runs a language model with and without its Θ, and measures what Θ costs and buys."""

from nkat.host import commandline
from nkat.inference.job import main

if __name__ == "__main__":
    commandline.run(main)
