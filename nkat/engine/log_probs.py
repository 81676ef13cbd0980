"""A prediction in 16 bits a token id: rows of log-probabilities as llama-perplexity keeps them in its base files.

A row is uint16 [row_words(V)]: two float32 (a step s and a lowest log-probability l), a number n for each of the V ids,
and a word more where V is odd: ln p = s·n + l. Logits more than 16 below the largest, and the lowest of all, are n = 0.
So a likely id keeps its ln p within 1.3e-4, and what lies below ln p = −16 is no part of a divergence from the row.
(llama-perplexity of https://github.com/ggml-org/llama.cpp, tools/perplexity.)
"""

from __future__ import annotations

import numpy as np
import torch

REACH = 16.0  # below the largest logit
_STEPS = 65535.0
_HEAD = 4  # words


def row_words(vocabulary: int) -> int:
    """uint16 numbers of a row."""
    return _HEAD + vocabulary + vocabulary % 2


def grid(top: np.ndarray, total: np.ndarray, lowest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of predictions by their largest logit, Σ exp(logit − it) and their smallest logit, float [N]: how logits become
    numbers, float32 [N, 2] (the logit at 0, steps per logit), and the rows' heads, float32 [N, 2] (s and l).
    """
    top = top.astype(np.float32)
    lowest = np.maximum(lowest.astype(np.float32), top - np.float32(REACH))
    log_total = np.log(total.astype(np.float64)).astype(np.float32)
    step = (top - lowest) / np.float32(_STEPS)
    steps = np.zeros_like(step)  # all logits alike: all numbers are 0
    np.divide(np.float32(1.0), step, out=steps, where=step > 0)
    return np.stack((lowest, steps), axis=1), np.stack((step, lowest - top - log_total), axis=1)


def empty_rows(count: int, vocabulary: int) -> np.ndarray:
    """uint16 [count, row_words], all 0, with room behind it that a kernel may read."""
    words = row_words(vocabulary)
    return np.zeros(count * words + 32, np.uint16)[: count * words].reshape(count, words)


def put_heads(rows: np.ndarray, heads: np.ndarray) -> None:
    """Writes s and l, float32 [N, 2], into rows."""
    rows[:, :_HEAD] = np.ascontiguousarray(heads, np.float32).view(np.uint16)


def heads_of(rows: np.ndarray) -> np.ndarray:
    """s and l of rows, float32 [N, 2]."""
    return np.ascontiguousarray(rows[:, :_HEAD]).view(np.float32)


def pack(logits: torch.Tensor) -> np.ndarray:
    """Logits [N, V] → rows."""
    values = logits.float().cpu().numpy()
    top = values.max(axis=1)
    total = np.exp(values - top[:, None]).sum(axis=1, dtype=np.float64)
    numbers, heads = grid(top, total, values.min(axis=1))
    lowest, steps = numbers[:, :1], numbers[:, 1:]
    rows = empty_rows(*values.shape)
    rows[:, _HEAD : _HEAD + values.shape[1]] = np.where(values > lowest, np.rint((values - lowest) * steps), 0)
    put_heads(rows, heads)
    return rows


def unpack(rows: np.ndarray, vocabulary: int) -> torch.Tensor:
    """Rows → ln p, float32 [N, V]."""
    heads = torch.from_numpy(heads_of(rows))
    numbers = torch.from_numpy(rows[:, _HEAD : _HEAD + vocabulary].astype(np.float32))
    return numbers * heads[:, :1] + heads[:, 1:]
