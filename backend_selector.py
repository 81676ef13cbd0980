#!/usr/bin/env python3
"""Picks the backend for KoboldCpp and runs a model with its Θ in it."""

from nkat.host import commandline
from nkat.kobold.session import main

if __name__ == "__main__":
    commandline.run(main)
