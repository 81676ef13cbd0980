"""The picture of a search, by what is drawn in it."""

from nkat.host.figures import new_figure
from nkat.search.plots import _history, _rank_gamma


def _trial(number: int, rank: int, gamma: float) -> dict:
    parameters = {"rank": rank, "gamma": gamma}
    return {
        "number": number,
        "state": "COMPLETE",
        "value": 1.0 + number,
        "parameters": parameters,
        "change_percent": 1.0,
        "feasible": True,
    }


def test_repeats_stay_in_their_ranks_band() -> None:
    figure = new_figure("x", (5, 5))
    axes = figure.subplots()
    rows = [*(_trial(n, 2, 0.94) for n in range(40)), _trial(40, 4, 0.9)]
    _rank_gamma(axes, figure, rows, rows[-1])
    heights = axes.collections[0].get_offsets()[:, 1]
    assert max(abs(heights[:40])) < 0.5  # rank 2 is row 0
    assert heights[40] == 1.0  # one alone is where its rank is


def test_the_edge_of_what_was_searched_is_said_where_the_best_lies_on_it() -> None:
    for best, said in ((0.9, True), (0.94, False)):
        figure = new_figure("x", (5, 5))
        axes = figure.subplots()
        rows = [_trial(0, 2, 0.9), _trial(1, 2, 0.94)]
        _rank_gamma(axes, figure, rows, next(r for r in rows if r["parameters"]["gamma"] == best), [0.9, 0.99])
        assert ("edge" in axes.get_title()) == said


def test_stopped_trials_are_below_all_others_and_the_legend_names_what_is_there() -> None:
    axes = new_figure("x", (5, 5)).subplots()
    rows = [_trial(0, 2, 0.9), {"number": 1, "state": "PRUNED"}]
    _history(axes, rows, None, rows[:1], rows[0])
    crosses = next(line for line in axes.lines if line.get_marker() == "x")
    bottom = axes.transData.inverted().transform(crosses.get_transform().transform((1, crosses.get_ydata()[0])))[1]
    assert bottom < rows[0]["value"]
    empty = new_figure("x", (5, 5)).subplots()
    _history(empty, rows[1:], None, [], None)
    assert [text.get_text() for text in empty.get_legend().get_texts()] == ["stopped early (no TPE)"]
