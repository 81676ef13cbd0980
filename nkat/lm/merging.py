"""Merging a word's characters or bytes into tokens: BPE by ranks, and SentencePiece's BPE by scores."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from heapq import heappop, heappush

import numpy as np
import tokenizers

from nkat.lm.pretokenisers import PreTokenizer
from nkat.lm.vocabulary import KEY, TokenizerError

SPACE = "\u2581"  # SentencePiece's visible space
_LONGEST_CACHED_WORD = 64  # characters; with the cache's size this bounds its memory


def _byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes 0..255 in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTE_TO_CHAR = _byte_alphabet()
_CHAR_TO_BYTE = {char: bytes([byte]) for byte, char in enumerate(_BYTE_TO_CHAR)}


def cuts(pre: PreTokenizer) -> list[tokenizers.pre_tokenizers.PreTokenizer]:
    """The steps by which the library cuts a text into words."""
    split, regex = tokenizers.pre_tokenizers.Split, tokenizers.Regex
    return [split(regex(pattern), behavior="isolated") for pattern in pre.patterns]


class _BPE:
    """Merges by rank, inside the words that a pre-tokeniser cuts."""

    def __init__(
        self,
        token_ids: dict[str, int],
        merges: list[str],
        pre: PreTokenizer,
        alphabet: list[tokenizers.pre_tokenizers.PreTokenizer],
        byte_fallback: bool = False,
    ) -> None:
        """alphabet: what turns a word into the characters that are merged;  byte_fallback: <0xNN> for those without a
        token."""
        # The library skips a character without a token and then merges its neighbours across the gap; as an unknown
        # token the gap stays, and `encode` drops it. Of more than one character, so that no text is that token.
        gap = "\0\0"
        while gap in token_ids:
            gap += "\0"
        self._gap_id = len(token_ids)
        unique = dict.fromkeys(merges)  # of a repeated merge the first rank holds
        pairs = [(merge[: (at := merge.index(" ", 1))], merge[at + 1 :]) for merge in unique]
        pairs = [(left, right) for left, right in pairs if right and " " not in right]  # no word has a space
        unknown = {text: None for left, right in pairs for text in (left, right, left + right) if text not in token_ids}
        unknown.pop(gap, None)
        if unknown:
            odd = next(iter(unknown))
            warnings.warn(
                f"{KEY}merges: {len(unknown)} of the texts that they merge are no tokens, as {odd[:80]!r}; "
                "where a text comes to one it is spelled, as by llama.cpp",
                stacklevel=5,
            )
        no_tokens = {text: self._gap_id + 1 + i for i, text in enumerate(unknown)}
        self._spelled = {token: self._spell(text, token_ids) for text, token in no_tokens.items()}
        bpe = tokenizers.models.BPE(
            token_ids | {gap: self._gap_id} | no_tokens,
            pairs,
            unk_token=gap,
            ignore_merges=pre.ignore_merges,
            byte_fallback=byte_fallback,
        )
        self._tokenizer = tokenizers.Tokenizer(bpe)
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*cuts(pre), *alphabet])

    def _merge(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [each for token in ids for each in self._spelled.get(token, (token,))] if self._spelled else ids

    @staticmethod
    def _spell(text: str, token_ids: Mapping[str, int]) -> list[int]:
        """What llama.cpp makes of a merged text that is no token."""
        raise NotImplementedError


class ByteBPE(_BPE):
    """Byte-level: a word is merged from its bytes, each written as a printable character."""

    def __init__(self, token_ids: dict[str, int], merges: list[str], pre: PreTokenizer) -> None:
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        super().__init__(token_ids, merges, pre, [byte_level])
        self._missing = {byte for byte, char in enumerate(_BYTE_TO_CHAR) if char not in token_ids}

    def encode(self, text: str) -> list[int]:
        ids = self._merge(text)
        if self._missing and self._gap_id in ids:
            dropped = ", ".join(f"0x{byte:02X}" for byte in sorted(self._missing.intersection(text.encode())))
            warnings.warn(
                f"{KEY}tokens has no token for some bytes of the text ({dropped}); they are dropped, as by llama.cpp",
                stacklevel=3,
            )
            ids = [token for token in ids if token != self._gap_id]
        return ids

    @staticmethod
    def _spell(text: str, token_ids: Mapping[str, int]) -> list[int]:
        """Byte by byte of the text as it is written: characters beyond ASCII, as that of the space, are lost."""
        return [token_ids[char] for char in text if char.isascii() and char in token_ids]

    @staticmethod
    def piece(text: str) -> bytes:
        # A character outside the alphabet (of a special token declared as a normal one) stands for itself.
        return b"".join(_CHAR_TO_BYTE.get(char) or char.encode() for char in text)


class CharacterBPE(_BPE):
    """A word is merged from its characters, with SentencePiece's space; those without a token become their bytes."""

    def __init__(self, token_ids: dict[str, int], merges: list[str], pre: PreTokenizer) -> None:
        for byte in range(256):
            if f"<0x{byte:02X}>" not in token_ids:
                raise TokenizerError(f"{KEY}tokens has no token for the byte <0x{byte:02X}>")
        super().__init__(token_ids, merges, pre, [], byte_fallback=True)
        self._token_ids, self._whole_newlines = token_ids, pre.whole_newlines

    def encode(self, text: str) -> list[int]:
        text = text.replace(" ", SPACE)
        if not self._whole_newlines:
            return self._merge(text)
        ids: list[int] = []
        for piece in filter(None, re.split(r"(\n+)", text)):
            token = self._token_ids.get(piece) if piece[0] == "\n" else None
            ids += self._merge(piece) if token is None else [token]
        return ids

    @staticmethod
    def _spell(text: str, token_ids: Mapping[str, int]) -> list[int]:
        return [token_ids[f"<0x{byte:02X}>"] for byte in text.encode()]

    @staticmethod
    def piece(text: str) -> bytes:
        return text.replace(SPACE, " ").encode()


