"""Picks the backend for a program and runs a model with its Θ in it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nkat.host.console import note, say
from nkat.host.files import check_apart, check_output
from nkat.host.programs import shell_line
from nkat.host.record import Recorder, check_record
from nkat.host.tables import show
from nkat.host.tools import suggest
from nkat.hub.fetch import local_model
from nkat.kobold.benchmark import fastest
from nkat.kobold.choose import Choice
from nkat.kobold.command import check_extra, command_of
from nkat.kobold.compare import as_run, measure_choices, speed_table
from nkat.kobold.config import remember_fastest
from nkat.kobold.describe import print_findings, print_layers, print_served, warn_of_strangers
from nkat.kobold.find import find_program
from nkat.kobold.findings import Findings, Model, gather_findings, pick_choice
from nkat.kobold.launch import launch
from nkat.kobold.machine import Machine, look_at_machine
from nkat.kobold.menu import ask_backend, ask_model, models_here
from nkat.kobold.options import AUTO, KoboldOptions, parse_arguments
from nkat.kobold.program import Program
from nkat.kobold.several import command_for, served_models


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a session leaves.

    record: for --json; None when stdout had it already
    status: to end with
    """

    record: dict[str, Any] | None
    status: int = 0


def main() -> None:
    options = parse_arguments(sys.argv[1:])
    runtime = options.runtime
    check_extra(options.extra, runtime.own_flags)
    check_apart({"--save-config": options.save_config, "--json": options.json})
    inputs = [options.model, *(theta.path for theta in options.thetas), options.base, options.draftmodel]
    check_record(options.json, options.force, inputs)
    if options.save_config is not None:
        check_output(options.save_config, options.force)  # before a benchmark of minutes
    program = runtime.probe(find_program(runtime.sought, options.program), True)
    model, base, draft = (local_model(path) for path in (options.model, options.base, options.draftmodel))
    options = replace(options, model=model, base=base, draftmodel=draft)
    recorder = Recorder(options.json, options.force)
    if options.folder is not None:
        outcome = run_several(options, program, look_at_machine(), recorder)
    else:
        interactive = options.action is None and options.backend == AUTO and sys.stdin.isatty() and sys.stdout.isatty()
        model = options.model
        if model is None and options.action is None:
            model = default_model(interactive)
        findings = gather_findings(options, model, program, look_at_machine())
        outcome = run_session(options, findings, interactive, recorder)
    if outcome.record is not None:
        recorder.finish(outcome.record)
    if outcome.status:
        sys.exit(outcome.status)


def default_model(interactive: bool) -> Path | None:
    """The newest model in the usual folders, or the one picked from a menu; None when there is none."""
    found = models_here()
    if interactive and len(found) > 1:
        picked = ask_model(found)
        if picked is None:
            sys.exit(0)
        print()
        return picked
    if found:
        note(f"model: {found[0]}" + (f", the newest of {len(found)}; --model FILE names another" if found[1:] else ""))
    return found[0] if found else None


def run_session(options: KoboldOptions, findings: Findings, interactive: bool, recorder: Recorder) -> Outcome:
    """Says what was found, and does with it what was asked for, or picked from the menu."""
    record = findings.record()
    recorder.keep(record)
    print_findings(findings)
    if findings.model is None:
        if options.action is None:
            note("no .nkat or .gguf here; name a model with --model FILE")
        return Outcome(record)
    if options.action == "list":
        suggest("kobold", *(["--model", options.model] if options.model else []), "--launch")
        return Outcome(record)
    if options.action == "benchmark":
        return Outcome(run_benchmark(options, findings, findings.model, recorder))
    how_to_get = options.runtime.sought.how_to_get()
    choice = ask_backend(findings.choices, how_to_get) if interactive else pick_choice(findings, options.backend)
    if choice is None:
        return Outcome(record)
    return run_choice(options, findings, findings.model, choice, interactive or options.action == "launch", recorder)


