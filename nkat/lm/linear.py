"""`StarLinear`: a packed weight and its Θ behind one forward, W ⋆ x = W x + κ(γ) Θ x (+ bias).

The weight stays as the file has it (a view of the memory map on CPU) and is dequantised on each call; γ may be changed
at any time, so both arms of a comparison share one set of weights. With no Θ, a zero Θ, or γ = 1 the star term is not
computed at all: the result is bit-identical to the plain layer's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import torch
import torch.nn.functional as F
from torch import nn

from nkat.gguf.formats import dequantise
from nkat.kernels import reference
from nkat.kernels.registry import kernel_types
from nkat.theta.algebra import Term, ThetaError, coupling

if TYPE_CHECKING:
    from nkat.kernels.cpu.linear import CpuLinear
    from nkat.kernels.cuda.planes import PackedWeight


class PackedModule(nn.Module):
    """A weight [m, n] = `shape` of type `qtype`: the file's bytes, or in their place what the kernels of a GPU read.

    packed: uint8 [nbytes], the file's bytes; None where `device_weight` has taken their place
    """

    packed: torch.Tensor | None

    def __init__(self, packed: torch.Tensor, qtype: gguf.GGMLQuantizationType, shape: tuple[int, int]) -> None:
        super().__init__()
        self.qtype, self.shape = qtype, shape
        self.register_buffer("packed", packed, persistent=False)
        self.device_weight: PackedWeight | None = None

    @property
    def file_bytes(self) -> torch.Tensor:
        """`packed` of a weight that no GPU's kernels have taken over; raises RuntimeError for others."""
        packed = self.packed
        if packed is None:
            raise RuntimeError("this weight was repacked for the GPU, and the file's bytes were let go")
        return packed

    def move_to_kernels(self, weight: PackedWeight) -> None:
        """Puts the weight as the GPU's kernels read it in place of the file's bytes."""
        self.device_weight, self.packed = weight, None


