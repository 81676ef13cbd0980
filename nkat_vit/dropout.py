"""Dropout whose random numbers do not cost more than the layer it is in.

torch's kernel for the processor draws a number for each value, one after another: about 10 ns each, 6 % of a training
step of the baseline. Sixteen bits decide just as well whether a value stays, and one draw has four times that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LANES = 4  # of 16 bits in 64
_LEVELS = 1 << 16


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Zero with the probability (rounded to 1/65536 on a processor), else x / (1 − probability)."""
    if not training or probability == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, probability, training)
    draws = torch.empty(-(-x.numel() // _LANES), dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)  # uniform from −32768 to 32767
    dropped = round(probability * _LEVELS)
    kept = (bits >= dropped - _LEVELS // 2).to(x.dtype)
    return x * kept.mul_(_LEVELS / (_LEVELS - dropped))
