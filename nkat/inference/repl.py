"""`--chat` without a prompt: a conversation line by line, at a terminal or from a pipe."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nkat.engine.session import Session
from nkat.errors import NKATError
from nkat.host.console import counted, note
from nkat.host.files import atomic_output
from nkat.host.interrupts import Terminated
from nkat.host.streams import printable
from nkat.inference.conversation import Conversation, Turn
from nkat.inference.options import EngineOptions
from nkat.inference.prompts import template_metadata
from nkat.inference.writing import drawing_record, sampler_for, show, speed_record
from nkat.lm.load import LoadedModel

USUAL_CONTEXT = 8192  # tokens: on a GPU they take memory at once
QUOTES = '"""'
HELP = f"""\
/clear       forget the conversation, but not --system
/undo        take the last message and its answer back
/save FILE   write it as a row of JSON, of the kind that --calibrate learns from
/exit        end, as Ctrl-D does
A \\ at the end of a line, or {QUOTES} around several, makes one message of them. Ctrl-C stops an answer and keeps it.
A message that begins with a slash is written with two."""


class _Ended(Exception):
    """The user wants no more."""


def converse(options: EngineOptions, loaded: LoadedModel) -> tuple[dict[str, Any], Session]:
    """Until the input ends; answers go to stdout, everything else to stderr. The record, and what wrote it."""
    sampler, config = sampler_for(options), loaded.config
    if options.context is not None:
        config.check_length(options.context, "--context", bool(options.beyond_context))
    room = options.context or min(config.context_length, USUAL_CONTEXT)
    arguments = dict(options.template_arg or ())
    session = Session(loaded.model, room)
    session.set_gamma(loaded.gamma)
    conversation = Conversation(
        session,
        loaded.tokenizer,
        sampler,
        metadata=template_metadata(loaded, options.template_file, arguments),
        system=options.system,
        arguments=arguments,
        max_tokens=options.max_tokens,
    )
    turns, stopped = _Loop(conversation, room, options.model.name).run()
    record = {
        "chat": True,
        "messages": conversation.messages,
        "turns": turns,
        "stopped": stopped,
        "context": room,
        "max_tokens": options.max_tokens,
        **drawing_record(options, sampler),
    }
    return record, session


class _Loop:
    """What is read and said."""

    def __init__(self, conversation: Conversation, room: int, name: str) -> None:
        self.conversation, self.room, self.name = conversation, room, name
        self.typed = sys.stdin is not None and sys.stdin.isatty()  # otherwise from a file or a pipe
        self.turns: list[dict[str, Any]] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: _tell(HELP),
            "clear": self._clear,
            "undo": self._undo,
            "save": self._save,
            **dict.fromkeys(("exit", "quit", "bye"), self._exit),
        }

    def run(self) -> tuple[list[dict[str, Any]], str]:
        """Each turn's record, and what ended them."""
        if self.typed:
            with contextlib.suppress(ImportError):  # Windows has none: the terminal edits lines by itself
                import readline  # noqa: F401  # input() then edits lines and remembers them
            note(f"{self.name}, {counted(self.room, 'token')} of context; /help says what there is, Ctrl-D ends")
        while True:
            try:
                self._answer(read_message(self._line))
            except (EOFError, _Ended):
                return self.turns, "end of input"
            except Terminated:
                return self.turns, "terminated"
            except KeyboardInterrupt:
                if not self.typed:
                    return self.turns, "interrupted"
                _tell("\nCtrl-D or /exit ends")
            except NKATError as error:
                if not self.typed:
                    raise
                _tell(f"error: {error}")

    def _line(self, prompt: str) -> str:
        """A line without its end. Raises EOFError behind the last."""
        if self.typed and sys.stdout is not None and sys.stdout.isatty():
            return input(prompt)
        if self.typed:  # the answers go to a file
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            line = "" if sys.stdin is None else sys.stdin.readline()
            line.encode()
        except UnicodeDecodeError as error:
            raise NKATError(f"stdin: not {error.encoding} text (byte {error.start})") from None
        except UnicodeEncodeError:  # what Python makes of stray bytes where no language is set
            raise NKATError("stdin: not UTF-8 text") from None
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _answer(self, text: str) -> None:
        if text.startswith("/") and not text.startswith("//"):
            name, _, rest = text[1:].partition(" ")
            if name not in self._commands:
                raise NKATError(f"there is no /{name}; /help says what there is")
            self._commands[name](rest.strip())
            return
        if not text.strip():
            return
        turn = self.conversation.ask(text.removeprefix("/") if text.startswith("//") else text, show)
        print("\n" if self.typed else "", flush=True)
        self._report(turn)
        self.turns.append({**speed_record(turn.result), "left_out_messages": turn.left_out})
        if turn.result.stopped == "terminated":
            raise Terminated
        if turn.result.stopped == "interrupted" and not self.typed:
            raise KeyboardInterrupt

    def _report(self, turn: Turn) -> None:
        result = turn.result
        if turn.left_out:
            note(
                f"the context of {counted(self.room, 'token')} is full: the model no longer sees the oldest "
                f"{counted(turn.left_out, 'message')}"
            )
        if result.stopped == "length":
            note(f"the answer ends here: --max-tokens is {self.conversation.max_tokens}")
        elif result.stopped == "context":
            note("the answer ends here: the context is full; the next message makes room")
        note(
            f"prompt {counted(result.prompt_tokens, 'token')}, {result.reused} of them kept; "
            f"generated {counted(len(result.tokens), 'token')}, {result.speed:.2f} tok/s"
        )

    def _clear(self, _: str) -> None:
        self.conversation.clear()
        _tell("forgotten")

    def _undo(self, _: str) -> None:
        text = self.conversation.undo()
        _tell("there is nothing to take back" if text is None else f"taken back: {text}")

    def _save(self, file: str) -> None:
        if not file:
            raise NKATError("/save FILE: a name is needed")
        path = Path(file).expanduser()
        data = (json.dumps({"messages": self.conversation.messages}, ensure_ascii=False) + "\n").encode(
            errors="backslashreplace"
        )
        with atomic_output(path, len(data)) as out:
            out.write(data)
        _tell(f"saved: {path}")

    def _exit(self, _: str) -> None:
        raise _Ended


def _tell(text: str) -> None:
    """What was asked for just now, also with --quiet."""
    print("\n".join(printable(line) for line in text.split("\n")), file=sys.stderr, flush=True)


def read_message(line: Callable[[str], str]) -> str:
    '''One message: a line, lines that end in a backslash with the next one, or what is between """ and """.

    line: shows a prompt and gives the next line; raises EOFError behind the last, which ends a message as well
    '''
    first = line("> ")
    lines = [first]
    with contextlib.suppress(EOFError):
        if first.lstrip().startswith(QUOTES):
            return _quoted(first.lstrip().removeprefix(QUOTES), line)
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(line("… "))
    return "\n".join(lines)


def _quoted(first: str, line: Callable[[str], str]) -> str:
    lines = [first]
    with contextlib.suppress(EOFError):
        while QUOTES not in lines[-1]:
            lines.append(line("… "))
    lines[-1] = lines[-1].partition(QUOTES)[0]
    return "\n".join(lines).strip("\n")
