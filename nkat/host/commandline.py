"""What every command line shares: flags' types, `--version`, and errors as one line."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from nkat.errors import NKATError
from nkat.host import output, streams, tables
from nkat.host.files import taken_outputs
from nkat.host.interrupts import Terminated, termination
from nkat.host.programs import shell_line
from nkat.host.record import git_commit
from nkat.host.start import INTERRUPTED
from nkat.host.threads import most_threads
from nkat.host.tools import is_installed
from nkat.version import __version__

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")

USER_ERROR = 2
SEEDS = 1 << 32


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a command. What goes wrong is one line on stderr: a user's mistake or what the system refuses is status 2,
    Ctrl-C is status 130, SIGTERM 143. A stdout that breaks does not stop the work; one that loses text is an error at
    the end.
    """
    with streams.guarded(), _short_warnings():
        sys.exit(_status(main))


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """What is for the user is a line like any other; what is for programmers keeps its place in the source."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if category is UserWarning:
            print(f"warning: {streams.printable(str(message))}", file=sys.stderr)
        else:
            usual(message, category, *place, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


def _status(main: Callable[[], None]) -> str | int | None:
    with termination() as received:
        status = _ending(main)
    return 128 + received[0] if received else status


def _ending(main: Callable[[], None]) -> str | int | None:
    taken_outputs()  # of a command before this one in the same process
    output.reset()
    try:
        try:
            main()
        finally:
            tables.finish()
    except NKATError as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError, OSError) as error:
        problem = system_limit(error)
        if problem is None and isinstance(error, OSError):  # what nobody was prepared for
            place = "" if error.filename is None else f"{error.filename}: "
            problem = f"{place}{error.strerror or error}"
        if problem is None:
            raise
        return _fail(problem)
    except Terminated:
        return _interrupted("terminated")
    except KeyboardInterrupt:
        return _interrupted("interrupted")
    except SystemExit as ended:
        if ended.code not in (None, 0):
            return ended.code
    lost = streams.lost_output() if sys.stdout is not None else None
    if lost is None or isinstance(lost, BrokenPipeError):  # `... | head` has read enough, and the work is done
        return 0
    return _fail(f"stdout: cannot be written: {lost.strerror or lost}")


def _interrupted(how: str) -> int:
    written = ", ".join(str(path) for path in taken_outputs())
    what = f"what was finished before is there: {written}" if written else "nothing was written"
    print(f"{how}; {streams.printable(what)}", file=sys.stderr)
    return INTERRUPTED


def _fail(message: str) -> int:
    print(f"error: {streams.printable(message)}", file=sys.stderr)
    return USER_ERROR


# Flags whose value sets how much memory a command takes, in the order in which lowering one helps most.
_SIZES = (
    "--max-tokens", "--seq-len", "--contextsize", "--batch-size", "--batch", "--chunks", "--theta-rank", "--rank",
    "--embed-dim", "--depth", "--rows", "--workers", "--threads",
)  # fmt: skip
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|Cannot allocate memory|Storage size calculation overflowed"
    r"|integer multiplication overflow",
    re.IGNORECASE,
)


def system_limit(error: BaseException) -> str | None:
    """What to tell a user whose memory, or whose system's paths, did not suffice; None: the error is another one.

    numpy and Python raise MemoryError, torch a RuntimeError, and the system's calls an OSError.
    """
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{str(error.filename)[:60]}…: the path is too long for this system"
    if isinstance(error, OSError):
        if error.errno != errno.ENOMEM:
            return None
    elif not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
        return None
    given = [flag for flag in _SIZES if any(word.split("=")[0].replace("_", "-") == flag for word in sys.argv[1:])]
    smaller = f"a smaller {' or '.join(given)}, or " if given else ""
    size = re.search(r"Unable to allocate ([\d.]+ \w+)|tried to allocate ([\d.]+ \w+)", str(error))
    wanted = f" ({size[1] or size[2]} more were wanted)" if size else ""
    return f"out of memory{wanted}: give {smaller}a smaller model or input, or end other programs"


_AS_IT_IS = "\0"  # which no argument of a command can hold, before the one text that argparse drops even as a value: --


def any_text(text: str) -> str:
    """For argparse: text of the user's, which may begin with a dash unless the whole of it is one of the flags."""
    return text.removeprefix(_AS_IT_IS)


EXIT_STATUS = """\
exit status:
  0 done; 2 a mistake or an input that cannot be used (stderr's line says what); 130 after Ctrl-C, 143 after SIGTERM
"""


