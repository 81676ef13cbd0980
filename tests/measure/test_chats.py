"""Chats: what of a rendered conversation the assistant said, rows that are none, templates that refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nkat.errors import NKATError
from nkat.lm.chat import TEMPLATE_KEY
from nkat.lm.load import load_model
from nkat.lm.tokenizer import Tokenizer
from nkat.measure.chats import Conversation, chat_chunks, conversations, is_chats, read_rows
from nkat.measure.perplexity import windows
from nkat.measure.texts import Text
from tests.support.tiny_models import write_tiny_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3: an answer's reasoning is written while it is the last message only.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}[thinks]{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
TURNS = [("user", "Hi there"), ("assistant", "Hello"), ("user", "And?"), ("assistant", "Then the end")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_model(write_tiny_model(tmp_path_factory.mktemp("chats") / "m.gguf", "llama", blocks=1)).tokenizer


def rows(*contents: object) -> Text:
    lines = [content if isinstance(content, str) else json.dumps(content) for content in contents]
    return Text("chats.jsonl", "\n".join(lines) + "\n", "c" * 64)


def messages(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns], "id": 7}


def said(tokenizer: Tokenizer, conversation: Conversation) -> str:
    return tokenizer.decode(conversation.tokens[conversation.said].tolist())


def found(tokenizer: Tokenizer, text: Text, template: str = CHATML) -> list[Conversation]:
    return conversations(text, {TEMPLATE_KEY: template}, tokenizer)


def test_the_assistants_tokens_count_with_the_end_of_their_turn(tokenizer: Tokenizer) -> None:
    (whole,) = found(tokenizer, rows(messages(*TURNS, ("user", "unanswered"))))
    assert tokenizer.decode(whole.tokens.tolist()).count("<|im_start|>") == 4
    assert "unanswered" not in tokenizer.decode(whole.tokens.tolist())
    assert said(tokenizer, whole) == "Hello<|im_end|>Then the end<|im_end|>"
    assert "Hi there" in tokenizer.decode(whole.tokens[~whole.said].tolist())


def test_prompt_and_completion_are_a_chat(tokenizer: Tokenizer) -> None:
    plain = {"prompt": "Hi there", "completion": "Hello"}
    listed = {name: [{"role": r, "content": c}] for name, (r, c) in zip(plain, TURNS, strict=False)}
    first, second, third = found(tokenizer, rows(plain, "", listed, messages(*TURNS[:2])))
    assert torch.equal(first.tokens, third.tokens)
    assert torch.equal(first.said, third.said)
    assert torch.equal(second.tokens, third.tokens)
    assert said(tokenizer, first) == "Hello<|im_end|>"


def test_a_template_that_rewrites_the_past_gives_each_answer_as_the_model_meets_it(tokenizer: Tokenizer) -> None:
    first, second = found(tokenizer, rows(messages(*TURNS)), FORGETS)
    assert said(tokenizer, first) == "[thinks]Hello<|im_end|>"
    assert said(tokenizer, second) == "[thinks]Then the end<|im_end|>"
    assert tokenizer.decode(second.tokens.tolist()).count("[thinks]") == 1
    with pytest.raises(NKATError, match=r"chats\.jsonl, line 1: .* otherwise than it asks"):
        found(tokenizer, rows(messages(*TURNS)), CHATML + "{{ messages | length }}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "not JSON: .* at character 2"),
        ("[1]", r"a row is .*, not a list"),
        ("5", "not a number"),
        ({"text": "x"}, "needs 'messages', or 'prompt' and 'completion'; it has 'text'"),
        ({"prompt": "x"}, "it has 'prompt'"),
        ({"messages": []}, "'messages' must be a list of messages, and is an empty list"),
        ({"messages": "hello"}, "and is a text"),
        ({"messages": [3]}, "message 1 of 'messages' must have a role and content, and is a number"),
        ({"messages": [{"role": "user"}]}, "message 1 of 'messages': its content must be a text, and is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "its content must be a text, and is a list"),
        ({"messages": [{"role": None, "content": "x"}]}, "its role must be a text"),
        (messages(("user", "hello")), "no message of the assistant's"),
        ({"prompt": 5, "completion": "x"}, "'prompt' must be a list of messages, and is a number"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_row_is_one_line_with_its_place(row: object, message: str) -> None:
    with pytest.raises(NKATError, match=rf"^chats\.jsonl, line 3: .*{message}") as caught:
        read_rows(rows(messages(*TURNS), "", row))
    assert "\n" not in str(caught.value)


def test_what_the_template_or_the_model_lacks_is_said(tokenizer: Tokenizer) -> None:
    system = messages(("system", "Be brief."), *TURNS)
    assert len(found(tokenizer, rows(system))) == 1
    with pytest.raises(NKATError, match=r"^chats\.jsonl, line 2: .*System role not supported"):
        found(tokenizer, rows(messages(*TURNS), system), STRICT)
    with pytest.raises(NKATError, match=r"no chat template .*give a plain text instead"):
        conversations(rows(messages(*TURNS)), {}, tokenizer)


def test_each_answer_is_scored_once(tokenizer: Tokenizer) -> None:
    chats = found(tokenizer, rows(*(messages(*TURNS) for _ in range(5))))
    chunks, counted = chat_chunks(chats, 64, tokenizer)
    assert chunks.shape[1] == 64
    assert counted.shape == (len(chunks), 31)
    assert bool(counted.any(dim=1).all())
    scored = chunks[:, -31:][counted]
    assert torch.equal(scored, torch.cat([chat.tokens[chat.said] for chat in chats]))
    assert len(chat_chunks(chats, 64, tokenizer, 2)[0]) == 2
    alone, _ = chat_chunks(chats[:1], 512, tokenizer)  # shorter than a chunk: nothing of it stands before itself
    length = len(chats[0].tokens)
    assert torch.equal(alone[0, 257 : 257 + length], chats[0].tokens)
    assert bool((alone[0, :257] == tokenizer.eos_id).all())
    assert bool((alone[0, 257 + length :] == tokenizer.eos_id).all())


def test_windows_score_every_place_once() -> None:
    places = windows(1000, 64)
    scored = places[:, -31:].flatten()
    assert torch.equal(scored, torch.arange(len(scored)))
    assert 1000 <= len(scored) < 1031
    assert bool((places[:, 1:] - places[:, :-1] == 1).all())


def test_the_files_name_says_that_it_is_chats(tmp_path: Path) -> None:
    assert is_chats(Text("a.jsonl", "", ""))
    assert is_chats(Text("A.JSONL", "", ""))
    assert not is_chats(Text("a.json", "", ""))
