"""Which model to run, and how: small and picklable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nkat.errors import NKATError
from nkat.lm.adapters import lora_set, open_adapter
from nkat.lm.load import DTYPES, LoadedModel, load_model
from nkat.theta.combine import WeightedFile, combined_for
from nkat.theta.modelfile import ModelFile, open_model_file
from nkat.theta.set import TermSet


@dataclass(frozen=True, slots=True)
class Request:
    """Which model to run, and how. Small and picklable.

    thetas: files whose Θ are used together in place of the Θ in the model's file, which may be among them
    gamma: strength of Θ in place of the recorded one, or of each one's
    repack: use the compiled CPU kernels, see `load_model`
    with_theta: False leaves Θ out altogether
    loras: adapters that run together in place of any Θ
    """

    model: Path
    thetas: tuple[WeightedFile, ...] = ()
    gamma: float | None = None
    device: str = "cpu"
    dtype: str | None = None
    int8_activations: bool = False
    repack: bool = False
    with_theta: bool = True
    loras: tuple[WeightedFile, ...] = ()

    def open(self) -> tuple[ModelFile, TermSet | None]:
        """The file and its Θ, or the adapters in its place.

        Raises NKATError when Θ or an adapter is for another model, or γ is given without any Θ.
        """
        model_file = open_model_file(self.model)
        if self.loras:
            adapters = [(open_adapter(file.path, model_file), file.weight) for file in self.loras]
            return model_file, lora_set(adapters) if self.with_theta else None
        theta_set = combined_for(model_file, self.thetas, self.gamma) if self.thetas else model_file.theta
        if theta_set is None and not self.thetas and self.gamma is not None:
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
