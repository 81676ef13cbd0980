"""The tokenizer against llama.cpp's ids (tests/golden/tokens.json), slow references, and its round-trip properties."""

import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st

from nkat.errors import NKATError
from nkat.gguf.file import GGUFFile
from nkat.lm.merging import cuts
from nkat.lm.pretokenisers import PRE_TOKENIZERS, PreTokenizer
from nkat.lm.tokenizer import Tokenizer
from tests.support.golden import read_golden

Metadata = dict[str, Any]

GOLDEN = read_golden("tokens")
MODELS = tuple(GOLDEN["models"])
NORMAL, CONTROL, USER = TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED

# Everything but the lone surrogates, which are not text. Often short runs of characters that tokenizers care about.
TEXTS = st.text() | st.text(" \n\t\r\0ab1'’sS.é漢🙂\u0301\u200d<|im_end|>", max_size=30)


def with_tokenizer_keys(**values: Any) -> Metadata:
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}


def byte_characters() -> list[str]:
    """GPT-2's table: printable Latin-1 bytes are themselves, the 68 others follow from U+0100 on."""
    shifted = [byte for byte in range(256) if not (0x20 < byte < 0x7F or 0xA0 < byte < 0xAD or byte > 0xAD)]
    return [chr(0x100 + shifted.index(byte)) if byte in shifted else chr(byte) for byte in range(256)]


def byte_level(text: str) -> str:
    return "".join(byte_characters()[byte] for byte in text.encode())


def gpt2(merges: Sequence[tuple[str, str]] = (), special: dict[str, TokenType] | None = None, **keys: Any) -> Metadata:
    """A gpt2 vocabulary: the 256 bytes (id = byte), one token a merge in order, then `special`."""
    special = special or {}
    pairs = [tuple(map(byte_level, pair)) for pair in merges]
    tokens = list(dict.fromkeys([*byte_characters(), *("".join(pair) for pair in pairs), *special]))
    types = [special.get(token, NORMAL) for token in tokens]
    base = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": np.array(types, np.int32)}
    return with_tokenizer_keys(**base | {"merges": [" ".join(pair) for pair in pairs]} | keys)


def spm(pieces: dict[str, float], special: dict[str, TokenType] | None = None, **keys: Any) -> Metadata:
    """A llama vocabulary: <unk>, <s>, </s>, the 256 byte tokens (id = byte + 3), then `pieces`, then `special`."""
    rows = [("<unk>", 0.0, TokenType.UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    rows += [(f"<0x{byte:02X}>", 0.0, TokenType.BYTE) for byte in range(256)]
    rows += [(piece, score, NORMAL) for piece, score in pieces.items()]
    rows += [(token, 0.0, kind) for token, kind in (special or {}).items()]
    tokens, scores, types = map(list, zip(*rows, strict=True))
    base = {"model": "llama", "tokens": tokens, "scores": np.array(scores, np.float32), "token_type": np.array(types)}
    return with_tokenizer_keys(**base | keys)


HELLO = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), (" ", "w"), ("o", "r")]
TURN = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL}
GPT2 = gpt2(HELLO, TURN)
SPM = spm({"▁": -5.0, "▁a": -1.0, "ab": -2.0, "▁ab": -3.0, "a": -6.0, "b": -7.0}, {"\n\n": USER})


GPT2_TOKENS = GPT2["tokenizer.ggml.tokens"]
SPM_TOKENS = SPM["tokenizer.ggml.tokens"]


@cache
def tiny(kind: str) -> Tokenizer:
    plain = SPM | with_tokenizer_keys(add_space_prefix=False)
    return Tokenizer.from_metadata({"gpt2": GPT2, "spm": SPM, "spm without prefix": plain}[kind])