class StarLinear(PackedModule):
    """y = W x + κ Θ x + bias for x [..., n]; y is [..., m] in the layer's dtype.

    packed: uint8 [nbytes] of W [m, n] = `shape`, in block format `qtype`
    dtype:  of the multiplication; x is cast to it
    theta:  acts on the leading block that fits W; its strength is set by `set_gamma`, off until then
    scale:  multiplies W x, and nothing else (`nkat.gguf.weights.scale_beside`); such a layer has no kernel
    down, up: its factors as numbers (`nkat.theta.algebra.low_rank_form`), where the CPU's kernels do not have it
    keep_dense: also keep W dequantised in `dtype`, for models small enough that repeated decoding gains from it
    """

    bias: torch.Tensor | None
    dense: torch.Tensor | None
    down: torch.Tensor | None
    up: torch.Tensor | None

    def __init__(
        self,
        packed: torch.Tensor,
        qtype: gguf.GGMLQuantizationType,
        shape: tuple[int, int],
        *,
        dtype: torch.dtype = torch.float32,
        bias: torch.Tensor | None = None,
        theta: Term | None = None,
        keep_dense: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__(packed, qtype, shape)
        self.dtype, self.scale = dtype, scale
        self.kappa = 0.0
        self.int8_activations = False  # round W's inputs as llama.cpp does: to compare with its figures
        self.register_buffer("bias", None if bias is None else bias.to(packed.device, dtype), persistent=False)
        self.register_buffer("dense", None, persistent=False)
        self.register_buffer("down", None, persistent=False)
        self.register_buffer("up", None, persistent=False)
        self.device = packed.device
        self.compiled: CpuLinear | None = None  # what `repack` made, on the CPU; None where its type has no kernel
        self.room = 0  # columns of Θ that a decoder has room for, whatever the present one has
        self.set_theta(theta)
        if keep_dense:
            self.keep_weight()

    def check_theta(self, theta: Term) -> None:
        """Raises ThetaError when it does not fit the layer."""
        if theta.experts is not None:
            raise ThetaError(
                f"Θ of {theta.experts} experts does not fit a single {self.shape[0]}x{self.shape[1]} weight"
            )
        theta.check(*self.shape)

    def set_theta(self, theta: Term | None) -> None:
        """Replaces Θ, or the low-rank term in its place; its strength stays. Raises as `check_theta` does."""
        if theta is not None:
            self.check_theta(theta)
        self.down = self.up = None
        self.theta = None if theta is None or theta.is_zero() else theta
        if self.compiled is not None:
            self.compiled.set_theta(self.theta, self.room)  # has it as INT8, in its own order
        if self.theta is None or self.compiled is not None:
            return
        down, up = self.theta.form(*self.shape, self.dtype)
        missing = 2 * self.room - len(down)
        if self.device.type == "cuda" and missing > 0:
            # Triton compiles a kernel for each number of terms: one is enough
            down, up = F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))
        self.down, self.up = down.to(self.device), up.to(self.device)

    def reserve(self, room: int) -> None:
        """Room for a Θ of so many columns in what is made for decoding from now on."""
        self.room = max(self.room, room)
        self.set_theta(self.theta)

    @property
    def terms(self) -> int:
        """Rows of `down` that a decoder's step needs room for."""
        return max(2 * self.room, 0 if self.down is None else len(self.down))

    def set_gamma(self, gamma: float | None) -> None:
        """Strength of Θ: κ(γ). None or 1 turns it off."""
        self.kappa = 0.0 if gamma is None else coupling(gamma)

    def repack(self) -> None:
        """Makes W ready for the kernels of its device, which then do the multiplication.

        On a GPU the file's bytes are let go, and 16-bit inputs are multiplied as they are, with sums in float32. W of a
        type without a kernel stays as the file has it and is multiplied by the reference.
        """
        if self.scale != 1.0:
            return
        if self.device.type == "cuda":
            from nkat.kernels.cuda.packing import pack  # Triton is loaded only where it is used

            self.move_to_kernels(pack(self.file_bytes, self.qtype, self.shape, self.bias is not None))
            return
        if self.qtype not in kernel_types("cpu"):
            return
        from nkat.kernels.cpu.linear import CpuLinear  # LLVM is loaded only where it is used

        room = max(self.room, 0 if self.theta is None else self.theta.columns)
        self.compiled = CpuLinear(
            self.file_bytes, self.qtype, self.shape, self.bias, exact=not self.int8_activations, room=room
        )
        self.set_theta(self.theta)

    def require_compiled(self) -> CpuLinear:
        """What `repack` made on the CPU; raises RuntimeError where it made nothing."""
        if self.compiled is None:
            raise RuntimeError("this layer was not repacked for the CPU's kernels")
        return self.compiled

    def keep_weight(self) -> None:
        """As `keep_dense`, of a layer that is there already."""
        if self.dense is None:
            self.dense = self.weight()

    def weight(self) -> torch.Tensor:
        """W [m, n] in the layer's dtype: the one that is kept, or dequantised anew from the file's bytes."""
        if self.dense is not None:
            return self.dense
        weight = dequantise(self.file_bytes, self.qtype, self.shape)
        return (weight if self.scale == 1.0 else weight * self.scale).to(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rows(x, 0, self.shape[0])

    def rows(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Outputs [start, stop) only: the way to a large vocabulary's logits in bounded memory.

        `start` must be a multiple of 16 (a tile of the CPU kernels).
        """
        if self.compiled is not None:
            kappa = 0.0 if self.theta is None else self.kappa
            return self.compiled.rows(x, start, stop, kappa, torch.get_num_threads()).to(self.dtype)
        x = x.to(self.dtype)
        bias = None if self.bias is None else self.bias[start:stop]
        inputs = reference.round_activations(x, self.qtype) if self.int8_activations else x
        if self.device_weight is not None:
            from nkat.kernels.cuda import linear as cuda

            weight = self.device_weight.rows(start, stop)
            if not self.int8_activations:
                up = None if self.up is None else self.up[start:stop]
                return cuda.linear(weight, x, bias, self.down, up, self.kappa)
            y = cuda.linear(weight, inputs, bias)
        elif self.dense is not None:
            y = F.linear(inputs, self.dense[start:stop], bias)
        else:
            packed = reference.packed_rows(self.file_bytes, self.shape[0], start, stop)
            plain = self.scale == 1.0
            y = reference.linear(packed, self.qtype, (stop - start, self.shape[1]), inputs, bias if plain else None)
            if not plain:
                y = y * self.scale if bias is None else y * self.scale + bias
        down, up = self.down, self.up
        if self.kappa == 0.0 or down is None or up is None:
            return y
        return y + reference.star_term(x, down, up[start:stop], self.kappa)

    def extra_repr(self) -> str:
        rank = 0 if self.theta is None else self.theta.rank
        return f"{self.shape[1]} -> {self.shape[0]}, {self.qtype.name}, {self.dtype}, Θ rank {rank}"
