"""What a model's layers receive on a text: the second moments of their inputs."""

from __future__ import annotations

from pathlib import Path

import torch

from nkat.gguf_writer import MetadataValue
from nkat.load import load_model
from nkat.perplexity import score_chunks, text_chunks
from nkat.texts import load_text
from nkat.theta_io import CALIBRATION_KEY

CALIBRATION_CHUNKS = 16  # 8192 tokens: E[x²] of a channel is then known to a few per cent


def input_second_moments(
    model_path: Path, text_path: Path, chunks: int = CALIBRATION_CHUNKS
) -> tuple[dict[str, torch.Tensor], dict[str, MetadataValue]]:
    """E[x_j²] of every linear layer's inputs, [n] float32 by weight name, without Θ; and what a Θ file records of it.

    Raises NKATError for a text that is empty or shorter than one chunk.
    """
    text = load_text(text_path)
    loaded = load_model(model_path)
    loaded.model.set_gamma(None)
    cut = text_chunks(loaded.tokenizer, text.content, chunks)
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str, layer: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].detach().flatten(0, -2).square().sum(dim=0, dtype=torch.float64)
            sums[name] = sums[name] + squares if name in sums else squares

        return layer.register_forward_pre_hook(add)

    handles = [watch(name, layer) for name, layer in loaded.model.star_linears().items()]
    score_chunks(loaded.model, cut, progress="calibrating")
    for handle in handles:
        handle.remove()
    moments = {name: (total / cut.numel()).float() for name, total in sums.items()}
    return moments, {CALIBRATION_KEY: text.sha256, "nkat.calibration.tokens": cut.numel()}
