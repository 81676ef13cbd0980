"""What a GGUF's metadata say of a vocabulary, checked: the tokens, and typed look-ups that name the key in errors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from nkat.errors import NKATError

KEY = "tokenizer.ggml."


class TokenizerError(NKATError):
    """A vocabulary that cannot be used, or text or ids that it cannot express; names the metadata key."""


def required(metadata: Mapping[str, Any], name: str) -> Any:
    if KEY + name not in metadata:
        raise TokenizerError(f"{KEY}{name} is missing from the metadata")
    return metadata[KEY + name]


def string(metadata: Mapping[str, Any], name: str) -> str:
    value = required(metadata, name)
    if not isinstance(value, str):
        raise TokenizerError(f"{KEY}{name} is {value!r:.80}, not a string")
    return value


def strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    value = required(metadata, name)
    if not isinstance(value, list) or not set(map(type, value)) <= {str}:
        raise TokenizerError(f"{KEY}{name} is not an array of strings")
    return value


def read_merges(metadata: Mapping[str, Any]) -> list[str]:
    """Those of two texts: others would make tokens that are none (see `read_tokens`)."""
    merges = strings(metadata, "merges")
    if not is_text("".join(merges)):
        merges = [merge for merge in merges if is_text(merge)]
    pairs = [merge for merge in merges if " " in merge[1:]]
    if len(pairs) < len(merges):
        odd = next(merge for merge in merges if " " not in merge[1:])
        warnings.warn(
            f"{KEY}merges: {len(merges) - len(pairs)} are not two tokens with a space between, as {odd[:80]!r}; they "
            "are not used, as by llama.cpp",
            stacklevel=4,
        )
    return pairs


def read_numbers(metadata: Mapping[str, Any], name: str, length: int) -> np.ndarray:
    value = required(metadata, name)
    try:
        numbers = np.asarray(value)
    except ValueError:  # a ragged nest of lists
        numbers = np.empty((0, 0))
    if numbers.ndim != 1 or numbers.dtype.kind not in "iuf" or np.isnan(numbers).any():
        raise TokenizerError(f"{KEY}{name} is not an array of numbers")
    if len(numbers) < length:
        raise TokenizerError(f"{KEY}{name} has {len(numbers)} entries for {length} tokens")
    if len(numbers) > length:
        warnings.warn(
            f"{KEY}{name} has {len(numbers)} entries for {length} tokens; the others are not used", stacklevel=4
        )
    return numbers[:length]


def flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(KEY + name, default)
    if not isinstance(value, bool):
        raise TokenizerError(f"{KEY}{name} is {value!r:.80}, not a boolean")
    return value


def read_tokens(metadata: Mapping[str, Any]) -> tuple[list[str], dict[int, bytes]]:
    """The tokens' texts, and the bytes of those that are no text (`nkat.gguf.file` keeps them as surrogates).

    Text never becomes such a token, so that it only needs a name that occurs nowhere: U+FFFF is no character.
    """
    tokens = strings(metadata, "tokens")
    if not tokens:
        raise TokenizerError(f"{KEY}tokens is empty")
    broken: dict[int, bytes] = {}
    if not is_text("".join(tokens)):
        try:
            broken = {
                token: text.encode("utf-8", "surrogateescape") for token, text in enumerate(tokens) if not is_text(text)
            }
        except UnicodeEncodeError:
            raise TokenizerError(f"{KEY}tokens holds text that is not valid Unicode") from None
        warnings.warn(f"{KEY}tokens: {len(broken)} are not valid UTF-8; they only appear in output", stacklevel=4)
        tokens = [f"\uffff{token}\uffff" if token in broken else text for token, text in enumerate(tokens)]
    # llama.cpp's name for a token without text, which could match anywhere.
    return [text or f"[EMPTY_{token}]" for token, text in enumerate(tokens)], broken


def is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
