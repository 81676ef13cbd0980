"""Several Θ by name on one model, each at a weight that may change between tokens.

A change of weights reads and repacks nothing of the model: the factors of those Θ that are on are put where the kernels
of the decoders read them (a few megabytes), and of one that is off nothing is read. Decoders and scorers that are made
after the mix follow it; on a GPU the room for all of them together is read as long as any is on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nkat.errors import NKATError
from nkat.lm.transformer import Transformer
from nkat.theta.combine import Weighted, combined
from nkat.theta.set import ThetaSet


class ThetaMix:
    """A model's named Θ. All are off until `set_weights` is called.

    weights: by name, how much of each counts: 0 is off, 1 as its file has it, below 0 the other way round
    theta: their sum as one Θ, such as `nkat.theta.modelfile` writes; None while all are off
    """

    def __init__(self, model: Transformer, sets: Mapping[str, ThetaSet]) -> None:
        """Raises NKATError where one does not fit the model."""
        self.model, self.sets = model, dict(sets)
        self.weights = dict.fromkeys(self.sets, 0.0)
        self.theta: ThetaSet | None = None
        self._signs: tuple[tuple[str, bool], ...] = ()
        columns: dict[str, int] = {}
        for theta_set in self.sets.values():
            model.check_thetas(theta_set.layers)
            for name, theta in theta_set.layers.items():
                columns[name] = columns.get(name, 0) + theta.rank
        model.reserve_thetas(columns)
        self.set_weights({})

    @property
    def nbytes(self) -> int:
        """Bytes of all of them as they are stored, on or off."""
        return sum(theta_set.nbytes for theta_set in self.sets.values())

    def set_weights(self, weights: Mapping[str, float], gamma: float | None = None) -> None:
        """What counts from the next token on; those that are not named are off.

        gamma: strength in place of every one's own
        What is in a decoder's cache was computed with what was on then: its `length` set to 0 forgets it.
        Raises NKATError for a name that there is none of, a weight that is no finite number, or γ out of range; then
        nothing has changed.
        """
        unknown = [name for name in weights if name not in self.sets]
        if unknown:
            raise NKATError(f"there is no Θ named {unknown[0]!r}, only {', '.join(map(repr, self.sets)) or 'none'}")
        parts = []
        for name, theta_set in self.sets.items():
            own = theta_set if gamma is None else replace(theta_set, gamma=gamma)
            parts.append(Weighted(own, float(weights.get(name, 0.0)), name))
        signs = tuple((part.name, part.weight < 0.0) for part in parts if part.weight != 0.0)
        theta = combined(parts, self.theta if signs == self._signs and len(signs) > 1 else None)
        self.model.set_thetas({} if theta is None else theta.layers)
        self.model.set_gamma(None if theta is None else theta.gamma)
        self.weights = {part.name: part.weight for part in parts}
        self.theta, self._signs = theta, signs
