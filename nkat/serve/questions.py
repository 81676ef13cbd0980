"""What a request's JSON asks for: each field checked, and none ignored that would change the answer.

The fields are OpenAI's, those of llama.cpp (`top_k`, `min_p`, `chat_template_kwargs`), and two of this server's own:
`nkat_gamma`, the strength of Θ, and `nkat_theta`: false, the name of one, or weights of several by name. Sampling that
a request does not name is the toolkit's, which is llama.cpp's, and not OpenAI's (temperature 1, no top-k and min-p).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nkat.engine.generate import Sampling
from nkat.errors import NKATError
from nkat.host.record import parse_json
from nkat.lm.chat import OURS, Message
from nkat.serve.arms import Theta
from nkat.serve.refusal import bad

COMPLETION_TOKENS = 16  # of /v1/completions where the request names none, as in OpenAI's API
_MOST_STOPS, _LONGEST_STOP = 16, 1000  # each is looked for in all that is held back
_MOST_LIKELIEST = 20
_USUAL = Sampling()

# Fields of OpenAI's, and one of llama.cpp's, that say nothing about the text.
_ABOUT_OTHERS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "parallel_tool_calls", "cache_prompt",
)  # fmt: skip
# Fields that this server has no means for, and the values that ask for nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repeat_penalty": (1,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
}
_WHY = {"n": "one answer a request is given", "best_of": "one answer a request is given"}
_ROLES = {"developer": "system"}  # OpenAI's newer name, which templates do not know


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation up to where the model answers. arguments: further variables for the template"""

    messages: list[Message]
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Question:
    """A request, read.

    prompt: a text, token ids, or a conversation
    max_tokens: None: as many as there is room for
    logprobs: see `nkat.serve.model.Ask`
    """

    model: str | None
    gamma: float | None
    theta: Theta | None
    prompt: str | list[int] | Chat
    max_tokens: int | None
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    logprobs: int | None
    stream: bool
    include_usage: bool
    echo: bool


def read_completion(data: bytes) -> Question:
    """The body of /v1/completions. Raises Refusal naming the field."""
    fields = Fields(data)
    prompt = _prompt(fields.take("prompt"))
    logprobs = fields.whole("logprobs", None, 0, _MOST_LIKELIEST)
    echo = fields.flag("echo", False)
    if echo and logprobs is not None:
        raise bad("echo together with logprobs is not supported: the prompt's tokens are not scored", "echo")
    if echo and not isinstance(prompt, str):
        raise bad("echo needs a prompt that is a text", "echo")
    most = fields.whole("max_tokens", COMPLETION_TOKENS, 1)
    return _question(fields, prompt=prompt, max_tokens=most, logprobs=logprobs, echo=echo)


def read_chat(data: bytes) -> Question:
    """The body of /v1/chat/completions. Raises Refusal naming the field."""
    fields = Fields(data)
    messages = _messages(fields.take("messages"))
    arguments = _arguments(fields.take("chat_template_kwargs"))
    most = fields.whole("max_completion_tokens", None, 1)
    old = fields.whole("max_tokens", None, 1)
    wanted, likeliest = fields.flag("logprobs", False), fields.whole("top_logprobs", None, 0, _MOST_LIKELIEST)
    if likeliest is not None and not wanted:
        raise bad("top_logprobs needs logprobs to be true", "top_logprobs")
    logprobs = (likeliest or 0) if wanted else None
    most = old if most is None else most
    return _question(fields, prompt=Chat(messages, arguments), max_tokens=most, logprobs=logprobs, echo=False)


def _question(fields: Fields, **rest: Any) -> Question:
    stream = fields.flag("stream", False)
    question = Question(
        model=fields.text("model"),
        gamma=fields.number("nkat_gamma", None),
        theta=_theta(fields.take("nkat_theta")),
        sampling=_sampling(fields),
        seed=fields.whole("seed", random.SystemRandom().getrandbits(32)),
        stop=_stop(fields.take("stop")),
        stream=stream,
        include_usage=_include_usage(fields.take("stream_options"), stream),
        **rest,
    )
    fields.finish()
    return question


