"""README and its translation say the same, and the commands in them and in docs/ are commands that there are."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.conftest import ROOT
from tests.support.documents import HOW_TO, code, headings, links, read
from tests.test_package import COMMANDS

ENGLISH, JAPANESE = read(ROOT / "README.md"), read(ROOT / "README.ja.md")
OURS = ("nkat", "nkat_vit", "examples", "benchmarks")
Program = tuple[str, ...]  # words that start it, without flags


# --- the two languages


def commands(page: str) -> list[str]:
    """Whatever a reader copies, in order: fenced blocks, and what is in code in tables. Of the tree, its paths."""
    return [found.text if found.where else found.text.split()[0] for found in code(page) if found.where != "prose"]


def percentages(page: str) -> list[str]:
    return sorted(re.findall(r"−?[\d.]+ %(?: ± [\d.]+)?", page))


def test_both_languages_have_the_same_commands() -> None:
    assert len(commands(ENGLISH)) > 50
    assert commands(JAPANESE) == commands(ENGLISH)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--theta-rank 4 --theta-gamma 0.97", "--theta-rank 4 --theta-gamma 0.96"),  # in a fenced block
        ("| `--no-cuda` |", "| `--cpu` |"),  # in a table
        ("make test ", "make check "),
        ("nkat/host/ ", "nkat/tools/ "),
        ("$ nkat-setup\n", ""),
    ],
)
def test_a_changed_command_would_be_found(old: str, new: str) -> None:
    changed = JAPANESE.replace(old, new, 1)
    assert changed != JAPANESE
    assert commands(changed) != commands(ENGLISH)


def test_comments_and_output_may_be_translated() -> None:
    page = "```console\n$ nkat-setup\nready\n```\n```sh\nmake test  # passes\n```\n"
    translated = page.replace("ready", "準備完了").replace("passes", "合格")
    assert commands(page) == commands(translated) == ["nkat-setup", "make test"]


def test_both_languages_have_the_same_sections_links_names_and_figures() -> None:
    assert headings(JAPANESE) == headings(ENGLISH)
    assert Counter(links(JAPANESE)) - Counter(["README.md"]) == Counter(links(ENGLISH)) - Counter(["README.ja.md"])
    prose = [Counter(found.text for found in code(page) if found.where == "prose") for page in (ENGLISH, JAPANESE)]
    assert prose[0] == prose[1]
    assert len(percentages(ENGLISH)) > 15
    assert percentages(JAPANESE) == percentages(ENGLISH)
    assert percentages(JAPANESE.replace("26 %", "27 %")) != percentages(ENGLISH)


# --- the commands and the programs


def program(command: str) -> Program | None:
    """What of this project a command starts; None: another program. Raises LookupError for one that is not there."""
    words = _words(command)
    if words[:1] == ["torchrun"]:
        start = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
        words = ["python", *words[start:]]
    name = Path(words[0]).name if words else ""
    if name == "make":
        for target in (word for word in words[1:] if "=" not in word):
            if not re.search(rf"^{target}:", read(ROOT / "Makefile"), re.MULTILINE):
                raise LookupError(f"{command}: no such target")
        return None
    if name.startswith("nkat-"):
        if name not in COMMANDS:
            raise LookupError(f"{command}: is not installed")
        return (name,)
    if name not in ("python", "py"):
        return None
    if "-m" in words:
        module = words[words.index("-m") + 1]
        if module.partition(".")[0] not in OURS:
            return None
        if not (ROOT / module.replace(".", "/")).with_suffix(".py").exists():
            raise LookupError(f"{command}: no such module")
        return ("-m", module)
    if not (ROOT / words[1]).exists():
        raise LookupError(f"{command}: no such script")
    task = words[words.index("--task") :][:2] if "--task" in words else []
    return (words[1], *task)


def flags(text: str) -> list[str]:
    """Those of the command itself, not of a program that it hands the rest to."""
    words = _words(text)
    if words[:1] == ["torchrun"]:
        words = words[3:]
    own = words[: words.index("--")] if "--" in words else words
    return [word.partition("=")[0] for word in own if word.startswith("--")]


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text.replace("\\", "/").replace("…", ""))
    except ValueError:  # an apostrophe: nothing that is typed
        return []


@functools.cache
def help_of(started: Program) -> str:
    first, *rest = started
    out = io.StringIO()
    argv = [rest[0] if first == "-m" else first, *(rest if first != "-m" else []), "--help"]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        if first == "-m":
            importlib.import_module(rest[0]).main()
        elif first in COMMANDS:
            module, _, function = COMMANDS[first].partition(":")
            getattr(importlib.import_module(module), function)()
        else:
            runpy.run_path(str(ROOT / first), run_name="__main__")
    return out.getvalue()


def accepts(started: Program, flag: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", help_of(started)) is not None


def uses(page: str) -> Iterator[tuple[Program, str]]:
    """(program, flag): a table's bare flags are those of the command before them."""
    latest: Program | None = None
    for found in code(page):
        if found.where in ("prose", "python", ""):
            continue
        bare = found.text.startswith("--")
        started = latest if bare else program(found.text)
        if started is None:
            continue
        latest = started
        yield from ((started, flag) for flag in flags(found.text))


def unknown(page: str) -> list[str]:
    return [f"{' '.join(started)}: {flag}" for started, flag in uses(page) if not accepts(started, flag)]


@pytest.mark.parametrize("path", HOW_TO, ids=lambda path: path.stem)
def test_every_command_is_there_and_takes_its_flags(path: Path) -> None:
    assert unknown(read(path)) == []


def test_commands_with_flags_are_really_looked_at() -> None:
    used = {(started[0], flag) for started, flag in uses(ENGLISH)}
    assert {
        ("nkat_gguf_converter.py", "--theta-gamma"),
        ("nkat_inference_engine.py", "--no-cuda"),
        ("nkat_auto_optimizer.py", "--data-root"),
        ("backend_selector.py", "--gpulayers"),
        ("-m", "--preset"),
    } <= used
    assert (("-m", "nkat_vit.train"), "--resume") in set(uses(read(ROOT / "docs/images.md")))


def test_a_wrong_flag_would_be_found() -> None:
    page = "```console\n$ python nkat_gguf_converter.py --input a.gguf --rank 4\n```\n\n| a | `--theta-gama 0.9` |\n"
    assert unknown(page) == ["nkat_gguf_converter.py: --rank", "nkat_gguf_converter.py: --theta-gama"]
    task = "```console\n$ python nkat_auto_optimizer.py --task vit --target-rank 2\n```\n"
    assert unknown(task) == ["nkat_auto_optimizer.py --task vit: --target-rank"]
    assert unknown("```sh\npython backend_selector.py --launch -- --quiet\n```\n") == []


@pytest.mark.parametrize(
    "command", ["python nkat_converter.py", "python -m nkat.fetch", "nkat-merge --help", "make everything"]
)
def test_a_program_that_is_not_there_would_be_found(command: str) -> None:
    with pytest.raises(LookupError):
        unknown(f"```console\n$ {command}\n```\n")


def test_flags_in_running_text_are_somebodys() -> None:
    programs = {started for path in HOW_TO for started, _ in uses(read(path))}
    for page in (ENGLISH, JAPANESE, *(read(path) for path in HOW_TO if path.parent.name == "docs")):
        for flag in {flag for found in code(page) if found.where == "prose" for flag in flags(found.text)}:
            assert any(accepts(started, flag) for started in programs), flag
