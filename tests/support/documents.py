"""What a Markdown page says in code: its fenced blocks, its tables' commands, its links, its headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

# CHANGELOG.md, docs/results/ and docs/walk.md tell what was: the commands of that day, and in the first its paths. The
# last is a log, with what commands printed among them.
HOW_TO = sorted({*ROOT.glob("*.md")} - {ROOT / "CHANGELOG.md", ROOT / "README.ja.md"})
HOW_TO += sorted({*ROOT.glob("docs/*.md")} - {ROOT / "docs" / "walk.md"})
PAGES = [*HOW_TO, ROOT / "README.ja.md", *sorted(ROOT.glob("docs/results/*.md")), ROOT / "tests/golden/README.md"]

_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_COMMENT = re.compile(r"(^|\s+)#\s.*")


@dataclass(frozen=True, slots=True)
class Code:
    """Something in code, and where: a fence's word ("console", "sh", …; "" where it has none), "table" or "prose"."""

    where: str
    text: str


def code(page: str) -> Iterator[Code]:
    """All of it in order. Of a console block only what is typed; comments left out, continued lines put together."""
    fence: str | None = None
    paragraph: list[str] = []  # a span may be broken over lines
    for line in re.sub(r"\\\n\s*", "", page).splitlines():
        marked = line.startswith("```")
        if fence is not None and not marked:
            typed = line.removeprefix("$ ") if fence == "console" else line
            typed = _COMMENT.sub("", typed).rstrip()
            if typed and (fence != "console" or line.startswith("$ ")):
                yield Code(fence, typed)
            continue
        in_text = not marked and not line.startswith("|") and line.strip()
        if in_text:
            paragraph.append(line)
            continue
        yield from (Code("prose", span) for span in _spans("\n".join(paragraph)))
        paragraph = []
        if line.startswith("|"):
            yield from (Code("table", span) for span in _spans(line))
        elif marked:
            fence = line[3:].strip() if fence is None else None
    yield from (Code("prose", span) for span in _spans("\n".join(paragraph)))


def links(page: str) -> list[str]:
    return _LINK.findall(page)


def headings(page: str) -> list[int]:
    """Their levels, in order."""
    return [
        len(marks) for marks in re.findall(r"^(#+) ", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    ]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _spans(text: str) -> list[str]:
    return [re.sub(r"\s*\n\s*", " ", span) for span in _SPAN.findall(text)]
