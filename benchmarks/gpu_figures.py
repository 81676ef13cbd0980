"""What `benchmarks.gpu` finds out: figures, how a part keeps them at once, and the page made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from nkat.host.record import parse_json
from nkat.host.tables import Column, Table, as_markdown, markdown


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the page.

    value: of `n` measurements the median, from `least` to `most`; None: not a finite number
    target: what was asked for, in words; met: whether it was, None without a target
    """

    name: str
    value: float | None
    unit: str
    n: int = 1
    least: float | None = None
    most: float | None = None
    target: str = ""
    met: bool | None = None


Keep = Callable[[Figure], None]
_FOLDED = 4  # cases from which the page has one line for all of them; the record has each


def measured(
    name: str,
    values: Sequence[float],
    unit: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    target: str = "",
) -> Figure:
    """The median of the values, with a target where one is given: met by the median. NaN meets none."""
    value = median(values)
    met, words = None, target
    if at_least is not None:
        met, words = value >= at_least, target or f"at least {number(at_least)} {unit}".rstrip()
    if at_most is not None:
        met, words = value <= at_most, target or f"at most {number(at_most)} {unit}".rstrip()
    finite = all(map(math.isfinite, values))
    if not finite:
        return Figure(name, None, unit, len(values), target=words, met=None if met is None else False)
    return Figure(name, value, unit, len(values), min(values), max(values), words, met)


def keeper(path: Path) -> Keep:
    """Appends each figure to a file as a line of JSON, so that nothing is lost when what comes after it goes wrong."""

    def keep(figure: Figure) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(figure)) + "\n")

    return keep


def kept(path: Path) -> list[dict[str, Any]]:
    """The figures that a part, or a piece of one, kept; a line that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(parse_json(line))
        except ValueError:
            continue
    return found


def number(value: float | None) -> str:
    """Four digits that count."""
    if value is None:
        return "not a number"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.2e}"


def problems(record: Mapping[str, Any]) -> list[str]:
    """Parts that failed and targets that were missed, a line each."""
    found = []
    for name, part in record["parts"].items():
        found += [f"{name}: failed: {error}" for error in part["errors"]]
        missed = [figure for figure in part["figures"] if figure["met"] is False]
        found += [f"{name}: {f['name']}: {number(f['value'])} {f['unit']} is not {f['target']}" for f in missed]
    return found


def page(record: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """The page in Markdown. record: as `benchmarks.gpu` keeps it; titles: of the parts, in order."""
    machine = record["machine"]
    lines = [
        "# On a GPU: correctness, speed, memory",
        "",
        "Written by `python -m benchmarks.gpu` (`make gpu`); not to be edited.",
        "",
        f"{machine['device_name']} (compute capability {machine['capability']}, "
        f"{machine['memory_bytes'] / 1e9:.1f} GB), driver {machine['driver']}, CUDA {machine['cuda']}, "
        f"torch {machine['torch']}, Triton {machine['triton']}, Python {machine['python']}, {machine['os']}; "
        f"{machine['processor']}, {machine['cores']} cores.",
        f"{record['date']}, {record['seconds']:.0f} seconds in all; the toolkit's commit: {record['git_commit']}.",
        "",
    ]
    wrong = problems(record)
    judged = sum(figure["met"] is not None for part in record["parts"].values() for figure in part["figures"])
    lines += [f"{judged} figures have a target." if judged else "No figure with a target was taken."]
    lines += ["Nothing failed and every target was met."] if not wrong and judged else []
    lines += [f"- {markdown(line)}" for line in wrong] + [""]
    for name, title in titles.items():
        part = record["parts"].get(name)
        if part is None:
            lines += [f"## {title}", "", f"Not run (`--only {name}`).", ""]
            continue
        lines += [f"## {title}", "", f"`{part['command']}`, {part['seconds']:.0f} s.", ""]
        for error in part["errors"]:
            lines += [f"**Failed**: {markdown(error)}", ""]
        if part["figures"]:
            lines += [as_markdown(Table(name, COLUMNS, folded(part["figures"]))), ""]
    return "\n".join(lines)


def folded(figures: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """With one figure for those with a target that are the same thing of several cases ("case, thing")."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for figure in figures:
        groups.setdefault(_thing(figure), []).append(figure)
    found = []
    for figure in figures:
        cases = groups[_thing(figure)]
        if not _thing(figure)[0] or figure["met"] is None or len(cases) < _FOLDED:
            found.append(figure)
        elif figure is cases[0]:
            found.append(_fold(cases))
    return found


def _thing(figure: Mapping[str, Any]) -> tuple[str, ...]:
    return figure["name"].partition(", ")[2], figure["unit"], figure["target"]


def _fold(cases: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    values = [figure["value"] for figure in cases]
    known = [value for value in values if value is not None]
    missed = sum(figure["met"] is False for figure in cases)
    said = f" ({missed} of {len(cases)} missed)" if missed else ""
    return {
        **cases[0],
        "name": f"{len(cases)} cases: {cases[0]['name'].partition(', ')[2]}{said}",
        "value": median(known) if len(known) == len(cases) else None,
        "n": len(cases),
        "least": min(known, default=None),
        "most": max(known, default=None),
        "met": None if cases[0]["met"] is None else not missed,
    }


def _spread(least: float, most: float, n: int) -> str:
    return "" if n < 2 else f"{number(least)} to {number(most)}"


COLUMNS = (
    Column("", "name"),
    Column("median", ("n", "value", "unit"), lambda _, value, unit: f"{number(value)} {unit}".rstrip()),
    Column("least to most", ("least", "most", "n"), _spread),
    Column("n", "n"),
    Column("target", "target"),
    Column("", "met", lambda met: "met" if met else "MISSED"),
)


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nIt is a part of another command: python -m benchmarks.gpu --help")
