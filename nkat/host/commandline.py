"""What every script's command line shares: flags' types, and errors as one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import NoReturn, TypeVar

from nkat.errors import NKATError

Options = TypeVar("Options")

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a script: a user's mistake is one line on stderr and status 2, Ctrl-C is status 130."""
    try:
        main()
    except NKATError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `… | head` has read enough
        sys.stderr.close()
        sys.exit(0)
    sys.exit(0)


class Parser(argparse.ArgumentParser):
    """argparse's, but a mistake is one line and not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"error: {message} (see --help)\n")


def parser(description: str, examples: str, parents: Sequence[argparse.ArgumentParser] = ()) -> Parser:
    """A parser whose help ends with commands to copy."""
    return Parser(
        parents=list(parents),
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def taken(kind: type[Options], parsed: argparse.Namespace, **others: object) -> Options:
    """A frozen options class out of a parsed command line: each field is the flag of its name, or one of `others`."""
    names = [field.name for field in fields(kind) if field.name not in others]
    return kind(**{name: getattr(parsed, name) for name in names}, **others)


def check_conflicts(
    parser: argparse.ArgumentParser, options: Options, conflicts: Sequence[tuple[Callable[[Options], object], str]]
) -> None:
    """Ends the program with the message of the first condition that holds; `{o}` in it stands for the options."""
    for wrong, message in conflicts:
        if wrong(options):
            parser.error(message.format(o=options))


def positive_int(text: str) -> int:
    """For argparse: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def non_negative_int(text: str) -> int:
    """For argparse: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value
