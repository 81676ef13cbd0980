"""What lies between the halves of a gated feed-forward network."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nkat.lm.architectures import Architecture

GATE_LIMIT = 7.0  # of the clamped activation (LLM_FFN_SWIGLU_OAI_MOE in llama.cpp's src/llama-graph.cpp)
GATE_SLOPE = 1.702


def kernel_clamp(architecture: Architecture) -> tuple[float, float] | None:
    """What `nkat.kernels.cpu.blocks.gate_kernel` is told of the clamped activation."""
    return (GATE_LIMIT, GATE_SLOPE) if architecture.clamped_gate else None


def activate(architecture: Architecture, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """activation(gate) · up: SiLU, tanh GELU, or gpt-oss's, which clamps both and adds 1 to `up`."""
    slope = 1.0
    if architecture.clamped_gate:
        gate, up = gate.clamp(max=GATE_LIMIT), up.clamp(-GATE_LIMIT, GATE_LIMIT) + 1.0
        slope = GATE_SLOPE
    if architecture.gelu:
        return F.gelu(gate, approximate="tanh") * up
    active = F.silu(gate) if slope == 1.0 else gate * torch.sigmoid(slope * gate)
    return active * up
