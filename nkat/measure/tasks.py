"""Multiple-choice tasks in the files that llama-perplexity reads, and which of them it would take.

HellaSwag (`--hellaswag`, text): six lines a task: the context, the number of the right ending from 0 on, four endings.

Winogrande (`--winogrande`, text): a line a task, of five columns: a number, a sentence with one blank `_`, in quotes
where it has commas, the two words for it, and which is right, 1 or 2. What comes last in the file without a line break
and a further, empty line behind it is not read. A line that is no task is left out.

Multiple choice (`--multiple-choice`, binary, little-endian; ARC, MMLU, TruthfulQA): uint32 n, n places in the file,
then n tasks: a question, answers of which one is right, answers of which several are (not used). A text is its uint32
length in bytes and UTF-8; answers are their uint32 number, the texts, and an int32 each, 1 where it is right.

Of more tasks than are asked for the same are drawn as by llama-perplexity (tools/perplexity of
https://github.com/ggml-org/llama.cpp), with a Mersenne twister that is seeded with 1; HellaSwag's as
its builds with GNU's C++ library draw them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nkat.errors import NKATError
from nkat.host.console import counted, note

_ENDINGS = 4
_MOST_ANSWERS = 100


@dataclass(frozen=True, slots=True)
class Choice:
    """A text that goes on in several ways. right: numbers of the right ones"""

    context: str
    endings: tuple[str, ...]
    right: frozenset[int]

    @property
    def texts(self) -> list[str]:
        return [f"{self.context} {ending}" for ending in self.endings]


@dataclass(frozen=True, slots=True)
class Blank:
    """A sentence with a blank. right: the number of the word that belongs there, alone"""

    before: str
    after: str
    words: tuple[str, str]
    right: frozenset[int]

    @property
    def texts(self) -> list[str]:
        return [self.before + word + self.after for word in self.words]


def read_hellaswag(path: Path, most: int) -> list[Choice]:
    """most: at most so many, 0: all. Raises NKATError for another file."""
    lines = _lines(path)
    if not lines or len(lines) % (2 + _ENDINGS):
        raise NKATError(f"{path}: has {counted(len(lines), 'line')}, and a HellaSwag task has {2 + _ENDINGS}")
    found = []
    for start in range(0, len(lines), 2 + _ENDINGS):
        context, label, *endings = lines[start : start + 2 + _ENDINGS]
        if label.strip() not in map(str, range(_ENDINGS)):
            raise NKATError(f"{path}: line {start + 2} is {label[:40]!r}, not the number of an ending, 0 to 3")
        found.append(Choice(context, tuple(endings), frozenset([int(label)])))
    return [found[i] for i in drawn_uniformly(len(found), most or len(found))]


def read_winogrande(path: Path, most: int) -> list[Blank]:
    """most: at most so many, 0: all. Raises NKATError where no line is a task; says which lines are none."""
    *lines, last = _content(path).removesuffix("\n").split("\n")
    if last.strip():
        note(f"note: {path}: the last line is left out, as llama-perplexity does; an empty line behind it brings it in")
    found, wrong = [], []
    for number, line in enumerate(lines, 1):
        task = _blank(line)
        if isinstance(task, str):
            wrong.append((number, task))
        else:
            found.append(task)
    if not found:
        raise NKATError(f"{path}: no line of it is a Winogrande task (number,sentence with _,word,word,1 or 2)")
    if wrong:
        number, why = wrong[0]
        note(f"note: {path}: {counted(len(wrong), 'line')} left out that is no task: line {number} {why}")
    return [found[i] for i in drawn_by_share(len(found), most)]


def _blank(line: str) -> Blank | str:
    """The task, or why it is none."""
    commas, quoted = [], False
    for place, character in enumerate(line):
        if character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            commas.append(place)
            if len(commas) == 4:
                break
    if len(commas) < 4:
        return "has fewer than five columns"
    ends = [*commas[1:], len(line)]
    sentence, *words, answer = (line[a + 1 : b] for a, b in zip(commas, ends, strict=True))
    if sentence.startswith('"'):
        sentence = sentence[1:-1]
    before, blank, after = sentence.partition("_")
    if not blank:
        return "has no blank _"
    if answer.strip() not in ("1", "2"):
        return f"says that {answer[:20]!r} is right, not 1 or 2"
    return Blank(before, after, (words[0], words[1]), frozenset([int(answer) - 1]))


def read_multiple_choice(path: Path, most: int) -> list[Choice]:
    """most: at most so many, 0: all. Raises NKATError for another file, and for one that is damaged."""
    source = _Bytes(path, _raw(path))
    (count,) = source.numbers("I", 1, "the number of tasks")
    if not count:
        raise NKATError(f"{path}: has no tasks")
    places = source.numbers("I", count, "the places of its tasks")
    wanted = drawn_by_share(count, most)
    found = []
    for number in wanted:
        if len(wanted) < count:
            source.place = places[number]
        found.append(_task(source, number))
    return found


def _task(source: _Bytes, number: int) -> Choice:
    where = f"task {number}"
    question = source.text(where)
    answers, labels = source.answers(where)
    source.answers(where)  # those of which several are right
    if not question or not answers or not all(answers):
        raise NKATError(f"{source.path}: {where} has an empty question or answer")
    return Choice(question, tuple(answers), frozenset(i for i, label in enumerate(labels) if label == 1))


class _Bytes:
    """What a binary file of tasks says from a place on."""

    def __init__(self, path: Path, raw: bytes) -> None:
        self.path, self.raw, self.place = path, raw, 0

    def numbers(self, letter: str, count: int, what: str) -> tuple[int, ...]:
        data = self._take(4 * count, what)
        return struct.unpack(f"<{count}{letter}", data)

    def text(self, where: str) -> str:
        (length,) = self.numbers("I", 1, where)
        try:
            return self._take(length, where).decode()
        except UnicodeDecodeError:
            raise NKATError(f"{self.path}: {where} has a text that is not UTF-8") from None

    def answers(self, where: str) -> tuple[list[str], tuple[int, ...]]:
        (count,) = self.numbers("I", 1, where)
        if count > _MOST_ANSWERS:
            raise NKATError(f"{self.path}: {where} has {count} answers, and {_MOST_ANSWERS} are the most")
        return [self.text(where) for _ in range(count)], self.numbers("i", count, where)

    def _take(self, count: int, what: str) -> bytes:
        data = self.raw[self.place : self.place + count]
        if len(data) < count:
            raise NKATError(f"{self.path}: not a file of multiple-choice tasks, or damaged: it ends within {what}")
        self.place += count
        return data


def _raw(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NKATError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise NKATError(f"{path}: this is a folder, not a file of tasks") from None
    except OSError as error:
        raise NKATError(f"{path}: cannot be read: {error.strerror or error}") from None


def _content(path: Path) -> str:
    try:
        return _raw(path).decode()
    except UnicodeDecodeError as error:
        raise NKATError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _lines(path: Path) -> list[str]:
    """A last line break, and one more, end the text and begin no line."""
    content = _content(path).removesuffix("\n").removesuffix("\n")
    return content.split("\n") if content else []


def drawn_uniformly(count: int, most: int) -> list[int]:
    """`most` of 0 … count − 1, each drawn from those that are left, by multiplication (Lemire, arXiv 1805.10941)."""
    twister, left = _Twister(), list(range(count))
    found = []
    for _ in range(min(count, most)):
        product = twister() * len(left)
        if product % 2**32 < len(left):
            while product % 2**32 < 2**32 % len(left):
                product = twister() * len(left)
        found.append(left.pop(product >> 32))
    return found


def drawn_by_share(count: int, most: int) -> list[int]:
    """`most` of 0 … count − 1, each at a share of those left, of which the last fills the gap; 0: all, in order."""
    if most == 0 or most >= count:
        return list(range(count))
    twister, left = _Twister(), list(range(count))
    found = []
    for _ in range(most):
        share = np.float32(2.0**-32) * np.float32(twister())
        place = min(int(share * np.float32(len(left))), len(left) - 1)  # a share may round to 1
        found.append(left[place])
        left[place] = left[-1]
        left.pop()
    return found


class _Twister:
    """The 32-bit numbers of a Mersenne twister seeded with 1, as in C++."""

    def __init__(self) -> None:
        self._numbers = np.random.RandomState(1)  # seeded by one number, which no newer generator of NumPy's is

    def __call__(self) -> int:
        return int(self._numbers.randint(0, 2**32, dtype=np.uint32))


READERS: dict[str, Callable[[Path, int], Sequence[Choice | Blank]]] = {
    "hellaswag": read_hellaswag,
    "winogrande": read_winogrande,
    "multiple_choice": read_multiple_choice,
}
