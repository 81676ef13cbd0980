"""A table in all its forms: the same cells for people, every number in full for programs."""

from __future__ import annotations

import csv
import io
import json
import math
import re

import pytest

from nkat.errors import NKATError
from nkat.host import output, tables
from nkat.host.record import check_record
from nkat.host.tables import Column, Table, as_csv, as_json_lines, as_markdown, as_text

CHANGE = Column("change", ("change_percent", "change_stderr"), "{:+.1f} % ± {:.1f}".format)
COLUMNS = (
    Column("model", "model"),
    Column("speed", ("speed", "speed_stderr"), "{:.1f} ± {:.1f}".format, "tok/s", beside=CHANGE),
    Column("steps", "steps", ","),
)
ROWS = (
    {"model": "plain", "speed": 1 / 3, "speed_stderr": 0.1, "steps": 1000},
    {"model": "with Θ", "speed": 0.25, "speed_stderr": math.nan, "change_percent": -25.0, "change_stderr": 2.0},
)
TABLE = Table("speed", COLUMNS, ROWS, "two models", {"threads": 2, "text": "a, b"})


@pytest.fixture(autouse=True)
def usual_form():
    yield
    output.reset()
    tables.finish()


def read_markdown(text: str) -> list[list[str]]:
    """The cells of a table by GitHub's rules: pipes part them unless a backslash is before one."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[re.sub(r"\\(.)", r"\1", c.strip()) for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(re.fullmatch(r":?-+:?", rule) for rule in cells[1])
    return [cells[0], *cells[2:]]


def test_people_see_a_figure_with_its_error_in_one_cell() -> None:
    assert as_text(TABLE) == (
        "two models\n\n"
        "model   speed, tok/s  steps\n"
        "------  ------------  -----\n"
        "plain      0.3 ± 0.1  1,000\n"
        "with Θ     0.2 ± nan"
    )


def test_markdown_has_the_same_cells() -> None:
    heading, lines = TABLE.cells()
    assert read_markdown(as_markdown(TABLE)) == [heading, *lines]
    assert as_markdown(TABLE).startswith("two models\n\n| model  |")


@pytest.mark.parametrize("hostile", ["a|b", "a\\|b", "a\nb", "`x` *y* <b>", "[link](http://x)", "\x1b[31m"])
def test_markdown_is_no_markup_of_a_files(hostile: str) -> None:
    table = Table("x", COLUMNS[:1], [{"model": hostile}], "a caption")
    lines = as_markdown(table).splitlines()
    assert len(lines) == 5
    assert re.search(r"(?<!\\)[`*<\[]", lines[-1]) is None
    assert read_markdown("\n".join(lines))[1] == [hostile.replace("\n", "\\n").replace("\x1b", "\\u001b")]


def test_csv_has_every_number_in_full_and_the_conditions_in_every_row() -> None:
    first, second = csv.DictReader(io.StringIO(as_csv([TABLE])))
    assert list(first) == [
        "table", "threads", "text", "model", "speed", "speed_stderr", "change_percent", "change_stderr", "steps",
    ]  # fmt: skip
    assert float(first["speed"]) == 1 / 3
    assert first["text"] == second["text"] == "a, b"
    assert (first["change_percent"], second["change_percent"], second["steps"]) == ("", "-25.0", "")
    assert second["speed_stderr"] == ""  # no number


def test_json_lines_have_the_same_values() -> None:
    records = [json.loads(line) for line in as_json_lines(TABLE).splitlines()]
    assert [record["speed"] for record in records] == [1 / 3, 0.25]
    assert records[1]["speed_stderr"] is records[0]["change_percent"] is None
    assert {record["table"] for record in records} == {"speed"}


def test_on_its_side_a_column_is_a_line_with_its_change_at_the_end() -> None:
    table = Table("speed", COLUMNS, ROWS, sideways=True, beside="what it costs")
    heading, lines = table.cells()
    assert heading == ["model", "plain", "with Θ", "what it costs"]
    assert lines == [["speed, tok/s", "0.3 ± 0.1", "0.2 ± nan", "-25.0 % ± 2.0"], ["steps", "1,000", "", ""]]
    assert table.records() == Table("speed", COLUMNS, ROWS).records()


def test_tables_of_one_csv_share_a_heading(capsys: pytest.CaptureFixture[str]) -> None:
    output.set_form("csv")
    tables.show(Table("a", COLUMNS[:1], ROWS[:1]))
    tables.show(Table("b", COLUMNS[2:], ROWS[:1]))
    assert capsys.readouterr().out == ""
    tables.finish()
    assert capsys.readouterr().out == "table,model,steps\na,plain,\nb,,1000\n"
    tables.finish()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("form", "out", "err"), [("table", True, False), ("md", True, False), ("jsonl", False, True)])
def test_words_are_beside_the_table_or_on_stderr(
    form: str, out: bool, err: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Markdown's caption belongs to what is pasted."""
    output.set_form(form)
    tables.show(TABLE)
    said = capsys.readouterr()
    assert ("two models" in said.out, "two models" in said.err) == (out, err)
    output.be_quiet()
    tables.show(TABLE)
    said = capsys.readouterr()
    assert ("two models" in said.out, said.err) == (out, "")


def test_the_record_does_not_go_where_a_program_reads_the_table() -> None:
    check_record("-", force=False)  # the control
    output.set_form("csv")
    with pytest.raises(NKATError, match="csv alone"):
        check_record("-", force=False)
