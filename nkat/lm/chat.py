"""The model's own chat template (`tokenizer.chat_template` of a GGUF), rendered as Hugging Face's transformers does.

Templates are programs in Jinja that come with a model from anywhere: they run in Jinja's sandbox, which keeps them from
the system but not from looping for a long time. What transformers gives them is here: `raise_exception`,
`strftime_now`, `tojson` without HTML escapes, `break` and `continue`, the `generation` tag (which only marks the
assistant's part and changes no text). Tools and documents are not offered to the template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from nkat.errors import NKATError
from nkat.lm.tokenizer import Tokenizer

TEMPLATE_KEY = "tokenizer.chat_template"

Message = Mapping[str, str]  # role ("system", "user", "assistant") and content


def chat_messages(prompt: str, system: str | None = None) -> list[Message]:
    """One turn of the user's, with instructions before it where given."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def render_chat(metadata: Mapping[str, Any], tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """The text of a conversation, up to where the assistant answers.

    Raises NKATError when the file has no template, or the template fails or refuses the messages.
    """
    from jinja2 import TemplateError

    template = metadata.get(TEMPLATE_KEY)
    if not isinstance(template, str) or not template.strip():
        raise NKATError(f"this model has no chat template ({TEMPLATE_KEY}): it continues text; leave --chat out")
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                bos_token=_text(tokenizer, tokenizer.bos_id),
                eos_token=_text(tokenizer, tokenizer.eos_id),
            )
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        line = " ".join(str(error).split())[:200]
        raise NKATError(f"the model's chat template cannot be used: {line or type(error).__name__}") from None


def encode_chat(tokenizer: Tokenizer, rendered: str) -> list[int]:
    """Token ids of a rendered conversation: special tokens parsed, and one BOS even if the template wrote none."""
    ids = tokenizer.encode(rendered, parse_special=True)
    if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        return [tokenizer.bos_id, *ids]
    return ids


def _environment() -> Any:
    """Jinja's sandbox with transformers' settings (utils/chat_template_utils.py)."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - Jinja's own way to say it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _text(tokenizer: Tokenizer, token: int | None) -> str:
    return "" if token is None else tokenizer.decode_bytes([token]).decode("utf-8", errors="replace")
