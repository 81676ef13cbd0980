"""What a model's layers receive on a text: the second moments of their inputs, E[x xᵀ].

Layers that get the same input (q, k and v; gate and up) share one matrix. Matrices of n×n for every distinct input are
403 MB for SmolLM2 135M and 22 GB for a 7B model. So they have a budget: where all do not fit, the layers with the
largest n get the diagonal alone, and a note says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from nkat.gguf.writer import MetadataValue
from nkat.host.console import bar, format_bytes, note
from nkat.lm.load import LoadedModel
from nkat.lm.transformer import Transformer
from nkat.measure.judge import text_passages
from nkat.measure.perplexity import CONTEXT, DEFAULT_BATCH, chunk_context
from nkat.measure.texts import Text
from nkat.theta.layers import adaptable_layers
from nkat.theta.set import CALIBRATION_KEY

CALIBRATION_CHUNKS = 16  # 8192 tokens: E[x²] of a channel is then known to a few per cent
FULL_MOMENTS_BYTES = 2 << 30


def input_second_moments(
    loaded: LoadedModel,
    text: Text,
    chunks: int = CALIBRATION_CHUNKS,
    names: Sequence[str] | None = None,
    full_bytes: int = FULL_MOMENTS_BYTES,
) -> tuple[dict[str, torch.Tensor], dict[str, MetadataValue]]:
    """E[x xᵀ] [n, n] or E[x_j²] [n] of the named layers' inputs, float32 by weight name; and what a Θ file records.

    The model runs without Θ. chunks: of 512 tokens, or as many tokens in shorter ones
    names: None for all that Θ adapts by default; full_bytes: budget of the full matrices.
    Raises NKATError for a text that is empty or shorter than one chunk, or for chats that are none.
    """
    loaded.model.set_gamma(None)
    context = chunk_context(loaded.config.context_length)
    cut = text_passages(loaded, text, chunks * CONTEXT // context, context).chunks
    names = adaptable_layers(loaded.tensors) if names is None else names
    moments = gather_moments(loaded.model, cut, names, full_bytes)
    return moments, {CALIBRATION_KEY: text.sha256, "nkat.calibration.tokens": cut.numel()}


@torch.no_grad()  # not inference mode: what is gathered goes into an optimiser
def gather_moments(
    model: Transformer, chunks: torch.Tensor, names: Sequence[str], full_bytes: int = FULL_MOMENTS_BYTES
) -> dict[str, torch.Tensor]:
    """The same for a loaded model at the strength of Θ it has, and chunks of token ids [C, T]."""
    layers = model.star_linears()
    watched = {name: layers[name] for name in names}
    owners = _owners(model, chunks[:1, :1], watched)
    sizes = {owner: watched[owner].shape[1] for owner in dict.fromkeys(owners.values())}
    largest = _largest_full(list(sizes.values()), full_bytes)
    diagonal = sorted({n for n in sizes.values() if n > largest})
    if diagonal:
        needed = sum(4 * n * n for n in sizes.values())
        note(
            f"note: full second moments of all inputs take {format_bytes(needed)}; layers with "
            f"{', '.join(map(str, diagonal))} inputs get the diagonal alone (budget {format_bytes(full_bytes)})"
        )
    sums = {owner: _Sum(n <= largest) for owner, n in sizes.items()}
    handles = [watched[owner].register_forward_pre_hook(total.add) for owner, total in sums.items()]
    try:
        parts = chunks.split(DEFAULT_BATCH)
        with bar(len(parts), "calibrating", "batch") as progress:
            for part in parts:
                model.hidden(part)  # the logits are not needed
                progress.update()
    finally:
        for handle in handles:
            handle.remove()
    means = {owner: total.value / chunks.numel() for owner, total in sums.items()}
    return {name: means[owner] for name, owner in owners.items()}


@dataclass(slots=True)
class _Sum:
    """Adds up x xᵀ, or x² alone, over a layer's inputs: a forward pre-hook."""

    full: bool
    value: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        # not in place: the first addition gives the sum its shape
        self.value = self.value + (x.T @ x if self.full else x.square().sum(dim=0, dtype=torch.float64).float())


def _owners(model: Transformer, tokens: torch.Tensor, layers: Mapping[str, torch.nn.Module]) -> dict[str, str]:
    """For each layer the name of the first that receives the same tensor, found by running one token."""
    first: list[tuple[torch.Tensor, str]] = []  # held, so that no later tensor can take an earlier one's place
    owners: dict[str, str] = {}

    def watch(name: str, layer: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        def look(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            owner = next((other for x, other in first if x is inputs[0]), None)
            if owner is None:
                first.append((inputs[0], name))
            owners[name] = owner or name

        return layer.register_forward_pre_hook(look)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return {name: owners[name] for name in layers}


def _largest_full(sizes: Sequence[int], full_bytes: int) -> int:
    """The largest n such that the matrices of all inputs up to it fit; 0 where not even the smallest do."""
    fitting = 0
    for n in sorted(set(sizes)):
        if sum(4 * other * other for other in sizes if other <= n) > full_bytes:
            break
        fitting = n
    return fitting
