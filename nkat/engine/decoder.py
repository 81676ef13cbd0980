"""One sequence, token by token: what generation and the decoding benchmarks run on, whatever the device.

`make_decoder` picks the fastest way that this model and device have and says which and why in `Decoder.name`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from nkat.engine.eager import EagerDecoder
from nkat.host.console import note
from nkat.kernels.registry import kernel_types
from nkat.lm.cache import KEPT_STATES
from nkat.lm.experts import ExpertStack
from nkat.lm.transformer import Transformer


class Decoder(Protocol):
    """A model, a KV cache for one sequence, and how many tokens are in it.

    name: what runs the steps, for people ("compiled CPU step", "CUDA graph", ...)
    length: tokens in the cache; setting it to a smaller value, which `reach` gave, forgets the tokens after it
    capacity: how many tokens fit; going beyond raises NKATError
    cache_nbytes: bytes of the KV cache
    """

    length: int

    @property
    def name(self) -> str: ...

    @property
    def capacity(self) -> int: ...

    @property
    def cache_nbytes(self) -> int: ...

    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        """Adds tokens, at least one, to the cache; returns the logits after the last, float32 [V]."""
        ...

    def step(self, token: int) -> torch.Tensor:
        """Adds one token; returns the logits after it, float32 [V]. Valid until the next call."""
        ...

    def reach(self, length: int) -> int:
        """How many of its first `length` tokens can be kept when those behind them are forgotten: all of them, or where
        there are recurrent states, as many as there were when one was kept."""
        ...

    def keep_state(self, most: int = KEPT_STATES) -> None:
        """`length` can be set to what it is now later on, and to as many such lengths as `most` says, the last ones."""
        ...

    def set_gamma(self, gamma: float | None) -> None:
        """Strength of Θ from the next token on; None or 1 turns it off."""
        ...

    def can_follow(self) -> bool:
        """Whether a Θ that was put on the model since has a place here; where not, the next token raises NKATError.

        One has, that is no larger than what the model had, or was given room for (`nkat.lm.mix`), when this was made.
        """
        ...


def make_decoder(model: Transformer, capacity: int) -> Decoder:
    """The fastest decoder for this model as it was loaded, with room for `capacity` tokens.

    One tensor that has no CPU kernel is enough to leave the compiled program, which has no step for the reference: then
    the model decodes an operation at a time, its other layers still by their kernels. So does, on a GPU, one whose
    blocks compute what `nkat.engine.plan` has no steps for.
    """
    layers = model.multipliers().values()
    compiled = all(layer.compiled is not None for layer in layers)
    if compiled and any(isinstance(layer, ExpertStack) and (layer.theta is not None or layer.room) for layer in layers):
        note("the compiled program has no Θ on experts: the model decodes an operation at a time, which is slower")
        return EagerDecoder(model, capacity)
    if compiled and all(table.qtype in kernel_types("cpu") for table in model.tables()):
        from nkat.engine.compiled import CompiledDecoder  # LLVM is loaded only where it is used

        return CompiledDecoder(model, capacity, torch.get_num_threads())
    packed = all(layer.device_weight is not None for layer in model.all_linears().values())
    if packed and model.config.has_gpu_step:
        from nkat.engine.cuda_graph import CudaGraphDecoder  # Triton is loaded only where it is used
        from nkat.engine.step_check import step_works

        if step_works(model, capacity):
            return CudaGraphDecoder(model, capacity)
    return EagerDecoder(model, capacity)
