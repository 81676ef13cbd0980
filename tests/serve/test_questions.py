"""What a request may hold, and what is said about the rest; names of models and strengths of Θ."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nkat.engine.generate import Sampling
from nkat.serve.arms import Arm, Arms, theta_names
from nkat.serve.questions import COMPLETION_TOKENS, read_chat, read_completion
from nkat.serve.refusal import Refusal

HELLO = [{"role": "user", "content": "Hello"}]
ON = (("theta", 1.0),)
ARMS = Arms("tiny", {"theta": 0.97}, {"theta": 1.0}, None, (0.9, 0.97, 1.0))
TWO = Arms("tiny", {"style": 0.97, "facts": 0.9}, {"style": 1.0, "facts": 0.5})
PLAIN = Arms("plain")


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
    assert chat(nkat_theta="style").theta == "style"
    assert chat(nkat_theta={"style": 1, "facts": 0.5}).theta == {"style": 1.0, "facts": 0.5}
    assert (asked.stream, asked.include_usage) == (True, True)
    assert completion(prompt=["one"]).prompt == "one"
    assert completion(prompt=[5, 6]).prompt == completion(prompt=[[5, 6]]).prompt == [5, 6]
    assert chat(max_tokens=5).max_tokens == chat(max_completion_tokens=5, max_tokens=9).max_tokens == 5
    assert (chat(logprobs=True).logprobs, chat(logprobs=True, top_logprobs=4).logprobs) == (0, 4)
    assert chat(chat_template_kwargs={"enable_thinking": False}).prompt.arguments == {"enable_thinking": False}
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
        ({"nkat_theta": 1}, "nkat_theta"),
        ({"nkat_theta": ["style"]}, "nkat_theta"),
        ({"nkat_theta": {"style": "much"}}, "nkat_theta"),
        ({"nkat_theta": {"style": True}}, "nkat_theta"),
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
        ({"chat_template_kwargs": ["enable_thinking"]}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "messages"),
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
    assert ARMS.named("tiny:gamma=0.95") == Arm("tiny:gamma=0.95", ON, 0.95)  # whether or not it is listed
    assert ARMS.named("tiny:gamma=1") == ARMS.named("tiny:base") == Arm("tiny:base", (), None)
    assert ARMS.named("tiny:theta") == ARMS.default == Arm("tiny", ON, None)
    assert [ARMS.strength(arm) for arm in ARMS.all()] == [0.97, None, 0.9]


def test_fields_choose_it_too() -> None:
    assert ARMS.choose(None, None, None) == ARMS.choose("tiny", None, True) == Arm("tiny", ON, None)
    assert ARMS.choose("tiny", 0.9, None) == ARMS.choose(None, 0.9, True) == Arm("tiny:gamma=0.9", ON, 0.9)
    assert ARMS.choose("tiny", None, False) == ARMS.choose(None, 1.0, None) == Arm("tiny:base", (), None)
    recorded = Arms("tiny", {"theta": 0.9700000286102295}, {"theta": 1.0})  # 0.97 as a float32
    assert recorded.choose(None, 0.97, None) == recorded.default


def test_several_are_chosen_by_name_and_weight() -> None:
    assert [arm.name for arm in TWO.all()] == ["tiny", "tiny:base", "tiny:style", "tiny:facts"]
    for asked, name, weights in (
        (True, "tiny", {"style": 1.0, "facts": 0.5}),
        ("facts", "tiny:facts", {"facts": 1.0}),
        ({"facts": 2, "style": -0.5}, "tiny:style=-0.5,facts=2", {"style": -0.5, "facts": 2.0}),
        ({"facts": 0.5, "style": 1}, "tiny", {"style": 1.0, "facts": 0.5}),
        ({"facts": 0}, "tiny:base", {}),
        ({}, "tiny:base", {}),
    ):
        arm = TWO.choose("tiny", None, asked)
        assert (arm.name, dict(arm.weights), arm.gamma) == (name, weights, None)
        assert TWO.named(arm.name) == arm  # so that whoever can only choose a model can choose it
    both = TWO.choose(None, 0.8, {"style": 1, "facts": 1})
    assert both == TWO.named("tiny:style,facts,gamma=0.8") == Arm("tiny:style,facts,gamma=0.8", both.weights, 0.8)
    assert TWO.strength(TWO.default) == 0.9  # of the stronger one


def test_a_strength_of_the_command_line_is_the_usual_one() -> None:
    started = Arms("tiny", {"theta": 0.97}, {"theta": 1.0}, gamma=0.9)
    assert started.default == started.choose(None, 0.9, None) == Arm("tiny", ON, 0.9)
    assert started.choose(None, 0.97, None) == started.named("tiny:gamma=0.97") == Arm("tiny:gamma=0.97", ON, 0.97)
    waiting = Arms("tiny", {"style": 0.9}, {"style": 0.0})  # there, and off until it is asked for
    assert waiting.default == Arm("tiny", (), None)
    assert (
        waiting.choose(None, None, True)
        == waiting.choose(None, 0.9, None)
        == Arm("tiny:style", (("style", 1.0),), None)
    )


def test_names_of_files_become_names_that_can_be_told_apart() -> None:
    names = theta_names(["a b", "a:b", "gamma", "base", "x=1,y", "", "文"])
    assert names == ["a-b", "a-b-2", "gamma-2", "base-2", "x-1-y", "theta", "文"]


@pytest.mark.parametrize(
    "name",
    ["gpt-4", "tiny2", "tiny:", "tiny:other", "TINY", "\x1b[31m", "tiny:base,theta", "tiny:base=1", "tiny:gamma"],
)
def test_another_model_is_not_there(name: str) -> None:
    with pytest.raises(Refusal) as refused:
        ARMS.choose(name, None, None)
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")
    assert refused.value.message.isprintable()


@pytest.mark.parametrize(
    ("arms", "asked", "param"),
    [
        (ARMS, (None, 0.0, None), "nkat_gamma"),
        (ARMS, (None, 1.5, None), "nkat_gamma"),
        (ARMS, (None, float("nan"), None), "nkat_gamma"),
        (ARMS, ("tiny:gamma=0", None, None), "model"),
        (ARMS, ("tiny:gamma=x", None, None), "model"),
        (ARMS, ("tiny:theta=nan", None, None), "model"),
        (ARMS, (None, 0.9, False), "nkat_gamma"),
        (ARMS, ("tiny:base", 0.9, None), "model"),
        (ARMS, ("tiny:base", None, True), "model"),
        (ARMS, (None, None, "facts"), "nkat_theta"),
        (TWO, (None, None, {"facts": float("inf")}), "nkat_theta"),
        (TWO, (None, None, {"facts": 1e30}), "nkat_theta"),
        (PLAIN, (None, 0.9, None), "nkat_gamma"),
        (PLAIN, (None, None, True), "nkat_theta"),
        (PLAIN, ("plain:gamma=0.9", None, None), "model"),
    ],
)
def test_what_cannot_be_chosen(arms: Arms, asked: tuple[Any, Any, Any], param: str) -> None:
    with pytest.raises(Refusal) as refused:
        arms.choose(*asked)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_a_model_without_theta_has_one_name() -> None:
    assert PLAIN.all() == [PLAIN.choose(None, None, False)] == [PLAIN.named("plain:base")] == [Arm("plain", (), None)]
