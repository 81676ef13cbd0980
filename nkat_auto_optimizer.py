#!/usr/bin/env python3
"""Searches with Optuna, on measured scores: the best Θ of a language model, or the best image model."""

from nkat.commands import optimize

if __name__ == "__main__":
    optimize()
