"""Decoding by the model's own forward pass, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nkat.lm.cache import KEPT_STATES
from nkat.lm.transformer import Transformer


class EagerDecoder:
    """The model's own forward pass, an operation at a time."""

    name = "torch, an operation at a time"
    growing = True  # the cache takes memory as tokens come

    def __init__(self, model: Transformer, capacity: int) -> None:
        self.model, self.capacity = model, capacity
        self.cache = model.new_cache(1, capacity, self.growing)

    @property
    def length(self) -> int:
        return self.cache.length

    @length.setter
    def length(self, value: int) -> None:
        self.cache.length = value

    @property
    def cache_nbytes(self) -> int:
        return self.cache.nbytes

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([list(tokens)], dtype=torch.int64, device=self.model.device)
        return self.model(ids, self.cache, logits="last")[0, -1].float()

    def reach(self, length: int) -> int:
        return self.cache.reach(length)

    def keep_state(self, most: int = KEPT_STATES) -> None:
        self.cache.keep_state(most)

    def step(self, token: int) -> torch.Tensor:
        return self.prefill([token])

    def can_follow(self) -> bool:
        return True

    def set_gamma(self, gamma: float | None) -> None:
        self.model.set_gamma(gamma)
