"""Linear layers whose Θ is learned: P and Q get gradients, the packed weight is frozen.

While a model is fitted its StarLinears are replaced by FittedLinears over the same packed bytes. The factors learned
are those of κ(γ₀)Θ (√κ in each of P and Q), so that the step sizes do not depend on γ₀.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from nkat.host.hardware import has_tiles
from nkat.lm.linear import StarLinear
from nkat.lm.transformer import Transformer
from nkat.theta.algebra import low_rank_form

Factors = tuple[torch.Tensor, torch.Tensor]
_INT8_MAX = 127


@dataclass(slots=True)
class ThetaMode:
    """What all fitted layers of a model do just now.

    active: Θ is added at all
    rounded: the factors act as they would after INT8 rounding; gradients pass straight through
    columns: bool [B, r], which columns of P and Q act in each sequence of the batch; None: all of them
    """

    active: bool = True
    rounded: bool = False
    columns: torch.Tensor | None = None
    _seen: tuple[torch.Tensor, torch.Tensor] | None = None  # what `seen` made last, and the columns that it is of

    def seen(self, dtype: torch.dtype) -> torch.Tensor | None:
        """[B, 1, 2r], what the rows of `down` count for in each sequence: Qᵀ, then Pᵀ; None: all of them."""
        if self.columns is None:
            return None
        if self._seen is None or self._seen[0].dtype != dtype or self._seen[1] is not self.columns:
            self._seen = self.columns.repeat(1, 2)[:, None].to(dtype), self.columns  # once for all layers of a step
        return self._seen[0]


class FittedLinear(nn.Module):
    """y = W x + Θ' x + bias for x [B, T, n], with Θ' = P Qᵀ − Q Pᵀ learned: float32 P, Q [max(m, n), r]."""

    def __init__(self, layer: StarLinear, factors: Factors, mode: ThetaMode) -> None:
        super().__init__()
        self.layer, self.mode, self.dtype = layer, mode, layer.dtype
        self.p, self.q = (nn.Parameter(factor.to(layer.device, copy=True)) for factor in factors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)
        if not self.mode.active:
            return FrozenProduct.apply(x, self.layer)
        p, q = (round_straight_through(f) for f in (self.p, self.q)) if self.mode.rounded else (self.p, self.q)
        down, up = (factor.to(self.dtype) for factor in self.low_rank(p, q))
        return ThetaProduct.apply(x, down, up, self.mode.seen(self.dtype), self.layer)

    def low_rank(self, p: torch.Tensor, q: torch.Tensor) -> Factors:
        """(down [k, n], up [m, k]) of the term that the factors add to W."""
        return _Form.apply(p, q, *self.layer.shape, self.dtype)


MakeLayer = Callable[[StarLinear, Factors, ThetaMode], FittedLinear]


@contextlib.contextmanager
def fitted_layers(
    model: Transformer, factors: Mapping[str, Factors], kind: MakeLayer = FittedLinear
) -> Iterator[tuple[dict[str, FittedLinear], ThetaMode]]:
    """Puts a FittedLinear in place of each named layer, starting from these factors; the old layers are put back."""
    mode = ThetaMode()
    layers = model.star_linears()
    fitted = {name: kind(layers[name], start, mode) for name, start in factors.items()}
    with stand_ins(model, fitted):
        yield fitted, mode


@contextlib.contextmanager
def stand_ins(model: Transformer, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts modules in place of the layers of their names; the layers are put back."""
    layers = model.star_linears()
    try:
        _replace(model, modules)
        yield
    finally:
        _replace(model, layers)


class _Context(Protocol):
    """What the two directions of `FrozenProduct` share; torch's own class takes any attribute."""

    layer: StarLinear


