"""Which rank, γ and step of a fit are kept: the best on held-out text among those that the guard admits.

A fit is nested and γ only scales it, so a candidate costs no more than being judged. What a Θ changes is nearly
quadratic in its strength κ, and nothing at 0: so each pair of step and rank is looked at on some chunks at two
strengths, and its best γ within the guard foretold from these. The pairs that promise most are then judged on all
chunks: weaker until the guard admits them, stronger as long as it does and they gain.

Best is the highest TPE: the perplexity that is left and the bytes that it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
        return Panel(Judge(self.home.loaded, some, batch=self.home.batch), guard)


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
        len(pairs) * len(strengths) + 2 * _MOST_PAIRS, "choosing rank, gamma and step", "candidate"
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
            judged += _climb(partial(judge, panel, *promise.pair), promise.gamma, space.gammas)
    better = [row for row in judged if row.home.change.log_ratio < 0.0]
    admitted = [row for row in better if row.admitted]
    kept = max(admitted, key=lambda row: row.gain, default=None)
    if kept is None and fixed:
        kept = min(better, key=_price, default=None)
    return Choice([row for looks in seen.values() for row in looks], judged, kept)


@dataclass(frozen=True, slots=True)
class _Promise:
    """What the looks at a pair of step and rank foretell: its best γ, the gain there, whether the guard admits it."""

    pair: tuple[int, int]
    gamma: float
    gain: float
    admitted: bool


def _promise(pair: tuple[int, int], looks: Sequence[Judged], space: Space, share: float) -> _Promise:
    """share: of the chunks that will be judged, how many were looked at: errors shrink by its root."""
    kappas = [coupling(row.candidate.gamma) for row in looks]
    found = []
    for gamma in space.gammas:
        at = coupling(gamma)
        home = _through_zero(kappas, [row.home.change.log_ratio for row in looks], at)
        gain = _gain(home, looks[0].home.byte_ratio)
        found.append(_Promise(pair, gamma, gain, _foretold(looks, kappas, at, share)))
    admitted = [promise for promise in found if promise.admitted]
    return max(admitted, key=lambda promise: promise.gain) if admitted else found[-1]


def _foretold(looks: Sequence[Judged], kappas: Sequence[float], at: float, share: float) -> bool:
    """Whether the guard will admit a strength, by what it found at others."""
    verdicts = [row.verdict for row in looks if row.verdict is not None]
    if not verdicts:
        return True
    prices = []
    for same in zip(*(verdict.prices for verdict in verdicts), strict=True):
        mean = _through_zero(kappas, [price.change.log_ratio for price in same], at)
        error = max(0.0, _through_zero(kappas, [price.change.log_ratio_stderr for price in same], at))
        spread = max(0.0, _through_zero(kappas, [price.spread for price in same], at))
        prices.append(Price(same[0].name, PairedChange(mean, error * math.sqrt(share)), spread))
    return Verdict(tuple(prices), verdicts[0].limit).admitted


def _through_zero(xs: Sequence[float], ys: Sequence[float], at: float) -> float:
    """y(at) of the parabola through 0 and two points, or of the line through 0 and one."""
    if len(xs) == 1:
        return ys[0] * at / xs[0]
    (x, y), (v, w) = zip(xs, ys, strict=True)
    square = (y / x - w / v) / (x - v)
    return (y / x + square * (at - x)) * at


def _climb(judge: Callable[[float], Judged], start: float, gammas: Sequence[float]) -> list[Judged]:
    """Weaker from `start` until one is admitted; or, where it is at once, on to where the gain is highest."""
    place = gammas.index(start)
    rows = [judge(gammas[place])]
    if not rows[0].admitted:
        for gamma in gammas[place + 1 :]:
            rows.append(judge(gamma))
            if rows[-1].admitted:
                break
        return rows
    best = rows[0]
    for way in (gammas[:place][::-1], gammas[place + 1 :]):  # stronger, then weaker
        for gamma in way:
            rows.append(judge(gamma))
            if not rows[-1].admitted or rows[-1].gain <= best.gain:
                break
            best = rows[-1]
        if best is not rows[0]:
            break
    return rows


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
