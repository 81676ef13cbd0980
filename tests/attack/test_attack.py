"""A few thousand hostile files end as they should; and faults planted on purpose are seen."""

from __future__ import annotations

import pytest

from tests.attack.run import FAULTS, attack

CASES = 3000


def test_hostile_files_are_read_or_refused_in_one_line() -> None:
    result = attack(CASES)
    assert result.clean, "\n".join(result.faults)
    assert sum(result.counts.values()) == CASES
    assert min(result.counts["read"], result.counts["refused"]) > CASES // 10  # or it would try nothing


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str) -> None:
    result = attack(20, processes=1, fault=fault, seconds=15.0)
    assert result.counts[fault] >= 1
    assert not result.clean
    assert result.counts["read"] + result.counts["refused"] >= 1  # what comes after it is still tried
    assert sum(result.counts.values()) == 20
