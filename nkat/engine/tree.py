"""Token sequences as a tree that has their common beginnings once: what is computed, and who sees what.

Pure arithmetic; `nkat.kernels.cpu.tree` computes the attention of such a tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nkat.kernels.cpu.agreed import KEYS

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class TokenTree:
    """The tokens of one pass, and the tables of `nkat.kernels.cpu.tree`; all int64.

    tokens: ids [token];  places: position and place in the cache of each [token, 2]
    paths: of each sequence which tokens it is, [its length]
    """

    tokens: np.ndarray
    places: np.ndarray
    tiles: np.ndarray
    blocks: np.ndarray
    paths: list[np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class _Branch:
    """Sequences low … high − 1, which have `depth` tokens in common: these, and the blocks of keys that hold them."""

    low: int
    high: int
    depth: int
    path: np.ndarray
    seen: list[tuple[int, int, int]]


def token_tree(sequences: Sequence[Tokens]) -> TokenTree:
    """The tree of sequences that are sorted, distinct and not empty."""
    tokens: list[int] = []
    places: list[tuple[int, int]] = []
    tiles: list[tuple[int, ...]] = []
    blocks: list[tuple[int, int, int]] = []
    paths = [np.zeros(0, np.int64)] * len(sequences)
    used = 0  # blocks of the cache
    pending = [_Branch(0, len(sequences), 0, np.zeros(0, np.int64), [])]
    while pending:
        branch = pending.pop()
        low, depth, path, seen = branch.low, branch.depth, branch.path, branch.seen
        first = sequences[low]
        common = in_common(first, sequences[branch.high - 1])
        if (count := common - depth) > 0:
            token, starts = len(tokens), range(0, count, KEYS)
            own = [(used + i, depth + start, min(KEYS, count - start)) for i, start in enumerate(starts)]
            listed = len(blocks), len(seen)
            tiles += [(token, start, min(start + KEYS, count), depth, *listed) for start in starts]
            places += [(depth + i, used * KEYS + i) for i in range(count)]
            tokens += first[depth:common]
            used, seen = used + len(own), [*seen, *own]
            blocks += seen
            path = np.concatenate((path, np.arange(token, token + count)))
        if len(first) == common:
            paths[low] = path
            low += 1
        pending += [_Branch(a, b, common, path, seen) for a, b in _branches(sequences, low, branch.high, common)]
    return TokenTree(
        np.array(tokens, np.int64),
        np.array(places, np.int64),
        np.array([(len(tiles), 0, 0, 0, 0, 0), *tiles], np.int64),
        np.array(blocks, np.int64),
        paths,
    )


def in_common(a: Tokens, b: Tokens) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def batches(
    sequences: Sequence[Tokens], tokens: int, blocks: int, most: int | None = None
) -> Iterator[tuple[int, int]]:
    """Cuts sorted sequences into runs whose trees have at most so many tokens, blocks of keys and sequences.

    A sequence by itself may have more.
    """
    low, new, used = 0, 0, 0
    for i, sequence in enumerate(sequences):
        shared = in_common(sequences[i - 1], sequence) if i > low else 0
        more = len(sequence) - shared
        takes = -(-more // KEYS) + 1  # it may part a segment
        full = new + more > tokens or used + takes > blocks or i - low == most
        if i > low and full:
            yield low, i
            low, new, used = i, 0, 0
            more, takes = len(sequence), -(-len(sequence) // KEYS) + 1
        new, used = new + more, used + takes
    if sequences:
        yield low, len(sequences)


def _branches(sequences: Sequence[Tokens], low: int, high: int, depth: int) -> Iterator[tuple[int, int]]:
    """Runs of sequences whose next token is the same."""
    while low < high:
        end = low + 1
        while end < high and sequences[end][depth] == sequences[low][depth]:
            end += 1
        yield low, end
        low = end
