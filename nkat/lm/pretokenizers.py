"""How byte-level vocabularies cut text into words, by the name in `tokenizer.ggml.pre`.

Source of the names and of what differs between them: src/llama-vocab.cpp of llama.cpp b11434.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a `gpt2` vocabulary cuts text into words: each pattern in turn isolates its matches in every piece so far."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token stays whole, even where the merges would not build it
    adds_bos: bool = False  # unless tokenizer.ggml.add_bos_token says otherwise


# The patterns are those of the models' own tokenizer.json. Contractions name both cases instead of using (?i:...),
# which would also match U+017F (long s).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_WORD}|\p{{N}}|{_REST}"
# Words that may begin in capitals and end in small letters. Letters beyond ASCII count as both, as in llama.cpp, whose
# regular expressions do not know their case; the models' own also keep combining marks in words.
_CAPITAL, _SMALL = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}*{_SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}+{_SMALL}*"
_CONTRACTION = r"(?:'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL]))?"
_CASED_CONTRACTED = "|".join(part + _CONTRACTION for part in _CASED.split("|"))
_SLASH_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED}|\p{{N}}|{_SLASH_REST}"
_GPT_4O = rf"{_CASED_CONTRACTED}|\p{{N}}{{1,3}}|{_SLASH_REST}"

# Every name is one that llama.cpp maps to the patterns of its row.
_FAMILIES = {
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizer((_LLAMA3,), True, True),
    "dbrx smaug-bpe": PreTokenizer((_LLAMA3,)),
    "tekken": PreTokenizer((_TEKKEN,), True, True),
    "gpt-4o llama4 kanana2 talkie": PreTokenizer((_GPT_4O,)),
    "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan": PreTokenizer((_QWEN2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": PreTokenizer((r"\p{N}", _GPT2)),
    "gpt-2 phi-2 mpt olmo jais gigachat a.x-4.0 mellum exaone4 trillion": PreTokenizer((_GPT2,)),
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {name: pre for names, pre in _FAMILIES.items() for name in names.split()}
