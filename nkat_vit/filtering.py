"""Top-k and top-p filtering of attention scores: which keys a query may look at.

Top-k comes first, top-p acts on the softmax of what top-k left (the order of llama.cpp's and Hugging Face's samplers).
The largest key always stays, k is clipped to the number of keys, and keys that equal the last one kept stay too, so
that the outcome does not depend on the order of keys. Training and evaluation filter alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Up to so many compared pairs a row, elementwise minima and maxima over whole columns beat torch.topk on a processor
# (k = 6 in bfloat16: 2.9x as fast at 17 keys, 1.8x at 65, even at 145); on a GPU each of them would be a launch.
_MAX_PAIRS = 400


def acts(top_k: int, top_p: float, keys: int) -> bool:
    """Whether the filter can remove anything; 0 and 1.0 mean off."""
    return 0 < top_k < keys or top_p < 1.0


def filter_scores_(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Sets the scores [..., keys] of the keys to be left out to −∞, in place, and returns them.

    For scores just made that nobody else holds. Autograd does not see it and need not: the softmax that follows gives
    such a key the weight 0, and its gradient is 0 with it.
    """
    with torch.no_grad():
        return scores.masked_fill_(scores < lowest_kept(scores, top_k, top_p), float("-inf"))


def lowest_kept(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """The smallest score that stays, [..., 1], for scores [..., keys]."""
    keys = scores.shape[-1]
    count = min(top_k, keys) if top_k > 0 else keys
    best = _largest(scores, count)
    if top_p >= 1.0:
        return best[-1].unsqueeze(-1)
    weights = [torch.exp((value - best[0]).float()) for value in best]
    limit = top_p * sum(weights)
    lowest, before = best[0], weights[0]
    for value, weight in zip(best[1:], weights[1:], strict=True):
        # A key stays while the weight of those above it is short of p. Values fall, so the last to stay is the minimum.
        lowest = torch.where(before < limit, value, lowest)
        before = before + weight
    return lowest.unsqueeze(-1)


def _largest(scores: Tensor, count: int) -> list[Tensor]:
    """The `count` largest of each row of scores [..., keys], from the largest down, as tensors [...]."""
    keys = scores.shape[-1]
    pairs = sum(range(keys - count, keys))
    # An exported program is for other machines, and smaller with one operation than with a hundred.
    if scores.device.type != "cpu" or pairs > _MAX_PAIRS or torch.compiler.is_exporting():
        return list(scores.topk(count, dim=-1).values.unbind(-1))
    columns = list(scores.movedim(-1, 0).contiguous().unbind(0))
    found = []
    for _ in range(count):  # a bubble sort's first passes, all rows at once
        top, rest = columns[0], []
        for column in columns[1:]:
            rest.append(torch.minimum(top, column))
            top = torch.maximum(top, column)
        found.append(top)
        columns = rest
    return found
