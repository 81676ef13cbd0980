"""Text from a prompt: sampling the next token, and streaming what has been generated.

Samplers and their order are llama.cpp's (src/llama-sampler.cpp; top-k, top-p, min-p, temperature), so that the same
settings mean the same thing there. Another order is in use elsewhere (Hugging Face applies the temperature first).
Penalties, grammars and the other samplers of llama.cpp are not here. The random numbers are Python's, so a seed gives
the same text on every run with the same logits, and not the text that llama.cpp draws from that seed.
"""

from __future__ import annotations

import codecs
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch

from nkat.engine.decoder import Decoder
from nkat.errors import NKATError
from nkat.host.console import bar
from nkat.host.interrupts import Terminated, interrupt_after
from nkat.lm.tokenizer import Tokenizer

PREFILL_PIECE = 512  # tokens of the prompt in one forward pass: bounds its memory and moves the progress bar

# "context": the decoder holds no more; "terminated": by SIGTERM or a terminal that is gone, after which nothing goes on
Stopped = Literal["end of generation", "length", "context", "interrupted", "terminated"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn, applied in this order; the defaults are llama.cpp's.

    top_k: only the k most likely tokens; 0: all
    top_p: of those, the fewest most likely ones whose probabilities sum to at least p (Holtzman et al., 2020, arXiv
        1904.09751); 1: all
    min_p: of those, the ones at least min_p times as likely as the best (Nguyen et al., 2024, arXiv 2407.01082); 0: all
    temperature: divides the logits of what is left; 0: the best token, whatever the rest says
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise NKATError(f"the temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise NKATError(f"top-k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise NKATError(f"top-p must be above 0 and at most 1 (off), got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise NKATError(f"min-p must be from 0 (off) to 1, got {self.min_p}")


class Sampler:
    """Draws tokens; the same seed and the same logits give the same tokens."""

    def __init__(self, sampling: Sampling, seed: int) -> None:
        self.sampling, self.seed = sampling, seed
        self._random = random.Random(seed)

    def candidates(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [V] → the tokens that may be drawn, most likely first, int64 [C], and their probabilities, float64.

        Raises NKATError when a logit is not a number, or none is finite.
        """
        logits = logits.detach().cpu()
        best = float(logits.max())
        if not math.isfinite(best):
            raise NKATError("the model's predictions are not finite numbers (damaged weights?)")
        sampling = self.sampling
        if sampling.temperature == 0:
            return logits.argmax().view(1), torch.ones(1, dtype=torch.float64)
        if 0 < sampling.top_k < len(logits):
            kept, ids = logits.topk(sampling.top_k)
        else:
            kept, ids = logits.sort(descending=True, stable=True)
        kept = kept.double()
        if sampling.top_p < 1:
            before = kept.softmax(dim=0).cumsum(dim=0).roll(1)
            before[0] = 0.0
            count = int((before < sampling.top_p).sum())
            kept, ids = kept[:count], ids[:count]
        if sampling.min_p > 0:
            count = int((kept >= best + math.log(sampling.min_p)).sum())
            kept, ids = kept[:count], ids[:count]
        return ids, (kept / sampling.temperature).softmax(dim=0)

    def pick(self, logits: torch.Tensor) -> int:
        """The next token."""
        ids, probabilities = self.candidates(logits)
        if len(ids) == 1:
            return int(ids[0])
        sums = probabilities.cumsum(dim=0)
        at = int(torch.searchsorted(sums, self._random.random() * float(sums[-1]), right=True))
        return int(ids[min(at, len(ids) - 1)])


@dataclass(frozen=True, slots=True)
class Generation:
    """What came out.

    prompt_tokens: of the prompt, 0 when it was interrupted there
    tokens: without the one that ended it; stopped: what did
    prefill_seconds: for the prompt; decode_seconds: from the first token's logits on, sampling and printing included
    steps: decode steps in decode_seconds
    reused: tokens of the prompt that were in the cache already (`nkat.engine.session`)
    """

    prompt_tokens: int
    tokens: list[int]
    text: str
    stopped: Stopped
    prefill_seconds: float
    decode_seconds: float
    steps: int
    reused: int = 0

    @property
    def prompt_speed(self) -> float:
        """Tokens of the prompt that were computed, per second."""
        return (self.prompt_tokens - self.reused) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def speed(self) -> float:
        """Decode steps per second."""
        return self.steps / self.decode_seconds if self.steps else 0.0


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int,
    on_text: Callable[[str], object],
) -> Generation:
    """Continues `prompt` until a token that ends generation, `max_tokens`, a full decoder, or Ctrl-C, which is no error
    here.

    decoder: empty, or holding what comes before the prompt (`nkat.engine.session`)
    on_text: gets each new piece of text as soon as its characters are complete
    """
    if not prompt:
        raise NKATError("the prompt is empty, and this vocabulary starts no text by itself")
    if max_tokens < 1:
        raise NKATError(f"at least one token must be asked for, got {max_tokens}")
    characters = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
    tokens: list[int] = []
    pieces: list[str] = []
    steps = 0
    stopped: Stopped = "length"

    def emit(piece: str) -> None:
        if piece:
            with interrupt_after():  # what is shown and what is kept are the same text
                pieces.append(piece)
                on_text(piece)

    started = perf_counter()
    prefilled = None
    try:
        logits = prefill(decoder, prompt)
        prefilled = perf_counter()
        while True:
            token = sampler.pick(logits)
            if token in tokenizer.eog_ids:
                stopped = "end of generation"
                break
            tokens.append(token)
            emit(characters.decode(tokenizer.decode_bytes([token])))
            if len(tokens) == max_tokens:
                break
            if decoder.length + 1 >= decoder.capacity:  # this token is the last that a model made for so many sees
                stopped = "context"
                break
            logits = decoder.step(token)
            steps += 1
    except KeyboardInterrupt as request:
        stopped = "terminated" if isinstance(request, Terminated) else "interrupted"
    finished = perf_counter()
    emit(characters.decode(b"", final=True))
    if prefilled is None:
        return Generation(0, tokens, "", stopped, finished - started, 0.0, 0)
    return Generation(len(prompt), tokens, "".join(pieces), stopped, prefilled - started, finished - prefilled, steps)


def prefill(decoder: Decoder, prompt: Sequence[int], what: str = "prompt") -> torch.Tensor:
    """The prompt, a piece at a time; logits after its last token, float32 [V]. what: for the progress bar"""
    with bar(len(prompt), what, "token") as progress:
        for start in range(0, len(prompt), PREFILL_PIECE):
            piece = prompt[start : start + PREFILL_PIECE]
            logits = decoder.prefill(piece)
            progress.update(len(piece))
    return logits
