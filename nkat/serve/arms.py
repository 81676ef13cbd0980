"""Which Θ answers a request, and how strongly: by the name of a model, or by fields of the request.

NAME                            as the server was started
NAME:base                       without Θ
NAME:gamma=0.9                  at another strength
NAME:style                      one of several Θ alone
NAME:style,facts=0.5,gamma=0.9  several with weights, at a strength
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from nkat.errors import NKATError
from nkat.serve.refusal import Refusal, bad
from nkat.theta.algebra import coupling

_OFF, _GAMMA = "base", "gamma"
LARGEST_WEIGHT = 1000.0
Theta = bool | str | Mapping[str, float]  # as a request names it: off or on, one by name, or weights by name


@dataclass(frozen=True, slots=True)
class Arm:
    """A model as a client sees it: the weights, and some Θ at some strength.

    name: what /v1/models calls it
    weights: (Θ's name, how much of it counts), none 0; nothing: without Θ
    gamma: strength in place of each one's own; None: their own
    """

    name: str
    weights: tuple[tuple[str, float], ...]
    gamma: float | None


@dataclass(frozen=True, slots=True)
class Arms:
    """All that can be asked for.

    name: of the model
    own: the names of its Θ, and the strength of each
    usual: weights of a request that names none; gamma: its strength in place of their own
    listed: further strengths that /v1/models has, so that a client which can only choose a model can choose them
    """

    name: str
    own: Mapping[str, float] = field(default_factory=dict)
    usual: Mapping[str, float] = field(default_factory=dict)
    gamma: float | None = None
    listed: tuple[float, ...] = ()

    @property
    def default(self) -> Arm:
        return self._arm(self.usual, None)

    @property
    def _full(self) -> Mapping[str, float]:
        """What is on where only a strength is asked for: what is usual, or all of it where that is nothing."""
        return self.usual if any(self.usual.values()) else dict.fromkeys(self.own, 1.0)

    def all(self) -> list[Arm]:
        """What /v1/models lists, the usual one first."""
        if not self.own:
            return [self.default]
        single = [self._arm({name: 1.0}, None) for name in self.own] if len(self.own) > 1 else []
        further = [self._arm(self._full, gamma) for gamma in self.listed]
        found = [self.default, self._arm({}, None), *single, *further]
        return list({arm.name: arm for arm in found}.values())

    def strength(self, arm: Arm) -> float | None:
        """γ of what is on, the strongest where several differ; None: nothing is."""
        if not arm.weights:
            return None
        return min((self.own[name] for name, _ in arm.weights), key=_weakness) if arm.gamma is None else arm.gamma

    def named(self, name: str) -> Arm:
        """What a model's name asks for. Raises Refusal for another model's, and for what this one has not."""
        if name == self.name:
            return self.default
        if not name.startswith(f"{self.name}:"):
            names = ", ".join(arm.name for arm in self.all())
            raise Refusal(404, f"there is no model {name[:200]!r} here: {names}", param="model", code="model_not_found")
        weights: dict[str, float] = {}
        gamma: float | None = None
        parts = name.removeprefix(f"{self.name}:").split(",")
        for part in parts:
            key, equals, value = part.partition("=")
            if key == _GAMMA and equals:
                gamma = _number(value)
            elif key == _OFF and not equals and len(parts) == 1:
                return self._arm({}, None)
            elif key in self.own:
                weights[key] = _number(value) if equals else 1.0
            else:
                raise Refusal(404, f"there is no {part[:100]!r} of {self.name}", param="model", code="model_not_found")
        return self._checked(weights or self._full, gamma, "model", "model")

    def choose(self, model: str | None, gamma: float | None, theta: Theta | None) -> Arm:
        """What a request asks for, whose fields may be left out. Raises Refusal where they contradict each other."""
        arm = self.named(model) if model else self.default
        if gamma is None and theta is None:
            return arm
        if arm.name != self.name:
            raise bad(f"the model {arm.name} says already what is on: leave nkat_gamma and nkat_theta out", "model")
        if theta is False:
            if gamma is not None:
                raise bad("nkat_gamma has no meaning where nkat_theta is false", "nkat_gamma")
            return self._arm({}, None)
        if not self.own:
            raise bad("this model has no Θ", "nkat_gamma" if theta is None else "nkat_theta")
        if isinstance(theta, str):
            theta = {theta: 1.0}
        weights = self._full if theta is None or theta is True else theta
        return self._checked(weights, gamma, "nkat_theta", "nkat_gamma")

    def _checked(self, weights: Mapping[str, float], gamma: float | None, of_theta: str, of_gamma: str) -> Arm:
        for name, weight in weights.items():
            if name not in self.own:
                raise bad(f"there is no Θ {name[:100]!r} here: {', '.join(self.own)}", of_theta)
            if not abs(weight) <= LARGEST_WEIGHT:
                raise bad(f"the weight of Θ {name!r} must be from -{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}", of_theta)
        if gamma is not None:
            if not self.own:
                raise bad("this model has no Θ whose strength could be chosen", of_gamma)
            try:
                coupling(gamma)
            except NKATError as error:
                raise bad(str(error), of_gamma) from None
        return self._arm(weights, gamma)

    def _arm(self, weights: Mapping[str, float], gamma: float | None) -> Arm:
        """With the one name that it has, however it was asked for."""
        on = {name: float(weights[name]) for name in self.own if weights.get(name)}
        if gamma == 1.0 or (gamma is None and self.gamma == 1.0):
            on = {}
        usual = {name: float(self.usual[name]) for name in self.own if self.usual.get(name)}
        if not on:
            off_anyway = not usual or self.gamma == 1.0
            return Arm(self.name if off_anyway else f"{self.name}:{_OFF}", (), None)
        strength = self.gamma if gamma is None else gamma
        if len(on) == 1 and strength is not None and self.gamma is None:
            own = self.own[next(iter(on))]
            strength = None if _same(strength, own) else strength  # which a file keeps as a float32
        parts = [] if on == usual else [name if weight == 1 else f"{name}={weight:g}" for name, weight in on.items()]
        if strength is not None and not (self.gamma is not None and _same(strength, self.gamma)):
            parts.append(f"{_GAMMA}={strength:g}")
        return Arm(f"{self.name}:{','.join(parts)}" if parts else self.name, tuple(on.items()), strength)


def theta_names(stems: list[str]) -> list[str]:
    """A name for each Θ, by its file's: without what separates names, and no two alike."""
    found: list[str] = []
    for stem in stems:
        plain = re.sub(r"[\s:,=]+", "-", stem).strip("-") or "theta"
        name, number = plain, 1
        while name in (*found, _OFF, _GAMMA):
            number += 1
            name = f"{plain}-{number}"
        found.append(name)
    return found


def _weakness(gamma: float) -> float:
    return -coupling(gamma)


def _same(one: float, other: float) -> bool:
    return f"{one:g}" == f"{other:g}"


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise bad(f"{text[:40]!r} is no number", "model")
    return value
