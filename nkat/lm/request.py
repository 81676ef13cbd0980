"""Which model to run, and how: small and picklable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nkat.errors import NKATError
from nkat.lm.adapters import lora_set, open_adapter
from nkat.lm.load import DTYPES, LoadedModel, load_model
from nkat.theta.modelfile import ModelFile, open_model_file, theta_for
from nkat.theta.set import TermSet


@dataclass(frozen=True, slots=True)
class Request:
    """Which model to run, and how. Small and picklable.

    theta: a file with Θ alone, in place of the Θ in the model's file
    gamma: strength of Θ in place of the recorded one
    repack: use the compiled CPU kernels, see `load_model`
    with_theta: False leaves Θ out altogether
    lora: adapters that run in place of any Θ, each at a scale
    """

    model: Path
    theta: Path | None = None
    gamma: float | None = None
    device: str = "cpu"
    dtype: str | None = None
    int8_activations: bool = False
    repack: bool = False
    with_theta: bool = True
    lora: tuple[tuple[Path, float], ...] = ()

    def open(self) -> tuple[ModelFile, TermSet | None]:
        """The file and its Θ, or the adapters in its place.

        Raises NKATError when Θ or an adapter is for another model, or γ is given without any Θ.
        """
        model_file = open_model_file(self.model)
        if self.lora:
            adapters = [(open_adapter(path, model_file), scale) for path, scale in self.lora]
            return model_file, lora_set(adapters) if self.with_theta else None
        theta_set = theta_for(model_file, self.theta) if self.theta else model_file.theta
        if theta_set is None and self.gamma is not None:
            raise NKATError(f"{self.model}: has no Θ, so --theta-gamma has no meaning")
        return model_file, theta_set if self.with_theta else None

    def load(self, source: ModelFile | LoadedModel, theta_set: TermSet | None) -> LoadedModel:
        """The model that `open` found, ready to run; or another one like a loaded one, see `load_model`."""
        gamma = self.gamma
        if gamma is None:
            gamma = theta_set.gamma if theta_set else 1.0
        return load_model(
            source,
            thetas=theta_set.layers if theta_set else {},
            gamma=gamma,
            device=self.device,
            dtype=DTYPES[self.dtype] if self.dtype else None,
            int8_activations=self.int8_activations,
            repack=self.repack,
        )
