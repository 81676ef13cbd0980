"""What the model is given: the prompt of a flag, a file or stdin, and the chat template it may be put into."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.host.console import note
from nkat.lm.chat import OURS, TEMPLATE_KEY, unused_arguments
from nkat.lm.load import LoadedModel
from nkat.measure.texts import load_text

STDIN = "-"


def read_prompt(path: Path) -> str:
    """A prompt from a UTF-8 file, "-" for stdin, without the line break that editors put at its end.

    Raises NKATError where it cannot be read, is empty, or no UTF-8.
    """
    text = _read_stdin() if str(path) == STDIN else load_text(path).content
    text = text.removeprefix("\ufeff")  # which editors on Windows put first
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def _read_stdin() -> str:
    if sys.stdin is None:
        raise NKATError("stdin is closed, so that no prompt can be read from it")
    if sys.stdin.isatty():
        note("the prompt, and Ctrl-D behind it (Ctrl-Z and Enter on Windows):")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise NKATError(f"stdin: not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise NKATError("stdin: the text is empty")
    return text


def template_argument(text: str) -> tuple[str, Any]:
    """For argparse: NAME=VALUE for a chat template, where the value is JSON, or else the text itself."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, such as enable_thinking=false, got {text!r}")
    if name in OURS:
        raise argparse.ArgumentTypeError(f"{name} is what the conversation itself is given to a template as")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def template_metadata(loaded: LoadedModel, file: Path | None, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's metadata, with the chat template of `file` in place of its own where there is one.

    Raises NKATError for a file that cannot be read, and where there is no template; says which of the arguments the
    template does not know.
    """
    metadata: Mapping[str, Any] = loaded.gguf.metadata
    if file is not None:
        metadata = {**metadata, TEMPLATE_KEY: load_text(file).content}
    for name in unused_arguments(metadata, [*arguments]):
        note(f"warning: --template-arg {name}: the chat template has no such word, so it changes nothing")
    return metadata