class SentencePiece:
    """Merges by score: of all pairs that are a token together the best first, whatever the words."""

    def __init__(self, token_ids: dict[str, int], scores: np.ndarray, add_space_prefix: bool) -> None:
        self._ids = token_ids
        self._costs = (-scores.astype(np.float32)).tolist()  # llama.cpp compares in float32
        self.add_space_prefix = add_space_prefix
        # Words are encoded one by one and remembered. Cutting before U+2581 changes nothing where no token contains it
        # after that other character, so those characters (Gemma 3: only ">", from ">▁</") are found first.
        joined = " ".join(token_ids)  # escaped text has no spaces, so pairs that contain one do not matter
        joins = {SPACE, *(pair[0] for pair in re.findall(f"[^ {SPACE}]{SPACE}", joined))}
        self._word_starts = re.compile(f"(?<=[^{re.escape(''.join(sorted(joins)))}])(?={SPACE})")
        self._encode_cached = lru_cache(maxsize=1 << 16)(self._encode_word)

    def encode(self, text: str) -> list[int]:
        if self.add_space_prefix:
            text = " " + text
        ids: list[int] = []
        for word in self._word_starts.split(text.replace(" ", SPACE)):
            ids += self._encode_cached(word) if len(word) <= _LONGEST_CACHED_WORD else self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Merge the cheapest adjacent pair until none is left; `symbols[i]` is "" once a symbol to its left took it."""
        symbols = list(word)
        end = len(symbols)
        left_of = list(range(-1, end - 1))
        right_of = list(range(1, end + 1))
        queue: list[tuple[float, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            merged = symbols[left] + symbols[right]
            token = self._ids.get(merged)
            if token is not None:
                heappush(queue, (self._costs[token], left, right, len(merged)))

        for right in range(1, end):
            offer(right - 1, right)
        while queue:
            _, left, right, size = heappop(queue)
            # Symbols only grow, so an unchanged size means that the pair is still the one that was offered.
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != size:
                continue
            symbols[left] += symbols[right]
            symbols[right] = ""
            after = right_of[left] = right_of[right]
            if after < end:
                left_of[after] = left
                offer(left, after)
            if left_of[left] >= 0:
                offer(left_of[left], left)

        ids: list[int] = []
        for symbol in filter(None, symbols):
            token = self._ids.get(symbol)
            ids += self._byte_ids(symbol) if token is None else (token,)
        return tuple(ids)

    def _byte_ids(self, char: str) -> list[int]:
        try:
            return [self._ids[f"<0x{byte:02X}>"] for byte in char.encode()]
        except KeyError as missing:
            raise TokenizerError(f"{KEY}tokens has neither {char!r} nor the byte token {missing}") from None

    @staticmethod
    def piece(text: str) -> bytes:
        return text.replace(SPACE, " ").encode()
