"""A model's importance matrix: gathered on a text as llama-imatrix does it, or a file's, as moments of the inputs.

Every token of a chunk counts (perplexity scores half of them), and every weight inside the blocks that activations are
multiplied by has an entry: routers too, and of a mixture's experts each the rows that went to it. The output layer has
none, as llama-imatrix leaves it out unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from nkat.errors import NKATError
from nkat.gguf.file import TensorInfo
from nkat.gguf.imatrix import Imatrix, Importance, read_imatrix
from nkat.gguf.names import block_number
from nkat.host.console import bar
from nkat.lm.experts import ExpertStack
from nkat.lm.load import LoadedModel
from nkat.measure.judge import text_passages
from nkat.measure.perplexity import DEFAULT_BATCH, chunk_context
from nkat.measure.texts import Text


@torch.inference_mode()
def gather_imatrix(loaded: LoadedModel, text: Text, chunks: int | None = None) -> Imatrix:
    """Sums over the inputs of every weight in the blocks, on a text's first chunks; the model runs without Θ.

    chunks: at most so many; None: all. It is llama-imatrix's where that computes in float32, too: on quantised weights
    it rounds activations to 8 bits, and on 16-bit ones to 16. Raises NKATError for a text that is too short, and for
    inputs that are not finite.
    """
    model = loaded.model
    model.set_gamma(None)
    cut = text_passages(loaded, text, chunks, chunk_context(loaded.config.context_length)).chunks
    sums: dict[str, list[_Sum]] = {}
    handles = []
    for name, layer in model.multipliers().items():
        if block_number(name) < 0:
            continue
        experts = [layer.expert(i) for i in range(layer.shape[0])] if isinstance(layer, ExpertStack) else [layer]
        sums[name] = [_Sum.of(each.shape[1]) for each in experts]
        handles += [each.register_forward_pre_hook(one.add) for each, one in zip(experts, sums[name], strict=True)]
    try:
        parts = cut.split(DEFAULT_BATCH)
        with bar(len(parts), "importance matrix", "batch") as shown:
            for part in parts:
                model.hidden(part)
                shown.update()
    finally:
        for handle in handles:
            handle.remove()
    entries = {name: _entry(name, each) for name, each in sums.items()}
    return Imatrix(entries, (text.name,), *cut.shape)


def moments_from_file(
    path: Path, tensors: Mapping[str, TensorInfo], names: Sequence[str]
) -> tuple[dict[str, torch.Tensor], Imatrix]:
    """E[x_j²] [n] of the named weights' inputs, float32, out of an importance matrix, and the matrix itself.

    Raises NKATError for a weight that it has no entry for, or one of another length.
    """
    found = read_imatrix(path)
    moments = {}
    for name in names:
        entry, inputs = found.entries.get(name), tensors[name].shape[-1]
        if entry is None:
            raise NKATError(
                f"{path}: has no entry for {name}; --selective-layers names the weights to adapt, and an importance "
                "matrix of this very model has all of them"
            )
        if entry.squares.shape != (1, inputs):
            raise NKATError(
                f"{path}: {name} has {entry.squares.size} inputs there and {inputs} in the model: it was made of "
                "another one"
            )
        moments[name] = torch.from_numpy(entry.means[0])
    return moments, found


@dataclass(slots=True)
class _Sum:
    """Adds up x and x² over a layer's inputs, in float64: a forward pre-hook."""

    squares: torch.Tensor
    sums: torch.Tensor
    rows: int = field(default=0)

    @classmethod
    def of(cls, inputs: int) -> _Sum:
        return cls(torch.zeros(inputs, dtype=torch.float64), torch.zeros(inputs, dtype=torch.float64))

    def add(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        self.squares += x.square().sum(dim=0, dtype=torch.float64).cpu()
        self.sums += x.sum(dim=0, dtype=torch.float64).cpu()
        self.rows += len(x)


def _entry(name: str, experts: Sequence[_Sum]) -> Importance:
    def stacked(of: Callable[[_Sum], torch.Tensor]) -> np.ndarray:
        return torch.stack([of(one) for one in experts]).float().numpy()

    squares = stacked(lambda one: one.squares)
    if not np.isfinite(squares).all():
        raise NKATError(f"{name}: its inputs on this text are not finite numbers")
    return Importance(squares, np.array([one.rows for one in experts], np.int64), stacked(lambda one: one.sums))
