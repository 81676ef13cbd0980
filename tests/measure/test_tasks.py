"""Task files in llama.cpp's forms, which tasks are drawn, and the scores against the model's own logits."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nkat.errors import NKATError
from nkat.lm.load import LoadedModel, load_model
from nkat.measure.base_file import open_base_file, write_base_file
from nkat.measure.task_scores import Solved, solve, task_endings
from nkat.measure.tasks import (
    READERS,
    Blank,
    Choice,
    drawn_by_share,
    drawn_uniformly,
    read_hellaswag,
    read_multiple_choice,
    read_winogrande,
)
from tests.engine.test_scoring import add_theta
from tests.support.task_files import (
    answers,
    multiple_choice,
    packed,
    write_hellaswag,
    write_multiple_choice,
    write_winogrande,
)
from tests.support.tiny_models import write_tiny_model

WRITERS = {"multiple_choice": write_multiple_choice, "winogrande": write_winogrande, "hellaswag": write_hellaswag}
TASKS = [
    packed(f"Question {i}?") + answers([f"a{i}", "b", "c"][: 2 + i % 2], [0, 1, 0][: 2 + i % 2]) + answers(["x"], [1])
    for i in range(6)
]


def test_hellaswag_files(tmp_path: Path) -> None:
    path = tmp_path / "hs.txt"
    lines = [f"Context {i}\n{i % 4}\n" + "".join(f"ending {i}{k}\n" for k in range(4)) for i in range(5)]
    path.write_text("".join(lines))
    tasks = read_hellaswag(path, 0)
    assert sorted(task.context for task in tasks) == [f"Context {i}" for i in range(5)]
    for task in tasks:
        i = int(task.context[-1])
        assert task.right == {i % 4}
        assert task.texts == [f"Context {i} ending {i}{k}" for k in range(4)]
    assert [t.context for t in read_hellaswag(path, 2)] == [t.context for t in tasks[:2]]  # the first of those drawn
    path.write_text("".join(lines)[:-1])
    assert read_hellaswag(path, 0) == tasks
    for text, problem in (
        ("a\n1\n", "has 2 lines, and a HellaSwag task has 6"),
        ("", "has 0 lines"),
        ("c\n4\na\nb\nc\nd\n", "line 2 is '4', not the number of an ending"),
        ("c\nx\na\nb\nc\nd\n", "line 2 is 'x'"),
    ):
        path.write_text(text)
        with pytest.raises(NKATError, match=problem):
            read_hellaswag(path, 0)


def test_winogrande_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last line is read only where an empty one follows: so llama-perplexity counts."""
    path = tmp_path / "wg.csv"
    rows = [
        "0,Sarah was a better surgeon than Maria so _ got the easier cases.,Sarah,Maria,2",
        '1,"The cup, which _ broke, was red.",Ann,Bob,1',
        "2,The dog saw the cat and _ ran.,dog,cat,1",
    ]
    path.write_text("\n".join(rows) + "\n\n")
    tasks = read_winogrande(path, 0)
    assert [task.right for task in tasks] == [{1}, {0}, {0}]
    assert tasks[1] == Blank("The cup, which ", " broke, was red.", ("Ann", "Bob"), frozenset([0]))
    assert tasks[0].texts[1] == "Sarah was a better surgeon than Maria so Maria got the easier cases."
    assert capsys.readouterr().err == ""
    for end in ("\n", ""):
        path.write_text("\n".join(rows) + end)
        assert read_winogrande(path, 0) == tasks[:2]
        assert "the last line is left out" in capsys.readouterr().err
    path.write_text("id,sentence,a,b,answer\n" + "\n".join(rows) + "\n3,no blank,a,b,1\n4,a _,a,b,3\n\n")
    assert read_winogrande(path, 0) == tasks
    assert "3 lines left out that is no task: line 1 has no blank _" in capsys.readouterr().err
    path.write_text("hello\n\n")
    with pytest.raises(NKATError, match="no line of it is a Winogrande task"):
        read_winogrande(path, 0)


