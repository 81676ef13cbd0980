"""A table as a value, and its forms: for people, for a page, for programs.

    table  columns padded for a terminal        md     the same cells in Markdown, to be pasted
    csv    one file a run, a line a row         jsonl  one JSON object a row

People see `23.5115 ± 0.7140` in one cell; programs get every number in full, in a column of its own, and in every row
the conditions that all rows share, as llama-bench gives them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nkat.host import output, streams
from nkat.host.console import format_table, say
from nkat.host.record import plain
from nkat.host.streams import printable

Row = Mapping[str, Any]
Show = str | Callable[..., str]


@dataclass(frozen=True, slots=True)
class Column:
    """title, unit: the heading for people;  keys: of its values in a row, and in csv and jsonl

    show: those values as text: a function of them, or a format for the first. One that is not there is an empty cell.
    beside: what a change of this column is, in a table that lies on its side
    """

    title: str
    keys: str | tuple[str, ...]
    show: Show = ""
    unit: str = ""
    beside: Column | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.keys,) if isinstance(self.keys, str) else self.keys

    @property
    def heading(self) -> str:
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def cell(self, row: Row) -> str:
        values = [row.get(name) for name in self.names]
        if values[0] is None:
            return ""
        return format(values[0], self.show) if isinstance(self.show, str) else self.show(*values)


@dataclass(frozen=True, slots=True)
class Table:
    """name: in csv and jsonl, where a command has several;  caption: what was measured, for people

    rows: values by the columns' keys;  conditions: what holds of all of them, for programs
    sideways: for people every column is a line, and every row a column, because there are few of those
    beside: the heading of the changes then
    """

    name: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    caption: str = ""
    conditions: Row = field(default_factory=dict)
    sideways: bool = False
    beside: str = ""

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Heading and lines for people."""
        if not self.sideways:
            return [column.heading for column in self.columns], [
                [column.cell(row) for column in self.columns] for row in self.rows
            ]
        first, *others = self.columns
        changes = any(column.beside for column in others)
        heading = [first.heading, *(first.cell(row) for row in self.rows), *([self.beside] if changes else [])]
        lines = []
        for column in others:
            line = [column.heading, *(column.cell(row) for row in self.rows)]
            if changes:
                line.append("" if column.beside is None else column.beside.cell(self.rows[-1]))
            lines.append(line)
        return heading, lines

    def records(self) -> list[dict[str, Any]]:
        """Each row with all its values, and the conditions, for programs."""
        every = [c for column in self.columns for c in (column, column.beside) if c is not None]
        names = dict.fromkeys(name for column in every for name in column.names)
        return [{"table": self.name, **self.conditions, **{name: row.get(name) for name in names}} for row in self.rows]


def as_text(table: Table) -> str:
    """Caption and table, for a terminal."""
    heading, lines = table.cells()
    return f"{table.caption}\n\n{format_table(lines, heading)}" if table.caption else format_table(lines, heading)


def as_markdown(table: Table) -> str:
    """A caption and a table of GitHub's Markdown, its columns padded as they are in a terminal."""
    heading, lines = table.cells()
    whole = [_escaped(line) for line in (heading, *lines)]
    widths = [max(3, *(len(line[i]) for line in whole)) for i in range(len(whole[0]))]

    def join(line: Sequence[str]) -> str:
        cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = join([("-" * (w - 1) + ":") if i else ":" + "-" * (w - 1) for i, w in enumerate(widths)])
    caption = "  \n".join(markdown(line) for line in table.caption.strip().splitlines())
    return "\n".join([*([caption, ""] if caption else []), join(whole[0]), rule, *(join(line) for line in whole[1:])])


def as_csv(tables: Iterable[Table]) -> str:
    """All rows of all tables, under one heading; what a table does not have is empty. Numbers as Python writes them."""
    rows = [row for table in tables for row in table.records()]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _field(value) for name, value in row.items()} for row in rows)
    return file.getvalue().removesuffix("\n")


def as_json_lines(table: Table) -> str:
    """An object a row. What is no finite number is null."""
    ascii_only = not streams.is_unicode()
    return "\n".join(json.dumps(plain(row), ensure_ascii=ascii_only) for row in table.records())


_waiting: list[Table] = []


def show(table: Table) -> None:
    """Prints a table in the form that was asked for; csv when the command ends, because its tables share a heading."""
    form = output.form()
    if form == "table":
        print(as_text(table), flush=True)
    elif form == "md":
        print(as_markdown(table) + "\n", flush=True)
    else:
        if table.caption:
            say(table.caption)
        if form == "jsonl":
            print(as_json_lines(table), flush=True)
        else:
            _waiting.append(table)


def finish() -> None:
    """Prints what is still to be printed. For whoever runs a command, however that ended."""
    waiting = _waiting[:]
    _waiting.clear()
    if waiting:
        print(as_csv(waiting), flush=True)


def _field(value: Any) -> str:
    """One of a csv line: on one line, whatever a file's name holds."""
    value = plain(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(_field(item) for item in value)
    return printable(str(value))


def _escaped(line: Sequence[str]) -> list[str]:
    return [markdown(cell.strip()).replace("|", "\\|") for cell in line]


def markdown(text: str) -> str:
    """Text that Markdown shows as it is: what a file is called is no markup."""
    shown = printable(text)
    for character in "\\`*<[":
        shown = shown.replace(character, "\\" + character)
    return shown
