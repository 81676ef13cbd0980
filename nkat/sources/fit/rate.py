"""The learning rate of a fit, scaled to the model.

Θ is added to weights whose size differs between models: the root mean square of a block's is 0.19 in SmolLM2 135M, 0.04
in Gemma 3 270M, 0.016 in Qwen2.5 0.5B. AdamW's steps are as large as the rate whatever the gradients, and what is added
is a product of two factors; so a rate that grows with the root of the weights' size changes each model by the same
share of its weights. 0.003 was found on SmolLM2. Limit: the rate is never less than a third of that.
"""

from __future__ import annotations

import math

import torch

from nkat.lm.transformer import Transformer

_MEASURED_ON = 0.19  # root mean square of the weights that the unscaled rate is for
_LEAST = 1.0 / 3.0


def rate_scale(model: Transformer) -> float:
    """What the learning rate and the random start are multiplied with: 1/3 to 1. Looks at the middle block."""
    block = model.blocks[len(model.blocks) // 2]
    layers = model.star_linears()
    names = [f"blk.{block.index}.{name}.weight" for name in block.linears]
    sizes = torch.tensor([float(layers[name].weight().float().square().mean().sqrt()) for name in names])
    return min(1.0, max(_LEAST, math.sqrt(float(sizes.median()) / _MEASURED_ON)))
