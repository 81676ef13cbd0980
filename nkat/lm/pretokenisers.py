"""How a BPE vocabulary cuts text into words before it merges: a row for each `tokenizer.ggml.pre` that llama.cpp knows.

Ids are to be llama.cpp's, so a row cuts as llama.cpp does where that differs from the model's own tokenizer.json: its
regular expressions know no case beyond ASCII, spaces beyond ASCII are nothing but spaces, and digits that are counted
from the right are cut together with the text before them.
Source: `llm_tokenizer_bpe` and `llama_vocab::impl::load` of src/llama-vocab.cpp and src/unicode.cpp, llama.cpp b11434.
Not here are embedding models, and those whose cutting is a program of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a vocabulary cuts text into words: each pattern in turn isolates its matches in every piece so far.

    ignore_merges: a word that is a token stays whole, even where the merges would not build it
    adds_bos: unless `tokenizer.ggml.add_bos_token` says otherwise
    always_bos: whatever it says
    assumes_bos: a file without `bos_token_id` has llama.cpp's default, 11
    characters: merges are of characters, with U+2581 for a space, and not of bytes
    whole_newlines: a run of line feeds that is a token stays whole
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    always_bos: bool = False
    assumes_bos: bool = True
    characters: bool = False
    whole_newlines: bool = False


# Contractions name both cases instead of using (?i:...), which would also match U+017F (long s).
_CONTRACTION = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_EXAONE_MOE = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED_CODER = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_WHITESPACES = "|".join(rf"\s{{{count}}}(?!\S)" for count in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
_JAIS2 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_WHITESPACES}|\s"
_SENTENCES = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_LINES = r"[^\n]+|\n+"

_HAN = "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002ebef\uf900-\ufaff\U0002f800-\U0002fa1f"
_KIMI = rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+(?:{_CONTRACTION})?|\p{{N}}{{1,3}}|{_REST}"


def _cased(upper: str, lower: str, after: str, rest: str) -> str:
    """Words whose capitals come first, as "HTMLText" → "HTML", "Text" by ASCII's cases only."""
    first = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{first}{upper}*{lower}+{after}|{first}{upper}+{lower}*{after}"
    return rf"{words}|{rest}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_TEKKEN = _cased(r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]", "", r"\p{N}")
_GPT4O = _cased(r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]", f"(?:{_CONTRACTION})?", r"\p{N}{1,3}")
_GRANITE_MULTI = _cased(r"[\p{L}\p{M}&&[^a-z]]", r"[\p{L}\p{M}&&[^A-Z]]", f"(?:{_CONTRACTION})?", r"\p{N}{1,3}")
_AYA = _cased(r"[\p{L}\p{M}]", r"[\p{L}\p{M}]", f"(?:{_CONTRACTION})?", r"\p{N}{1,3}")
_YOUTU = _cased(r"[\p{L}\p{M}]", r"[\p{L}\p{M}]", f"(?:{_CONTRACTION})?", r"\p{N}")

_ASCII_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_MARKS_FIRST = rf"{_ASCII_MARKS}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+"
_DEEPSEEK3 = rf"{_MARKS_FIRST}[\r\n]*|{_SPACES}"
_SPARK = rf"{_MARKS_FIRST}|[\r\n]|\s+(?!\S)|\s+"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CJK_TO_HANGUL = "[\u0800-\u9fa5\uac00-\ud7ff&&[^\\s]]+"
_YOUTU_FIRST = (
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    f"|[\u3105-\u312f]+|{_CJK}"
)
_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
# Digits in groups of three from the right; llama.cpp leaves what stands before a number with its first group.
_GROUPS_OF_DIGITS = r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
# Letters of scripts with two cases, in the Unicode of its time.
_DEEPSEEK_LETTERS = (
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
_DEEPSEEK_MARKS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002]+"

# Every name is one that llama.cpp maps to the patterns of its row.
_FAMILIES = {
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": PreTokenizer(
        (_LLAMA3,), ignore_merges=True, adds_bos=True
    ),
    "dbrx smaug-bpe": PreTokenizer((_LLAMA3,)),
    "chatglm-bpe": PreTokenizer((_LLAMA3,), assumes_bos=False),
    "glm4 glm5": PreTokenizer((_LLAMA3,), ignore_merges=True, assumes_bos=False),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}+|{_REST}"), ignore_merges=True),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2 "
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer((_QWEN2,)),
    "ufakzeka": PreTokenizer((rf"{_LETTERS}|\p{{N}}|{_REST}",)),
    "laguna": PreTokenizer((_LINES, _QWEN2)),
    "qwen35": PreTokenizer((_QWEN35,)),
    "exaone-moe": PreTokenizer((_EXAONE_MOE,)),
    "seed-coder": PreTokenizer((_SEED_CODER,)),
    "jais-2": PreTokenizer((_JAIS2,)),
    "kimi-k2": PreTokenizer((_KIMI,)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, adds_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": PreTokenizer((_GPT4O,)),
    "granite-embed-multi-97m": PreTokenizer((_GRANITE_MULTI,), ignore_merges=True),
    "tiny_aya cohere2moe": PreTokenizer((_GROUPS_OF_DIGITS, _AYA)),
    "youtu": PreTokenizer((_YOUTU_FIRST, _YOUTU), ignore_merges=True),
    "superbpe": PreTokenizer((r"\p{N}+", r"\p{N}+?(?=(?:[0-9]{3})+(?![0-9]))")),
    "deepseek-llm": PreTokenizer((r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_MARKS, r"\s+\z", _CJK_TO_HANGUL, r"\p{N}+")),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_TO_HANGUL, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK3)),
    "spark2_5": PreTokenizer((r"\p{N}{1,3}", _CJK, _SPARK, r"\p{N}")),
    "afmoe": PreTokenizer((_GROUPS_OF_DIGITS, _ASIAN, _DEEPSEEK3)),
    "poro-chat bloom gpt3-finnish": PreTokenizer((_SENTENCES,)),
    "viking": PreTokenizer((_SENTENCES, r"\p{N}")),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": PreTokenizer((r"\p{N}", _GPT2)),
    "gpt-2 phi-2 mpt olmo jais gigachat a.x-4.0 mellum exaone4 trillion granite-docling modern-bert "
    "jina-es jina-de jina-v2-es jina-v2-de": PreTokenizer((_GPT2,)),
    "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "chameleon": PreTokenizer(
        (
            *(r"<sentinel:[0-9]+>", r"IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  ", r"\p{N}"),
            *(r"[\p{P}!-/:-@\[-`{-~]", _GPT2),
        ),
        adds_bos=True,
    ),
    "gemma4 granite-embed-multi-311m": PreTokenizer(
        (_LINES,), adds_bos=True, always_bos=True, characters=True, whole_newlines=True
    ),
    "sarvam-moe": PreTokenizer((_LINES,), characters=True),
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {name: pre for names, pre in _FAMILIES.items() for name in names.split()}
