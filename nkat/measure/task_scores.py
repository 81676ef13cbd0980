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

from nkat.engine.scoring import make_scorer
from nkat.errors import NKATError
from nkat.host.console import bar
from nkat.lm.load import LoadedModel
from nkat.lm.tokenizer import Tokenizer
from nkat.measure.perplexity import check_ids
from nkat.measure.tasks import Blank, Choice

_CERTAINTY = 1.95996398454  # standard deviations that 95 % of a normal distribution lie within
_SHORT = 3  # tokens behind what is common that are too few to leave the word out


@dataclass(frozen=True, slots=True)
class Ending:
    """Mean ln p of a sequence's tokens number `first` … `stop` − 1, each from those before it.

    instead: a sequence whose last token stands for number `first`
    """

    tokens: tuple[int, ...]
    first: int
    stop: int
    instead: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Solved:
    """Of each task whether the model solved it, bool [n].  chance_percent: the score of guessing"""

    right: torch.Tensor
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
        return tuple(100.0 * (share + z / 2.0 + side * half) / (1.0 + z) for side in (-1, 1))  # type: ignore[return-value]

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
    batch: int,
    progress: str | None = None,
    beyond: bool = False,
) -> list[Solved]:
    """The model on tasks. arms: 1, as it is; 2, without Θ and with it;  batch: sequences in one forward pass

    beyond: texts may be longer than what the model was made for

    Raises NKATError for a task that is longer than the model was made for, or has endings that are the same.
    """
    endings = [task_endings(loaded.tokenizer, task, number) for number, task in enumerate(tasks)]
    flat = [ending for each in endings for ending in each]
    longest = max(len(tokens) for ending in flat for tokens in (ending.tokens, ending.instead or ()))
    loaded.config.check_length(longest, "the longest task", beyond)
    means = _mean_log_probs(loaded, flat, arms, batch, progress)
    chance = 100.0 * sum(1.0 / len(each) for each in endings) / len(endings)
    found = []
    for arm in means.tolist():
        values = iter(arm)
        chosen = [_likeliest([next(values) for _ in each], task) for each, task in zip(endings, tasks, strict=True)]
        right = [
            choice == task.right if isinstance(task, Blank) else choice in task.right
            for choice, task in zip(chosen, tasks, strict=True)
        ]
        found.append(Solved(torch.tensor(right), chance))
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
        return [Ending(tokens, common, len(tokens)) for tokens in sequences]
    common = max(common, 1)  # what a text begins with is not predicted
    whole = all(len(tokens) - common > _SHORT for tokens in sequences)  # the word itself is left out
    endings: list[Ending] = []
    for tokens, word in zip(sequences, task.words, strict=True):
        first = len(tokenizer.encode(task.before + word, add_special=True)) if whole else common
        stop = len(tokens) - (1 if len(tokens) - first > 1 else 0)
        instead = (*sequences[0], tokens[first]) if endings and not whole else None
        endings.append(Ending(tokens, first, stop, instead))
    return endings


def _mean_log_probs(
    loaded: LoadedModel, endings: Sequence[Ending], arms: int, batch: int, progress: str | None
) -> torch.Tensor:
    """float64 [arms, endings]; NaN where there is nothing to take the mean of."""
    wanted: list[tuple[int, tuple[int, ...], int, int]] = []  # number of the ending, tokens, first and stop
    for number, ending in enumerate(endings):
        rest = ending.first
        if ending.instead is not None:
            wanted.append((number, ending.instead, len(ending.instead) - 1, len(ending.instead)))
            rest += 1
        if rest < ending.stop:
            wanted.append((number, ending.tokens, rest, ending.stop))
    wanted.sort(key=lambda item: len(item[1]), reverse=True)  # those of a length go together, and memory is known first
    check_ids(torch.tensor([token for _, tokens, _, _ in wanted for token in tokens]), loaded.config.vocab_size)
    together = max(1, min(batch // arms, len(wanted)))
    scorer = make_scorer(loaded.model, together * arms, len(wanted[0][1]), every=True)
    sums = torch.zeros(arms, len(endings), dtype=torch.float64)
    with bar(len(wanted), progress, "text", enabled=progress is not None) as shown:
        for start in range(0, len(wanted), together):
            part = wanted[start : start + together]
            length, first = len(part[0][1]), min(item[2] for item in part) - 1
            ids = torch.tensor([[*tokens, *[0] * (length - len(tokens))] for _, tokens, _, _ in part])
            nll = scorer.score_from(ids, first, arms)
            for row, (number, _, begin, stop) in enumerate(part):
                sums[:, number] -= nll[:, row, begin - 1 - first : stop - 1 - first].sum(dim=1)
            shown.update(len(part))
    if not bool(torch.isfinite(sums).all()):
        raise NKATError("the model's predictions are not finite numbers (damaged weights?)")
    counts = torch.tensor([max(0, ending.stop - ending.first) for ending in endings])
    return sums / counts
