"""Progress and remarks: a bar in a terminal, lines elsewhere, nothing where none is wanted."""

from __future__ import annotations

import io
import os
import re
import sys

import pytest

from nkat.host import console, output
from nkat.host.console import bar, note, remark, say


@pytest.fixture(autouse=True)
def usual_form():
    yield
    output.reset()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the lines of progress take for the time."""
    now = [0.0]
    monkeypatch.setattr(console, "monotonic", lambda: now[0])
    return now


def run(clock: list[float], steps: int, seconds: float) -> None:
    with bar(steps, "fitting", "step") as progress:
        for _ in range(steps):
            clock[0] += seconds
            progress.set_postfix_str("loss 1.5")  # of which each would be a line
            progress.update()


def test_a_pipe_gets_a_line_every_few_seconds_and_a_last_one(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    run(clock, 1000, 0.02)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5  # after 2, 7, 12 and 17 of 20 seconds, and at the end
    assert lines[-1].startswith("fitting: 100 %, 1000 of 1000, ")
    assert [int(re.search(r"(\d+) %", line)[1]) for line in lines] == [10, 35, 60, 85, 100]
    assert all(line.isprintable() for line in lines)


def test_what_is_quick_says_nothing_in_a_pipe(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, 1000, 0.001)
    assert capsys.readouterr() == ("", "")


def test_quiet_has_no_progress(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    output.be_quiet()
    run(clock, 1000, 1.0)
    assert capsys.readouterr() == ("", "")


def test_a_job_without_a_total_says_how_long_it_has_taken(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with bar(None, "loading", form="{desc}: {elapsed}") as progress:
        for _ in range(4):
            clock[0] += 1.5
            progress.update(0)
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["loading"] * 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("kind", "moves"), [("xterm", True), ("dumb", False)])
def test_a_terminal_gets_a_bar_that_moves_if_it_can(
    kind: str, moves: bool, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(os.environ, "TERM", kind)
    with bar(10, "fitting", "step") as progress:
        progress.delay = 0
        clock[0] = 3.0
        progress.refresh()
    assert ("\r" in sys.stderr.getvalue()) == moves
    assert "fitting" in sys.stderr.getvalue()
    assert re.search(r"\x1b\[[\d;]*m", sys.stderr.getvalue()) is None  # no colours, so NO_COLOR has nothing to change


def test_quiet_leaves_results_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    def speak() -> tuple[str, str]:
        for word in (say, remark, note):
            word(word.__name__)
        note("warning: x")
        note("always", always=True)
        return tuple(capsys.readouterr())

    assert speak() == ("say\nremark\n", "note\nwarning: x\nalways\n")
    output.be_quiet()
    assert speak() == ("say\n", "warning: x\nalways\n")
    output.set_form("csv")
    assert speak() == ("", "warning: x\nalways\n")