def words(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [tokenizer.decode_bytes([token]).decode() for token in ids]


@cache
def metadata_of(path: Path) -> Metadata:
    with GGUFFile.open(path) as file:
        return {key: value for key, value in file.metadata.items() if key.startswith(("tokenizer.", "general.name"))}


@cache
def tokenizer_of(path: Path) -> Tokenizer:
    return Tokenizer.from_metadata(metadata_of(path))


@pytest.fixture(params=MODELS)
def golden(request: pytest.FixtureRequest) -> tuple[Tokenizer, Metadata]:
    """A real vocabulary and what llama.cpp made with it."""
    return tokenizer_of(request.getfixturevalue(request.param)), GOLDEN["models"][request.param]


# Against llama.cpp


def test_special_ids_are_llama_cpps(golden):
    tokenizer, expected = golden
    assert tokenizer.vocab_size == expected["vocab_size"]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (expected["bos_id"], expected["eos_id"])
    assert tokenizer.adds_bos == expected["adds_bos"]
    assert tokenizer.eog_ids == set(expected["eog_ids"])


@pytest.mark.filterwarnings("ignore:.*no token for some bytes")
def test_short_strings_have_llama_cpps_ids(golden):
    tokenizer, expected = golden
    assert [tokenizer.encode(text) for text in GOLDEN["strings"]] == expected["ids"]
    texts = GOLDEN["special_strings"]
    assert [tokenizer.encode(text) for text in texts] == expected["special_ids_unparsed"]
    assert [tokenizer.encode(text, parse_special=True) for text in texts] == expected["special_ids"]
    both = [tokenizer.encode(text, add_special=True, parse_special=True) for text in texts]
    assert both == expected["special_ids_with_bos"]
    assert expected["special_ids"] != expected["special_ids_unparsed"]


@pytest.mark.parametrize("name", ["alice29.txt", "plrabn12.txt", "wiki.test.raw"])  # all five take twice as long
def test_whole_texts_have_llama_cpps_ids(golden, shared_text: Callable[[str], Path], name: str):
    tokenizer, expected = golden
    ids = tokenizer.encode(shared_text(name).read_bytes().decode())
    assert ids[:32] == expected["texts"][name]["first"]
    assert len(ids) == expected["texts"][name]["count"]
    assert hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest() == expected["texts"][name]["sha256"]


def test_ids_depend_on_every_merge_and_on_the_pre_tokeniser(smollm2: Path):
    """Negative control of the three tests above."""
    metadata = metadata_of(smollm2)
    merges = metadata["tokenizer.ggml.merges"]
    without = metadata | {"tokenizer.ggml.merges": [merge for merge in merges if merge != "Ġ t"]}
    other_pre = metadata | {"tokenizer.ggml.pre": "gpt-2"}
    text = "on the  12th of May"
    ids = tokenizer_of(smollm2).encode(text)
    assert Tokenizer.from_metadata(without).encode(text) != ids
    assert Tokenizer.from_metadata(other_pre).encode(text) != ids
    assert Tokenizer.from_metadata(other_pre).encode("on the May") == tokenizer_of(smollm2).encode("on the May")


# Merging, against slow references and by hand


def test_byte_level_merges_by_hand():
    tokenizer = tiny("gpt2")
    assert words(tokenizer, tokenizer.encode("hello world")) == ["hello", " w", "or", "l", "d"]
    assert words(tokenizer, tokenizer.encode("ahell")) == ["a", "hell"]
    assert tokenizer.encode("é") == list("é".encode())
    assert tokenizer.encode("") == []


def test_the_first_rank_of_a_repeated_merge_holds():
    tokenizer = Tokenizer.from_metadata(gpt2([("a", "b"), ("b", "c"), ("a", "b")]))
    assert words(tokenizer, tokenizer.encode("abc")) == ["ab", "c"]


def reference_spm(text: str, ids: dict[str, int], scores: Sequence[float]) -> list[int]:
    """The definition: join the best-scored adjacent pair, the leftmost among equals, until there is none."""
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[ids[a + b]], at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not pairs:
            return [token for symbol in symbols for token in ([ids[symbol]] if symbol in ids else _bytes(symbol, ids))]
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def _bytes(symbol: str, ids: dict[str, int]) -> list[int]:
    return [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]


@st.composite
def spm_cases(draw: st.DrawFn) -> tuple[str, dict[str, float]]:
    """A text, and scores for some of its substrings: with many ties, and letters that are no tokens on their own."""
    text = draw(st.text("ab é.", min_size=2, max_size=20)) * draw(st.sampled_from([1, 1, 8]))  # short and long words
    start = text.replace(" ", "▁")[:20]
    spans = [start[a:b] for a in range(len(start)) for b in range(a + 1, min(a + 7, len(start) + 1))]
    scores = draw(st.lists(st.sampled_from([None, -1.0, -2.0, -3.0]), min_size=len(spans), max_size=len(spans)))
    return text, {span: score for span, score in zip(spans, scores, strict=True) if score is not None}


@settings(max_examples=200, deadline=None)
@given(spm_cases())
def test_spm_equals_its_definition(case: tuple[str, dict[str, float]]):
    text, pieces = case
    metadata = spm(pieces, add_space_prefix=False)
    ids = {text: token for token, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    assert Tokenizer.from_metadata(metadata).encode(text) == reference_spm(
        text, ids, metadata["tokenizer.ggml.scores"].tolist()
    )


def test_spm_merges_the_best_score_first():
    scores = {"▁": -9.0, "a": -9.0, "b": -9.0, "▁a": -1.0, "ab": -2.0}
    for best, expected in (("▁a", [" a", "b"]), ("ab", [" ", "ab"])):
        tokenizer = Tokenizer.from_metadata(spm(scores | {best: 0.0}))
        assert words(tokenizer, tokenizer.encode("ab")) == expected
    assert tiny("spm").encode("é") == [SPM_TOKENS.index("▁"), 0xC3 + 3, 0xA9 + 3]


def test_spm_prefers_the_leftmost_of_equal_scores():
    left = Tokenizer.from_metadata(spm({"a": 0.0, "aa": -1.0}, add_space_prefix=False))
    assert words(left, left.encode("aaa")) == ["aa", "a"]


def test_space_prefix_follows_special_tokens_and_is_dropped_by_decode():
    tokenizer = tiny("spm")
    assert words(tokenizer, tokenizer.encode("b\n\nb")) == [" ", "b", "\n\n", " ", "b"]
    assert tokenizer.decode_bytes(tokenizer.encode("a b")) == b" a b"
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    assert tokenizer.decode(tokenizer.encode("  a")) == "  a"
    plain = tiny("spm without prefix")
    assert plain.decode_bytes(plain.encode("a b")) == b"a b"
    assert plain.decode(plain.encode(" a")) == " a"


# Pre-tokenisers: a vocabulary in which every substring of the text can be merged shows where the text is cut.


def cut(pre: str, text: str) -> list[str]:
    spans = [(start, stop) for start in range(len(text)) for stop in range(start + 1, len(text))]
    tokenizer = Tokenizer.from_metadata(gpt2([(text[start:stop], text[stop]) for start, stop in spans], pre=pre))
    return words(tokenizer, tokenizer.encode(text))


CUTS = {
    "a 1234567": {
        "gpt-2": ["a", " 1234567"],
        "default": ["a", " ", "123", "456", "7"],
        "smollm": ["a", " ", "1", "2", "3", "4", "5", "6", "7"],
        "qwen2": ["a", " ", "1", "2", "3", "4", "5", "6", "7"],
        "llama-bpe": ["a", " ", "123", "456", "7"],
    },
    "I'Mx it's,\n\n x": {
        "gpt-2": ["I", "'", "Mx", " it", "'s", ",", "\n\n", " x"],
        "default": ["I", "'", "Mx", " it", "'", "s", ",", "\n\n", " x"],
        "smollm": ["I", "'", "Mx", " it", "'s", ",", "\n\n", " x"],
        "qwen2": ["I", "'M", "x", " it", "'s", ",\n\n", " x"],
        "llama-bpe": ["I", "'M", "x", " it", "'s", ",\n\n", " x"],
    },
    "x  y\t.z \r\n": {
        "gpt-2": ["x", " ", " y", "\t", ".", "z", " \r\n"],
        "default": ["x", " ", " y", "\t", ".", "z", " \r\n"],
        "smollm": ["x", " ", " y", "\t", ".", "z", " \r\n"],
        "qwen2": ["x", " ", " y", "\t", ".z", " \r\n"],
        "llama-bpe": ["x", " ", " y", "\t", ".z", " \r\n"],
    },
}


@pytest.mark.parametrize("pre", ["gpt-2", "default", "smollm", "qwen2", "llama-bpe"])
@pytest.mark.parametrize("text", CUTS)
def test_pre_tokenisers_cut_where_they_should(pre: str, text: str):
    assert cut(pre, text) == CUTS[text][pre]


CUT_BY_LLAMA = read_golden("cuts")


def words_of(pre: PreTokenizer, text: str) -> list[int]:
    """Characters of each word."""
    sequence = tokenizers.pre_tokenizers.Sequence(cuts(pre))
    return [len(word) for word, _ in sequence.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", CUT_BY_LLAMA["names"])
def test_odd_texts_are_cut_where_llama_cpp_cuts_them(name: str):
    column = CUT_BY_LLAMA["names"].index(name)
    expected = {text: kinds[of[column]] for text, kinds, of in CUT_BY_LLAMA["texts"]}
    assert {text: words_of(PRE_TOKENIZERS[name], text) for text in expected} == expected


def test_every_way_of_cutting_is_judged_and_differs():
    patterns = {pre.patterns for pre in PRE_TOKENIZERS.values() if not pre.characters}
    assert patterns == {PRE_TOKENIZERS[name].patterns for name in CUT_BY_LLAMA["names"]}
    columns = list(zip(*(of for *_, of in CUT_BY_LLAMA["texts"]), strict=True))
    assert len(set(columns)) == len(columns) == len(patterns)


CHARACTERS = {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}


@pytest.mark.parametrize(("kind", "pre"), [("gemma4", None), ("gpt2", "gemma4"), ("gpt2", "sarvam-moe")])
def test_a_vocabulary_of_characters_merges_them_and_writes_spaces_as_sentencepiece_does(kind: str, pre: str | None):
    tokens = ["<bos>", *CHARACTERS, "▁", "a", "b", "é", "\n", "\n\n", "ab", "▁ab"]
    types = np.array([CHARACTERS.get(token, NORMAL) for token in tokens], np.int32)
    merges = ["a b", "▁ ab"]
    keys = with_tokenizer_keys(model=kind, pre=pre, tokens=tokens, token_type=types, merges=merges, bos_token_id=0)
    tokenizer = Tokenizer.from_metadata(keys)
    assert words(tokenizer, tokenizer.encode("ab ab\n\né c")) == (
        ["ab", " ab", *(["\n\n"] if "gemma4" in (kind, pre) else ["\n", "\n"]), "é", " ", "c"]
    )
    assert tokenizer.encode("c\0") == [1 + ord("c"), 1]
    assert tokenizer.decode(tokenizer.encode("ab ▁世")) == "ab  世"
    assert tokenizer.adds_bos == ("gemma4" in (kind, pre))
    with pytest.raises(NKATError, match="no token for the byte <0x00>"):
        Tokenizer.from_metadata(keys | {"tokenizer.ggml.tokens": [tokens[0], "zero", *tokens[2:]]})


def test_some_end_texts_end_nothing_beside_others():
    harmony = dict.fromkeys(("<|end|>", "<|return|>", "<|call|>"), CONTROL)
    both = Tokenizer.from_metadata(gpt2(special=harmony, eos_token_id=257))
    assert both.eog_ids == {257, 258}
    assert both.encode("<|end|>") == [256]  # like a user's own token, whether it is asked for or not
    alone = Tokenizer.from_metadata(gpt2(special={"<|end|>": CONTROL, "<|return|>": CONTROL}, eos_token_id=257))
    assert alone.eog_ids == {256, 257}
    gemma = gpt2(special={"</s>": NORMAL, "<|tool_response>": CONTROL}, eos_token_id=257)
    assert Tokenizer.from_metadata(gemma).eog_ids == {257}
    assert len(Tokenizer.from_metadata(gemma).encode("</s>", parse_special=True)) == 4


@pytest.mark.parametrize(
    ("alias", "name"), [("llama3", "llama-bpe"), ("deepseek-r1-qwen", "qwen2"), ("phi-2", "gpt-2")]
)
def test_aliases(alias: str, name: str):
    assert PRE_TOKENIZERS[alias] == PRE_TOKENIZERS[name] != PRE_TOKENIZERS["default"]


def test_llama3_keeps_a_word_that_is_a_token_although_no_merge_makes_it():
    ids = {}
    for pre in ("llama-bpe", "smaug-bpe"):
        metadata = gpt2(special={"hi": NORMAL}, pre=pre, bos_token_id=0)
        ids[pre] = Tokenizer.from_metadata(metadata).encode("hi")
    assert ids == {"llama-bpe": [256], "smaug-bpe": list(b"hi")}


def test_a_missing_pre_tokeniser_is_default_with_a_warning():
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre is missing"):
        tokenizer = Tokenizer.from_metadata(gpt2([("1", "2"), ("12", "3"), ("123", "4")], pre=None))
    assert words(tokenizer, tokenizer.encode("1234")) == ["123", "4"]


def test_bytes_without_a_token_are_dropped_with_a_warning_and_leave_a_gap():
    metadata = gpt2([("a", "b")])
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[4] = "unlike"
    tokenizer = Tokenizer.from_metadata(metadata)
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.tokens has no token for some bytes .*\(0x04\)"):
        assert tokenizer.encode("a\x04b") == list(b"ab")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.encode("ab") == [256]


# Special tokens


def test_control_tokens_only_when_asked_for():
    tokenizer = tiny("gpt2")
    start, end = (GPT2["tokenizer.ggml.tokens"].index(text) for text in TURN)
    text = "<|im_start|>hello<|im_end|>"
    assert tokenizer.encode(text, parse_special=True) == [start, *tokenizer.encode("hello"), end]
    assert not {start, end} & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text, parse_special=True)) == text


def test_longer_special_tokens_win_even_further_right():
    metadata = gpt2(special={"abc": USER, "cdefg": USER, "<|im_end|>": USER, "<u>": TokenType.UNKNOWN})
    tokenizer = Tokenizer.from_metadata(metadata)
    assert words(tokenizer, tokenizer.encode("abcdefgabc")) == ["a", "b", "cdefg", "abc"]
    assert len(tokenizer.encode("<|im_end|>")) == 10  # a control token by its name, although declared otherwise
    assert len(tokenizer.encode("<|im_end|>", parse_special=True)) == 1
    assert [len(tokenizer.encode("<u>", parse_special=parse)) for parse in (False, True)] == [3, 1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab", min_size=2, max_size=4), unique=True, max_size=8), st.text("abc", max_size=40))
def test_special_tokens_are_found_like_one_search_after_another(special: list[str], text: str):
    tokenizer = Tokenizer.from_metadata(gpt2(special=dict.fromkeys(special, USER)))
    fragments = [text]
    for token in sorted(special, key=len, reverse=True):
        pattern = re.compile(f"({re.escape(token)})")
        fragments = [part for f in fragments for part in ([f] if f in special else pattern.split(f)) if part]
    expected = [part for f in fragments for part in ([f] if f in special else f)]
    assert words(tokenizer, tokenizer.encode(text)) == expected


def test_phi_3s_special_tokens_swallow_white_space():
    metadata = spm({"▁": -1.0, "a": -2.0}, {"<|user|>": CONTROL, "<|endoftext|>": CONTROL}, add_space_prefix=False)
    text = "<|user|>\n a<|endoftext|> a"
    other = Tokenizer.from_metadata(metadata)
    phi = Tokenizer.from_metadata(metadata | {"general.name": "Phi-3 mini"})
    assert other.decode(other.encode(text, parse_special=True)) == text
    assert phi.decode(phi.encode(text, parse_special=True)) == "<|user|>a<|endoftext|> a"


@pytest.mark.parametrize(
    ("metadata", "adds_bos"),
    [
        (spm({}), True),
        (spm({}, add_bos_token=False), False),
        (gpt2(), False),
        (gpt2(add_bos_token=True), True),
        (gpt2(pre="llama-bpe"), True),
        (gpt2(pre="llama-bpe", add_bos_token=False), False),
    ],
)
def test_bos_is_added_by_llama_cpps_rule(metadata: Metadata, adds_bos: bool):
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.adds_bos == adds_bos
    assert tokenizer.encode("a", add_special=True) == [tokenizer.bos_id] * adds_bos + tokenizer.encode("a")


def test_eos_is_added_when_the_vocabulary_asks():
    tokenizer = Tokenizer.from_metadata(spm({"▁": 0.0}, add_eos_token=True))
    assert tokenizer.encode("", add_special=True) == [1, 2]
    assert tokenizer.encode("") == []


def test_end_of_generation():
    special = dict.fromkeys(("<|endoftext|>", "<end_of_turn>", "<|fim_pad|>", "<|fim_prefix|>", "stop"), NORMAL)
    tokenizer = Tokenizer.from_metadata(
        gpt2(special=special, eos_token_id=65, eot_token_id=260, bos_token_id=2**32 - 1)
    )
    assert tokenizer.eog_ids == {65, 256, 257, 258, 260}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (11, 65)  # llama.cpp's default for an id that is not set


# Round trips


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_round_trip_of_byte_level_text(text: str):
    tokenizer = tiny("gpt2")
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()
    assert tokenizer.decode(tokenizer.encode(text, parse_special=True)) == text


@settings(max_examples=150, deadline=None)
@given(TEXTS.filter(lambda text: "▁" not in text))
def test_round_trip_of_spm_text(text: str):
    tokenizer = tiny("spm without prefix")
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()
    assert tokenizer.decode(tokenizer.encode(text, parse_special=True)) == text


@pytest.mark.parametrize("model", ["gemma3", "qwen", "smollm2"])
def test_round_trip_and_streaming_with_real_vocabularies(model: str, request: pytest.FixtureRequest):
    tokenizer = tokenizer_of(request.getfixturevalue(model))
    lost = re.compile("[▁\x04\x06\x13\x14\x16\x1d\U00040000-\U000bffff]")  # see the module's limits

    @settings(max_examples=100, deadline=None)
    @given(TEXTS)
    def holds(text: str) -> None:
        text = lost.sub("", text)
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert b"".join(tokenizer.decode_bytes([token]) for token in ids) == text.encode()

    holds()


def test_a_lower_one_eighth_block_decodes_as_a_space_in_spm_only():
    assert tiny("gpt2").decode(tiny("gpt2").encode("a▁")) == "a▁"
    assert tiny("spm").decode(tiny("spm").encode("a▁")) == "a "


def test_a_character_can_be_split_over_tokens():
    tokenizer = tiny("spm")
    ids = tokenizer.encode("é")[1:]
    assert [tokenizer.decode_bytes([token]) for token in ids] == [b"\xc3", b"\xa9"]
    assert (tokenizer.decode(ids[:1]), tokenizer.decode(ids)) == ("\ufffd", "é")


@pytest.mark.parametrize("metadata", [GPT2, SPM])
def test_encoding_is_deterministic(metadata: Metadata):
    """A new tokenizer, and one whose cache has seen other texts, give the same ids."""
    text = "ab hello é\n\n ab"
    first = Tokenizer.from_metadata(metadata)
    ids = first.encode(text)
    first.encode("hello world ab")
    assert first.encode(text) == Tokenizer.from_metadata(metadata).encode(text) == ids


# Refusals


@pytest.mark.parametrize("token", [-1, 10**6, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(token: int):
    with pytest.raises(NKATError, match=f"token id {token} is outside the vocabulary of {len(GPT2_TOKENS)}"):
        tiny("gpt2").decode_bytes([65, token])


@pytest.mark.parametrize(
    ("base", "name", "value", "message"),
    [
        (GPT2, "model", None, "is missing"),
        (GPT2, "model", "bert", "is 'bert'; supported are 'gpt2', 'gemma4', 'llama'"),
        (GPT2, "model", 3, "is 3, not a string"),
        (GPT2, "pre", "babel", "is 'babel'; supported are .*default.*llama-bpe.*qwen2.*smollm"),
        (GPT2, "pre", 7, "is 7, not a string"),
        (GPT2, "tokens", None, "is missing"),
        (GPT2, "tokens", [], "is empty"),
        (GPT2, "tokens", [1, 2], "not an array of strings"),
        (GPT2, "tokens", "abc", "not an array of strings"),
        (GPT2, "tokens", [*GPT2_TOKENS[:-1], "\ud800"], "not valid Unicode"),
        (GPT2, "tokens", [*GPT2_TOKENS[:-1], "he"], "holds 'he' twice, at 256"),
        (GPT2, "merges", None, "is missing"),
        (GPT2, "merges", [1], "not an array of strings"),
        (GPT2, "token_type", np.ones(3, np.int32), "has 3 entries for 264 tokens"),
        (GPT2, "token_type", ["a"] * len(GPT2_TOKENS), "not an array of numbers"),
        (GPT2, "eot_token_id", "x", "is 'x', not a token id"),
        (GPT2, "add_bos_token", 1, "is 1, not a boolean"),
        (SPM, "scores", np.zeros(5, np.float32), f"has 5 entries for {len(SPM_TOKENS)} tokens"),
        (SPM, "scores", [[0.0], [0.0, 1.0]], "not an array of numbers"),
        (SPM, "scores", np.full(len(SPM_TOKENS), np.nan, np.float32), "not an array of numbers"),
        (SPM, "add_space_prefix", "yes", "is 'yes', not a boolean"),
    ],
)
def test_bad_metadata_is_refused_by_key(base: Metadata, name: str, value: Any, message: str):
    metadata = {key: old for key, old in base.items() if key != f"tokenizer.ggml.{name}"} | with_tokenizer_keys(
        **{name: value}
    )
    with pytest.raises(NKATError, match=rf"^tokenizer\.ggml\.{name}\b.*{message}") as refusal:
        Tokenizer.from_metadata(metadata)
    assert "\n" not in str(refusal.value)


def test_a_vocabulary_that_adds_a_token_it_does_not_have_is_refused():
    small = with_tokenizer_keys(model="llama", tokens=["a"], scores=[0.0])
    with pytest.raises(NKATError, match=r"tokenizer\.ggml\.bos_token_id is missing"):
        Tokenizer.from_metadata(small)
    assert Tokenizer.from_metadata(small | with_tokenizer_keys(add_bos_token=False)).bos_id is None


def test_text_that_cannot_be_expressed_is_refused():
    small = with_tokenizer_keys(model="llama", tokens=["a", "▁"], scores=[0.0, 0.0], add_bos_token=False)
    with pytest.raises(NKATError, match="neither 'é' nor the byte token '<0xC3>'"):
        Tokenizer.from_metadata(small).encode("aé")
    with pytest.raises(NKATError, match="not valid Unicode at character 1"):
        tiny("gpt2").encode("a\ud800")


def test_a_token_without_text_matches_nothing():
    tokenizer = Tokenizer.from_metadata(gpt2(special={"": USER, "stop": USER}))
    assert words(tokenizer, tokenizer.encode("a stop")) == ["a", " ", "stop"]
    assert tokenizer.decode([256]) == "[EMPTY_256]"


# --- no stricter than llama.cpp


def _ids(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("ab the 1 é", add_special=True)


@pytest.mark.parametrize(
    ("base", "name", "change", "message"),
    [
        (SPM, "eos_token_id", lambda m: len(SPM_TOKENS), "outside the vocabulary.*2 is used"),
        (SPM, "eot_token_id", lambda m: 1 << 40, "outside the vocabulary.*none is used"),
        (GPT2, "eos_token_id", lambda m: -1, "is -1, outside the vocabulary"),
        (SPM, "scores", lambda m: np.append(m["tokenizer.ggml.scores"], [9.0, 9.0]), "the others are not used"),
        (SPM, "token_type", lambda m: np.append(m["tokenizer.ggml.token_type"], [3, 3]), "the others are not used"),
    ],
)
def test_values_with_one_sensible_reading_get_it(base: Metadata, name: str, change: Callable, message: str):
    plain = Tokenizer.from_metadata(base)
    with pytest.warns(UserWarning, match=message):
        changed = Tokenizer.from_metadata(base | with_tokenizer_keys(**{name: change(base)}))
    assert _ids(changed) == _ids(plain)
    assert changed.vocab_size == plain.vocab_size


def test_scores_may_be_missing_or_integers():
    without = {key: value for key, value in SPM.items() if key != "tokenizer.ggml.scores"}
    zeros = np.zeros(len(SPM_TOKENS), np.int32)
    with pytest.warns(UserWarning, match="scores is missing; all are 0"):
        found = Tokenizer.from_metadata(without)
    assert _ids(found) == _ids(Tokenizer.from_metadata(SPM | with_tokenizer_keys(scores=zeros)))


@pytest.mark.parametrize("base", [GPT2, SPM])
def test_a_token_that_is_no_text_keeps_its_bytes(base: Metadata):
    tokens = list(base["tokenizer.ggml.tokens"])
    types = base.get("tokenizer.ggml.token_type")
    at = (
        next(i for i, text in enumerate(tokens) if len(text) == 1 and text == "Z") if "Z" in tokens else len(tokens) - 1
    )
    tokens[at] = b"caf\xe9".decode("utf-8", "surrogateescape")
    changed = base | with_tokenizer_keys(tokens=tokens, token_type=types)
    if "tokenizer.ggml.merges" in base:
        changed["tokenizer.ggml.merges"] = [m for m in base["tokenizer.ggml.merges"] if "Z" not in m] + ["caf\udce9 a"]
    with pytest.warns(UserWarning, match="1 are not valid UTF-8"):
        tokenizer = Tokenizer.from_metadata(changed)
    assert tokenizer.decode_bytes([at]) == b"caf\xe9"
    assert _ids(tokenizer) == _ids(Tokenizer.from_metadata(base))


def test_merges_that_make_no_token_are_read_as_llama_cpp_reads_them():
    """Its ids (b11434): a text that is merged and is no token is spelled, by characters of ASCII alone."""
    merges = ["z z", "h e", "z a", "Ġ z", "hello", "l  l", "", "heĠ q", "he llo", "l l", "ll o"]
    metadata = gpt2([("h", "e"), ("z", "a")]) | with_tokenizer_keys(merges=merges)
    with pytest.warns(UserWarning, match=r"merges: 2 are not two tokens .*'hello'") as warned:
        tokenizer = Tokenizer.from_metadata(metadata)
    assert "merges: 7 of the texts that they merge are no tokens, as 'zz'" in " ".join(str(w.message) for w in warned)
    assert tokenizer.encode("zza zz") == [122, 122, 97, 32, 122, 122]
    assert tokenizer.encode("hello zzhe") == [104, 101, 108, 108, 111, 32, 122, 122, 256]
    assert tokenizer.encode("z zaz he") == [122, 32, 257, 122, 32, 256]
    assert tokenizer.encode("zzza é zz") == [122, 122, 257, 32, 195, 169, 32, 122, 122]
    assert tokenizer.encode("a z") == [97, 122]


def test_a_byte_token_that_names_no_byte_is_text():
    tokens = [*SPM_TOKENS[:3], "<0xZZ>", *SPM_TOKENS[4:]]
    with pytest.warns(UserWarning, match=r"token_type says byte of 1 tokens that name none .*'<0xZZ>'"):
        tokenizer = Tokenizer.from_metadata(SPM | with_tokenizer_keys(tokens=tokens))
    assert tokenizer.decode_bytes([3, 4]) == b"<0xZZ>\x01"
