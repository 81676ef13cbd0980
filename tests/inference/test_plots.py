"""The picture of a comparison: bars from zero, and paired differences with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nkat.host import figures
from nkat.inference import plots
from nkat.inference.plots import plot_comparison


def record(change: float = -0.5, chunks: int = 4) -> dict[str, Any]:
    timings = {"tokens_per_second": 100.0, "median_latency_ms": 10.0, "p10_latency_ms": 9.0, "p90_latency_ms": 12.0}
    arm = {"decode": timings, "prefill": timings, "perplexity": 20.0, "perplexity_stderr": 0.7}
    cost = {"percentage": 2.0, "interval": [-1.0, 4.0], "interval_coverage": 0.97}
    return {
        "baseline": arm,
        "nkat": arm,
        "overhead": cost,
        "prefill_overhead": cost,
        "chunks": chunks,
        "estimated_perplexity_improvement": change,
        "perplexity_change_stderr": 0.1,
    }


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved."""
    kept: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *_: kept.append(figure))
    return kept


def test_bars_start_at_zero_and_differences_have_zero_in_their_middle(drawn: list[Any]) -> None:
    plot_comparison(Path("x.png"), record(), "x", force=True)
    axes = drawn[0].axes
    assert len(axes) == 6
    for bars, difference in zip(axes[::2], axes[1::2], strict=True):
        assert bars.get_ylim()[0] == 0
        assert all(bar.get_y() == 0 for bar in bars.patches)
        low, high = difference.get_ylim()
        assert low == -high
        assert any(list(line.get_ydata()) == [0, 0] for line in difference.lines)


def test_the_point_and_its_interval_are_the_records(drawn: list[Any]) -> None:
    plot_comparison(Path("x.png"), record(change=-0.5), "x", force=True)
    for panel, (value, low, high) in ((1, (2.0, -1.0, 4.0)), (5, (-0.5, -0.7, -0.3))):
        (container,) = drawn[0].axes[panel].containers
        point, _, (bar,) = container
        assert point.get_ydata()[0] == value
        assert bar.get_segments()[0][:, 1].tolist() == pytest.approx([low, high])
        assert drawn[0].axes[panel].get_ylim()[0] < low
    assert "-1.00 to +4.00, 97% sure" in drawn[0].axes[1].get_xlabel()
    assert "-0.500 % ± 0.100" in drawn[0].axes[5].get_xlabel()


def test_without_perplexity_there_are_two_pairs(drawn: list[Any]) -> None:
    plot_comparison(Path("x.png"), record(chunks=0), "x", force=True)
    assert len(drawn[0].axes) == 4


def test_it_is_saved(tmp_path: Path) -> None:
    plot_comparison(tmp_path / "x.png", record(), "x", force=False)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert plots.save_figure is figures.save_figure
