"""Timing: statistics against their definitions, what is run in which order, and that drift of the machine cancels."""

from __future__ import annotations

import math
import random

import pytest
import torch
from scipy.stats import binom

from nkat.engine.eager import EagerDecoder
from nkat.errors import NKATError
from nkat.lm.load import load_model
from nkat.measure import speed
from nkat.measure.speed import PairedOverhead, Timings, bench_decode, bench_prefill, median_interval, paired_overhead
from nkat.theta.algebra import quantise_factors
from tests.support.tiny_models import write_tiny_model

GAMMA = 0.9


class FakeMachine:
    """A decoder and the clock it is timed by: a step takes 1 s, 1.1 s with Θ, times what the machine's drift makes it.

    calls: (what, strength of Θ, position, tokens), in order
    """

    name = "fake"
    capacity = 1000
    cache_nbytes = 0

    def __init__(self, drift: float = 0.0) -> None:
        self.length, self.now, self.drift = 0, 0.0, drift
        self.gamma: float | None = None
        self.calls: list[tuple[str, float | None, int, tuple[int, ...]]] = []

    def clock(self) -> float:
        return self.now

    def prefill(self, tokens):
        self._work("prefill", tokens)
        return torch.zeros(4)

    def step(self, token):
        self._work("step", [token])
        return torch.zeros(4)

    def reach(self, length):
        return length

    def keep_state(self, most):
        pass

    def set_gamma(self, gamma):
        self.gamma = gamma

    def _work(self, what, tokens):
        self.calls.append((what, self.gamma, self.length, tuple(tokens)))
        self.now += len(tokens) * (1.0 if self.gamma is None else 1.1) * (1.0 + self.drift * self.now)
        self.length += len(tokens)


@pytest.fixture
def machine(monkeypatch) -> FakeMachine:
    fake = FakeMachine()
    monkeypatch.setattr(speed, "perf_counter", fake.clock)
    return fake


# --- statistics


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 10, 25, 60])
def test_the_medians_interval_is_that_of_the_sign_test(count: int) -> None:
    values = list(range(count))
    random.Random(count).shuffle(values)
    low, high, coverage = median_interval(values)
    k = low + 1  # the k-th smallest and the k-th largest
    assert high == count - k
    assert coverage == pytest.approx(max(0.0, 1 - 2 * binom.cdf(k - 1, count, 0.5)))
    narrower = 1 - 2 * binom.cdf(k, count, 0.5)
    assert narrower < speed.COVERAGE or k + 1 > (count + 1) // 2
    assert coverage >= speed.COVERAGE or k == 1


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    """On a lopsided distribution, where the mean's usual interval has no business."""
    generator = random.Random(0)
    covered = 0
    for _ in range(2000):
        low, high, coverage = median_interval([generator.expovariate(1.0) for _ in range(12)])
        covered += low <= math.log(2) <= high
    assert covered / 2000 == pytest.approx(coverage, abs=4 * math.sqrt(coverage * (1 - coverage) / 2000))
    assert covered / 2000 != pytest.approx(0.99, abs=0.01)  # the tolerance can tell


def test_timings_are_means_medians_and_percentiles() -> None:
    timings = Timings((1.0, 2.0, 3.0, 10.0), tokens=8)
    assert (timings.mean, timings.median, timings.tokens_per_second) == (4.0, 2.5, 8 / 2.5)
    assert timings.percentile(0) == 1.0
    assert timings.percentile(90) == pytest.approx(7.9)  # 3 + 0.7 · 7
    record = timings.record()
    assert record["avg_latency_ms"] == 4000.0
    assert record["tokens_per_second"] == 8 * 1e3 / record["median_latency_ms"]


def test_overhead_is_the_median_of_ratios() -> None:
    cost = PairedOverhead((1.1, 2.4, 30.0), (1.0, 2.0, 10.0))
    assert cost.percent == pytest.approx(20.0)
    assert cost.spread == (pytest.approx(10.0), pytest.approx(200.0))
    assert cost.record()["pairs"] == 3


# --- what is run


def test_decode_alternates_arms_over_the_same_positions_and_tokens(machine: FakeMachine) -> None:
    machine.length = 8
    arms = bench_decode(machine, [10, 11, 12, 13, 14], GAMMA, start=8, repetitions=3, block=2)
    assert {what for what, *_ in machine.calls} == {"step"}
    run = [(position, tokens) for _, _, position, tokens in machine.calls]
    # Every arm starts with an untimed step at the position it then rewinds to.
    steps = [(8, (10,)), (9, (11,))], [(10, (12,)), (11, (13,))], [(12, (14,))]
    untimed_and_timed = [[block[0], *block] for block in steps]
    pairs = [block for index in (0, *([0, 1, 2] * 3)) for block in untimed_and_timed[index] * 2]
    assert run == pairs
    arms_run = [{gamma for _, gamma, at, _ in machine.calls if at == position} for position in range(8, 13)]
    assert arms_run == [{None, GAMMA}] * 5
    assert len(arms.without.seconds) == len(arms.with_theta.seconds) == 15
    assert len(arms.overhead.ratios) == 9
    assert machine.gamma == GAMMA


