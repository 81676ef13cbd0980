"""What a search tells people: the table of the best, why none was written, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nkat.host.console import counted, say
from nkat.host.tables import Column, Table, show
from nkat.host.tools import suggest
from nkat.measure.columns import CHANGE_PERCENT, KL, PERPLEXITY, SAME_TOP, TPE
from nkat.measure.divergence import divergence_row
from nkat.measure.perplexity import change_text
from nkat.search.objective import GUARD
from nkat.search.options import SearchOptions
from nkat.study import workers
from nkat.theta.optimal import gamma_text

_GUARD_KEYS = "change_percent", "change_percent_stderr", "bound_percent", "text"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"  # for the guard's texts in the table


def print_fit(fit: Mapping[str, Any]) -> None:
    """How the Θ that the trials cut was learned."""
    settings = fit["settings"]
    say(
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


def print_report(record: Mapping[str, Any], words: list[str]) -> None:
    """What came out, for people. words: of `what_came_out`"""
    show(held_out_table(record))
    names = guard_names(record)
    if names:
        print_prices(record, names)
    say("\n" + "\n".join(words))


def what_came_out(record: Mapping[str, Any], won: bool, tried: bool) -> list[str]:
    """Lines. tried: whether any trial had a Θ"""
    held_out = record["held_out"]
    lines = [workers.counts_line(record)]
    if won:
        best = record["optimal"]
        row, base = best["held_out"], held_out["base"]
        lines.append(
            f"best: {best['file']} (trial {best['trial']}), TPE {row['tpe']:.6f} against {base['tpe']:.6f} without Θ "
            f"({100 * (row['tpe'] / base['tpe'] - 1):+.2f} %); perplexity "
            f"{change_text(row['change_percent'], row['change_percent_stderr'])}"
        )
        lines.append(f"the same file is {best['same_file']}")
    elif not tried:
        lines.append(why_none(record, tried))
    else:
        written = " (written all the same: --force)" if record["optimal"] else ": none was written"
        lines.append(why_none(record, tried) + written)
    if edge := about_edge(record):
        lines.append(edge)
    if ahead := [str(row["trial"]) for row in held_out["best"][1:] if row["tpe"] > held_out["best"][0]["tpe"]]:
        which = f"trial {ahead[0]} comes" if len(ahead) == 1 else f"trials {' and '.join(ahead)} come"
        lines.append(
            f"on the held-out text {which} out ahead of trial {held_out['best'][0]['trial']}; the trials' own chunks "
            "alone decide, because a choice made on the held-out text would be flattered by it"
        )
    return lines


def print_prices(record: Mapping[str, Any], names: list[str]) -> None:
    """What the letters of the table stand for, and what the guard turned away."""
    lines = ["\nchange of perplexity, %, on what a Θ may not make worse:"]
    lines += [f"  ({letter}) {name}" for letter, name in zip(_LETTERS, names, strict=False)]
    limit = max(row[GUARD]["limit_percent"] for row in record["held_out"]["best"] if GUARD in row)
    turned = record["turned_away"]
    of_these = "no trial that was better at home breaks that"
    if turned:
        were, breaks = ("was", "breaks") if turned == 1 else ("were", "break")
        of_these = f"{counted(turned, 'trial')} that {were} better at home {breaks} that"
    lines.append(f"the guard admits what is worse there by {limit:g} % at most, beyond doubt; {of_these}")
    say("\n".join(lines))


def print_interrupted(record: dict[str, Any], base: Mapping[str, Any] | None, best: Mapping[str, Any] | None) -> None:
    """What the trials found so far, for people; base, best: their rows of the history."""
    say(f"\ninterrupted: {workers.counts_line(record)}")
    if best is None:
        say("no Θ was measured to its end yet" + ("" if base is None else ", only the model without it was"))
        return
    beside = "" if base is None else f" against {base['tpe']:.6f} without Θ"
    say(
        f"best so far: trial {best['number']}, {name_of(best)}: TPE {best['tpe']:.6f}{beside} on the "
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


def name_of(row: Mapping[str, Any]) -> str:
    """A row's setting, for people."""
    if "setting" not in row:
        return "without Θ"
    setting = row["setting"]
    decay = ", decay" if setting["depth_decay"] else ""
    return f"rank {setting['rank']}, gamma {gamma_text(setting['gamma'])}, {setting['layers']}{decay}"


def guard_names(record: Mapping[str, Any]) -> list[str]:
    """Of the guard's texts, in the order of their letters."""
    rows = [record["held_out"]["base"], *record["held_out"]["best"]]
    return list(dict.fromkeys(price["text"] for row in rows for price in row.get(GUARD, {}).get("prices", ())))


def held_out_table(record: Mapping[str, Any]) -> Table:
    """The model without Θ and the best settings on text that no trial saw, with what they cost on the guard's texts."""
    held_out, names = record["held_out"], guard_names(record)
    rows = []
    for row in (held_out["base"], *held_out["best"]):
        setting = row.get("setting", {})
        values = {**{key: value for key, value in row.items() if key not in (GUARD, "divergence")}, **setting}
        values |= divergence_row(row["divergence"]) if row.get("divergence") else {}
        prices = {price["text"]: price for price in row.get(GUARD, {}).get("prices", ())}
        for letter, name in zip(_LETTERS, names, strict=False):
            values |= {f"guard_{letter}_{key}": value for key, value in prices.get(name, {}).items()}
        if not setting:  # the model without Θ is what others change
            values |= dict.fromkeys(CHANGE_PERCENT.names)
        rows.append({**values, "name": name_of(row)})
    guard = [
        Column(
            f"({letter}) %",
            tuple(f"guard_{letter}_{key}" for key in _GUARD_KEYS),
            lambda percent, error, *_: change_text(percent, error, ""),
        )
        for letter, _ in zip(_LETTERS, names, strict=False)
    ]
    columns = [
        Column("setting", ("name", "rank", "gamma", "layers", "depth_decay"), lambda name, *_: name),
        Column("trial", "trial"),
        PERPLEXITY,
        CHANGE_PERCENT,
        replace(TPE, keys=("tpe", "byte_ratio", "theta_bytes"), show=lambda tpe, *_: f"{tpe:.6f}"),
        KL,
        SAME_TOP,
        *guard,
    ]
    caption = f"\nheld-out: {counted(record['held_out_chunks'], 'chunk')} of {record['text']} that no trial saw"
    conditions = {key: record[key] for key in ("model", "model_sha256", "text", "text_sha256", "held_out_chunks")}
    return Table("held-out", columns, rows, caption, {**conditions, "nkat_version": record["nkat_version"]})


def about_edge(record: Mapping[str, Any]) -> str:
    """What is to be said where the best γ is at an end of the range that was searched; "" elsewhere."""
    edge = record["gamma_edge"]
    if edge is None:
        return ""
    low, high = record["gamma_range"]
    gamma, way = (low, "stronger") if edge == "lowest" else (high, "weaker")
    return (
        f"γ {gamma_text(gamma)} is the {edge} that was searched ({gamma_text(low)} to {gamma_text(high)}): a {way} Θ "
        "may be better still; --target-gamma tries one"
    )
