"""The Θ nearest to a LoRA, and what it misses."""

from __future__ import annotations

import pytest
import torch

from nkat.sources.lora import lora_starts, missed_record, missed_table, nearest_theta
from nkat.theta.algebra import low_rank_form
from nkat.theta.lowrank import LowRank

pytestmark = pytest.mark.isa


@pytest.mark.parametrize(("m", "n"), [(24, 24), (40, 16), (16, 40)])
def test_a_lora_that_is_a_theta_is_found_again(m: int, n: int) -> None:
    down, up = low_rank_form(torch.randn(max(m, n), 2), torch.randn(max(m, n), 2), m, n)
    (p, q), missed = nearest_theta(LowRank(up, down), 2)
    again, back = low_rank_form(p, q, m, n)
    assert missed.share < 0.02
    assert float((back @ again - up @ down).norm() / (up @ down).norm()) == pytest.approx(missed.share, abs=1e-4)
    assert nearest_theta(LowRank(up, down), 1)[1].share > 10 * missed.share  # control: of rank 1 there is none


@pytest.mark.parametrize("seed", [0, 1])
def test_a_symmetric_lora_is_missed_as_a_whole_and_a_general_one_by_half(seed: int) -> None:
    """Of a square matrix Θ has the antisymmetric part alone; a random one's has half of the squared norm."""
    torch.manual_seed(seed)
    vector = torch.randn(32, 1)
    assert nearest_theta(LowRank(vector, vector.T), 2)[1].share == pytest.approx(1.0, abs=1e-4)
    general = nearest_theta(LowRank(torch.randn(32, 1), torch.randn(1, 32)), 2)[1].share
    assert general == pytest.approx(0.5**0.5, abs=0.05)


def test_the_record_counts_layers_that_get_no_theta() -> None:
    down, up = low_rank_form(torch.randn(8, 1), torch.randn(8, 1), 8, 8)
    exact, other = LowRank(up, down), LowRank(torch.randn(8, 1), torch.randn(1, 8))
    terms = {"blk.0.attn_q.weight": exact, "blk.1.attn_q.weight": other, "blk.0.attn_v.weight": exact}
    names = ["blk.0.attn_q.weight", "blk.1.attn_q.weight", "blk.0.attn_k.weight"]
    zero = [(torch.ones(8, 1), torch.zeros(8, 1))] * 3
    done: list[int] = []
    starts, missed = lora_starts(terms, names, zero, 1, 0, lambda: done.append(1))
    assert len(done) == 3
    assert starts[2] is zero[2]
    record = missed_record(missed)
    assert record["layers"]["blk.0.attn_v.weight"] == 1.0
    assert record["layers"]["blk.0.attn_q.weight"] < 0.02
    squares = {name: float(term.product().square().sum()) for name, term in terms.items()}
    left = sum(squares[name] * record["layers"][name] ** 2 for name in terms)
    assert record["all"] == pytest.approx((left / sum(squares.values())) ** 0.5, rel=1e-4)
    _, rows = missed_table(record).cells()
    assert [row[:2] for row in rows] == [["attn_q", "2"], ["attn_v", "1"], ["all", "3"]]
