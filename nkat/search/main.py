"""Searches with Optuna, on measured scores: the best Θ of a language model, or the best image model."""

from __future__ import annotations

from nkat.study.task import run_task

# By name, so that neither side is imported for the other.
TASKS = {"lm": "nkat.search.job", "vit": "nkat_vit.search_job"}


def main() -> None:
    run_task(TASKS)
