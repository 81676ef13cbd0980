"""Linear layers whose block scales are learned; the integers and sub-scales between them stay as the file has them.

A weight is linear in its block's stored numbers: w = d·s·q + m·t, where d and m (in some types −dmin) are float16 in
the file, s and t sub-scales or 1, and q the integers. Learned is a factor eᶜ for each stored number, c = 0 at first, so
that a step means the same for large and small scales and none changes its sign. With G = ∂loss/∂W, summed over a block,

    ∂loss/∂c_m = Σ G·(m·t)        ∂loss/∂c_d = Σ G·(d·s·q) = Σ G·w − ∂loss/∂c_m

which needs W and the offsets alone. The forward pass always runs on the bytes that a file would have, scales rounded to
float16; gradients pass straight through that rounding (Bengio et al., 2013, arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from nkat.gguf.blocks import BlockFormat
from nkat.gguf.formats import BLOCK_FORMATS, dequantise
from nkat.gguf.scales import put_scales, stored_scales
from nkat.lm.linear import StarLinear
from nkat.sources.fit.layers import product


class RepairedLinear(nn.Module):
    """y = W x + bias for x [B, T, n], W's scales changed by the factors eᶜ. change: c, float32 [blocks, k]."""

    def __init__(self, layer: StarLinear, change: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.dtype = layer, layer.dtype
        self.stored = stored_scales(layer.file_bytes, layer.qtype)
        self.packed = layer.file_bytes.clone()
        self.change = nn.Parameter(change.to(layer.device, copy=True))
        self.put()

    @torch.no_grad()
    def put(self) -> None:
        """Brings `packed` up to date with `change`: after every step of the descent."""
        put_scales(self.packed, self.layer.qtype, self.stored * self.change.exp())

    def weight(self) -> torch.Tensor:
        """W [m, n] in the layer's dtype, unpacked anew from the changed bytes."""
        return dequantise(self.packed, self.layer.qtype, self.layer.shape).to(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _ScaledProduct.apply(x.to(self.dtype), self.change, self)


def no_change(layers: Mapping[str, StarLinear], names: Sequence[str]) -> list[torch.Tensor]:
    """c = 0 for the stored scales of each named layer."""
    found = [layers[name] for name in names]
    formats = [(layer, BLOCK_FORMATS[layer.qtype]) for layer in found]
    return [torch.zeros(layer.file_bytes.numel() // f.block_bytes, len(f.halves)) for layer, f in formats]


def scale_gradient(
    block: type[BlockFormat], packed: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """∂loss/∂c, float32 [blocks, k], for W [m, n] that `packed` holds and G = ∂loss/∂W [m, n]."""
    blocks = packed.view(-1, block.block_bytes)
    if len(block.halves) == 1:
        return _sums(weight, gradient, len(blocks))[0].float()[:, None]
    _, offset = block.scales(blocks)
    assert offset is not None
    products, sums = (part.view(offset.shape) for part in _sums(weight, gradient, offset.numel()))
    of_offset = (sums * offset).sum(dim=1)
    return torch.stack([products.sum(dim=1) - of_offset, of_offset], dim=1).float()


def _sums(weight: torch.Tensor, gradient: torch.Tensor, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ gradient · weight and Σ gradient over each of so many equal parts, in float32 at least."""
    dtypes = (torch.float32, torch.bfloat16)
    if weight.device.type != "cpu" or weight.dtype not in dtypes or gradient.dtype not in dtypes:
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return (gradient * weight).view(parts, -1).sum(dim=1), gradient.view(parts, -1).sum(dim=1)
    from nkat.kernels.cpu.beside_torch import run  # LLVM is loaded only where it is used
    from nkat.kernels.cpu.learning import number, product_sums_kernel

    found = torch.empty(parts, 2)
    kernel = product_sums_kernel(weight.numel() // parts, number(gradient), number(weight))
    run(kernel, gradient.contiguous(), weight.contiguous(), found, parts)
    products, sums = found.unbind(dim=1)
    return products, sums


class _Context(Protocol):
    """What the two directions of `_ScaledProduct` share; torch's own class takes any attribute."""

    layer: RepairedLinear

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...

    @property
    def saved_tensors(self) -> tuple[torch.Tensor, ...]: ...


class _ScaledProduct(torch.autograd.Function):
    """x Wᵀ + bias with W unpacked in each direction and kept in neither."""

    @staticmethod
    def forward(ctx: _Context, x: torch.Tensor, change: torch.Tensor, layer: RepairedLinear) -> torch.Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return product(x, layer.weight().T, layer.layer.bias)

    @staticmethod
    def backward(ctx: _Context, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        layer, weight = ctx.layer, ctx.layer.weight()
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        block = BLOCK_FORMATS[layer.layer.qtype]
        return product(gradient, weight), scale_gradient(block, layer.packed, weight, of_weight), None
