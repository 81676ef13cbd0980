"""Two predictions of a text's tokens side by side: what the divergence of a model from a base is measured with.

`make_comparer` picks the fastest way that the models and their device have.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from nkat.engine.compared import Compared
from nkat.engine.log_probs import pack, unpack
from nkat.engine.scoring import has_kernels
from nkat.kernels.cpu.agreed import STORED_FLOOR
from nkat.lm.attention import capped
from nkat.lm.transformer import Transformer

_TILE_LOGITS = 1 << 24  # that are made at once where there are no kernels


class Comparer(Protocol):
    """Made for a model with the Θ that it has then, and a base; the strength may change.

    The base is the model itself without Θ, another model, or rows of log-probabilities (`nkat.engine.log_probs`).
    Chunks: int64 [B, context], of which the tokens behind the first half are scored, as `nkat.engine.scoring.Scorer`
    does it, and bit by bit as it does.
    """

    def beside_itself(self, chunks: torch.Tensor, base: torch.Tensor | None = None) -> tuple[Compared, torch.Tensor]:
        """With Θ against without; and the base's hidden states [B, scored, d], as this comparer has them.

        base: these, where they were computed before: the output layer is all that is then left of the base's work
        """
        ...

    def beside(self, chunks: torch.Tensor, arms: int, rows: np.ndarray | None = None) -> list[Compared]:
        """Against another base. arms: 1, the model with its Θ; 2, without it and with it.

        rows: uint16 [B · scored, words], stored log-probabilities; None: the other model
        """
        ...

    def stored(self, chunks: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        """Of the model without Θ: −ln p as `Scorer.score` has it, and rows to keep, until the next are asked for."""
        ...


def make_comparer(model: Transformer, batch: int, context: int, other: Transformer | None = None) -> Comparer:
    """The fastest comparer of up to `batch` chunks of `context` tokens together. other: a base that is another model"""
    if has_kernels(model) and (other is None or has_kernels(other)):
        from nkat.engine.compiled_comparer import CompiledComparer  # LLVM is loaded only where it is used

        return CompiledComparer(model, batch, context, torch.get_num_threads(), other)
    return EagerComparer(model, other)


class EagerComparer:
    """The models' own forward passes, an operation at a time."""

    def __init__(self, model: Transformer, other: Transformer | None = None) -> None:
        self.model, self.other = model, other

    @torch.inference_mode()
    def beside_itself(self, chunks: torch.Tensor, base: torch.Tensor | None = None) -> tuple[Compared, torch.Tensor]:
        hidden = self._hidden(self.model, chunks, plain=True) if base is None else base.to(self.model.device)
        own = self._hidden(self.model, chunks)
        sides = (_Side(self.model, hidden, plain=True), _Side(self.model, own))
        return self._compare(chunks, *sides), hidden.cpu()

    @torch.inference_mode()
    def beside(self, chunks: torch.Tensor, arms: int, rows: np.ndarray | None = None) -> list[Compared]:
        base: _Side | _Stored
        if rows is None:
            assert self.other is not None
            base = _Side(self.other, self._hidden(self.other, chunks))
        else:
            base = _Stored(rows, self.model)
        plain = (True, False)[-arms:]
        return [self._compare(chunks, base, _Side(self.model, self._hidden(self.model, chunks, p), p)) for p in plain]

    @torch.inference_mode()
    def stored(self, chunks: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        side = _Side(self.model, self._hidden(self.model, chunks, plain=True), plain=True)
        targets = _targets(chunks).to(self.model.device)
        found, rows = [], []
        for part in side.parts():
            logits = side.logits(part)
            found.append(-logits.log_softmax(1).gather(1, targets[part, None])[:, 0])
            rows.append(pack(logits))
        return torch.cat(found).double().cpu().view(len(chunks), -1), np.concatenate(rows)

    def _hidden(self, model: Transformer, chunks: torch.Tensor, plain: bool = False) -> torch.Tensor:
        """[B, scored, d]"""
        gamma = model.gamma
        if plain:
            model.set_gamma(None)
        try:
            return model.hidden(chunks.to(model.device))[:, chunks.shape[1] // 2 : -1]
        finally:
            model.set_gamma(gamma)

    def _compare(self, chunks: torch.Tensor, base: _Side | _Stored, own: _Side) -> Compared:
        targets = _targets(chunks).to(self.model.device)
        columns: list[list[torch.Tensor]] = [[], [], [], []]
        for part in own.parts():
            a, b = base.log_probs(part), own.log_probs(part)
            weight = a.exp() if isinstance(base, _Side) else torch.where(a > STORED_FLOOR, a.exp(), 0.0)
            chosen = (x.gather(1, targets[part, None])[:, 0] for x in (a, b))
            found = (*(-x for x in chosen), (weight * (a - b)).sum(1), a.argmax(1) == b.argmax(1))
            for column, values in zip(columns, found, strict=True):
                column.append(values)
        *numbers, same = (torch.cat(column).cpu().view(len(chunks), -1) for column in columns)
        base_nll, nll, kl = (values.double() for values in numbers)
        return Compared(base_nll, nll, kl, same)


def _targets(chunks: torch.Tensor) -> torch.Tensor:
    return chunks[:, chunks.shape[1] // 2 + 1 :].flatten()


class _Side:
    """A model's predictions from hidden states [B, scored, d]. plain: without Θ"""

    def __init__(self, model: Transformer, hidden: torch.Tensor, plain: bool = False) -> None:
        self.model, self.hidden, self.plain = model, hidden.flatten(0, 1), plain

    def parts(self) -> list[slice]:
        """Rows that are taken together."""
        step = max(1, _TILE_LOGITS // self.model.config.vocab_size)
        return [slice(start, start + step) for start in range(0, len(self.hidden), step)]

    def logits(self, rows: slice) -> torch.Tensor:
        gamma = self.model.gamma
        if self.plain:
            self.model.set_gamma(None)
        hidden = self.hidden[rows]
        try:
            return capped(self.model.output(hidden).to(hidden.dtype), self.model.config.logit_cap)
        finally:
            self.model.set_gamma(gamma)

    def log_probs(self, rows: slice) -> torch.Tensor:
        return self.logits(rows).log_softmax(1)


class _Stored:
    """Predictions that were kept as rows."""

    def __init__(self, rows: np.ndarray, model: Transformer) -> None:
        self.rows, self.model = rows, model

    def log_probs(self, rows: slice) -> torch.Tensor:
        return unpack(self.rows[rows], self.model.config.vocab_size).to(self.model.device)