def test_multiple_choice_files(tmp_path: Path) -> None:
    path = tmp_path / "mc.bin"
    path.write_bytes(multiple_choice(TASKS))
    tasks = read_multiple_choice(path, 0)
    assert [task.context for task in tasks] == [f"Question {i}?" for i in range(6)]
    assert tasks[1] == Choice("Question 1?", ("a1", "b", "c"), frozenset([1]))
    some = read_multiple_choice(path, 3)
    assert some == [tasks[i] for i in drawn_by_share(6, 3)]
    assert len(set(some)) == 3


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda raw: raw[:-1], "ends within task 5"),
        (lambda raw: raw[:10], "ends within the places of its tasks"),
        (lambda raw: raw[:2], "ends within the number of tasks"),
        (lambda raw: struct.pack("<I", 0), "has no tasks"),
        (lambda raw: multiple_choice([packed("q") + answers(["\ud800"[:0]], [1]) + answers([], [])]), "empty question"),
        (lambda raw: multiple_choice([packed("q") + struct.pack("<I", 101)]), "101 answers, and 100 are the most"),
        (lambda raw: multiple_choice([struct.pack("<I", 1) + b"\xff" + answers(["a"], [1])]), "not UTF-8"),
    ],
)
def test_damaged_multiple_choice_files(tmp_path: Path, change: Callable[[bytes], bytes], problem: str) -> None:
    path = tmp_path / "mc.bin"
    path.write_bytes(change(multiple_choice(TASKS)))
    with pytest.raises(NKATError, match=problem):
        read_multiple_choice(path, 0)


def test_what_is_drawn() -> None:
    """By C++'s std::mt19937(1), whose first numbers are 1791095845, 4282876139, 3093770124, 4005303368, 491263."""
    numbers = (1791095845, 4282876139, 3093770124, 4005303368, 491263)
    left, expected = list(range(10)), []
    for number in numbers:
        expected.append(left.pop(number * len(left) >> 32))
    assert drawn_uniformly(10, 5) == expected
    left, expected = list(range(10)), []
    for number in numbers:
        place = int(number / 2**32 * len(left))
        expected.append(left[place])
        left[place] = left[-1]
        left.pop()
    assert drawn_by_share(10, 5) == expected
    assert sorted(drawn_uniformly(50, 50)) == sorted(drawn_uniformly(50, 99)) == list(range(50))
    assert drawn_by_share(4, 0) == drawn_by_share(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["multiple_choice", "winogrande", "hellaswag", "base file"])
def test_hostile_files(tmp_path: Path, kind: str) -> None:
    """Bytes changed, cut or put in: what is no file of its kind is refused in one line, and nothing else happens."""
    path, rng = tmp_path / "file", random.Random(0)

    def read() -> None:
        if kind == "base file":
            opened = open_base_file(path)
            opened.rows(0, len(opened.tokens))
        else:
            READERS[kind](path, rng.choice((0, 3)))

    if kind == "base file":
        write_base_file(path, torch.zeros((2, 9), dtype=torch.int64), 5, [np.zeros((8, 10), np.uint16)])
    else:
        writers = {
            "multiple_choice": write_multiple_choice,
            "winogrande": write_winogrande,
            "hellaswag": write_hellaswag,
        }
        writers[kind](path)
    whole = path.read_bytes()
    refused: list[str] = []
    for _ in range(400):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(min(len(raw), rng.choice((24, len(raw)))))
            change = rng.randrange(4)
            if change == 0:
                raw[at] = rng.choice((0, 255, 10, 44, rng.randrange(256)))
            elif change == 1:
                del raw[at : at + rng.choice((1, 4, 100))]
            elif change == 2:
                raw[at:at] = rng.randbytes(rng.choice((1, 4)))
            else:
                raw[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 2**31, 2**32 - 1)))
        path.write_bytes(raw)
        try:
            read()
        except NKATError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(len(message.splitlines()) == 1 for message in refused)


# --- scores


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Tokens are bytes and a few words, and every text begins with BOS."""
    return load_model(write_tiny_model(tmp_path_factory.mktemp("tasks") / "m.gguf", "llama", add_bos=True))


@torch.inference_mode()
def log_probs(loaded: LoadedModel, text: str) -> tuple[list[int], torch.Tensor]:
    """A text's tokens, and the logarithms of all probabilities behind each."""
    ids = loaded.tokenizer.encode(text, add_special=True)
    return ids, loaded.model(torch.tensor([ids]))[0].double().log_softmax(-1)


def mean_behind(loaded: LoadedModel, text: str, first: int, stop: int | None = None) -> float:
    ids, found = log_probs(loaded, text)
    places = range(first, len(ids) if stop is None else stop)
    return sum(float(found[i - 1, ids[i]]) for i in places) / len(places)