class Fields:
    """The fields of a JSON object, taken one by one; null is as good as none."""

    def __init__(self, data: bytes) -> None:
        try:
            found = parse_json(data)
        except ValueError as error:
            raise bad(f"the body is not JSON: {str(error)[:200]}") from None
        if not isinstance(found, dict):
            raise bad("the body must be a JSON object")
        self._left: dict[str, Any] = {name: value for name, value in found.items() if value is not None}

    def take(self, name: str) -> Any:
        """The value; None: there is none."""
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise bad(f"{name} must be a text", name)
        return value

    def flag(self, name: str, default: Any) -> Any:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise bad(f"{name} must be true or false", name)
        return default if value is None else value

    def number(self, name: str, default: float | None) -> Any:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise bad(f"{name} must be a number", name)
        try:
            return float(value)
        except OverflowError:
            raise bad(f"{name} is too large", name) from None

    def whole(self, name: str, default: int | None, least: int | None = None, most: int | None = None) -> Any:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad(f"{name} must be a whole number", name)
        if (least is not None and value < least) or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"from {least} to {most}"
            raise bad(f"{name} must be {limits}, got {value}", name)
        return value

    def finish(self) -> None:
        """Raises Refusal for what is left and would have to change the answer."""
        for name in _ABOUT_OTHERS:
            self.take(name)
        for name, values in _NOTHING.items():
            value = self.take(name)
            if value is not None and not (value in values and not isinstance(value, bool)):
                raise bad(f"{name} is not supported: {_WHY.get(name, 'leave it out')}", name)
        for name in self._left:
            raise bad(f"unrecognised field: {name[:100]!r}", name[:100])


def _sampling(fields: Fields) -> Sampling:
    values = {
        "temperature": fields.number("temperature", _USUAL.temperature),
        "top_k": fields.whole("top_k", _USUAL.top_k),
        "top_p": fields.number("top_p", _USUAL.top_p),
        "min_p": fields.number("min_p", _USUAL.min_p),
    }
    try:
        return Sampling(**values)
    except NKATError as error:
        name = next(name for name in values if str(error).startswith((f"the {name}", name.replace("_", "-"))))
        raise bad(str(error), name) from None


def _theta(value: Any) -> Theta | None:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, dict) and all(isinstance(w, int | float) and not isinstance(w, bool) for w in value.values()):
        return {name: float(weight) if abs(weight) < 1e300 else math.inf for name, weight in value.items()}
    raise bad("nkat_theta must be false, the name of a Θ, or an object of names and weights", "nkat_theta")


def _stop(value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise bad("stop must be a text or a list of texts, none of them empty", "stop")
    if len(words) > _MOST_STOPS or any(len(word) > _LONGEST_STOP for word in words):
        raise bad(f"stop may hold {_MOST_STOPS} texts of {_LONGEST_STOP} characters at most", "stop")
    return tuple(words)


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise bad("stream_options needs stream to be true", "stream_options")
    known = {"include_usage", "include_obfuscation"}
    if not isinstance(value, dict) or not set(value) <= known or not all(isinstance(v, bool) for v in value.values()):
        raise bad("stream_options may hold include_usage, which is true or false", "stream_options")
    return bool(value.get("include_usage", False))


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        return value
    if isinstance(value, list) and len(value) > 1:
        raise bad("one prompt a request is answered: send the others in requests of their own", "prompt")
    raise bad("prompt must be a text, or a list of token ids", "prompt")


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise bad("messages must be a list with at least one message", "messages")
    return [_message(one, f"messages[{at}]") for at, one in enumerate(value)]


def _arguments(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad("chat_template_kwargs must be an object", "chat_template_kwargs")
    for name in OURS:
        if name in value:
            raise bad(f"chat_template_kwargs cannot hold {name}: it is what the conversation is given as", name)
    return value


def _message(value: Any, where: str) -> Message:
    role = value.get("role") if isinstance(value, dict) else None
    if not isinstance(role, str) or not role:
        raise bad(f"{where} must have a role", where)
    content = value.get("content")
    if content is None and role == "assistant":
        content = ""
    return {"role": _ROLES.get(role, role), "content": _content(content, f"{where}.content")}


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad(f"{where} must be a text", where)
    return "".join(_part(one, f"{where}[{at}]") for at, one in enumerate(value))


def _part(value: Any, where: str) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else None
    text = value.get("text") if isinstance(value, Mapping) else None
    if kind != "text" or not isinstance(text, str):
        raise bad(f"{where}: only parts of type text are understood", where)
    return text


def token_ids(prompt: Sequence[int], vocabulary: int) -> list[int]:
    """A prompt of ids. Raises Refusal for one that is no token of the model's."""
    for one in prompt:
        if not 0 <= one < vocabulary:
            raise bad(f"prompt: there is no token {one}; ids go from 0 to {vocabulary - 1}", "prompt")
    return list(prompt)
