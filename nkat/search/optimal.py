"""What a search leaves of its best: a model and its description, under a name that says what it is and under one that
is always the same; and the command that makes the model again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from nkat.gguf.writer import FileRange, sha256_of_parts, write_gguf
from nkat.host import console, hardware
from nkat.host.console import note
from nkat.host.files import note_output, sync_folder
from nkat.host.page import machine_facts
from nkat.host.programs import shell_line
from nkat.host.record import toolkit_version, write_json
from nkat.host.tools import tool_command
from nkat.measure.gains import gain_table
from nkat.measure.guard import prices_table
from nkat.search.objective import GUARD, Setting, patterns_of
from nkat.search.options import SearchOptions
from nkat.search.prepare import Prepared
from nkat.theta.card import CARD, Card, may_write, write_card
from nkat.theta.modelfile import embedded_parts
from nkat.theta.optimal import MODEL, RECORD, optimal_name
from nkat.theta.set import ThetaSet


def write_optimal(
    options: SearchOptions, prepared: Prepared, chosen: ThetaSet, judged: Mapping[str, Any], won: bool
) -> dict[str, Any]:
    """Writes the best Θ and its description. judged: its row of the held-out record"""
    setting = Setting(**judged["setting"])
    folder = options.study.output_dir
    path = folder / optimal_name(setting.rank, setting.gamma)
    model = prepared.loaded.file
    write_gguf(path, embedded_parts(chosen, model.require_base()), force=True, inputs=model.files)
    record = {
        "file": str(path),
        "sha256": sha256_of_parts([FileRange(path, 0, path.stat().st_size)]),
        "same_file": str(folder / MODEL),
        "beats_base": won,
        "trial": judged["trial"],
        "setting": setting.parameters(),
        "held_out": {name: value for name, value in judged.items() if name != "trial"},
        "model": str(options.model),
        **prepared.described,
        "metadata": chosen.metadata(),
        "fit": prepared.fit,
        "command": converter_command(options, prepared, setting, path),
    }
    write_json(record, str(path.with_suffix(".json")), force=True)
    write_same(path, folder / MODEL, model.files)
    write_json(record, str(folder / RECORD), force=True)
    _write_card(options, prepared, chosen, record)
    return record


def _write_card(options: SearchOptions, prepared: Prepared, chosen: ThetaSet, record: Mapping[str, Any]) -> None:
    """The page beside the best, where no other one of that name is in the folder."""
    page = options.study.output_dir / CARD
    if not may_write(page):
        note(f"note: {page} is not a page of this toolkit's, so it stays, and none is written about {record['file']}")
        return
    held_out = record["held_out"]
    commands = {"It is made again by:": record["command"]}
    machine = {"machine": hardware.describe(torch.device("cpu")), "versions": {}, **toolkit_version()}
    card = Card(
        theta=chosen,
        base=prepared.loaded.file.require_base().file.metadata,
        gamma=chosen.gamma,
        files={
            MODEL: "the base model with Θ in it",
            Path(record["file"]).name: "the same under a name that says which",
        },
        text=None if options.calibrate is None else options.calibrate.name,
        gains=[gain_table(held_out, record["text"])],
        prices=[prices_table(held_out[GUARD])] if GUARD in held_out else [],
        commands=commands,
        facts=machine_facts(machine),
    )
    write_card(page, card, force=True)


def write_none(options: SearchOptions, prepared: Prepared, why: str) -> None:
    """The record that there is no best: `optimal.nkat` of an earlier report is not the best any more, so it goes."""
    folder = options.study.output_dir
    (folder / MODEL).unlink(missing_ok=True)
    if may_write(folder / CARD):  # of an earlier best
        (folder / CARD).unlink(missing_ok=True)
    record = {"file": None, "why_none": why, "model": str(options.model), **prepared.described, "fit": prepared.fit}
    write_json(record, str(folder / RECORD), force=True)


def write_same(path: Path, target: Path, inputs: list[Path]) -> None:
    """The same file under a second name, in place of what was there: a link, which takes no room, or else a copy."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()
        os.link(path, temporary)
        temporary.replace(target)  # nothing, where both are one file already
        temporary.unlink(missing_ok=True)
        sync_folder(target.parent)
        note_output(target)
    except OSError:  # a file system without links
        size = path.stat().st_size
        with console.bar(size, f"copying to {target.name}", "B") as bar:
            write_gguf(target, [FileRange(path, 0, size)], True, inputs, bar.update)


def converter_command(options: SearchOptions, prepared: Prepared, setting: Setting, path: Path) -> str:
    """The command that makes the same file again, in its place, from whatever folder it is run in.

    Of a learned Θ it is two: the fit, which may be left out while its file is there, and the part of it.
    """
    words: list[object] = [*tool_command("convert")]
    words += ["--input", options.model.absolute(), "--output", path.absolute(), "--force"]
    if prepared.fit is not None:
        words += ["--theta", Path(prepared.fit["file"]).absolute(), "--truncate-rank", setting.rank]
        words += ["--theta-gamma", f"{setting.gamma:g}"]
    else:
        words += ["--theta-rank", setting.rank, "--theta-gamma", f"{setting.gamma:g}", "--seed", options.study.seed]
        words += ["--threads", torch.get_num_threads()]  # sums of another number of threads may round otherwise
    if setting.layers != "both":
        words += ["--selective-layers", *patterns_of(setting.layers, prepared.theta_set.layers)]
    if setting.depth_decay:
        words.append("--depth-decay")
    if options.theta_source == "residual" and options.reference is not None:
        words += ["--theta-source", "residual", "--reference", options.reference.absolute()]
        words += ["--calibrate", options.calibrate.absolute()] if options.calibrate else []
    line = shell_line(words)
    return line if prepared.fit is None else f"{prepared.fit['command']} && {line}"