class Parser(argparse.ArgumentParser):
    """argparse's, but a mistake is one line and not the whole usage, in words for people who do not know Python.

    `any_text` may begin with a dash.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.register("type", int, whole_number)  # argparse itself says "invalid int value"
        self.register("type", float, number)

    def parse_known_args(  # type: ignore[override]  # argparse's own overloads differ between versions of Python
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, of which every way to parse makes use."""
        words = list(sys.argv[1:] if args is None else args)
        flags = {"--", *(flag for action in self._actions for flag in action.option_strings)}
        texts = {flag for action in self._actions if action.type is any_text for flag in action.option_strings}
        joined: list[str] = []
        for word in words:
            if joined and joined[-1] in texts and word in flags:
                flag = joined[-1]
                self.error(f"{flag} needs a text, and {word} is a flag; for a text of that name give {flag}={word}")
            if joined and joined[-1] in texts and word.startswith("-"):
                joined[-1] += f"={word}"
            else:
                flag, _, value = word.partition("=")
                joined.append(f"{flag}={_AS_IT_IS}--" if flag in texts and value == "--" else word)
        return super().parse_known_args(joined, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"error: {streams.printable(message)} (see --help)\n")

    # The overloads of argparse are about kinds of namespaces, of which there is one here.
    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, but a flag that there is not is named even where one that is needed is missing."""
        needed = [action for action in self._actions if action.required]
        for action in needed:
            action.required = False
        try:
            unknown = self.parse_known_args(args)[1]
        finally:
            for action in needed:
                action.required = True
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return super().parse_args(args, namespace)

    def _meant(self, unknown: Sequence[str]) -> str:
        """The flag that looks most like the first unknown one."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        given = next((word.partition("=")[0] for word in unknown if word.startswith("-")), "")
        near = difflib.get_close_matches(given, flags, n=1)
        return f"; did you mean {near[0]}?" if near else ""


class ShowVersion(argparse.Action):
    """`--version`; git is asked only where the user asks."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        commit = git_commit()
        print(f"nkat {__version__}" + (f", commit {commit[:7]}" if commit else ""))
        parser.exit()


def parser(
    description: str, examples: str, parents: Sequence[argparse.ArgumentParser] = (), ending: str = EXIT_STATUS
) -> Parser:
    """A parser with `--version`, whose help ends with commands to copy, and how the command ends."""
    made = Parser(
        parents=list(parents),
        description=description,
        epilog=f"examples:\n{_as_called(examples).rstrip()}\n\n{ending}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--version", action=ShowVersion, nargs=0, help="show the toolkit's version and exit")
    made.add_argument(
        "--quiet",
        action=_BeQuiet,
        nargs=0,
        default=False,
        help="results, warnings and errors only: no progress, no hints",
    )
    return made


def add_output_format(parser: argparse.ArgumentParser) -> None:
    """`--output-format`, for a command that measures: how its tables are printed."""
    parser.add_argument(
        "--output-format",
        choices=output.FORMS,
        action=_SetForm,
        help="of the tables on stdout (default table); with md, csv or jsonl all other words go to stderr",
    )


class _BeQuiet(argparse.Action):
    """`--quiet`, of which whoever prints asks `nkat.host.output`."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        output.be_quiet()
        setattr(namespace, self.dest, True)


class _SetForm(argparse.Action):
    """`--output-format`, likewise; the options have it too."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: Any) -> None:
        output.set_form(value)
        setattr(namespace, self.dest, value)


def _as_called(examples: str) -> str:
    """Where a console script was called, which has no script beside it, the examples call that one."""
    command = Path(sys.argv[0]).name.removesuffix(".exe")
    if not is_installed():
        return examples
    return re.sub(r"^  python (-m )?\S+", f"  {command}", examples, flags=re.MULTILINE)


def own_command() -> str:
    """This command as it was given, for a record."""
    return shell_line([*([] if is_installed() else ["python"]), *sys.argv])


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


def whole_number(text: str) -> int:
    """For argparse: an integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def number(text: str) -> float:
    """For argparse: a float."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def positive_int(text: str) -> int:
    """For argparse: an integer of at least 1."""
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def thread_count(text: str) -> int:
    """For argparse: how many threads or processes, as many as this machine can sensibly run."""
    value = positive_int(text)
    if value > most_threads():
        raise argparse.ArgumentTypeError(f"must be at most {most_threads()} on this machine, got {value}")
    return value


def seconds(text: str) -> float:
    """For argparse: a time, which comes to its end."""
    value = number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {value:g}")
    return value


def seed(text: str) -> int:
    """For argparse: what every generator of random numbers takes, 32 bits."""
    value = non_negative_int(text)
    if value >= SEEDS:
        raise argparse.ArgumentTypeError(f"must be below {SEEDS}, got {value}")
    return value


def non_negative_int(text: str) -> int:
    """For argparse: an integer of at least 0."""
    value = whole_number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value
