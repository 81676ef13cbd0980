"""The choice: on made-up prices of known curves, so that the best is known too."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch

from nkat.measure.guard import GUARD_LIMIT, Price, Verdict
from nkat.measure.judge import Score
from nkat.measure.perplexity import PairedChange, Perplexity
from nkat.sources.fit.choice import GAMMAS, Candidate, Choice, Judged, Space, choose, print_choice
from nkat.theta.algebra import coupling

FULL = coupling(0.97)
Curve = tuple[float, float]  # of ln ppl: a·s + b·s² at s = κ(γ)/κ(0.97)


def at(curve: Curve, gamma: float) -> float:
    s = coupling(gamma) / FULL
    return curve[0] * s + curve[1] * s * s


@dataclass
class FakePanel:
    """Judges by curves. home, price: by (step, rank)"""

    home: dict[tuple[int, int], Curve]
    price: dict[tuple[int, int], Curve]
    error: float = 0.001
    guarded: bool = True
    chunks: int = 40
    asked: list[tuple[Candidate, int]] = field(default_factory=list)

    def judge(self, candidate: Candidate, theta: object) -> Judged:
        assert theta == candidate
        self.asked.append((candidate, self.chunks))
        pair, s = (candidate.step, candidate.rank), coupling(candidate.gamma) / FULL
        change = PairedChange(at(self.home[pair], candidate.gamma), 0.01 * s)
        score = Score(Perplexity(torch.full((1, 2), 3.0)), change, 1 + 0.004 * candidate.rank)
        cost = Price("text", PairedChange(at(self.price[pair], candidate.gamma), self.error * s))
        return Judged(candidate, score, Verdict((cost, Price("own", change))) if self.guarded else None, self.chunks)

    def part(self) -> FakePanel:
        return FakePanel(self.home, self.price, 2 * self.error, self.guarded, self.chunks // 4, self.asked)


def chosen(panel: FakePanel, ranks: tuple[int, ...] = (4,), gammas: tuple[float, ...] = GAMMAS) -> Choice:
    steps = sorted({step for step, _ in panel.home})
    return choose(lambda candidate: candidate, steps, Space(ranks, gammas), panel)


def best_by_hand(panel: FakePanel) -> Candidate:
    """Of every candidate there is."""
    rows = [panel.judge(c, c) for pair in panel.home for c in (Candidate(*pair, gamma) for gamma in GAMMAS)]
    return max((row for row in rows if row.admitted), key=lambda row: row.gain).candidate


def test_the_strongest_gamma_that_the_guard_admits() -> None:
    panel = FakePanel({(60, 4): (-0.6, 0.3)}, {(60, 4): (-0.06, 0.12)})
    choice = chosen(panel)
    assert choice.kept.candidate == best_by_hand(panel)
    assert choice.kept.candidate.gamma == 0.985
    assert choice.kept.verdict.worst.bound <= math.log1p(GUARD_LIMIT)
    assert not panel.judge(Candidate(60, 4, 0.98), Candidate(60, 4, 0.98)).admitted  # control
    assert {row.chunks for row in choice.looks} == {10}
    assert len(choice.judged) == 1  # the looks bend as all chunks do, so what they foretell is the best


def test_not_stronger_than_what_gains_most_at_home() -> None:
    """Gemma's case: at full strength even the text that was learned is predicted worse than at less."""
    panel = FakePanel({(60, 4): (-0.4, 0.35)}, {(60, 4): (-0.1, 0.01)})
    assert chosen(panel).kept.candidate == best_by_hand(panel)
    panel.guarded = False
    without = chosen(panel, gammas=GAMMAS[:5])
    assert without.kept.candidate.gamma == best_by_hand(panel).gamma
    assert without.kept.verdict is None


def test_a_lower_rank_or_an_earlier_step_wins_where_it_is_cheaper() -> None:
    home = {(20, 4): (-0.45, 0.2), (60, 4): (-0.6, 0.3), (60, 2): (-0.55, 0.28), (60, 1): (-0.3, 0.2)}
    dear = dict.fromkeys(home, (0.02, 0.2))
    for cheap in ((60, 2), (20, 4)):
        panel = FakePanel(home, {**dear, cheap: (-0.05, 0.04)})
        choice = chosen(panel, ranks=(4, 2, 1))
        assert (choice.kept.candidate.step, choice.kept.candidate.rank) == cheap
        assert choice.kept.candidate == best_by_hand(panel)


def test_there_is_always_a_gamma_weak_enough_or_none_is_kept() -> None:
    weak = chosen(FakePanel({(60, 4): (-0.6, 0.3)}, {(60, 4): (0.1, 0.3)}, error=0.0))
    assert weak.kept.candidate.gamma in GAMMAS[-3:]
    assert weak.kept.admitted
    hopeless = chosen(FakePanel({(60, 4): (-0.6, 0.3)}, {(60, 4): (3.0, 1.0)}))
    assert hopeless.kept is None
    assert chosen(FakePanel({(60, 4): (0.1, 0.3)}, {(60, 4): (-0.1, 0.0)})).kept is None  # no gain at home


def test_a_fixed_gamma_is_kept_to() -> None:
    home = {(20, 4): (-0.3, 0.1), (60, 4): (-0.6, 0.3)}
    broken = chosen(FakePanel(home, {(20, 4): (0.01, 0.01), (60, 4): (0.2, 0.2)}), gammas=(0.97,))
    assert broken.kept.candidate == Candidate(20, 4, 0.97)  # the lower price
    assert not broken.kept.admitted
    met = chosen(FakePanel(home, {(20, 4): (-0.1, 0.0), (60, 4): (0.2, 0.2)}), gammas=(0.97,))
    assert met.kept.candidate == Candidate(20, 4, 0.97)
    assert met.kept.admitted


def test_a_wrong_promise_is_corrected_by_all_chunks() -> None:
    """A few chunks look dearer, or cheaper, than all are."""

    class Misleading(FakePanel):
        def part(self) -> FakePanel:
            return FakePanel(self.home, {(60, 4): self.seen}, 2 * self.error, True, 10, self.asked)

        seen: Curve = (0.0, 0.0)

    for seen in ((0.2, 0.3), (-0.3, 0.0)):
        panel = Misleading({(60, 4): (-0.6, 0.3)}, {(60, 4): (-0.06, 0.12)})
        panel.seen = seen
        assert chosen(panel).kept.candidate == best_by_hand(panel)


@pytest.mark.parametrize("guarded", [True, False])
def test_the_table_has_every_candidate_that_was_judged(guarded: bool, capsys: pytest.CaptureFixture[str]) -> None:
    panel = FakePanel({(60, 4): (-0.6, 0.3)}, {(60, 4): (-0.06, 0.12)}, guarded=guarded)
    choice = chosen(panel)
    print_choice(choice.record())
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == len(choice.looks) + len(choice.judged)
    assert [line.endswith("kept") for line in lines].count(True) == 1
    assert ("text" in lines[0]) == guarded
