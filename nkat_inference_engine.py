#!/usr/bin/env python3
"""Runs a language model with and without its Θ, and measures what Θ costs and buys."""

from nkat.commands import engine

if __name__ == "__main__":
    engine()
