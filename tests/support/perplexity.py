"""Perplexity of a model on a text, from the parts."""

from __future__ import annotations

from nkat.lm.tokenizer import Tokenizer
from nkat.lm.transformer import Transformer
from nkat.measure.perplexity import CONTEXT, DEFAULT_BATCH, Perplexity, score_chunks, text_chunks


def measure(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    chunks: int | None = None,
    context: int = CONTEXT,
    batch: int = DEFAULT_BATCH,
) -> Perplexity:
    cut = text_chunks(tokenizer, text, chunks, context)
    return Perplexity(score_chunks(model, cut, batch=batch), context)
