"""The model's own chat template (`tokenizer.chat_template` of a GGUF), rendered as Hugging Face's transformers does.

Templates are programs in Jinja that come with a model from anywhere: they run in Jinja's sandbox and in a process of
their own with little memory and time (`nkat.lm.template`). What transformers gives them is here: `raise_exception`,
`strftime_now`, `tojson` without HTML escapes, `break` and `continue`, the `generation` tag (which only marks the
assistant's part and changes no text). Tools and documents are not offered to the template, unless the user gives them
among its arguments: further variables, which most templates call what transformers' `apply_chat_template` does
(`enable_thinking`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from nkat.errors import NKATError
from nkat.lm.template_process import TemplateProcess, failed
from nkat.lm.tokenizer import Tokenizer

TEMPLATE_KEY = "tokenizer.chat_template"
NAMES_KEY = "tokenizer.chat_templates"

Message = Mapping[str, str]  # role ("system", "user", "assistant") and content
OURS = ("messages", "add_generation_prompt")  # variables that no argument may replace


def chat_messages(prompt: str, system: str | None = None) -> list[Message]:
    """One turn of the user's, with instructions before it where given."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def render_chat(
    metadata: Mapping[str, Any],
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation, up to where the assistant answers. arguments: further variables, as JSON has them

    Raises NKATError when the file has no template, or the template fails or refuses the messages.
    """
    (text,) = _render(chat_template(metadata), [_variables(tokenizer, messages, True, arguments)])
    if isinstance(text, NKATError):
        raise text
    return text


def render_chats(
    metadata: Mapping[str, Any],
    tokenizer: Tokenizer,
    chats: Sequence[tuple[Sequence[Message], bool]],
    arguments: Mapping[str, Any] | None = None,
    process: TemplateProcess | None = None,
) -> list[str | NKATError]:
    """The text of each conversation, or why the template gave none; True: up to where the assistant answers.

    All of them in one process: in that which is given, where more will follow. Raises NKATError when the file has no
    template, and for what ends the process.
    """
    renders = [_variables(tokenizer, messages, asks, arguments) for messages, asks in chats]
    return _render(chat_template(metadata), renders, process)


def encode_chat(tokenizer: Tokenizer, rendered: str) -> list[int]:
    """Token ids of a rendered conversation: special tokens parsed, and one BOS even if the template wrote none."""
    ids = tokenizer.encode(rendered, parse_special=True)
    if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        return [tokenizer.bos_id, *ids]
    return ids


def unused_arguments(metadata: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Those names that the template does not contain, so that giving them a value changes nothing."""
    template = chat_template(metadata)
    return [name for name in names if not re.search(rf"\b{re.escape(name)}\b", template)]


def chat_template(metadata: Mapping[str, Any], instead: str = "leave --chat out, or give one: --template-file") -> str:
    """The template of a file. Raises NKATError where there is none, or several of which none is the usual one.

    instead: what the user can do then

    Beside a text it may be an array of texts, whose names `tokenizer.chat_templates` has, an array of pairs of a name
    and a text, or texts under keys of their own (`tokenizer.chat_template.NAME`).
    """
    value = metadata.get(TEMPLATE_KEY)
    if isinstance(value, str) and value.strip():
        return value
    named = {key.removeprefix(f"{TEMPLATE_KEY}."): key for key in metadata if key.startswith(f"{TEMPLATE_KEY}.")}
    texts = {name: metadata[key] for name, key in named.items()}
    if isinstance(value, list):
        names = metadata.get(NAMES_KEY)
        if not (isinstance(names, list) and len(names) == len(value)):
            names = [str(number) for number in range(1, len(value) + 1)]
        pairs = [v if isinstance(v, list) and len(v) == 2 else (n, v) for n, v in zip(names, value, strict=True)]
        texts |= {str(name): text for name, text in pairs}
    texts = {name: text for name, text in texts.items() if isinstance(text, str) and text.strip()}
    if "default" in texts:
        return str(texts["default"])
    if len(texts) == 1:
        ((name, text),) = texts.items()
        warnings.warn(f"{TEMPLATE_KEY}: the only chat template of the model, {name!r:.80}, is used", stacklevel=3)
        return str(text)
    if texts:
        raise NKATError(
            f"this model has {len(texts)} chat templates ({', '.join(texts):.200}) and none is its default, so none "
            f"can be chosen: {instead}"
        )
    if value is None or isinstance(value, str):
        raise NKATError(f"this model has no chat template ({TEMPLATE_KEY}): it continues text; {instead}")
    raise NKATError(f"the model's chat template ({TEMPLATE_KEY}) is {value!r:.80}, which is no text: {instead}")


def _variables(
    tokenizer: Tokenizer, messages: Sequence[Message], asks: bool, arguments: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What transformers gives a template."""
    return {
        "tools": None,
        "documents": None,
        "bos_token": _text(tokenizer, tokenizer.bos_id),
        "eos_token": _text(tokenizer, tokenizer.eos_id),
        **(arguments or {}),
        "messages": [dict(message) for message in messages],
        "add_generation_prompt": asks,
    }


def _render(
    template: str, renders: Sequence[Mapping[str, Any]], process: TemplateProcess | None = None
) -> list[str | NKATError]:
    """process: that is kept for more; None: one for these alone"""
    if process is None:
        with TemplateProcess() as own:
            return _render(template, renders, own)
    found = process.answers(template, renders)
    return [failed(one["error"]) if "error" in one else one["text"] for one in found]


def _text(tokenizer: Tokenizer, token: int | None) -> str:
    return "" if token is None else tokenizer.decode_bytes([token]).decode("utf-8", errors="replace")