class _Form(torch.autograd.Function):
    """`nkat.theta.algebra.low_rank_form` of factors [max(m, n), r] in a dtype. Each of its small operations by itself,
    with a gradient, would cost a fit of many layers more than the term's products.
    """

    @staticmethod
    def forward(
        ctx: Any, p: torch.Tensor, q: torch.Tensor, m: int, n: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.given = p.shape, p.dtype, m, n
        down, up = (factor.to(dtype) for factor in low_rank_form(p, q, m, n))
        return down, up

    @staticmethod
    def backward(
        ctx: Any, of_down: torch.Tensor, of_up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        (rows, rank), dtype, m, n = ctx.given
        gradients = of_down.new_zeros(rows, 2 * rank, dtype=dtype)  # by P and by −Q
        gradients[:m] = of_up
        gradients[:n, :rank] += of_down[rank:].T
        gradients[:n, rank:] -= of_down[:rank].T
        return gradients[:, :rank], -gradients[:, rank:], None, None, None


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight + bias for x [..., n] and weight [n, m].

    oneDNN leaves one of two threads idle where the result is one block of its tiles; in two halves, both have work.
    Measured with 4 × 256 tokens on a processor with AMX: 0.8 ms instead of 1.4 for 1536 → 576, 4.5 instead of 8.2 for
    4864 → 896.
    """
    rows = x.flatten(0, -2)
    if not (512 < len(rows) <= 1024 and 384 < weight.shape[1] <= 1024 and _tiles_for_two(x)):
        return F.linear(x, weight.T, bias)
    out = x.new_empty(*x.shape[:-1], weight.shape[1])
    for part, into in zip(rows.chunk(2), out.flatten(0, -2).chunk(2), strict=True):
        if bias is None:
            torch.mm(part, weight, out=into)
        else:
            torch.addmm(bias, part, weight, out=into)
    return out


def _tiles_for_two(x: torch.Tensor) -> bool:
    """Whether its products are made in tiles (AMX), by two threads."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.get_num_threads() == 2 and has_tiles()


class FrozenProduct(torch.autograd.Function):
    """x Wᵀ + bias with W dequantised in each direction and kept in neither, unless the layer keeps it anyway.

    The bias goes into the product, as in StarLinear: some BLAS kernels start their sums from it, and added afterwards
    it would be rounded otherwise than there.
    """

    @staticmethod
    def forward(ctx: _Context, x: torch.Tensor, layer: StarLinear) -> torch.Tensor:
        ctx.layer = layer
        return product(x, layer.weight().T, layer.bias)

    @staticmethod
    def backward(ctx: _Context, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return product(gradient, ctx.layer.weight()), None


class _ThetaContext(_Context, Protocol):
    """What the two directions of `ThetaProduct` share."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...

    @property
    def saved_tensors(self) -> tuple[torch.Tensor, ...]: ...


class ThetaProduct(torch.autograd.Function):
    """x Wᵀ + bias + ((x downᵀ) · seen) upᵀ: `FrozenProduct` and a low-rank term that is added where the product lies.

    x [B, T, n], down [k, n], up [m, k], seen [B, 1, k] or None: all. As sums of three results in each direction, most
    of the time would go into reading and writing them.
    """

    @staticmethod
    def forward(
        ctx: _ThetaContext,
        x: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        seen: torch.Tensor | None,
        layer: StarLinear,
    ) -> torch.Tensor:
        y, z = product(x, layer.weight().T, layer.bias), F.linear(x, down)
        if seen is not None:
            z *= seen
        ctx.layer = layer
        ctx.save_for_backward(x, z, down, up, seen)
        y.flatten(0, -2).addmm_(z.flatten(0, -2), up.T)
        return y

    @staticmethod
    def backward(
        ctx: _ThetaContext, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        x, z, down, up, seen = ctx.saved_tensors
        of_x, of_z = product(gradient, ctx.layer.weight()), gradient @ up
        if seen is not None:
            of_z *= seen
        of_z = of_z.flatten(0, -2)
        of_x.flatten(0, -2).addmm_(of_z, down)
        return of_x, of_z.T @ x.flatten(0, -2), gradient.flatten(0, -2).T @ z.flatten(0, -2), None, None


def round_straight_through(factor: torch.Tensor) -> torch.Tensor:
    """The rounding of `quantise_factors` with the gradient of the identity (Bengio et al., 2013, 1308.3432)."""
    with torch.no_grad():
        scale = factor.abs().amax(dim=0) / _INT8_MAX
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        error = torch.round(factor / scale) * scale - factor
    return factor + error


def _replace(model: Transformer, layers: Mapping[str, nn.Module]) -> None:
    for block in model.blocks:
        for name in block.linears:
            layer = layers.get(f"blk.{block.index}.{name}.weight")
            if layer is not None:
                block.linears[name] = layer
