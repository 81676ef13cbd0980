"""What a request may hold, and what is said about the rest; names of models and strengths of Θ."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nkat.engine.generate import Sampling
from nkat.serve.arms import Arm, Arms
from nkat.serve.questions import COMPLETION_TOKENS, read_chat, read_completion
from nkat.serve.refusal import Refusal

HELLO = [{"role": "user", "content": "Hello"}]
ARMS = Arms("tiny", 0.97, (0.9, 0.97, 1.0))


def chat(**fields: Any):
    return read_chat(json.dumps({"messages": HELLO} | fields).encode())


def completion(**fields: Any):
    return read_completion(json.dumps({"prompt": "Hello"} | fields).encode())


def test_what_is_left_out_is_as_usual() -> None:
    asked = completion()
    assert asked.sampling == Sampling()
    assert (asked.max_tokens, asked.stop, asked.logprobs, asked.stream) == (COMPLETION_TOKENS, (), None, False)
    assert (asked.model, asked.gamma, asked.theta) == (None, None, None)
    assert asked.seed != completion().seed
    assert chat().max_tokens is None
    assert chat(temperature=None, stop=None, n=None).sampling == Sampling()  # null is as good as nothing


def test_fields_are_taken_as_they_are_meant() -> None:
    asked = completion(
        model="tiny", temperature=0, top_p=0.5, top_k=3, min_p=0.1, seed=7, stop="x", max_tokens=3, logprobs=2,
        stream=True, stream_options={"include_usage": True}, nkat_gamma=0.9, nkat_theta=True, user="me", n=1,
        presence_penalty=0.0, logit_bias={},
    )  # fmt: skip
    assert asked.sampling == Sampling(0.0, 3, 0.5, 0.1)
    assert (asked.seed, asked.stop, asked.max_tokens, asked.logprobs) == (7, ("x",), 3, 2)
    assert (asked.model, asked.gamma, asked.theta) == ("tiny", 0.9, True)
    assert (asked.stream, asked.include_usage) == (True, True)
    assert completion(prompt=["one"]).prompt == "one"
    assert completion(prompt=[5, 6]).prompt == completion(prompt=[[5, 6]]).prompt == [5, 6]
    assert chat(max_tokens=5).max_tokens == chat(max_completion_tokens=5, max_tokens=9).max_tokens == 5
    assert (chat(logprobs=True).logprobs, chat(logprobs=True, top_logprobs=4).logprobs) == (0, 4)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}]
    assert chat(messages=messages).prompt.messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "ab"},
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"seed": 1.5}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options"),
        ({"model": 5}, "model"),
        ({"nkat_gamma": "0.9"}, "nkat_gamma"),
        ({"nkat_theta": "yes"}, "nkat_theta"),
        ({"nkat_gama": 0.9}, "nkat_gama"),  # a slip of the pen is not another answer in silence
    ],
)
def test_a_field_that_cannot_be_taken_is_named(fields: dict[str, Any], param: str) -> None:
    for read in (completion, chat):
        with pytest.raises(Refusal) as refused:
            read(**fields)
        assert (refused.value.status, refused.value.param) == (400, param)
        assert refused.value.message.isprintable()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "prompt": [5]}, "echo"),
        ({"suffix": "end"}, "suffix"),
    ],
)
def test_of_completions(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as refused:
        completion(**fields)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["Hello"]}, "messages[0]"),
        ({"messages": [{"content": "Hello"}]}, "messages[0]"),
        ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_of_chats(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as refused:
        chat(**fields)
    assert refused.value.param == param


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"text"', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object(data: bytes) -> None:
    for read in (read_chat, read_completion):
        with pytest.raises(Refusal, match="the body"):
            read(data)


# --- which Θ


def test_names_choose_the_strength() -> None:
    assert [arm.name for arm in ARMS.all()] == ["tiny", "tiny:base", "tiny:gamma=0.9"]
    for arm in ARMS.all():
        assert ARMS.named(arm.name) == arm
    assert ARMS.named("tiny:gamma=0.95") == Arm("tiny:gamma=0.95", 0.95)  # whether or not it is listed
    assert ARMS.named("tiny:gamma=1") == ARMS.named("tiny:base") == Arm("tiny:base", None)


def test_fields_choose_it_too() -> None:
    assert ARMS.choose(None, None, None) == ARMS.choose("tiny", None, True) == Arm("tiny", 0.97)
    assert ARMS.choose("tiny", 0.9, None) == ARMS.choose(None, 0.9, True) == Arm("tiny:gamma=0.9", 0.9)
    assert ARMS.choose("tiny", None, False) == ARMS.choose(None, 1.0, None) == Arm("tiny:base", None)
    recorded = Arms("tiny", 0.9700000286102295)  # 0.97 as a float32
    assert recorded.choose(None, 0.97, None) == Arm("tiny", recorded.gamma)


@pytest.mark.parametrize("name", ["gpt-4", "tiny2", "tiny:", "tiny:other", "TINY", "\x1b[31m"])
def test_another_model_is_not_there(name: str) -> None:
    with pytest.raises(Refusal) as refused:
        ARMS.choose(name, None, None)
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")
    assert "tiny:base" in refused.value.message


@pytest.mark.parametrize(
    ("arms", "asked", "param"),
    [
        (ARMS, (None, 0.0, None), "nkat_gamma"),
        (ARMS, (None, 1.5, None), "nkat_gamma"),
        (ARMS, (None, float("nan"), None), "nkat_gamma"),
        (ARMS, ("tiny:gamma=0", None, None), "model"),
        (ARMS, ("tiny:gamma=x", None, None), "model"),
        (ARMS, (None, 0.9, False), "nkat_gamma"),
        (ARMS, ("tiny:base", 0.9, None), "model"),
        (ARMS, ("tiny:base", None, True), "model"),
        (Arms("plain", None), (None, 0.9, None), "nkat_gamma"),
        (Arms("plain", None), (None, None, True), "nkat_theta"),
    ],
)
def test_a_strength_that_cannot_be(arms: Arms, asked: tuple[Any, Any, Any], param: str) -> None:
    with pytest.raises(Refusal) as refused:
        arms.choose(*asked)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_a_model_without_theta_has_one_name() -> None:
    plain = Arms("plain", None)
    assert plain.all() == [plain.choose(None, None, False)] == [Arm("plain", None)]
