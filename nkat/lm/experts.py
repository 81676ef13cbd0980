"""A mixture of experts: a router sends each token to a few of many feed-forward networks.

The weights of all experts of a block lie behind one another in three tensors, or in two, of which a token reads its own
experts' part only. An expert's layers are made when a token first goes to it, and nothing of the others is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import gguf
import torch
from torch import nn

from nkat.kernels.registry import kernel_types
from nkat.lm.activation import activate
from nkat.lm.architectures import Architecture
from nkat.lm.linear import StarLinear
from nkat.theta.algebra import Term, Theta, ThetaError, coupling

if TYPE_CHECKING:
    from nkat.kernels.cpu.experts import CpuExperts


class ExpertStack(nn.Module):
    """The weights [m, n] of all experts of one name: `shape` is (experts, m, n).

    packed: uint8, the file's bytes of all of them; bias: [experts, m]
    scale: [experts], what their products are multiplied by; as in llama.cpp, that is no part of Θ's
    outside: `Experts` does that, with their weights; else each expert's layer does
    """

    packed: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None

    def __init__(
        self,
        packed: torch.Tensor,
        qtype: gguf.GGMLQuantizationType,
        shape: tuple[int, int, int],
        *,
        dtype: torch.dtype = torch.float32,
        bias: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        outside: bool = True,
        keep_dense: bool = False,
    ) -> None:
        super().__init__()
        self.scales_inside = scale is not None and not outside
        self.qtype, self.shape, self.dtype, self.keep_dense = qtype, shape, dtype, keep_dense
        self.int8_activations = False  # as of StarLinear
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.theta: Theta | None = None
        self.kappa, self.room = 0.0, 0  # room: as of StarLinear
        self.compiled: CpuExperts | None = None  # what `repack` made, on the CPU; None where its type has no kernel
        self._layers: dict[int, StarLinear] = {}

    def expert(self, index: int) -> StarLinear:
        """One expert's layer."""
        layer = self._layers.get(index)
        if layer is None:
            count, m, n = self.shape
            nbytes = self.packed.numel() // count
            layer = StarLinear(
                self.packed[index * nbytes : (index + 1) * nbytes],
                self.qtype,
                (m, n),
                dtype=self.dtype,
                bias=None if self.bias is None else self.bias[index],
                theta=None if self.theta is None else self.theta.expert(index),
                keep_dense=self.keep_dense,
                scale=float(self.scale[index]) if self.scale is not None and self.scales_inside else 1.0,
            )
            self._layers[index] = layer
        layer.int8_activations, layer.kappa = self.int8_activations, self.kappa
        if self.scale is not None and self.theta is not None and not self.scales_inside:
            layer.kappa /= float(self.scale[index])
        return layer

    def check_theta(self, theta: Term) -> None:
        """Raises ThetaError when it is for other experts, larger than they are, or no Θ."""
        if not isinstance(theta, Theta):
            raise ThetaError("a mixture's experts take a Θ and no other low-rank term")
        if theta.experts != self.shape[0] or theta.size > max(self.shape[1:]):
            raise ThetaError(f"Θ of size {theta.size} for {theta.experts} experts does not fit weights {self.shape}")
        if self.scale is not None and not self.scale.all():
            raise ThetaError("an expert whose outputs are multiplied by 0 takes no Θ")

    def reserve(self, room: int) -> None:
        """As of StarLinear: tells `nkat.engine.decoder` that there will be a Θ."""
        self.room = max(self.room, room)

    def set_theta(self, theta: Term | None) -> None:
        """As of StarLinear: that of every expert."""
        if theta is not None:
            self.check_theta(theta)
        self.theta = theta if isinstance(theta, Theta) and not theta.is_zero() else None
        self._layers.clear()

    def keep_weight(self) -> None:
        """As of StarLinear: each expert's, when a token first needs it."""
        self.keep_dense = True
        self._layers.clear()

    def set_gamma(self, gamma: float | None) -> None:
        """Strength of Θ: κ(γ). None or 1 turns it off."""
        self.kappa = 0.0 if gamma is None else coupling(gamma)

    def repack(self) -> None:
        """Room for the weights as the CPU's kernels read them, which an expert's take when a token first needs it."""
        if self.packed.device.type == "cpu" and self.qtype in kernel_types("cpu") and not self.scales_inside:
            from nkat.kernels.cpu.experts import CpuExperts  # LLVM is loaded only where it is used

            self.compiled = CpuExperts(self.packed, self.qtype, self.shape, self.bias, exact=not self.int8_activations)

    def require_compiled(self) -> CpuExperts:
        """What `repack` made on the CPU; raises RuntimeError where it made nothing."""
        if self.compiled is None:
            raise RuntimeError("these experts were not repacked for the CPU's kernels")
        return self.compiled

    def extra_repr(self) -> str:
        count, m, n = self.shape
        return f"{count} experts, {n} -> {m}, {self.qtype.name}, {self.dtype}"


class Experts(nn.Module):
    """Feed-forward network: x → Σ weight · down(activation(gate x) · up x) over each token's `used` experts.

    The weights are the softmax over the logits of the chosen experts. llama.cpp computes that, or the softmax over all
    of them divided by the sum of the chosen, which is the same.
    """

    def __init__(
        self, architecture: Architecture, used: int, router: StarLinear, stacks: Mapping[str, ExpertStack]
    ) -> None:
        """stacks: by name, as `nkat.lm.mixture.Mixture.stacks` has them"""
        super().__init__()
        self.architecture, self.used, self.router = architecture, used, router
        self.stacks = nn.ModuleDict(stacks)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the weights: gate and up, or both in one, then down."""
        return tuple(self.stacks)

    def stack(self, name: str) -> ExpertStack:
        """One of `names`."""
        stack = self.stacks[name]
        assert isinstance(stack, ExpertStack)
        return stack

    def forward(self, x: torch.Tensor, routed: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., d] → [..., d], both in the residual stream's dtype.

        routed: what the router reads, of the same shape; None: x
        """
        tokens = x.flatten(0, -2)
        best, chosen = self.router(tokens if routed is None else routed.flatten(0, -2)).topk(self.used, dim=-1)
        weights = best.softmax(dim=-1)
        *gate_up, down = (self.stack(name) for name in self.names)
        if down.scale is not None:
            weights = weights * down.scale[chosen]
        out = torch.zeros_like(tokens)
        for index in chosen.unique().tolist():
            token, slot = (chosen == index).nonzero(as_tuple=True)
            rows = tokens[token]
            outputs = [stack.expert(index)(rows) for stack in gate_up]
            gate, up = outputs[0].chunk(2, dim=-1) if len(outputs) == 1 else outputs
            active = activate(self.architecture, gate, up)
            part = down.expert(index)(active).to(x.dtype) * weights[token, slot, None]
            out = out.index_add(0, token, part)
        return out.view_as(x)
