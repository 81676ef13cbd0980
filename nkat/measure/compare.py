"""Chunks of a text as two models predict them: how likely the text is to either, and how far apart they are.

The base is the model itself without Θ, another model, or a base file. No logits are kept, and a few chunks are in
work at a time; of the base without Θ what the output layer reads may be kept: each further Θ then costs its own work.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from nkat.engine.compared import Compared
from nkat.engine.comparing import make_comparer
from nkat.engine.log_probs import row_words
from nkat.errors import NKATError
from nkat.host.console import bar
from nkat.lm.load import LoadedModel
from nkat.lm.transformer import Transformer
from nkat.lm.vocabulary import strings
from nkat.measure.base_file import BaseFile, write_base_file
from nkat.measure.perplexity import check_finite, check_ids, scored_tokens

_ROWS_BYTES = 1 << 28  # of stored log-probabilities that are in memory at once

Base = LoadedModel | BaseFile


def compare_arms(
    model: Transformer, chunks: torch.Tensor, kept: list[torch.Tensor], *, batch: int, progress: str | None = None
) -> Compared:
    """The model with its Θ against itself without.

    kept: the base's hidden states, a tensor for each chunk that was compared before, in order; gets those of the others
    batch, progress: as `nkat.measure.perplexity.score_chunks` has them
    """
    parts = []
    comparer, steps = None, _parts(model, chunks, batch // 2, progress)
    for start, part in steps:
        comparer = comparer or make_comparer(model, len(part), part.shape[1])
        known = torch.stack(kept[start : start + len(part)]) if len(kept) >= start + len(part) else None
        compared, hidden = comparer.beside_itself(part, known)
        if known is None:
            kept += hidden.unbind()
        parts.append(compared)
    return _joined(parts)


def compare_with(
    model: Transformer, base: Base, chunks: torch.Tensor, arms: int, *, batch: int, progress: str | None = None
) -> list[Compared]:
    """The model against another base, on the same chunks. arms: 1: with its Θ, 2: without it and with it

    Of a base file the chunks are its first ones. Raises as `check_base` does, and for a file that is damaged.
    """
    together = batch // 2
    if isinstance(base, BaseFile):
        together = min(together, _ROWS_BYTES // base.chunk_bytes)
    other = None if isinstance(base, BaseFile) else base.model
    parts: list[list[Compared]] = []
    comparer = None
    for start, part in _parts(model, chunks, together, progress):
        comparer = comparer or make_comparer(model, len(part), part.shape[1], other)
        rows = base.rows(start, len(part)) if isinstance(base, BaseFile) else None
        parts.append(comparer.beside(part, arms, rows))
    return [_joined(list(arm)) for arm in zip(*parts, strict=True)]


def save_base(
    path: Path,
    model: Transformer,
    chunks: torch.Tensor,
    *,
    batch: int,
    progress: str | None = None,
    force: bool = False,
) -> torch.Tensor:
    """Writes the base file of the model without Θ; returns −ln p of the scored tokens, float64 [C, scored]."""
    chunk_bytes = 2 * scored_tokens(chunks.shape[1]) * row_words(model.config.vocab_size)
    found = []

    def rows() -> Iterator[np.ndarray]:
        comparer = None
        for _, part in _parts(model, chunks, min(batch // 2, _ROWS_BYTES // chunk_bytes), progress):
            comparer = comparer or make_comparer(model, len(part), part.shape[1])
            nll, stored = comparer.stored(part)
            check_finite(nll)
            found.append(nll)
            yield stored

    write_base_file(path, chunks, model.config.vocab_size, rows(), force)
    return torch.cat(found)


def check_base(loaded: LoadedModel, base: Base) -> None:
    """Raises NKATError for a base whose token ids do not mean what the model's do, as far as that can be seen."""
    size = loaded.config.vocab_size
    if isinstance(base, BaseFile):
        if base.vocabulary != size:
            raise NKATError(
                f"{base.path}: is of a model with a vocabulary of {base.vocabulary}, and {loaded.file.path} has {size}"
            )
        return
    other = base.config.vocab_size
    if other != size or strings(base.gguf.metadata, "tokens") != strings(loaded.gguf.metadata, "tokens"):
        differs = f"its vocabulary has {other} tokens, and" if other != size else "its vocabulary is another one than"
        what = f"{size}" if other != size else "that"
        raise NKATError(f"{base.file.path}: {differs} {what} of {loaded.file.path}, so that they cannot be compared")


def _parts(
    model: Transformer, chunks: torch.Tensor, together: int, progress: str | None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Chunks that go together, with the number of the first."""
    check_ids(chunks, model.config.vocab_size)
    start = 0
    with bar(len(chunks), progress, "chunk", enabled=progress is not None) as shown:
        for part in chunks.split(max(1, together)):
            yield start, part
            start += len(part)
            shown.update(len(part))


def _joined(parts: list[Compared]) -> Compared:
    found = Compared.joined(parts)
    for values in (found.base_nll, found.nll, found.kl):
        check_finite(values)
    return found
