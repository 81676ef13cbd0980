"""Which rank, γ and step of a fit are kept: the best on held-out text among those that the guard admits.

A fit is nested and γ only scales it, so a candidate costs no more than being judged. What a Θ changes is nearly
quadratic in its strength κ, and nothing at 0: so each pair of step and rank is looked at on some chunks at two
strengths, and its best γ within the guard foretold from these. The pairs that promise most are then judged on all
chunks, at that γ first, and at others until none is foretold to be better by what all chunks have shown.

Best is the highest TPE: the perplexity that is left and the bytes that it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from nkat.host import console
from nkat.host.tables import Column, Table, show
from nkat.measure.columns import CHANGE_PERCENT
from nkat.measure.guard import Guard, Price, Verdict
from nkat.measure.judge import Judge, Score, evenly
from nkat.measure.perplexity import PairedChange, change_text
from nkat.theta.algebra import coupling
from nkat.theta.set import ThetaSet

GAMMAS = (0.97, 0.975, 0.98, 0.985, 0.99, 0.9925, 0.995, 0.9965, 0.998, 0.999, 0.9995)  # the strongest first
_LOOK_SHARE = 4  # of the chunks, one in so many is looked at
_USUAL_JUDGEMENTS = 3  # of a pair, on all chunks
_LOOK_GAMMA = 3  # beside the strongest γ, this one of the list, of about half the strength
_MOST_PAIRS = 2  # that are judged on all chunks


@dataclass(frozen=True, slots=True)
class Candidate:
    """Factors after so many steps, their first columns, and a strength."""

    step: int
    rank: int
    gamma: float


@dataclass(frozen=True, slots=True)
class Space:
    """What is chosen from. gammas: the strongest first;  one of either: it is fixed"""

    ranks: tuple[int, ...]
    gammas: tuple[float, ...] = GAMMAS


@dataclass(frozen=True, slots=True)
class Judged:
    """A candidate at home and, where there is a guard, elsewhere. chunks: that it was judged on"""

    candidate: Candidate
    home: Score
    verdict: Verdict | None
    chunks: int

    @property
    def admitted(self) -> bool:
        return self.verdict is None or self.verdict.admitted

    @property
    def gain(self) -> float:
        """ln(TPE with Θ / without)."""
        return _gain(self.home.change.log_ratio, self.home.byte_ratio)

    def record(self) -> dict[str, Any]:
        candidate = self.candidate
        return {
            "step": candidate.step,
            "rank": candidate.rank,
            "gamma": candidate.gamma,
            "chunks": self.chunks,
            **self.home.record(),
            "tpe_gain_percent": 100.0 * math.expm1(self.gain),
            "guard": None if self.verdict is None else self.verdict.record(),
        }


@dataclass(frozen=True, slots=True)
class Panel:
    """Where candidates are judged: on the held-out part of the text that was learned, and on the guard's texts."""

    home: Judge
    guard: Guard | None

    def judge(self, candidate: Candidate, theta: ThetaSet) -> Judged:
        home = self.home.score(theta, candidate.gamma, progress=None)
        verdict = None if self.guard is None else self.guard.judge(theta, candidate.gamma, progress=None)
        return Judged(candidate, home, verdict, self.chunks)

    @property
    def chunks(self) -> int:
        return len(self.home.passages.chunks) + (0 if self.guard is None else self.guard.chunks)

    def part(self) -> Panel:
        """The same on some of the chunks."""
        count = len(self.home.passages.chunks)
        some = self.home.passages.pick(evenly(count, max(1, count // _LOOK_SHARE)))
        guard = None if self.guard is None else self.guard.part(_LOOK_SHARE)
        return Panel(Judge(self.home.loaded, some, batch=self.home.batch, make=self.home.make), guard)


@dataclass(frozen=True, slots=True)
class Choice:
    """looks, judged: on some and on all chunks;  kept: one of `judged`, None where none is to be kept"""

    looks: list[Judged]
    judged: list[Judged]
    kept: Judged | None

    def record(self) -> dict[str, Any]:
        return {
            "looks": [row.record() for row in self.looks],
            "judged": [row.record() for row in self.judged],
            "kept": next((number for number, row in enumerate(self.judged) if row is self.kept), None),
        }


def choose(make: Callable[[Candidate], ThetaSet], steps: Sequence[int], space: Space, panel: Panel) -> Choice:
    """Judges candidates of a fit and keeps one.

    make: a candidate's Θ;  steps: after which there are factors, ascending

    Kept is the highest TPE among those that lower perplexity at home and that the guard admits. Where γ is fixed and it
    admits none, the one of the lowest price is kept all the same: the caller has been told what was asked for.
    """
    fixed = len(space.gammas) == 1
    strengths = space.gammas[:1] if fixed else (space.gammas[0], space.gammas[min(_LOOK_GAMMA, len(space.gammas) - 1)])
    pairs = [(steps[-1], rank) for rank in sorted(space.ranks, reverse=True)]
    pairs += [(step, max(space.ranks)) for step in reversed(steps[:-1])]
    part = panel.part()
    judged: list[Judged] = []
    with console.bar(
        len(pairs) * len(strengths) + _USUAL_JUDGEMENTS * _MOST_PAIRS, "choosing rank, gamma and step", "candidate"
    ) as bar:

        def judge(where: Panel, step: int, rank: int, gamma: float) -> Judged:
            candidate = Candidate(step, rank, gamma)
            row = where.judge(candidate, make(candidate))
            bar.update()
            return row

        seen = {pair: [judge(part, *pair, gamma) for gamma in strengths] for pair in pairs}
        promises = [_promise(pair, looks, space, part.chunks / panel.chunks) for pair, looks in seen.items()]
        promises.sort(key=lambda promise: (promise.admitted, promise.gain), reverse=True)
        for promise in promises[:_MOST_PAIRS]:
            best = max((row.gain for row in judged if row.admitted), default=-math.inf)
            if judged and promise.gain <= best and not fixed:
                continue
            judged += _search(partial(judge, panel, *promise.pair), promise.gamma, space.gammas, seen[promise.pair])
    better = [row for row in judged if row.home.change.log_ratio < 0.0]
    admitted = [row for row in better if row.admitted]
    kept = max(admitted, key=lambda row: row.gain, default=None)
    if kept is None and fixed:
        kept = min(better, key=_price, default=None)
    return Choice([row for looks in seen.values() for row in looks], judged, kept)


@dataclass(frozen=True, slots=True)
class _Promise:
    """What judgements of a pair of step and rank foretell: its best γ, the gain there, whether the guard admits it."""

    pair: tuple[int, int]
    gamma: float
    gain: float
    admitted: bool


def _promise(pair: tuple[int, int], looks: Sequence[Judged], space: Space, share: float) -> _Promise:
    """share: of the chunks that will be judged, how many were looked at: errors shrink by its root."""
    return _best(pair, [_foretell(pair, looks, gamma, share) for gamma in space.gammas])


def _best(pair: tuple[int, int], found: Sequence[_Promise]) -> _Promise:
    """Of the same pair at several γ, the strongest first: the weakest where none is admitted."""
    admitted = [promise for promise in found if promise.admitted]
    return max(admitted, key=lambda promise: promise.gain) if admitted else found[-1]


def _foretell(
    pair: tuple[int, int], rows: Sequence[Judged], gamma: float, share: float, looks: Sequence[Judged] = ()
) -> _Promise:
    """From one or two judgements at other strengths. share: see `_promise`;  looks: see `_at`"""
    at = coupling(gamma)
    home = _at(at, rows, looks, lambda row: row.home.change.log_ratio)
    gain = _gain(home, rows[0].home.byte_ratio)
    first = rows[0].verdict
    if first is None:
        return _Promise(pair, gamma, gain, admitted=True)
    prices = tuple(_foretold_price(place, at, rows, looks, share) for place in range(len(first.prices)))
    return _Promise(pair, gamma, gain, Verdict(prices, first.limit).admitted)


def _foretold_price(place: int, at: float, rows: Sequence[Judged], looks: Sequence[Judged], share: float) -> Price:
    """On one of the guard's texts."""

    def price(row: Judged) -> Price:
        assert row.verdict is not None
        return row.verdict.prices[place]

    mean = _at(at, rows, looks, lambda row: price(row).change.log_ratio)
    error = max(0.0, _at(at, rows, looks, lambda row: price(row).change.log_ratio_stderr))
    spread = max(0.0, _at(at, rows, looks, lambda row: price(row).spread))
    return Price(price(rows[0]).name, PairedChange(mean, error * math.sqrt(share)), spread)


def _at(at: float, rows: Sequence[Judged], looks: Sequence[Judged], value: Callable[[Judged], float]) -> float:
    """A value at κ = `at`: on the parabola through 0 and two rows, or through 0 and one, bent as two looks say."""
    points = [(coupling(row.candidate.gamma), value(row)) for row in rows]
    if len(points) == 1 and len(looks) == 2:
        ((x, y),) = points
        shape = [(coupling(row.candidate.gamma), value(row)) for row in looks]
        return _through_zero(shape, at) + (y - _through_zero(shape, x)) * at / x
    return _through_zero(points, at)


def _through_zero(points: Sequence[tuple[float, float]], at: float) -> float:
    """y(at) of the parabola through 0 and two points, or of the line through 0 and one."""
    if len(points) == 1:
        ((x, y),) = points
        return y * at / x
    (x, y), (v, w) = points
    square = (y / x - w / v) / (x - v)
    return (y / x + square * (at - x)) * at


def _search(
    judge: Callable[[float], Judged], start: float, gammas: Sequence[float], looks: Sequence[Judged]
) -> list[Judged]:
    """Judges at `start`, and on at the γ that is foretold to be the best, until that one was judged already.

    A γ that was judged counts as it was found; one stronger than one that the guard rejected is rejected with it.
    """
    rows = {start: judge(start)}
    pair = rows[start].candidate.step, rows[start].candidate.rank
    while True:
        rejected = max((gamma for gamma, row in rows.items() if not row.admitted), default=0.0)
        found = []
        for gamma in gammas:
            if gamma in rows:
                found.append(_Promise(pair, gamma, rows[gamma].gain, rows[gamma].admitted))
                continue
            foretold = _foretell(pair, _nearest(rows.values(), gamma), gamma, 1.0, looks)
            found.append(replace(foretold, admitted=foretold.admitted and gamma > rejected))
        best = _best(pair, found)
        if best.gamma in rows:
            return list(rows.values())
        rows[best.gamma] = judge(best.gamma)


def _nearest(rows: Iterable[Judged], gamma: float) -> list[Judged]:
    """The one or two that were judged at the strengths next to this one."""
    return sorted(rows, key=lambda row: abs(coupling(row.candidate.gamma) - coupling(gamma)))[:2]


def _gain(log_ratio: float, byte_ratio: float) -> float:
    return -log_ratio - math.log(math.log10(10.0 * byte_ratio))


def _price(row: Judged) -> float:
    return -math.inf if row.verdict is None else row.verdict.worst.bound


def print_choice(record: Mapping[str, Any], caption: str = "") -> None:
    """A choice's record as a table."""
    rows = [*record["looks"], *record["judged"]]
    kept = None if record["kept"] is None else len(record["looks"]) + record["kept"]
    flat = []
    for number, row in enumerate(rows):
        guard = row["guard"]
        dearest = {} if guard is None else max(guard["prices"], key=lambda price: price["bound_percent"])
        verdict = "kept" if number == kept else None if guard is None else "yes" if guard["admitted"] else "no"
        flat.append({**row, **{f"guard_{key}": value for key, value in dearest.items()}, "admitted": verdict})
    columns = [
        Column("step", "step"),
        Column("rank", "rank"),
        Column("gamma", "gamma", "g"),
        Column("chunks", "chunks"),
        replace(CHANGE_PERCENT, title="change at home, %"),
        Column("TPE, %", "tpe_gain_percent", "+.2f"),
        Column("dearest guard text", "guard_text"),
        Column(
            "change there, %",
            ("guard_change_percent", "guard_change_percent_stderr"),
            lambda percent, error: change_text(percent, error, ""),
        ),
        Column("at most, %", "guard_bound_percent", "+.2f"),
        Column("admitted", "admitted"),
    ]
    show(Table("choice", columns, flat, caption))
