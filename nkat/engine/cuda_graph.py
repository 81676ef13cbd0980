"""Decoding on a GPU: a whole step as one CUDA graph, launched once a token.

`StaticDecoder` runs the same step an operation at a time, on any device; `CudaGraphDecoder` records it. A graph reads
token, position and Θ's strength from the GPU's memory, so it stays valid while they change. There is one with Θ and one
without: switching Θ off costs nothing that a model without Θ does not cost. Prompts go through the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nkat.engine.eager import EagerDecoder
from nkat.engine.plan import StepOps, decode_step, make_plan
from nkat.errors import NKATError
from nkat.kernels.cuda.linear import out_of_memory_hint
from nkat.kernels.cuda.step import TritonOps
from nkat.lm.transformer import Transformer

_WARM_UP_STEPS = 2  # the first compiles, the second finds everything compiled


class StaticDecoder(EagerDecoder):
    """A `nkat.engine.decoder.Decoder` whose steps always do the same to the same memory, as recording asks for.

    plain, star: the operations without and with Θ
    """

    name = "fixed step, an operation at a time"
    growing = False  # what is recorded reads the cache where it is

    def __init__(self, model: Transformer, capacity: int, plain: StepOps, star: StepOps) -> None:
        super().__init__(model, capacity)
        self._plan = make_plan(model, self.cache)
        self._ops = {False: plain, True: star}
        self._token, self._position = torch.zeros(2, 1, dtype=torch.int64, device=model.device)
        self._follows = model.theta_changes, model.gamma
        self._star = self._has_effect()

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> Tensor:
        if not tokens:
            raise NKATError("there is no token to start from")
        if len(tokens) == 1:
            return self.step(tokens[0])
        return super().prefill(tokens)

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        self.cache.check_room(1, 1)
        if not 0 <= token < self.model.config.vocab_size:  # a GPU would read past the table
            raise NKATError(f"token {token} is outside the vocabulary of {self.model.config.vocab_size}")
        now = self.model.theta_changes, self.model.gamma
        if self._follows != now:
            self._plan.follow(self.model, self._follows[0] != now[0])
            self._follows, self._star = now, self._has_effect()
        self._token.fill_(token)
        self._position.fill_(self.cache.length)
        logits = self._run(self._star)
        self.cache.advance(1)
        return logits

    def can_follow(self) -> bool:
        return self._plan.can_follow(self.model)

    def _has_effect(self) -> bool:
        return self._plan.has_theta and bool((self._plan.kappas != 0).any())

    def _run(self, star: bool) -> Tensor:
        return decode_step(self._plan, self._ops[star], self._token, self._position).float()


class CudaGraphDecoder(StaticDecoder):
    """The decoder for a model on a GPU. Makes the graphs at once: some seconds of compilation the first time.

    Raises NKATError without Triton, on a GPU that is too old, and when the memory does not suffice.
    """

    name = "CUDA graph of Triton kernels"

    def __init__(self, model: Transformer, capacity: int) -> None:
        with out_of_memory_hint():
            super().__init__(model, capacity, TritonOps(star=False), TritonOps(star=True))
            self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
            self._logits: dict[bool, Tensor] = {}
            for star in [False, True] if self._plan.has_theta else [False]:
                self._record(star)

    @torch.inference_mode()
    def _record(self, star: bool) -> None:
        # Recording must not be the first run: compiling and torch's own set-up do what a graph cannot hold. These runs
        # write at position 0 of the still empty cache.
        side = torch.cuda.Stream(self.model.device)
        side.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_STEPS):
                super()._run(star)
        torch.cuda.current_stream(self.model.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Memory can be shared: the graphs never run at the same time, and each one's logits stay allocated.
        pool = self._graphs[False].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            self._logits[star] = super()._run(star)
        self._graphs[star] = graph

    def _run(self, star: bool) -> Tensor:
        self._graphs[star].replay()
        return self._logits[star]
