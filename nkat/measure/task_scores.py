"""How many tasks a model solves, scored as llama-perplexity does it, so that the figures are its.

HellaSwag and multiple choice: of each ending the mean ln p of the tokens behind those that all endings have in common;
the highest is the model's choice. Winogrande: the mean ln p of what follows the word in the blank, without the last
token; where at most three tokens follow what both sentences have in common, of the word, too.

There llama-perplexity predicts the first token of the second sentence that differs from where the first sentence has
ended, and not from where they part. So does this: a score is of use beside others' scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from nkat.engine.continuations import Continuation, predict
from nkat.errors import NKATError
from nkat.host.console import bar
from nkat.lm.load import LoadedModel
from nkat.lm.tokenizer import Tokenizer
from nkat.measure.tasks import Blank, Choice

_CERTAINTY = 1.95996398454  # standard deviations that 95 % of a normal distribution lie within
_SHORT = 3  # tokens behind what is common that are too few to leave the word out


@dataclass(frozen=True, slots=True)
class Ending:
    """What is scored of a text: the mean ln p of the tokens that its parts predict, `count` in all."""

    count: int
    parts: tuple[Continuation, ...]


@dataclass(frozen=True, slots=True)
class Solved:
    """Of each task whether the model solved it, bool [n], and its endings' mean ln p.

    chance_percent: the score of guessing
    """

    right: torch.Tensor
    means: list[list[float]]
    chance_percent: float

    @property
    def score(self) -> float:
        """Per cent."""
        return 100.0 * float(self.right.double().mean())

    @property
    def stderr(self) -> float:
        share, count = self.score / 100.0, len(self.right)
        return 100.0 * math.sqrt(share * (1.0 - share) / (count - 1)) if count > 1 else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's for 95 %, per cent."""
        share, z = self.score / 100.0, _CERTAINTY**2 / len(self.right)
        half = math.sqrt(z * (4.0 * share * (1.0 - share) + z)) / 2.0
        low, high = (100.0 * (share + z / 2.0 + side * half) / (1.0 + z) for side in (-1, 1))
        return low, high

    def record(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "score_percent": self.score,
            "score_percent_stderr": self.stderr,
            "interval_percent": [low, high],
            "solved": int(self.right.sum()),
        }


def solve(
    loaded: LoadedModel,
    tasks: Sequence[Choice | Blank],
    *,
    arms: int,
    batch: int | None = None,
    progress: str | None = None,
    beyond: bool = False,
) -> list[Solved]:
    """The model on tasks. arms: 1, as it is; 2, without Θ and with it;  batch: texts in one forward pass, at most

    beyond: texts may be longer than what the model was made for
    Raises NKATError for one that is longer otherwise, and for endings that have nothing in common.
    """
    endings = [task_endings(loaded.tokenizer, task, number) for number, task in enumerate(tasks)]
    flat = [ending for each in endings for ending in each]
    longest = max(len(part.tokens) for ending in flat for part in ending.parts)
    loaded.config.check_length(longest, "the longest task", beyond)
    chance = 100.0 * sum(1.0 / len(each) for each in endings) / len(endings)
    gamma, found = loaded.model.gamma, []
    total = arms * len(flat)
    with bar(total, progress, "text", enabled=progress is not None) as shown:
        for strength in (None, gamma)[-arms:]:
            loaded.model.set_gamma(strength)
            values = iter(_means(loaded, flat, batch, shown))
            means = [[next(values) for _ in each] for each in endings]
            right = [_likeliest(own, task) in task.right for own, task in zip(means, tasks, strict=True)]
            found.append(Solved(torch.tensor(right), means, chance))
    return found


def _likeliest(means: list[float], task: Choice | Blank) -> int:
    """The first of the best; of two words the second where they are equal."""
    if isinstance(task, Blank):
        return 0 if means[0] > means[1] else 1
    return means.index(max(means))


def task_endings(tokenizer: Tokenizer, task: Choice | Blank, number: int = 0) -> list[Ending]:
    """What is scored of a task. number: for messages"""
    sequences = [tuple(tokenizer.encode(text, add_special=True)) for text in task.texts]
    shortest = min(map(len, sequences))
    common = next((i for i in range(shortest) if len({s[i] for s in sequences}) > 1), shortest)
    if common == shortest:  # an ending has nothing of its own
        common -= 1
    if isinstance(task, Choice):
        if common < 1:
            raise NKATError(f"task {number}: its endings have no token in common, so that nothing predicts the first")
        return [Ending(len(tokens) - common, (Continuation(tokens, common),)) for tokens in sequences]
    common = max(common, 1)  # what a text begins with is not predicted
    whole = all(len(tokens) - common > _SHORT for tokens in sequences)  # the word itself is left out
    endings: list[Ending] = []
    for tokens, word in zip(sequences, task.words, strict=True):
        first = len(tokenizer.encode(task.before + word, add_special=True)) if whole else common
        stop = len(tokens) - (1 if len(tokens) - first > 1 else 0)
        if endings and not whole:
            elsewhere = Continuation((*sequences[0], tokens[first]), len(sequences[0]))
            endings.append(Ending(stop - first, (elsewhere, *_part(tokens[:stop], first + 1))))
        else:
            endings.append(Ending(stop - first, _part(tokens[:stop], first)))
    return endings


def _part(tokens: tuple[int, ...], first: int) -> tuple[Continuation, ...]:
    return (Continuation(tokens, first),) if first < len(tokens) else ()


def _means(loaded: LoadedModel, endings: Sequence[Ending], batch: int | None, shown: tqdm) -> list[float]:
    """Mean ln p of each ending; NaN where there is nothing to take the mean of."""
    parts = [(number, part) for number, ending in enumerate(endings) for part in ending.parts]
    sums = [0.0] * len(endings)
    left = [len(ending.parts) for ending in endings]
    for index, found in predict(loaded.model, [part for _, part in parts], batch):
        number = parts[index][0]
        sums[number] -= float(found.nll.sum())
        left[number] -= 1
        shown.update(left[number] == 0)
    return [total / ending.count if ending.count > 0 else math.nan for total, ending in zip(sums, endings, strict=True)]
