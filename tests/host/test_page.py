"""The HTML report: one file, readable by itself, in which what files say is text."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nkat.errors import NKATError
from nkat.host.page import Page, machine_facts, render, write_page
from nkat.host.tables import Column, Table

PNG = b"\x89PNG\r\n\x1a\n, of which nothing but its bytes matters here"
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Tags with their attributes, the text between, and whether what was opened is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style",):
            self.said.append(data.strip())


def page(name: str, picture: Path) -> Page:
    table = Table("x", [Column(name, "a"), Column("speed", "b", ".1f", "tok/s")], [{"a": name, "b": 2.25}], name)
    return Page(name, [name], [table], {name: picture}, {name: f"nkat-engine --model '{name}'"}, {name: {name: name}})


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "p.png"
    path.write_bytes(PNG)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "{{ page }}{% for %}",
        "a & b",
        "Θ\x1b[1m",
    ],
)
def test_what_a_file_says_is_text(name: str, picture: Path) -> None:
    found, usual = Reader(render(page(name, picture))), Reader(render(page("plain", picture)))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in usual.tags]
    assert not found.open
    assert sum(text == name.replace("\x1b", "\\u001b") for text in found.said) >= 6


def test_it_stands_alone(picture: Path) -> None:
    text = render(page("plain", picture))
    tags = Reader(text).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "base"}
    sources = [value for _, attributes in tags for key, value in attributes.items() if key in ("src", "href", "action")]
    assert sources == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert not re.search(r"url\(|@import|https?://", text)
    assert dict(tags[[tag for tag, _ in tags].index("img")][1])["alt"] == "plain"
    assert "color-scheme: light dark" in text


def test_the_table_is_the_one_of_the_terminal(picture: Path) -> None:
    said = Reader(render(page("plain", picture))).said
    at = said.index("speed, tok/s")
    assert "2.2" in said[at:]


def test_it_is_written_whole_and_replaces_nothing_unasked(picture: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    write_page(target, page("plain", picture), force=False)
    assert target.read_text(encoding="utf-8").endswith("</html>\n")
    with pytest.raises(NKATError, match="exists already"):
        write_page(target, page("plain", picture), force=False)


def test_a_machine_is_what_it_is_and_not_whose() -> None:
    machine = {"device_name": "A processor", "threads": 2, "hostname": "mine", "python": "3.11"}
    facts = machine_facts(
        {"machine": machine, "versions": {"torch": "2", "triton": None}, "nkat_version": "1", "git_commit": None}
    )
    assert facts == {
        "device name": "A processor",
        "threads": 2,
        "python": "3.11",
        "torch": "2",
        "nkat": "1",
        "commit": "not recorded",
    }
