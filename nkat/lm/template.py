"""Renders a chat template, in a process of its own with little memory and time.

    python -I nkat/lm/template.py        requests on stdin, each a line of JSON; on stdout a line for each, with
                                         {"text": …} or {"error": …} for each of its `renders`

A template is a program that comes with a model from anywhere. Jinja's sandbox keeps it from the system, but not from
looping for ever, filling the memory or recursing through the stack; so `nkat.lm.template_process` runs it here, where
whatever it does ends this process alone. The limits of memory and processor time are the system's (not on Windows,
where only the caller's clock ends it). Limits: the standard library and Jinja only, nothing of nkat.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from datetime import datetime
from typing import Any

MEMORY_BYTES = 1 << 30  # Python and Jinja take a tenth of it
SECONDS = 10  # of the processor; real templates take milliseconds
MAX_ADDED = 1 << 16  # characters around the messages, each of which may appear a few times: those in use add thousands
MAX_REPEATED = 4


def environment() -> Any:
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

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def answers(template: str, renders: list[dict[str, Any]]) -> list[dict[str, str]]:
    """For each set of variables the rendered text, or why there is none."""
    made = environment()
    return [answer(made, template, variables) for variables in renders]


def answer(made: Any, template: str, variables: dict[str, Any]) -> dict[str, str]:
    """made: see `environment`, which keeps what it has compiled"""
    try:
        text = made.from_string(template).render(**variables)
    except RecursionError:
        return {"error": "it calls itself without an end"}
    except (MemoryError, OverflowError):
        return {"error": "it needs more memory than a template may have"}
    except Exception as error:  # whatever a foreign program may fail with
        return {"error": " ".join(str(error).split())[:200] or type(error).__name__}
    said = "".join(part for message in variables["messages"] for part in message.values())
    if len(text) > MAX_ADDED + MAX_REPEATED * len(said):
        return {"error": f"it makes {len(text):,} characters of {len(said):,}"}
    if _has_surrogates(text) and not _has_surrogates(said):
        return {"error": "its text is not valid Unicode"}
    return {"text": text}


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _limit() -> None:
    """For the next request: memory in all, and so much more of the processor."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + SECONDS),
        (resource.RLIMIT_CORE, 0),
    )
    for kind, most in limits:
        with contextlib.suppress(ValueError, OSError):  # macOS does not know them all
            highest = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (most, highest if kind == resource.RLIMIT_CPU else most))


def main() -> None:
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _limit()
        sys.stdout.write(json.dumps(answers(**request)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
