"""Text to token ids and back with the vocabulary inside a GGUF file; the ids are those of llama.cpp.

Kinds of vocabulary (`tokenizer.ggml.model`):

- `gpt2`: BPE. A pre-tokeniser (`tokenizer.ggml.pre`, `nkat.lm.pretokenisers`) cuts the text with regular expressions,
  then merges are applied by rank inside each word. The `tokenizers` library does both. Merges are of bytes; of
  characters in a `gemma4` vocabulary and its like, which write spaces as U+2581 as well.
- `llama`: SentencePiece BPE. Of all adjacent pairs whose concatenation is a token, the one with the highest score is
  merged first, the leftmost among equals. This is written out here: `tokenizers` wants an explicit list of merges
  (514,847 for Gemma 3: 2 s to make, against 0.2 s for this class), orders equal scores by that list instead of by
  position, and cannot merge through a character that is not itself a token.

In both, special tokens are cut out of the text first: user-defined ones always, control and unknown ones with
`parse_special`, longest (in bytes) first. llama.cpp's order among equally long ones is unspecified; here it is by id.

Limits:
- Other vocabulary types (WordPiece, Unigram, RWKV, ...) and pre-tokenisers not in `PRE_TOKENIZERS` are refused.
- A `llama` vocabulary writes spaces as U+2581, so a U+2581 in the text decodes as a space; with `add_space_prefix` a
  space is put before each piece of text that starts the input or follows a special token.
- Some `gpt2` vocabularies lack tokens for some bytes (SmolLM2: U+0004 and five more control characters, and U+40000 to
  U+BFFFF). Those bytes are dropped with a warning, because llama.cpp drops them.
- Letters, digits and punctuation are Unicode 16's in `tokenizers` 0.23, Unicode 15's in llama.cpp b11434, so ids may
  differ next to the 4,395 characters between them (most of them Egyptian hieroglyphs).

Source of the rules: src/llama-vocab.cpp and src/unicode.cpp of llama.cpp b11434; metadata keys: the GGUF specification.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import index, itemgetter
from typing import Any

import numpy as np
from gguf import TokenType

from nkat.lm.merging import ByteBPE, CharacterBPE, SentencePiece
from nkat.lm.pretokenisers import PRE_TOKENIZERS, PreTokenizer
from nkat.lm.vocabulary import (
    KEY,
    TokenizerError,
    flag,
    read_merges,
    read_numbers,
    read_tokens,
    string,
)

_KINDS = ("gpt2", "gemma4", "llama")
_OWN_PRE = "gemma4"  # a kind that names its pre-tokeniser, and has no special ids unless the file says so
_ID_UNSET = 2**32 - 1  # writers store -1 in the unsigned id fields for "this vocabulary has none"

# Texts by which llama.cpp knows tokens that end a generation, whatever their declared type.
_END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
# Fill-in-the-middle tokens: metadata key and the texts that stand in for it; the last three end a generation.
_FIM_TEXTS = {
    "fim_pre_token_id": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
                         "<|code_prefix|>", "<|prefix|>"),
    "fim_suf_token_id": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
                         "<|code_suffix|>", "<|suffix|>"),
    "fim_mid_token_id": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
                         "<|code_middle|>", "<|middle|>"),
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}  # fmt: skip
_FIM_ENDS = ("fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")
# One of those texts, beside which others it ends no generation, and whether it is still cut out of texts.
_NO_ENDS = (
    ("<|end|>", {"<|return|>", "<|call|>"}, True),
    ("<|end|>", {"<|return|>", "<|calls|>"}, True),
    ("<|end|>", {"<|flush|>", "<|call|>"}, True),
    ("<|end|>", {"<|flush|>", "<|calls|>"}, True),
    ("</s>", {"<|tool_response>"}, False),
)
_USER_DEFINED_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


class Tokenizer:
    """A vocabulary and its rules. Made by `from_metadata`; immutable afterwards but for its caches.

    Attributes:
        vocab_size: number of tokens; ids are 0 .. vocab_size - 1.
        bos_id, eos_id: begin and end of sequence, None where the vocabulary has none.
        adds_bos: whether `encode(add_special=True)` puts bos_id first.
        eog_ids: tokens that end a generation.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """See `from_metadata`."""
        kind = string(metadata, "model")
        if kind not in _KINDS:
            raise TokenizerError(f"{KEY}model is {kind[:80]!r}; supported are {', '.join(map(repr, _KINDS))}")
        self._tokens, self._broken = read_tokens(metadata)
        self.vocab_size = len(self._tokens)
        token_ids = {text: token for token, text in enumerate(self._tokens)}
        if len(token_ids) != self.vocab_size:
            again = next(token for token, text in enumerate(self._tokens) if token_ids[text] != token)
            raise TokenizerError(f"{KEY}tokens holds {self._tokens[again][:80]!r} twice, at {again} and later")

        self._model: ByteBPE | CharacterBPE | SentencePiece
        default_bos: int | None
        default_eos: int | None
        if kind != "llama":
            pre = _pre_tokenizer(metadata, kind)
            default_bos = 11 if pre.assumes_bos and kind != _OWN_PRE else None
            default_eos = 11 if kind != _OWN_PRE else None
            adds_bos, always_bos = pre.adds_bos, pre.always_bos
            bpe = CharacterBPE if pre.characters else ByteBPE
            self._model = bpe(token_ids, read_merges(metadata), pre)
        else:
            default_bos, default_eos, adds_bos, always_bos = 1, 2, True, False
            if f"{KEY}scores" in metadata:
                scores = read_numbers(metadata, "scores", self.vocab_size)
            else:
                warnings.warn(f"{KEY}scores is missing; all are 0, as in llama.cpp", stacklevel=3)
                scores = np.zeros(self.vocab_size, np.float32)
            self._model = SentencePiece(token_ids, scores, flag(metadata, "add_space_prefix", True))

        self.bos_id = self._id(metadata, "bos_token_id", default_bos)
        self.eos_id = self._id(metadata, "eos_token_id", default_eos)
        self.adds_bos = flag(metadata, "add_bos_token", adds_bos) or always_bos
        self._before = _added("bos", self.bos_id, self.adds_bos)
        self._after = _added("eos", self.eos_id, flag(metadata, "add_eos_token", False))
        self._set_special_tokens(metadata, token_ids)
        self._pieces: dict[int, bytes] = {}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from a GGUF's metadata (string arrays as list[str], numeric arrays as numpy arrays or lists).

        Missing `tokenizer.ggml.pre`, `.token_type`, `.*_token_id` and `.add_*` get llama.cpp's defaults (`.pre` with a
        warning); a special id of 2**32 - 1 means missing. Raises TokenizerError naming the key for everything else.
        """
        return cls(metadata)

    def _set_special_tokens(self, metadata: Mapping[str, Any], token_ids: Mapping[str, int]) -> None:
        """Find out which tokens are cut out of texts, which are bytes, and which end a generation."""
        types = np.full(self.vocab_size, TokenType.NORMAL)
        if f"{KEY}token_type" in metadata:
            types = read_numbers(metadata, "token_type", self.vocab_size)

        def of_type(*kinds: TokenType) -> set[int]:
            return set(np.flatnonzero(np.isin(types, kinds)).tolist())

        def of_text(texts: Sequence[str]) -> list[int]:
            return [token_ids[text] for text in texts if text in token_ids]

        ends = {self.eos_id, *of_text(_END_TEXTS)}
        ends |= {self._id(metadata, name) for name in ("eot_token_id", "eom_token_id")}
        control = of_type(TokenType.CONTROL, TokenType.UNKNOWN).union(of_text(_END_TEXTS))
        for name, texts in _FIM_TEXTS.items():
            token = self._id(metadata, name)
            if token is None:
                known_by_text = of_text(texts)[:1]
                control.update(known_by_text)
                token = known_by_text[0] if known_by_text else None
            if name in _FIM_ENDS:
                ends.add(token)
        user_defined = (of_type(TokenType.USER_DEFINED) - control).union(of_text(_USER_DEFINED_TEXTS))
        present = {self._tokens[token] for token in ends if token is not None}
        for text, others, stays_special in _NO_ENDS:
            if text in present and others <= present:
                token = token_ids[text]
                ends.remove(token)
                control.discard(token)
                (user_defined.add if stays_special else user_defined.discard)(token)
        self.eog_ids = frozenset(token for token in ends if token is not None)
        self._special_ids = {self._tokens[token]: token for token in user_defined | control}
        self._special = sorted(self._special_ids)
        self._user_defined = sorted(self._tokens[token] for token in user_defined)

        self._bytes: dict[int, bytes] = {}
        odd: list[str] = []
        for token in of_type(TokenType.BYTE):
            text = self._tokens[token]
            match = re.fullmatch("<0x([0-9A-Fa-f]{2})>", text)
            if match is None:
                odd.append(text)
            else:
                self._bytes[token] = bytes.fromhex(match[1])
        if odd:
            warnings.warn(
                f"{KEY}token_type says byte of {len(odd)} tokens that name none (<0xNN>), as {odd[0][:80]!r}; they are "
                "taken as text",
                stacklevel=4,
            )

        # llama.cpp goes by the model's name here: Phi-3's special tokens swallow the white space that follows them.
        self._strips: frozenset[str] = frozenset()
        model_name = metadata.get("general.name")
        if isinstance(model_name, str) and re.search("phi-?3", model_name.lower()):
            self._strips = frozenset(self._special) - {"<unk>", "<s>", "<|endoftext|>"}

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        `add_special` adds BOS (and EOS) where the vocabulary wants them; `parse_special` turns the text of control
        tokens, such as "<|im_end|>", into those tokens instead of treating it as ordinary text.
        Raises TokenizerError for a lone surrogate, and for a character that a `llama` vocabulary without byte tokens
        cannot express. Warns about bytes that a `gpt2` vocabulary cannot express, and drops them.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid Unicode at character {error.start}: {error.reason}") from None
        ids = list(self._before) if add_special else []
        for fragment in self._fragments(text, parse_special):
            ids += (fragment,) if isinstance(fragment, int) else self._model.encode(fragment)
        return [*ids, *self._after] if add_special else ids

    def _fragments(self, text: str, parse_special: bool) -> list[str | int]:
        """Cut special tokens out: their ids, and between them the pieces of ordinary text, none empty."""
        fragments: list[str | int] = [text] if text else []
        found = _occurring(text, self._special if parse_special else self._user_defined)
        for special in sorted(found, key=lambda word: (-len(word.encode()), self._special_ids[word])):
            cut: list[str | int] = []
            for fragment in fragments:
                if isinstance(fragment, int):
                    cut.append(fragment)
                    continue
                for at, piece in enumerate(fragment.split(special)):
                    if at:
                        cut.append(self._special_ids[special])
                        piece = piece.lstrip(" \t\n\v\f\r") if special in self._strips else piece
                    if piece != "":
                        cut.append(piece)
            fragments = cut
        return fragments

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of each token, joined; so decode_bytes(a + b) == decode_bytes(a) + decode_bytes(b), which is what
        streaming needs (a token may end inside a character). Control tokens give their text.

        For text without U+2581, decode_bytes(encode(text)) == text.encode(), except that a `llama` vocabulary with
        `add_space_prefix` gives the added spaces as well, and that bytes without a token are lost (see the module).
        Unlike llama.cpp, spaces before punctuation are kept, and tokens of type "unused" give their text.
        Raises TokenizerError for an id outside the vocabulary.
        """
        return b"".join([self._pieces.get(token) or self._piece(token) for token in ids])

    def decode(self, ids: Sequence[int]) -> str:
        """`decode_bytes` as text, U+FFFD for what is not UTF-8; drops the one leading space of `add_space_prefix`."""
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        if isinstance(self._model, SentencePiece) and self._model.add_space_prefix:
            return text.removeprefix(" ")
        return text

    def _piece(self, token: int) -> bytes:
        token = index(token)
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        text = self._tokens[token]
        if token in self._broken:
            piece = self._broken[token]
        elif token in self._bytes:
            piece = self._bytes[token]
        else:
            piece = text.encode() if text in self._special_ids else self._model.piece(text)
        self._pieces[token] = piece
        return piece

    def _id(self, metadata: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
        value = metadata.get(KEY + name, _ID_UNSET)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TokenizerError(f"{KEY}{name} is {value!r:.80}, not a token id")
        if value == _ID_UNSET:
            return default if default is not None and default < self.vocab_size else None
        if not 0 <= value < self.vocab_size:
            usual = default if default is not None and default < self.vocab_size else None
            warnings.warn(
                f"{KEY}{name} is {value}, outside the vocabulary of {self.vocab_size}; "
                f"{'none' if usual is None else usual} is used, as by llama.cpp",
                stacklevel=4,
            )
            return usual
        return value


def _added(name: str, token: int | None, wanted: bool) -> tuple[int, ...]:
    """What the vocabulary adds to texts in this place."""
    if wanted and token is None:
        raise TokenizerError(f"{KEY}{name}_token_id is missing, but the vocabulary adds that token to texts")
    return (token,) if wanted and token is not None else ()


def _occurring(text: str, words: list[str]) -> Iterator[str]:
    """Those of the sorted `words` that occur in `text`. A common prefix that is absent rules out all words under it,
    so that 6,000 tokens like <unused123> cost one search."""
    groups = [words] if words else []
    while groups:
        group = groups.pop()
        first, last = group[0], group[-1]
        size = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        if first[:size] not in text:
            continue
        if len(first) == size:
            yield first
            group = group[1:]
        groups += [list(longer) for _, longer in groupby(group, key=itemgetter(slice(size, size + 1)))]


def _pre_tokenizer(metadata: Mapping[str, Any], kind: str) -> PreTokenizer:
    name = string(metadata, "pre") if f"{KEY}pre" in metadata else ""
    if kind == _OWN_PRE:
        name = kind
    if not name:
        warnings.warn(
            f"{KEY}pre is missing; 'default' is used, as by llama.cpp, and may not be what the model was trained with",
            stacklevel=4,
        )
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise TokenizerError(f"{KEY}pre is {name[:80]!r}; supported are {', '.join(sorted(PRE_TOKENIZERS))}")
    return PRE_TOKENIZERS[name]
