"""What the pages point at is there: files, folders, modules, and names in files; and each file says its one job."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.documents import PAGES, code, links, read
from tests.test_structure import MAY, TRUNK, modules

FOLDERS = ("nkat", "nkat_vit", "tests", "docs", "examples", "benchmarks")
_IN_FOLDER = re.compile(rf"(?:\.\./|(?:{'|'.join(FOLDERS)})/)[\w./*-]*")
_TEST = re.compile(r"test_[a-z]\w*")
_AT_TOP = re.compile(r"[\w.-]+\.(?:py|md|toml|yaml)|Makefile|requirements[\w-]*\.txt")


def stale(page: str, folder: Path) -> list[str]:
    """What a page in `folder` names and what is not there."""
    found = [link for link in links(page) if not _has_link(link, folder)]
    return found + [word for word in _pointers(page) if not _is_there(word, folder)]


def _has_link(link: str, folder: Path) -> bool:
    path = link.partition("#")[0]
    return "://" in link or not path or (folder / path).exists()


def _pointers(page: str) -> Iterator[str]:
    """Paths, `path::name` and tests' names in code, modules behind -m."""
    for found in code(page):
        words = found.text.split()
        for before, word in zip(["", *words], words, strict=False):
            path = word.partition("::")[0]
            if before == "-m" and word.partition(".")[0] in FOLDERS:
                yield word.replace(".", "/") + ".py"
            elif (
                _TEST.fullmatch(word)
                or _IN_FOLDER.fullmatch(path)
                or (_AT_TOP.fullmatch(path) and before in ("", "python"))
            ):
                yield word


def _is_there(word: str, folder: Path) -> bool:
    if _TEST.fullmatch(word):
        return any(f"def {word}(" in read(path) for path in (ROOT / "tests").rglob("test_*.py"))
    path, _, name = word.partition("::")
    base = folder if path.startswith("../") or (folder / path).exists() else ROOT
    if "*" in path:
        return any(base.glob(path))
    target = base / path
    if not target.exists():
        return False
    return not name or re.search(rf"\b{re.escape(name)}\b", read(target)) is not None


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(path: Path) -> None:
    assert stale(read(path), path.parent) == []


def test_names_are_really_looked_at() -> None:
    assert "nkat/theta/modelfile.py" in _pointers(read(ROOT / "docs/files.md"))
    assert "nkat/host/" in _pointers(read(ROOT / "README.md"))
    assert "benchmarks/vit_step.py" in _pointers(read(ROOT / "docs/images.md"))


@pytest.mark.parametrize(
    "page",
    [
        "see `nkat/theta_io.py`",
        "see [there](docs/nowhere.md)",
        "`nkat/kernels/cpu/turbo*.py` and more",
        "`python -m nkat.fetch smollm2`",
        "`nkat/sources/options.py::SAUCES`",
        "`nkat_converter.py`",
        "```\nnkat/tools/   hammers\n```",
        "| a | `tests/kobold/fake_koboldcpp.py` |",
        "`test_everything_at_once` sees to it",
    ],
)
def test_what_is_not_there_would_be_found(page: str) -> None:
    assert len(stale(page, ROOT)) == 1


def test_what_is_there_is_not_stale() -> None:
    page = "`nkat/sources/options.py::SOURCES`, `tests/*/test_fit*.py`, `nkat/theta/`, [here](README.md#two-commands)"
    assert stale(page, ROOT) == []
    assert stale("`../support/tiny_models.py`", ROOT / "tests/golden") == []
    assert stale("`../support/tiny_models.py`", ROOT) == ["../support/tiny_models.py"]


def rules(page: str) -> tuple[list[str], dict[str, set[str]]]:
    """The rule of imports as CONTRIBUTING.md draws it: the trunk, and what each other room may import of it."""
    trunk = re.search(r"^\w+(?: < \w+)+", page, re.MULTILINE)
    assert trunk is not None
    others = re.findall(r"^(\w+) +may import  (\w+(?:, (?!and )\w+)*)", page, re.MULTILINE)
    return trunk[0].split(" < "), {room: set(words.split(", ")) for room, words in others}


def test_the_rule_of_imports_is_the_one_that_is_tested() -> None:
    page = read(ROOT / "CONTRIBUTING.md")
    trunk, others = rules(page)
    assert trunk == TRUNK
    rooms = {"study", "hub", "kobold", "inference", "harness", "serve", "convert", "search", "nkat_vit"}
    assert others.keys() == rooms
    for room, may in others.items():
        assert may == MAY[room] - {"errors", "version", "nkat"}, room
    changed = read(ROOT / "CONTRIBUTING.md").replace(
        "may import  theta, gguf, hub, host", "may import  lm, theta, gguf, hub, host", 1
    )
    assert rules(changed)[1]["kobold"] != others["kobold"]


def test_hooks_run_what_make_lint_runs() -> None:
    """And with the tools of .venv alone, so that nothing is fetched."""
    yaml = pytest.importorskip("yaml")
    (repository,) = yaml.safe_load(read(ROOT / ".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    assert all(hook["language"] == "system" for hook in repository["hooks"])
    entries = {hook["entry"] for hook in repository["hooks"]}
    lint = read(ROOT / "Makefile").partition("\nlint:")[2].partition("\n\n")[0]
    commands = {f".venv/bin/python {rest}" for rest in re.findall(r"\$\(PY\) (.+)", lint)}
    assert len(commands) >= 2
    assert commands <= entries <= commands | {".venv/bin/python -m mypy"}


def test_every_file_says_its_job_in_a_line() -> None:
    """The README's tree ends at the rooms: within one, the first lines of the docstrings are the tree."""
    for name, path in modules().items():
        first = (ast.get_docstring(ast.parse(read(path))) or "").partition("\n")[0]
        assert first, f"{name} does not say what it is for"
