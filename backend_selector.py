#!/usr/bin/env python3
"""Picks the backend for KoboldCpp and runs a model with its Θ in it."""

from nkat.commands import kobold

if __name__ == "__main__":
    kobold()