CHOICES = [Choice("It was", ("raining.", "rainy!", "a day", "sun"), frozenset([i % 4])) for i in range(4)] + [
    Choice("Why", ("not", "so late?"), frozenset([0])),
    Choice("Who", ("he", "her own", "hers"), frozenset([2])),
]


def test_choices_are_the_likeliest_mean(loaded: LoadedModel) -> None:
    expected = []
    for task in CHOICES:
        tokens = [loaded.tokenizer.encode(text, add_special=True) for text in task.texts]
        shortest = min(map(len, tokens))
        common = next((i for i in range(shortest) if len({t[i] for t in tokens}) > 1), shortest - 1)
        means = [mean_behind(loaded, text, common) for text in task.texts]
        expected.append(max(range(len(means)), key=means.__getitem__) in task.right)
    found = solve(loaded, CHOICES, arms=1, batch=4)[0]
    assert found.right.tolist() == expected
    assert sum(expected[:4]) == 1  # the same task with each ending as the right one
    assert found.chance_percent == pytest.approx(100 * (4 / 4 + 1 / 2 + 1 / 3) / 6)


def test_blanks(loaded: LoadedModel) -> None:
    """Many tokens behind the word: those without the last; few: the word with them, and the second's first token from
    where the first sentence ended.
    """
    long = Blank("The dog met ", " in the old garden", ("Ann", "Bob"), frozenset([0]))
    first, second = task_endings(loaded.tokenizer, long)
    for ending, text, word in zip((first, second), long.texts, long.words, strict=True):
        ids, base = (loaded.tokenizer.encode(t, add_special=True) for t in (text, "The dog met " + word))
        (part,) = ending.parts
        assert (part.first, part.tokens, ending.count) == (len(base), tuple(ids[:-1]), len(ids) - 1 - len(base))
    short = Blank("So he saw ", ".", ("A", "B"), frozenset([0]))
    first, second = task_endings(loaded.tokenizer, short)
    one, two = (tuple(loaded.tokenizer.encode(t, add_special=True)) for t in short.texts)
    common = len(one) - 2
    assert one[:common] == two[:common]
    assert [(p.first, p.tokens) for p in first.parts] == [(common, one[:-1])]
    assert [(p.first, p.tokens) for p in second.parts] == [(len(one), (*one, two[common]))]
    assert (first.count, second.count) == (1, 1)
    ids, found = log_probs(loaded, short.texts[0])
    means = (float(found[common - 1, one[common]]), float(found[-1, two[common]]))
    assert solve(loaded, [short], arms=1)[0].right.tolist() == [means[0] > means[1]]


def test_both_arms(loaded: LoadedModel) -> None:
    """Without Θ the figure of the model without any; and what is left behind is the model as it was."""
    tasks = [Choice(f"{a} {b}", ("yes", "no", "maybe", "it is"), frozenset([0])) for a in "abcdefgh" for b in "xyz"]
    plain = solve(loaded, tasks, arms=1)[0]
    changed = load_model(loaded.file.path)
    add_theta(changed)
    changed.model.set_gamma(0.8)
    without, with_theta = solve(changed, tasks, arms=2)
    assert torch.equal(without.right, plain.right)
    assert not torch.equal(with_theta.right, plain.right)
    assert changed.model.gamma == 0.8


def test_scores_and_their_errors() -> None:
    solved = Solved(torch.tensor([True] * 30 + [False] * 10), [], 25.0)
    assert solved.score == 75.0
    assert solved.stderr == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 39))
    low, high = solved.interval
    for bound in (low / 100, high / 100):  # Wilson: where the score lies 1.96 of the bound's own deviations away
        assert abs(bound - 0.75) == pytest.approx(1.95996398454 * math.sqrt(bound * (1 - bound) / 40))
    assert low < 75.0 < high


def test_what_cannot_be_scored(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(NKATError, match="more than the 2048 that the model was made for"):
        solve(loaded, [Choice("x" * 4000, ("a", "b"), frozenset([0]))], arms=1)
    bare = load_model(write_tiny_model(tmp_path / "bare.gguf", "llama", add_bos=False))
    with pytest.raises(NKATError, match="task 0: its endings have no token in common"):
        task_endings(bare.tokenizer, Choice("", ("", "b"), frozenset([0])))
