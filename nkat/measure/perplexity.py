"""Perplexity by llama.cpp's convention, and the paired comparison of two models on the same text.

The convention (llama-perplexity of https://github.com/ggml-org/llama.cpp, tools/perplexity): the text, without one
final line break, is tokenised once with BOS where the vocabulary adds one, and cut into chunks of `context` tokens that
do not overlap; the rest is dropped. BOS takes the place of each chunk's first token where the vocabulary adds one. Of
the predictions in a chunk of 512 the last 255 are scored, so that every one of them has seen at least 256 tokens.

    ppl = exp(mean nll)        ± = ppl · sqrt(variance of nll / (n − 1))        n scored tokens

Unlike llama.cpp, one chunk of text is enough (it asks for two), and chunks are no longer than what the model was made
for unless that is asked for (`chunk_context`).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch

from nkat.engine.scoring import MakeScorer, make_scorer
from nkat.errors import NKATError
from nkat.host.console import bar, counted
from nkat.lm.tokenizer import Tokenizer
from nkat.lm.transformer import Transformer

CONTEXT = 512
DEFAULT_BATCH = 4


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What a model scored on a text.

    nll: −ln p of every scored token in nats, float64 [chunks, scored tokens of a chunk]
    scattered: over how many chunks they were where not all tokens of each count; nll then is [1, n]
    """

    nll: torch.Tensor
    context: int = CONTEXT
    scattered: int | None = None

    @property
    def chunks(self) -> int:
        return self.nll.shape[0] if self.scattered is None else self.scattered

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return self.nll.numel()

    @property
    def chunk_nll(self) -> torch.Tensor:
        """Mean nll of each chunk, float64 [chunks]."""
        return self.nll.mean(dim=1)

    @property
    def ppl(self) -> float:
        return math.exp(self.nll.mean())

    @property
    def stderr(self) -> float:
        return self.ppl * standard_error(self.nll)

    def __str__(self) -> str:
        return perplexity_text(self.ppl, self.stderr)

    def record(self) -> dict[str, float]:
        return {"perplexity": self.ppl, "perplexity_stderr": self.stderr}


@dataclass(frozen=True, slots=True)
class PairedChange:
    """How much b's perplexity differs from a's, from the differences token by token.

    log_ratio: mean of nll_b − nll_a = ln(ppl_b / ppl_a), negative where b is better; log_ratio_stderr: its standard
    error, much smaller than each perplexity's own ± because both models find the same tokens hard
    """

    log_ratio: float
    log_ratio_stderr: float

    @property
    def percent(self) -> float:
        """Change of perplexity in per cent of a's."""
        return 100.0 * math.expm1(self.log_ratio)

    @property
    def percent_stderr(self) -> float:
        return 100.0 * math.exp(self.log_ratio) * self.log_ratio_stderr

    @property
    def clear(self) -> bool:
        """Whether b differs from a beyond two standard errors."""
        return abs(self.log_ratio) > 2 * self.log_ratio_stderr

    def __str__(self) -> str:
        return change_text(self.percent, self.percent_stderr)

    def record(self, prefix: str = "") -> dict[str, float]:
        return {f"{prefix}change_percent": self.percent, f"{prefix}change_percent_stderr": self.percent_stderr}


def perplexity_text(perplexity: float, stderr: float, digits: int = 4) -> str:
    """For people: 23.5115 ± 0.7140."""
    return f"{perplexity:.{digits}f} ± {stderr:.{digits}f}"


def change_text(percent: float, stderr: float, unit: str = " %") -> str:
    """For people: -0.547 % ± 0.057. unit: "" under a heading that names it."""
    return f"{percent:+.3f}{unit} ± {stderr:.3f}"


def scored_tokens(context: int) -> int:
    """Scored predictions of one chunk: 255 of 512."""
    return context - 1 - context // 2


def chunk_context(made_for: int) -> int:
    """Tokens of a chunk where the user names no number: 512, or all that a model is made for."""
    return min(CONTEXT, made_for)


def warn_of_short_chunks(context: int) -> None:
    """Where `chunk_context` is not the usual one."""
    if context < CONTEXT:
        warnings.warn(
            f"the model was made for {context} tokens: chunks have as many, where others have {CONTEXT}; perplexities "
            "of different contexts are not to be compared",
            stacklevel=3,
        )


