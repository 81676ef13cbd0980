"""What a search over the image model tells people: tables, lines, and the report as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nkat.host.console import counted, say
from nkat.host.page import Page, machine_facts
from nkat.host.tables import Column, Table, show
from nkat.study import workers
from nkat_vit.evaluate import stage2_table
from nkat_vit.metrics import LAMBDA_OF_BASELINE, TARGETS, accuracy_needed
from nkat_vit.search import BASELINE, FIRST_SET, in_range

Record = Mapping[str, Any]
_HOW = ("mode", "seed", "sampler", "pruner", "search_seconds", "study", "local_tpe")


def shapes_table(record: Record) -> Table:
    """The best shapes and the baseline, on pictures that no trial was trained on."""
    best, baseline = record["best"], record["baseline"]
    rows = []
    for row in [*best, *([baseline] if baseline and baseline not in best else [])]:
        accuracies = {f"accuracy_{name}": value for name, value in row["accuracies"].items()}
        rows.append({**row, **row["setting"], **accuracies, "name": _name(row["setting"])})
    columns = [
        Column("setting", ("name", *BASELINE), lambda name, *_: name),
        Column("trial", "trial"),
        Column("epochs", "epochs"),
        *(
            Column(f"{name} %", f"accuracy_{name}", lambda share: f"{100 * share:.2f}")
            for name in (record["sets"] if record["passed"] else [FIRST_SET])
        ),
        Column("Local TPE", "local_tpe", ".4f"),
        Column("Global TPE", "global_tpe", ".4f"),
    ]
    return Table("shapes", columns, rows, "\non pictures held out of the training sets:")


def tested_table(record: Record) -> Table | None:
    """The winner on the test sets; None where none was judged there."""
    optimal = record["optimal"]
    if not optimal or "test" not in optimal:
        return None
    test = optimal["test"]
    caption = f"\ntrial {optimal['trial']} on the test sets, {counted(test['seeds'], 'seed')}, touched this once:"
    return stage2_table(test["table"], test["lambda_theory"], caption)


def what_came_out(record: Record) -> list[str]:
    """Lines on the trials."""
    gate, best = record["local_tpe"], record["best"]
    floors = ", ".join(f"{100 * floor:.0f} % on {name}" for name, floor in record["accuracy"].items())
    takes, asked = 100 * accuracy_needed(gate, LAMBDA_OF_BASELINE), TARGETS[FIRST_SET].tpe
    lines = [
        f"{'interrupted: ' if record['interrupted'] else ''}{workers.counts_line(record)}",
        f"{record['passed']} reached the gate, Local TPE {gate:g} on {FIRST_SET}, with an accuracy of {floors}",
        f"(at the baseline's size Local TPE {gate:g} takes {takes:.1f} %; STAGE2's target there is {asked:g})",
    ]
    for row in best:
        accuracy = row["accuracies"][FIRST_SET]
        if row["local_tpe"] >= gate and accuracy < record["accuracy"][FIRST_SET]:
            lines.append(
                f"trial {row['trial']}: Local TPE {row['local_tpe']:.4f} is bought by size alone, "
                f"with {100 * accuracy:.2f} % on {FIRST_SET}"
            )
    if not record["passed"] and best:
        top = best[0]
        short = [f"{name} by {by:.4f}" for name, by in top["constraints"].items() if by > 0]
        lines.append(
            f"the best, trial {top['trial']}, has Local TPE {top['local_tpe']:.4f} after {top['epochs']} epochs and is "
            f"short of {', '.join(short)}; more epochs or pictures, or lower --local-tpe and --accuracy, let some pass"
        )
    return lines


def print_report(record: Record) -> None:
    """What came out, for people."""
    optimal = record["optimal"]
    show(shapes_table(record))
    say("\n" + "\n".join(what_came_out(record)))
    if (tested := tested_table(record)) is not None:
        show(tested)
        say("\n" + "\n".join(optimal["test"]["remarks"]))
    if optimal:
        say(f"\nits settings: {optimal['file']}; train it with\n  {optimal['command']}")


def search_page(record: Record, title: str, command: str, picture: Path) -> Page:
    """command: that ran the search;  picture: of it, as PNG"""
    tested, optimal = tested_table(record), record["optimal"]
    commands = {"This search:": command}
    if optimal:
        commands["The winner, trained anew:"] = optimal["command"]
    return Page(
        title=title,
        summary=[*what_came_out(record), *(optimal["test"]["remarks"] if tested else [])],
        tables=[shapes_table(record), *([tested] if tested else [])],
        pictures={"Scores with the gate, parameters by score, what decides, accuracy against size": picture},
        commands=commands,
        facts={
            "Data": {FIRST_SET: f"sha256 {record['data_sha256']}"},
            "How": {name.replace("_", " "): record[name] for name in _HOW if record.get(name) is not None},
            "Machine and versions": machine_facts(record),
        },
    )


def _name(setting: Mapping[str, Any]) -> str:
    shape = f"{setting['conv_stem']}, patch {setting['patch_size']}, {setting['embed_dim']} x {setting['depth']}"
    shape += "" if in_range(setting["conv_stem"]) else " (outside STAGE2's range)"
    sharpness = f"temperature {setting['temperature']:g}, top-p {setting['top_p']:g}"
    return f"{shape}, {sharpness}" + (" (baseline)" if setting == BASELINE else "")
