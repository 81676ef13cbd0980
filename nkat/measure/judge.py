"""How well a model predicts a text, and what Θ changes about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nkat.lm.load import LoadedModel
from nkat.lm.transformer import Transformer
from nkat.measure.perplexity import PairedChange, Perplexity, paired, score_chunks, scored_tokens


@dataclass(frozen=True, slots=True)
class Validation:
    """Chunks as perplexity cuts them, int64 [C, context], and which of their scored tokens count, bool [C, scored]."""

    chunks: torch.Tensor
    counted: torch.Tensor

    def score(self, model: Transformer, progress: str | None = None) -> torch.Tensor:
        """−ln p of the tokens that count, float64 [n]."""
        return score_chunks(model, self.chunks, progress=progress)[self.counted]


def every_token(chunks: torch.Tensor) -> Validation:
    """Chunks of which every scored token counts, as in a plain perplexity."""
    return Validation(chunks, torch.ones(len(chunks), scored_tokens(chunks.shape[1]), dtype=torch.bool))


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity of both arms on the same chunks.

    rounding: what 8-bit activations change without Θ; None: they are exact
    """

    without: Perplexity
    with_theta: Perplexity
    rounding: PairedChange | None

    @property
    def change(self) -> PairedChange:
        return paired(self.without, self.with_theta)


def measure_quality(
    loaded: LoadedModel, chunks: torch.Tensor, *, batch: int, exact: LoadedModel | None = None
) -> Quality:
    """Scores the chunks [C, context] without and with Θ; leaves Θ on.

    exact: the same model without rounded activations, to measure what rounding changes
    """
    model = loaded.model
    rounding = None
    model.set_gamma(None)
    without = Perplexity(score_chunks(model, chunks, batch=batch, progress="without Θ"))
    model.set_gamma(loaded.gamma)
    with_theta = Perplexity(score_chunks(model, chunks, batch=batch, progress="with Θ"))
    if exact is not None:
        exact.model.set_gamma(None)
        unrounded = score_chunks(exact.model, chunks, batch=batch, progress="without Θ, exact activations")
        rounding = paired(Perplexity(unrounded), without)
    return Quality(without, with_theta, rounding)
