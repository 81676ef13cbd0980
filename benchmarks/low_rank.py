"""Low-rank terms that are no Θ: the controls and rivals that `benchmarks.quality` compares it with.

A term adds up · down to a layer's weight, down [k, n] and up [m, k]. Its factors are rounded to INT8 as Θ's are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nkat.gguf.file import GGUFFile
from nkat.gguf.weights import read_weight
from nkat.host import console
from nkat.lm.load import LoadedModel, load_model
from nkat.lm.transformer import Transformer
from nkat.measure.texts import load_text
from nkat.sources.fit.data import fit_text, split_validation
from nkat.sources.fit.descent import FitData, FitSettings, Progress, by_name, fit
from nkat.sources.fit.layers import Factors, FittedLinear
from nkat.sources.moments import input_second_moments
from nkat.sources.residual import equal_bytes_rank, regularised_moments, rounded_factors, unrestricted_optimum
from nkat.theta.algebra import coupling, low_rank_form
from nkat.theta.layers import adaptable_layers
from nkat.theta.set import ThetaSet, truncate_rank


@dataclass(frozen=True, slots=True)
class LowRankTerms:
    """down and up of each layer by weight name, and the bytes their INT8 factors take."""

    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    nbytes: int


class UnrestrictedLinear(FittedLinear):
    """y = W x + P Qᵀ x: a LoRA. P [m, k], Q [n, k]."""

    def low_rank(self, p: torch.Tensor, q: torch.Tensor) -> Factors:
        return q.T, p


def apply_terms(model: Transformer, terms: LowRankTerms) -> None:
    """Adds the terms to a model that has no Θ; `set_thetas` and `set_gamma` take them off again."""
    layers = model.star_linears()
    for name, (down, up) in terms.layers.items():
        layer = layers[name]
        layer.down, layer.up = (factor.to(layer.device, layer.dtype) for factor in (down, up))
        layer.kappa = 1.0


def weight_controls(loaded: LoadedModel, theta_set: ThetaSet, rank: int, gamma: float) -> dict[str, LowRankTerms]:
    """What of source `weight` acts: its two halves alone (κ P Qᵀ = ½ κ W_r and −κ Q Pᵀ), its negative, and chance.

    Chance: factors of the same norms, column by column, with random directions.
    """
    kappa = coupling(gamma)
    cut = truncate_rank(theta_set, rank)
    out: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {
        name: {} for name in ("negated", "random", "straight-half", "transposed-half")
    }
    generator = torch.Generator().manual_seed(0)
    for name, theta in cut.layers.items():
        m, n = loaded.tensors[name].shape
        p, q = theta.factors()
        down, up = low_rank_form(p, q, m, n)
        out["negated"][name] = (down, -kappa * up)
        out["straight-half"][name] = (down[:rank], kappa * up[:, :rank])
        out["transposed-half"][name] = (down[rank:], kappa * up[:, rank:])
        chance = [torch.randn(f.shape, generator=generator) for f in (p, q)]
        chance = [c * (f.norm(dim=0) / c.norm(dim=0)) for c, f in zip(chance, (p, q), strict=True)]
        random_down, random_up = low_rank_form(*chance, m, n)
        out["random"][name] = (random_down, kappa * random_up)
    return {name: LowRankTerms(layers, cut.nbytes) for name, layers in out.items()}


def qera_terms(loaded: LoadedModel, reference: Path, calibrate: Path, rank: int) -> LowRankTerms:
    """The unrestricted optimum for what quantisation lost (QERA-exact), at the bytes of a Θ of `rank`."""
    moments = _moments(loaded.gguf.path, calibrate)
    names = adaptable_layers(loaded.tensors)
    layers, nbytes = {}, 0
    with GGUFFile.open(reference) as better, console.bar(len(names), "QERA", "layer") as bar:
        for name in names:
            m, n = loaded.tensors[name].shape
            residual = read_weight(better, name) - read_weight(loaded.gguf, name)
            k = equal_bytes_rank(rank, m, n)
            u, v = rounded_factors(*unrestricted_optimum(residual, k, regularised_moments(moments[name], n)))
            layers[name] = (v.T.contiguous(), u)
            nbytes += (m + n + 8) * k
            bar.update()
    return LowRankTerms(layers, nbytes)


def fit_unrestricted(
    loaded: LoadedModel, calibrate: Path, ignore: Sequence[str], rank: int, steps: int, kept: Path
) -> LowRankTerms:
    """A LoRA fitted by the recipe of `--theta-source fit --no-nested --fit-start zero`, at the bytes of a Θ of `rank`.

    kept: file with the fitted factors; used where it is there
    """
    loaded.model.set_gamma(None)
    names = adaptable_layers(loaded.tensors)
    shapes = [loaded.tensors[name].shape for name in names]
    if not kept.exists():
        text = load_text(calibrate)
        settings = FitSettings(rank, 0.97, steps=steps, nested=False)
        learned, validation = split_validation(fit_text(loaded.tokenizer, text, ignore), text.name, settings.context)
        with console.bar(steps, "fitting a LoRA", "step") as bar:
            progress = Progress(lambda *_: bar.update(), lambda: False)
            starts = {"zero": _zero_start(shapes, rank)}
            state = fit(
                loaded.model,
                names,
                starts,
                FitData(learned, validation),
                settings,
                progress,
                kind=UnrestrictedLinear,
                keep_activations=True,
            )
        torch.save(state.best_factors, kept)
    factors: Mapping[str, Factors] = by_name(names, torch.load(kept, weights_only=True, map_location="cpu"))
    layers = {}
    for name, (p, q) in factors.items():
        u, v = rounded_factors(p, q)
        layers[name] = (v.T.contiguous(), u)
    return LowRankTerms(layers, sum((len(p) + len(q) + 8) * p.shape[1] for p, q in factors.values()))


def _zero_start(shapes: Sequence[tuple[int, int]], rank: int) -> list[Factors]:
    """Q random, P zero, as LoRA starts (Hu et al., 2021, arXiv 2106.09685)."""
    generator = torch.Generator().manual_seed(0)
    ranks = [equal_bytes_rank(rank, m, n) for m, n in shapes]
    return [
        (torch.zeros(m, k), 0.02 * torch.randn(n, k, generator=generator))
        for (m, n), k in zip(shapes, ranks, strict=True)
    ]


_known: dict[tuple[Path, Path], Mapping[str, torch.Tensor]] = {}


def _moments(model: Path, calibrate: Path) -> Mapping[str, torch.Tensor]:
    """Second moments, gathered once for all ranks."""
    if (model, calibrate) not in _known:
        _known[model, calibrate] = input_second_moments(load_model(model), load_text(calibrate))[0]
    return _known[model, calibrate]


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nIt is a part of another command: python -m benchmarks.quality --help")
