"""A report as one HTML file: words, tables, pictures, commands, and under which conditions all of it holds.

It needs no other file, no network and no script, and is read as well by night as by day. What comes from files (names,
metadata) is text in it and never markup.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from nkat.host.files import atomic_output
from nkat.host.streams import shown
from nkat.host.tables import Table
from nkat.version import __version__

REPORT = "report.html"
_MACHINE = ("device_name", "processor", "cores", "threads", "os", "python", "torch")  # what it is, not whose


@dataclass(frozen=True, slots=True)
class Page:
    """summary: a paragraph each;  pictures: PNG files by what they show;  commands: by what they are for

    facts: tables of two columns, by their headings
    """

    title: str
    summary: Sequence[str]
    tables: Sequence[Table]
    pictures: Mapping[str, Path]
    commands: Mapping[str, str]
    facts: Mapping[str, Mapping[str, Any]]


def write_page(path: Path, page: Page, force: bool) -> None:
    """Writes it, whole or not at all."""
    data = render(page).encode(errors="backslashreplace")
    with atomic_output(path, len(data), force) as file:
        file.write(data)


def render(page: Page) -> str:
    """The file's text."""
    from jinja2 import Environment, StrictUndefined  # it takes a while to load
    from markupsafe import Markup

    def plain(value: Any) -> Any:
        return value if isinstance(value, Markup) else shown(str(value))

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=plain, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(resources.files("nkat.host").joinpath("page.html").read_text(encoding="utf-8"))
    tables = []
    for table in page.tables:
        heading, lines = table.cells()
        tables.append({"caption": table.caption.strip(), "heading": heading, "lines": lines})
    pictures = [
        {"about": about, "data": Markup("data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())}
        for about, path in page.pictures.items()
    ]
    return template.render(page=page, tables=tables, pictures=pictures, version=__version__) + "\n"


def machine_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """Machine and versions out of a record, without the names of the machine and its user."""
    machine = {name.replace("_", " "): record["machine"][name] for name in _MACHINE if name in record["machine"]}
    versions = {name: found for name, found in record["versions"].items() if found is not None}
    return {**machine, **versions, "nkat": record["nkat_version"], "commit": record["git_commit"] or "not recorded"}