def run_choice(
    options: KoboldOptions, findings: Findings, model: Model, choice: Choice, start: bool, recorder: Recorder
) -> Outcome:
    """Launches the program with this choice, or prints the command that would."""
    program = findings.program
    print_layers(choice, model.memory, findings.machine, options)
    warn_of_strangers(options)
    values = options.runtime.settings_of(program, choice, model.files, findings.settings)
    if options.save_config is not None:
        save_config(options, findings, options.save_config, values)
    command = command_of(program, values, options.extra)
    record = findings.record()
    chosen = record | {"chosen": choice.record(), "config": values, "command": command}
    return run_command(options, program, choice, len(model.files.adapters), command, (record, chosen), start, recorder)


def run_several(options: KoboldOptions, program: Program, machine: Machine, recorder: Recorder) -> Outcome:
    """Launches the program with all models of a folder, or prints the command that would."""
    served = served_models(options, program, machine)
    print_served(served)
    warn_of_strangers(options)
    command = command_for(options, program, machine, served)
    record = {"runtime": options.runtime.name, "served": {one.name: dict(one.values) for one in served}}
    chosen = record | {"command": command}
    first = served[0]
    start = options.action == "launch"
    return run_command(
        options, program, first.choice, len(first.files.adapters), command, (record, chosen), start, recorder
    )


def run_command(
    options: KoboldOptions,
    program: Program,
    choice: Choice,
    adapters: int,
    command: list[str],
    records: tuple[Mapping[str, Any], dict[str, Any]],
    start: bool,
    recorder: Recorder,
) -> Outcome:
    """Launches this command, or prints it.

    records: what was found; the same with what was chosen
    """
    found, chosen = records
    recorder.keep(chosen)
    if not start:
        if options.action is None:
            note("add --launch to start it, or paste this:")
        print(shell_line(command))
        return Outcome(chosen)

    def on_ready(told: dict[str, Any]) -> None:  # now, not when the user has closed it
        ready = dict(found) | {"command": command} | told
        recorder.keep(ready)
        recorder.finish(ready)

    ended = launch(command, choice, program, adapters, options, on_ready)
    return Outcome(None if ended.was_ready else chosen, ended.status)


def run_benchmark(options: KoboldOptions, findings: Findings, model: Model, recorder: Recorder) -> dict[str, Any]:
    """Every usable backend and split, with and without the adapter; the fastest with it becomes the default."""
    runtime, program, settings = options.runtime, findings.program, findings.settings
    usable = [choice for choice in findings.choices if choice.lacks is None]
    wanted = [choice for choice in usable if options.backend in (AUTO, choice.backend.name)]
    wanted = wanted or [pick_choice(findings, options.backend)]
    measured = measure_choices(runtime, wanted, model.files, program, settings, options.extra, options.timeout)
    choice, speed = fastest(as_run(measured))
    values = runtime.settings_of(program, choice, model.files, settings)
    path = remember_fastest(runtime, program, model.files, settings, choice, speed, values)
    records = [item.record() for item in measured]
    found = {"benchmark": records, "fastest": choice.record(), "default_config": path and str(path)}
    recorder.keep(findings.record() | found)
    show(speed_table(measured, conditions_of(findings, model)))
    kept = "" if path is None else f", now this model's default at --contextsize {speed.context}"
    say(f"\nfastest: {choice.backend.name}{kept}")
    if path is not None:
        say(f"load it with: {shell_line(runtime.loading(program, path, settings, ()))}")
    if options.save_config is not None:
        save_config(options, findings, options.save_config, values)
    return findings.record() | found


def conditions_of(findings: Findings, model: Model) -> dict[str, Any]:
    """What holds of all the runs of a benchmark, for programs."""
    files, program = model.files, findings.program
    thetas = "; ".join(adapter.about for adapter in files.adapters) or None
    where = {"program": program.title, "version": program.version, "threads": findings.settings.threads}
    return {"model": str(files.model), "theta": thetas, **where}


def save_config(options: KoboldOptions, findings: Findings, path: Path, values: Mapping[str, Any]) -> None:
    """Writes the settings to the program's own file, with the user's own flags among them where it can hold them."""
    runtime, program = options.runtime, findings.program
    runtime.write(program, path, values, options.extra, options.force)
    note(f"wrote {path}; load it with: {shell_line(runtime.loading(program, path, findings.settings, options.extra))}")
