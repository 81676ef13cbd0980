"""A gated delta net in place of attention: a memory of fixed size that every token changes (Yang et al., 2024, arXiv
2412.06464), as llama.cpp computes it (src/models/delta-net-base.cpp).

A head's memory S [D, D] maps keys to values. A token with key k, value v and query q, all of them behind a causal
convolution, decays it by exp(g), moves what it says of k by β towards v, and reads it:

    S ← exp(g) S        S ← S + k ⊗ β (v − Sᵀ k)        o = Sᵀ q / √D

Token by token that is `step`. Many tokens together are computed in chunks: within one, the changes of its tokens solve
a triangular system, and all the rest is products of matrices (the WY form of Yang et al., 2024, arXiv 2406.06484).

Shapes: B sequences, T new tokens, H value heads of D elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nkat.lm.cache import State
from nkat.lm.recurrence import Recurrence

CHUNK = 64  # tokens: the triangular systems grow with its square, the steps between chunks shrink


class DeltaNet(nn.Module):
    """What lies between a block's linear layers, all of it in the residual stream's dtype."""

    kernel: torch.Tensor
    time_bias: torch.Tensor
    decay: torch.Tensor
    norm: torch.Tensor

    def __init__(
        self,
        sizes: Recurrence,
        epsilon: float,
        kernel: torch.Tensor,
        time_bias: torch.Tensor,
        decay: torch.Tensor,
        norm: torch.Tensor,
    ) -> None:
        """kernel: [channels, tokens], the last one's the new token's;  time_bias, decay: [H];  norm: RMS weight [D]"""
        super().__init__()
        self.sizes, self.epsilon = sizes, epsilon
        self.register_buffer("kernel", kernel, persistent=False)
        self.register_buffer("time_bias", time_bias, persistent=False)
        self.register_buffer("decay", decay, persistent=False)
        self.register_buffer("norm", norm, persistent=False)

    def forward(self, outputs: Sequence[torch.Tensor], state: State | None) -> tuple[torch.Tensor, State]:
        """What the block's linear layers made of the new tokens → what its last one reads [B, T, H·D], and the state.

        outputs: [B, T, rows] of each of `sizes.inputs`: queries, keys and values before the convolution, the gate, and
        what β and g come from, [B, T, H] each or both in one, by key head;  state: None: before any token
        """
        sizes = self.sizes
        if sizes.fused:
            both, *strengths = outputs
            mixed, gate = self._unfused(both)
        else:
            mixed, gate, *strengths = outputs
        convolved, inputs = self._convolved(mixed, state)
        q, k, v = F.silu(convolved).split((sizes.keys, sizes.keys, sizes.values), dim=-1)
        q, k = (self._spread(unit(heads.unflatten(-1, (-1, sizes.size)), self.epsilon)) for heads in (q, k))
        beta, alpha = strengths if len(strengths) == 2 else self._parted(strengths[0])
        g = F.softplus(alpha + self.time_bias) * self.decay
        q, k, v = (t.transpose(1, 2) for t in (q * sizes.size**-0.5, k, v.unflatten(-1, (-1, sizes.size))))
        memory = mixed.new_zeros(*v.shape[:2], sizes.size, sizes.size) if state is None else state.memory
        out, memory = delta_rule(q, k, v, g.mT, beta.sigmoid().mT, memory)
        normed = F.rms_norm(out.transpose(1, 2), self.norm.shape, self.norm, self.epsilon)
        return normed.flatten(2) * F.silu(gate), State(inputs, memory)

    def _convolved(self, mixed: torch.Tensor, state: State | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Each channel's sum over the last tokens [B, T, channels], and the inputs that later tokens need."""
        count, before = mixed.shape[1], self.sizes.kernel - 1
        earlier = mixed.new_zeros(len(mixed), before, mixed.shape[2]) if state is None else state.inputs
        padded = torch.cat((earlier, mixed), dim=1)
        parts = [padded[:, i : i + count] * self.kernel[:, i] for i in range(self.sizes.kernel)]
        # cloned, so that the new tokens' inputs are not kept with it
        return torch.stack(parts).sum(dim=0), padded[:, count:].clone()

    def _unfused(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is convolved, and the gate, of an output that has by key head its query, key, values and gates."""
        sizes = self.sizes
        some = sizes.values // sizes.key_heads
        *mixed, gate = both.unflatten(-1, (sizes.key_heads, -1)).split((sizes.size, sizes.size, some, some), dim=-1)
        return torch.cat([part.flatten(2) for part in mixed], dim=-1), gate.flatten(2)

    def _spread(self, heads: torch.Tensor) -> torch.Tensor:
        """Key heads [B, T, heads, D] → one for each value head."""
        times = self.sizes.value_heads // self.sizes.key_heads
        if self.sizes.row.grouped:
            return heads.repeat_interleave(times, dim=2)
        return heads.repeat(1, 1, times, 1)

    def _parted(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """β's and g's, [B, T, H] each, of a weight that has by key head first the one, then the other."""
        beta, alpha = both.unflatten(-1, (self.sizes.key_heads, 2, -1)).unbind(-2)
        return beta.flatten(2), alpha.flatten(2)


def unit(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Vectors of length 1: x / √(|x|² + ε)."""
    return x * (x.square().sum(dim=-1, keepdim=True) + epsilon).rsqrt()


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    memory: torch.Tensor,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `step` after `step`, up to rounding: outputs [B, H, T, D], and the memory after the last token.

    q, k, v: [B, H, T, D];  g (at most 0), beta: [B, H, T];  memory: [B, H, D, D]
    """
    count = q.shape[2]
    if count == 1:
        out, memory = step(q[:, :, 0], k[:, :, 0], v[:, :, 0], g[:, :, 0], beta[:, :, 0], memory)
        return out[:, :, None], memory
    chunk = min(chunk, count)
    missing = -count % chunk  # tokens of strength 0 that do not decay: they change nothing
    q, k, v = (F.pad(t, (0, 0, 0, missing)).unflatten(2, (-1, chunk)) for t in (q, k, v))
    g, beta = (F.pad(t, (0, missing)).unflatten(2, (-1, chunk)) for t in (g, beta))
    age = g.cumsum(dim=-1)  # [B, H, chunks, chunk]: ln of what is left of the memory before the chunk
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    left = (age[..., :, None] - age[..., None, :]).masked_fill(later, -torch.inf).exp()  # of token j's at token i
    strong = k * beta[..., None]
    system = (strong @ k.mT) * left
    right = torch.cat((v * beta[..., None], strong * age.exp()[..., None]), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    changes, of_memory = solved.chunk(2, dim=-1)
    scores, reading = (q @ k.mT) * left, q * age.exp()[..., None]
    writing = (k * (age[..., -1:] - age).exp()[..., None]).mT
    decays = age[..., -1, None, None].exp()
    outputs = []
    for i in range(q.shape[2]):
        new = changes[:, :, i] - of_memory[:, :, i] @ memory
        outputs.append(reading[:, :, i] @ memory + scores[:, :, i] @ new)
        memory = decays[:, :, i] * memory + writing[:, :, i] @ new
    return torch.stack(outputs, dim=2).flatten(2, 3)[:, :, :count], memory


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, memory: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token's output [B, H, D], and the memory after it. As `delta_rule`, without T."""
    memory = memory * g.exp()[..., None, None]
    known = (memory * k[..., None]).sum(dim=-2)
    memory = memory + k[..., None] * (beta[..., None] * (v - known))[..., None, :]
    return (memory * q[..., None]).sum(dim=-2), memory
