"""What a search tells people: the table of the best, why none was written, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nkat.host.console import counted, format_table
from nkat.host.tools import suggest
from nkat.measure.divergence import divergence_cells
from nkat.measure.perplexity import change_text, perplexity_text
from nkat.search.objective import GUARD
from nkat.search.options import SearchOptions
from nkat.study import workers
from nkat.theta.optimal import gamma_text

_LETTERS = "abcdefghijklmnopqrstuvwxyz"  # for the guard's texts in the table


def print_fit(fit: Mapping[str, Any]) -> None:
    """How the Θ that the trials cut was learned."""
    settings = fit["settings"]
    print(
        f"\nΘ of rank {settings['rank']} was learned in {fit['steps']} steps at a learning rate of up to "
        f"{settings['learning_rate']:g}, and is kept in {fit['file']}"
    )


def why_none(record: Mapping[str, Any], tried: bool) -> str:
    """Why there is no best, after "because". tried: whether any trial had a Θ"""
    held_out = record["held_out"]
    if not tried:
        return "no Θ was tried, only the model without it"
    if any(row["tpe"] > held_out["base"]["tpe"] for row in held_out["best"]):
        return "the best of the trials does not beat the model without it"
    if turned := record["turned_away"]:
        better = "1 trial was" if turned == 1 else f"{turned} trials were"
        return (
            f"no Θ that the guard admits beats the model without it ({better} better at home; --no-guard takes those)"
        )
    return (
        "no Θ beats the model without it" if held_out["best"] else "no trial was measured to its end within the limits"
    )


def print_report(record: Mapping[str, Any], won: bool, tried: bool) -> None:
    """What came out, for people. tried: whether any trial had a Θ"""
    held_out = record["held_out"]
    print(f"\nheld-out: {counted(record['held_out_chunks'], 'chunk')} of {record['text']} that no trial saw\n")
    rows = [held_out["base"], *held_out["best"]]
    names = list(dict.fromkeys(price["text"] for row in rows for price in row.get(GUARD, {}).get("prices", ())))
    cells = [[_name(row), str(row.get("trial", "")), *_cells(row), *_prices(row, names)] for row in rows]
    header = ["setting", "trial", "perplexity", "change %", "TPE", "KL divergence", "same top %"]
    print(format_table(cells, [*header, *(f"({letter}) %" for letter in _LETTERS[: len(names)])]))
    if names:
        print_prices(record, names)
    print(f"\n{workers.counts_line(record)}")
    if won:
        best = record["optimal"]
        row, base = best["held_out"], held_out["base"]
        print(
            f"best: {best['file']} (trial {best['trial']}), TPE {row['tpe']:.6f} against {base['tpe']:.6f} without Θ "
            f"({100 * (row['tpe'] / base['tpe'] - 1):+.2f} %); perplexity "
            f"{change_text(row['change_percent'], row['change_percent_stderr'])}"
        )
        print(f"the same file is {best['same_file']}")
    elif not tried:
        print(why_none(record, tried))
    else:
        written = " (written all the same: --force)" if record["optimal"] else ": none was written"
        print(why_none(record, tried) + written)
    if ahead := [str(row["trial"]) for row in held_out["best"][1:] if row["tpe"] > held_out["best"][0]["tpe"]]:
        which = f"trial {ahead[0]} comes" if len(ahead) == 1 else f"trials {' and '.join(ahead)} come"
        print(
            f"on the held-out text {which} out ahead of trial {held_out['best'][0]['trial']}; the trials' own chunks "
            "alone decide, because a choice made on the held-out text would be flattered by it"
        )


def print_prices(record: Mapping[str, Any], names: list[str]) -> None:
    """What the letters of the table stand for, and what the guard turned away."""
    print("\nchange of perplexity, %, on what a Θ may not make worse:")
    for letter, name in zip(_LETTERS, names, strict=False):
        print(f"  ({letter}) {name}")
    limit = max(row[GUARD]["limit_percent"] for row in record["held_out"]["best"] if GUARD in row)
    turned = record["turned_away"]
    of_these = "no trial that was better at home breaks that"
    if turned:
        were, breaks = ("was", "breaks") if turned == 1 else ("were", "break")
        of_these = f"{counted(turned, 'trial')} that {were} better at home {breaks} that"
    print(f"the guard admits what is worse there by {limit:g} % at most, beyond doubt; {of_these}")


def print_interrupted(record: dict[str, Any], base: Mapping[str, Any] | None, best: Mapping[str, Any] | None) -> None:
    """What the trials found so far, for people; base, best: their rows of the history."""
    print(f"\ninterrupted: {workers.counts_line(record)}")
    if best is None:
        print("no Θ was measured to its end yet" + ("" if base is None else ", only the model without it was"))
        return
    beside = "" if base is None else f" against {base['tpe']:.6f} without Θ"
    print(
        f"best so far: trial {best['number']}, {_name(best)}: TPE {best['tpe']:.6f}{beside} on the "
        f"{counted(record['chunks'], 'chunk')} that trials see; not judged on held-out text, so nothing was made of it"
    )


def suggest_next(options: SearchOptions, record: Mapping[str, Any], won: bool) -> None:
    """What a user would do with what was found."""
    if record["held_out"] is None:  # interrupted: the way on is said there
        return
    if won:
        suggest("engine", "--model", record["optimal"]["file"], "--compare")
    elif options.study.mode != "full":
        learn = ["--calibrate", options.calibrate] if options.learns else []
        suggest("optimize", "--model", options.model, "--mode", "full", *learn, "--output-dir", "output/full")
    elif not options.learns:
        words = ("--model", options.model, "--mode", "quick", "--calibrate", "TEXT", "--output-dir", "output/learned")
        suggest("optimize", *words, why="a Θ that learns from a text")
    else:
        suggest("engine", "--model", options.model, "--perplexity", why="the model as it is")


def _name(row: Mapping[str, Any]) -> str:
    if "setting" not in row:
        return "without Θ"
    setting = row["setting"]
    decay = ", decay" if setting["depth_decay"] else ""
    return f"rank {setting['rank']}, gamma {gamma_text(setting['gamma'])}, {setting['layers']}{decay}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    change = change_text(row["change_percent"], row["change_percent_stderr"], "") if "setting" in row else ""
    figures = [perplexity_text(row["perplexity"], row["perplexity_stderr"]), change, f"{row['tpe']:.6f}"]
    return [*figures, *divergence_cells(row.get("divergence"))]


def _prices(row: Mapping[str, Any], names: list[str]) -> list[str]:
    prices = {price["text"]: price for price in row.get(GUARD, {}).get("prices", ())}
    found = [prices.get(name) for name in names]
    return ["" if p is None else change_text(p["change_percent"], p["change_percent_stderr"], "") for p in found]
