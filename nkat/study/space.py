"""The settings a search may try, and the next one that no trial has had."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

POINT = "point"  # the user attribute with the parameters that a trial was queued with
_DRAWS = 20  # of the sampler, before one of what is left is drawn at random

Propose = Callable[[Sequence[FrozenTrial]], dict[str, Any] | None]


class Space(Protocol):
    """What may be tried. Every value of it can be listed: floats go in steps."""

    def suggest(self, trial: optuna.Trial) -> Any:
        """Asks the trial for its parameters."""

    def points(self) -> Iterable[Mapping[str, Any]]:
        """The parameters of every setting."""


def proposer(space: Space, sampler: Callable[[int], optuna.samplers.BaseSampler]) -> Propose:
    """From a study's trials to the parameters of the next one; None when every setting was tried.

    sampler: makes one, given how many trials there are, so that a resumed study goes on as it would have
    """

    def propose(trials: Sequence[FrozenTrial]) -> dict[str, Any] | None:
        taken = {key_of(trial) for trial in trials if trial.state != TrialState.FAIL}  # those that run or wait too
        # In a study of its own: a trial of the real one could not be given back.
        draft = optuna.create_study(direction="maximize", sampler=sampler(len(trials)))
        draft.add_trials([t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)])
        for _ in range(_DRAWS):
            trial = draft.ask()
            space.suggest(trial)
            if key(trial.params) not in taken:
                return trial.params
        left = [point for point in space.points() if key(point) not in taken]
        return dict(random.Random(len(trials)).choice(left)) if left else None

    return propose


def key_of(trial: FrozenTrial) -> tuple:
    """The `key` of what a trial was queued with."""
    return key(trial.user_attrs.get(POINT, trial.params))


def key(parameters: Mapping[str, Any]) -> tuple:
    """The same for the same setting, however its floats were computed."""
    return tuple(sorted((n, round(v, 9) if isinstance(v, float) else v) for n, v in parameters.items()))