def test_each_arm_goes_first_in_turn(machine: FakeMachine) -> None:
    bench_prefill(machine, [1, 2, 3], GAMMA, repetitions=4)
    order = [gamma for _, gamma, position, _ in machine.calls if position == 0]
    assert order == [None, GAMMA, None, GAMMA, GAMMA, None, None, GAMMA, GAMMA, None]
    assert machine.length == 3
    assert machine.gamma == GAMMA


def test_without_theta_there_is_one_arm(machine: FakeMachine) -> None:
    arms = bench_prefill(machine, [1, 2, 3], None, repetitions=2)
    assert arms.with_theta is None
    assert arms.overhead is None
    assert arms.as_asked is arms.without
    assert {gamma for _, gamma, _, _ in machine.calls} == {None}
    assert arms.without.seconds == (3.0, 3.0)
    assert arms.without.tokens_per_second == 1.0


def test_a_machine_that_slows_down_does_not_change_the_overhead(machine: FakeMachine) -> None:
    machine.length = 4
    steady = bench_decode(machine, [1] * 40, GAMMA, start=4, repetitions=2)
    assert steady.overhead.percent == pytest.approx(10.0)
    machine.now, machine.drift, machine.length = 0.0, 1e-3, 4
    drifting = bench_decode(machine, [1] * 40, GAMMA, start=4, repetitions=2)
    assert drifting.overhead.percent == pytest.approx(10.0, abs=1.0)
    # The control: one arm after the other, as without alternation, would have blamed the drift on Θ.
    machine.now, machine.length = 0.0, 4
    before = bench_decode(machine, [1] * 40, None, start=4, repetitions=2).without.mean
    after = bench_decode(machine, [1] * 40, None, start=4, repetitions=2).without.mean
    assert 100 * (after / before - 1) > 5.0


def test_the_first_step_behind_a_change_of_arm_is_not_timed(machine: FakeMachine) -> None:
    machine.length = 2
    arms = bench_decode(machine, [1] * 6, GAMMA, start=2, repetitions=1, block=3)
    timed = len(arms.without.seconds) + len(arms.with_theta.seconds)
    run = sum(what == "step" for what, *_ in machine.calls)
    assert (timed, run) == (12, 12 + 4 + 8)  # 2 blocks · 2 arms untimed steps, and one warm-up pair of 4 steps


def test_paired_overhead_stays_at_one_position(machine: FakeMachine) -> None:
    cost = paired_overhead(machine, [5, 6, 7], GAMMA, blocks=3, steps=2)
    assert cost.percent == pytest.approx(10.0)
    assert len(cost.ratios) == 3
    assert {position for what, _, position, _ in machine.calls if what == "step"} == {3, 4}
    assert {tokens for what, _, _, tokens in machine.calls if what == "step"} == {(7,)}
    for prompt, blocks, steps in (([], 1, 1), ([1], 0, 1), ([1], 1, 0)):
        with pytest.raises(NKATError, match="at least one"):
            paired_overhead(machine, prompt, GAMMA, blocks=blocks, steps=steps)


def test_mistakes(machine: FakeMachine) -> None:
    with pytest.raises(NKATError, match="at least one token"):
        bench_prefill(machine, [], GAMMA, repetitions=1)
    with pytest.raises(NKATError, match="0 are in the KV cache"):
        bench_decode(machine, [1], GAMMA, start=4, repetitions=1)


# --- on a real model


@pytest.mark.isa
@pytest.mark.parametrize("arch", ["llama", "qwen35"])  # the latter goes back to states that were kept
def test_both_arms_are_the_model_without_and_with_theta(tmp_path, arch: str) -> None:
    """The logits under the stopwatch are those of a model that never saw the other arm; with γ = 1 the arms agree."""
    loaded = load_model(write_tiny_model(tmp_path / "tiny.gguf", arch))
    model = loaded.model
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(96, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    model.set_thetas({"blk.0.ffn_up.weight": quantise_factors(*factors)})
    prompt, following = [1, 2, 3, 4], [5, 6, 7]

    class Watched(EagerDecoder):
        seen: dict  # (Θ's strength, position) → logits of the last step there

        def step(self, token):
            at = self.strength, self.length
            self.seen[at] = super().step(token)
            return self.seen[at]

        def set_gamma(self, gamma):
            self.strength = gamma
            super().set_gamma(gamma)

    def run(gamma: float) -> dict:
        decoder = Watched(model, 7)
        decoder.seen = {}
        bench_prefill(decoder, prompt, gamma, repetitions=1)
        bench_decode(decoder, following, gamma, start=4, repetitions=1, block=1)
        return decoder.seen

    seen = run(0.5)
    for strength in (None, 0.5):
        alone = EagerDecoder(model, 7)
        alone.set_gamma(0.5)  # the last prefill was with Θ
        alone.prefill(prompt)
        alone.set_gamma(strength)
        assert torch.allclose(alone.step(5), seen[strength, 4], atol=1e-5)
    assert (seen[None, 4] - seen[0.5, 4]).abs().max() > 1e-3
    off = run(1.0)
    assert torch.equal(off[None, 4], off[1.0, 4])