def text_chunks(tokenizer: Tokenizer, text: str, chunks: int | None = None, context: int = CONTEXT) -> torch.Tensor:
    """Tokenises a text and cuts it: int64 [chunks, context], BOS already in place.

    chunks: at most so many; None: all there are. Raises NKATError when there is not one.
    """
    if chunks is not None and chunks < 1:
        raise NKATError(f"the number of chunks must be at least 1, got {chunks}")
    if context < 8:
        raise NKATError(f"the context must be at least 8 tokens, got {context}")
    text = text.removesuffix("\n")
    if not text.strip():
        raise NKATError("the text is empty")
    ids = torch.tensor(tokenizer.encode(text, add_special=True), dtype=torch.int64)
    available = len(ids) // context
    if available == 0:
        raise NKATError(f"the text is too short: it has {counted(len(ids), 'token')}, and one chunk needs {context}")
    count = available if chunks is None else min(chunks, available)
    cut = ids[: count * context].view(count, context)
    bos = text_bos(tokenizer)
    if bos is not None:
        cut = cut.clone()
        cut[:, 0] = bos
    return cut


def text_bos(tokenizer: Tokenizer) -> int | None:
    """What a chunk begins with in place of its first token, None where the vocabulary adds nothing to texts."""
    return tokenizer.bos_id if tokenizer.adds_bos else None


def windows(count: int, context: int) -> torch.Tensor:
    """Places in a sequence of `count` tokens, int64 [C, context], such that each of them is scored.

    The scored places of a window follow those of the window before; the first window begins with the end of the
    sequence, and the last one goes beyond it: places are to be taken modulo `count`, and scored ones from `count` on
    have been scored before.
    """
    scored = scored_tokens(context)
    return torch.arange(-(-count // scored))[:, None] * scored + torch.arange(context) - (context - scored)


def score_chunks(
    model: Transformer,
    chunks: torch.Tensor,
    *,
    batch: int = DEFAULT_BATCH,
    progress: str | None = None,
    make: MakeScorer = make_scorer,
) -> torch.Tensor:
    """−ln p of the scored tokens of chunks [C, context]: float64 [C, scored_tokens(context)], on the CPU.

    batch: chunks in one forward pass: they share each weight's unpacking, and take memory for their activations
    progress: label of a progress bar on stderr; None: no bar
    make: what makes the scorer; a `KeptScorer` where a Θ is measured many times
    """
    return _score(model, chunks, 1, batch, progress, make)[0]


def score_arms(
    model: Transformer,
    chunks: torch.Tensor,
    *,
    batch: int = DEFAULT_BATCH,
    progress: str | None = None,
    make: MakeScorer = make_scorer,
) -> torch.Tensor:
    """The same without Θ and with it, float64 [2, C, ...]; both arms of a chunk share a forward pass, as two of it."""
    return _score(model, chunks, 2, batch, progress, make)


def _score(
    model: Transformer, chunks: torch.Tensor, arms: int, batch: int, progress: str | None, make: MakeScorer
) -> torch.Tensor:
    """[arms, C, scored]"""
    if batch < 1:
        raise NKATError(f"the batch must be at least 1 chunk, got {batch}")
    check_ids(chunks, model.config.vocab_size)
    count, context = chunks.shape
    together = min(max(1, batch // arms), count)
    scorer = make(model, together * arms, context)
    results = []
    with bar(count, progress, "chunk", enabled=progress is not None) as shown:
        for part in chunks.split(together):
            results.append(scorer.score(part)[None] if arms == 1 else scorer.score_arms(part))
            shown.update(len(part))
    nll = torch.cat(results, dim=1)
    for arm in nll:
        check_finite(arm)
    return nll


def check_ids(chunks: torch.Tensor, vocabulary: int) -> None:
    """Raises NKATError for token ids that are none."""
    low, high = (int(x) for x in torch.aminmax(chunks))
    if low < 0 or high >= vocabulary:
        raise NKATError(f"token id {low if low < 0 else high} lies outside the vocabulary of {vocabulary}")


def check_finite(scores: torch.Tensor) -> None:
    """Raises NKATError where what was found of a chunk, [C, scored], is no number."""
    wrong = (~torch.isfinite(scores)).any(dim=1)
    if bool(wrong.any()):
        chunk = int(wrong.nonzero()[0, 0])
        raise NKATError(f"the model's predictions for chunk {chunk} are not finite numbers (damaged weights?)")


def paired(a: Perplexity, b: Perplexity) -> PairedChange:
    """The change from a to b, which must have been scored on the same chunks."""
    if a.nll.shape != b.nll.shape:
        raise NKATError(
            f"a paired comparison needs the same chunks: {tuple(a.nll.shape)} and {tuple(b.nll.shape)} tokens scored"
        )
    difference = b.nll - a.nll
    return PairedChange(float(difference.mean()), standard_error(difference))


def standard_error(values: torch.Tensor) -> float:
    """Of the mean, as llama.cpp computes it: sqrt(population variance / (n − 1))."""
    return math.sqrt(float(values.var(correction=0)) / (values.numel() - 1))
