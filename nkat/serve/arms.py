"""Which strength of Θ answers a request, by the name of a model or by fields of its own."""

from __future__ import annotations

from dataclasses import dataclass

from nkat.errors import NKATError
from nkat.serve.refusal import Refusal, bad
from nkat.theta.algebra import coupling

_OFF = "base"
_GAMMA = "gamma="


@dataclass(frozen=True, slots=True)
class Arm:
    """A model as a client sees it: the weights, and Θ at some strength.

    name: what /v1/models calls it; gamma: None: without Θ
    """

    name: str
    gamma: float | None


@dataclass(frozen=True, slots=True)
class Arms:
    """All that can be asked for.

    name: of the model as it was loaded
    gamma: its Θ's strength; None: it has no Θ
    listed: further strengths that /v1/models has, so that a client which can only choose a model can choose them
    """

    name: str
    gamma: float | None
    listed: tuple[float, ...] = ()

    def all(self) -> list[Arm]:
        """What /v1/models lists, the usual one first."""
        usual = Arm(self.name, self.gamma)
        if self.gamma is None:
            return [usual]
        found = [usual, self._off(), *(self._at(gamma) for gamma in self.listed)]
        return list({arm.name: arm for arm in found}.values())

    def named(self, name: str) -> Arm:
        """What a model's name asks for: NAME, NAME:base, NAME:gamma=0.95. Raises Refusal for another one."""
        rest = name.removeprefix(self.name)
        if name.startswith(self.name):
            if not rest:
                return Arm(self.name, self.gamma)
            if rest == f":{_OFF}":
                return self._off()
            if rest.startswith(f":{_GAMMA}"):
                return self.at(_number(rest.removeprefix(f":{_GAMMA}")), "model")
        names = ", ".join(arm.name for arm in self.all())
        raise Refusal(404, f"there is no model {name[:200]!r} here: {names}", param="model", code="model_not_found")

    def at(self, gamma: float, param: str) -> Arm:
        """Θ at that strength. Raises Refusal where there is none, or the strength is impossible."""
        if self.gamma is None:
            raise bad("this model has no Θ whose strength could be chosen", param)
        try:
            coupling(gamma)
        except NKATError as error:
            raise bad(str(error), param) from None
        return self._at(gamma)

    def choose(self, model: str | None, gamma: float | None, theta: bool | None) -> Arm:
        """What a request asks for, whose fields may be left out. Raises Refusal where they contradict each other.

        theta: False: without Θ; True: with it, an error where there is none
        """
        arm = self.named(model) if model else Arm(self.name, self.gamma)
        if gamma is None and theta is None:
            return arm
        if arm.name != self.name:
            raise bad(
                f"the model {arm.name} says already which Θ is meant: leave nkat_gamma and nkat_theta out", "model"
            )
        if theta is False and gamma is not None:
            raise bad("nkat_gamma has no meaning where nkat_theta is false", "nkat_gamma")
        if theta and self.gamma is None:
            raise bad("this model has no Θ", "nkat_theta")
        if theta is False:
            return self._off()
        return arm if gamma is None else self.at(gamma, "nkat_gamma")

    def _off(self) -> Arm:
        return Arm(self.name if self.gamma is None else f"{self.name}:{_OFF}", None)

    def _at(self, gamma: float) -> Arm:
        said = f"{gamma:g}"
        if self.gamma is not None and said == f"{self.gamma:g}":  # which a file keeps as a float32
            return Arm(self.name, self.gamma)
        return self._off() if gamma == 1.0 else Arm(f"{self.name}:{_GAMMA}{said}", gamma)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise bad(f"gamma={text[:40]} is no number", "model") from None
