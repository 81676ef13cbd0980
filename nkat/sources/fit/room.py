"""What a fit keeps in memory instead of making it again for each backward pass, where there is room.

Two things: the activations of all blocks, without which each block is computed a second time (Chen et al., 2016, arXiv
1604.06174), and the weights dequantised, without which each is unpacked anew in each direction. Neither changes a bit
of what is learned, so a fit that is resumed may keep something else than it did before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nkat.host.hardware import total_and_free_memory
from nkat.lm.experts import ExpertStack
from nkat.lm.linear import StarLinear
from nkat.lm.transformer import Transformer

_SHARE = 0.5  # of the free memory; the rest is for gradients, the mapped file and other programs


@dataclass(frozen=True, slots=True)
class Kept:
    """Which of the two are kept."""

    activations: bool = False
    weights: bool = False


class _TooMuch(Exception):
    """Ends a forward pass whose activations do not fit."""


def keep(
    model: Transformer,
    frozen: Sequence[StarLinear | ExpertStack],
    tokens: torch.Tensor,
    sequences: int,
    asked: bool | None,
    *,
    room: int | None = None,
    processes: int = 1,
) -> Kept:
    """Decides what a fit of the model as it stands keeps, and unpacks the weights if it keeps them.

    frozen: layers whose weights stay as they are
    tokens: one sequence [1, T], as a step has `sequences` of them
    asked: keep both or neither; None: what fits
    room: bytes that may be taken; None: half of what is free, of which each of `processes` on the machine gets its part
    """
    if asked is None:
        left = (_SHARE * free_bytes(model.device) / processes) if room is None else room
        needed = activation_bytes(model, tokens, int(left / sequences))
        activations = needed is not None
        weights = weight_bytes(frozen) <= left - sequences * (needed or 0)
        kept = Kept(activations, weights)
    else:
        kept = Kept(asked, asked)
    if kept.weights:
        for layer in frozen:
            layer.keep_weight()
    return kept


def free_bytes(device: torch.device) -> int:
    """Of the memory that tensors on the device lie in."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else total_and_free_memory()[1]


def weight_bytes(layers: Sequence[StarLinear | ExpertStack]) -> int:
    """Bytes of the layers' weights, dequantised."""
    return sum(layer.dtype.itemsize * math.prod(layer.shape) for layer in layers)


def activation_bytes(model: Transformer, tokens: torch.Tensor, most: int) -> int | None:
    """Bytes that a forward pass of tokens [1, T] keeps for the backward pass, measured by one; None above `most`.

    Tensors that share memory count once. The vocabulary's part is not in it: its logits are never kept.
    """
    held: dict[int, int] = {}
    total = 0

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:  # which nothing else can get, as the graph keeps it
            held[storage.data_ptr()] = storage.nbytes()
            total += storage.nbytes()
        if total > most:
            raise _TooMuch
        return tensor

    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            model.hidden(tokens, learning=True)
    except _TooMuch:
        return None
    return total
