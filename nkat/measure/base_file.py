"""llama-perplexity's base files: a text's tokens, and what a model predicted for each that is scored.

Little-endian, as `llama-perplexity --kl-divergence-base FILE` of llama.cpp writes and reads it (tools/perplexity):

    "_logits_", int32 context, int32 vocabulary, int32 chunks, int32 [chunks, context] token ids,
    then for each chunk its scored tokens' rows, uint16 (`nkat.engine.log_probs`)

What text it is and which model predicted it is not in it. A file has 2 bytes for each scored token and id of the
vocabulary: SmolLM2's 25 MB a chunk of 512, Gemma's 134. Chunks are read and written in turn.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nkat.engine.log_probs import heads_of, row_words
from nkat.errors import NKATError
from nkat.host.console import counted
from nkat.host.files import atomic_output
from nkat.measure.perplexity import scored_tokens

_MAGIC = b"_logits_"
_HEAD = struct.Struct("<8s3i")
_MOST = 1 << 24  # tokens of a chunk, ids of a vocabulary: more is no such file


@dataclass(frozen=True, slots=True, eq=False)
class BaseFile:
    """An opened base file. tokens: int64 [chunks, context]"""

    path: Path
    vocabulary: int
    tokens: torch.Tensor

    @property
    def chunk_bytes(self) -> int:
        """Of one chunk's rows."""
        return _chunk_bytes(self.tokens.shape[1], self.vocabulary)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Some chunks' rows, uint16 [count · scored, words]. Raises NKATError for what is none."""
        start = _HEAD.size + 4 * self.tokens.numel() + first * self.chunk_bytes
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(start)
            data = file.read(count * self.chunk_bytes)
        if len(data) != count * self.chunk_bytes:
            raise NKATError(f"{self.path}: was cut short while it was read")
        rows = np.frombuffer(data, "<u2").reshape(-1, row_words(self.vocabulary))
        step, lowest = heads_of(rows).T
        good = np.isfinite(step) & np.isfinite(lowest) & (step >= 0)
        if not good.all():
            chunk = first + int(np.argmin(good)) // scored_tokens(self.tokens.shape[1])
            raise NKATError(f"{self.path}: damaged: log-probabilities of chunk {chunk} are no numbers")
        return rows


def open_base_file(path: Path) -> BaseFile:
    """Raises NKATError for what is no base file, or not all of one."""
    with _reading(path), path.open("rb") as file:
        size = path.stat().st_size
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size or not head.startswith(_MAGIC):
            raise NKATError(f"{path}: not a file of log-probabilities (llama-perplexity's --kl-divergence-base)")
        _, context, vocabulary, chunks = _HEAD.unpack(head)
        if not (8 <= context <= _MOST and 2 <= vocabulary <= _MOST and chunks >= 1):
            raise NKATError(f"{path}: damaged: has {chunks} chunks of {context} tokens of a vocabulary of {vocabulary}")
        expected = _HEAD.size + chunks * (4 * context + _chunk_bytes(context, vocabulary))
        if size != expected:
            raise NKATError(
                f"{path}: has {size:,} bytes, and {counted(chunks, 'chunk')} of {context} tokens are {expected:,} "
                "(was writing it interrupted?)"
            )
        tokens = np.frombuffer(file.read(4 * chunks * context), "<i4").reshape(chunks, context)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise NKATError(
            f"{path}: damaged: token id {low if low < 0 else high} lies outside its vocabulary of {vocabulary}"
        )
    return BaseFile(path, vocabulary, torch.from_numpy(tokens.astype(np.int64)))


def write_base_file(
    path: Path, tokens: torch.Tensor, vocabulary: int, rows: Iterable[np.ndarray], force: bool = False
) -> None:
    """The file is there when all rows were given, and not before.

    tokens: int64 [chunks, context];  rows: uint16 [n, words] of the scored tokens, one after another
    """
    chunks, context = tokens.shape
    size = _HEAD.size + chunks * (4 * context + _chunk_bytes(context, vocabulary))
    with atomic_output(path, size, force) as file:
        file.write(_HEAD.pack(_MAGIC, context, vocabulary, chunks))
        file.write(tokens.numpy().astype("<i4").tobytes())
        for part in rows:
            file.write(part.astype("<u2", copy=False).tobytes())
        if file.tell() != size:
            raise ValueError(f"{file.tell()} bytes were given for a file of {size}")


def _chunk_bytes(context: int, vocabulary: int) -> int:
    return 2 * scored_tokens(context) * row_words(vocabulary)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NKATError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise NKATError(f"{path}: this is a folder, not a file of log-probabilities") from None
    except OSError as error:
        raise NKATError(f"{path}: cannot be read: {error.strerror or error}") from None
