"""Picks the backend for KoboldCpp and runs a model with its Θ in it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.host.console import note, say
from nkat.host.files import check_apart, check_output
from nkat.host.programs import shell_line
from nkat.host.record import Recorder, check_record
from nkat.host.tables import show
from nkat.host.tools import suggest
from nkat.kobold.benchmark import fastest
from nkat.kobold.choose import Choice, advice
from nkat.kobold.command import Settings, check_extra, kobold_command, kobold_settings
from nkat.kobold.compare import as_run, measure_choices, speed_table
from nkat.kobold.config import config_with_extra, remember_fastest, write_config
from nkat.kobold.describe import print_findings, print_layers
from nkat.kobold.find import Kobold, find_kobold, probe_kobold
from nkat.kobold.findings import Findings, Model, gather_findings
from nkat.kobold.launch import launch_kobold
from nkat.kobold.machine import look_at_machine
from nkat.kobold.menu import ask_backend, ask_model, check_usable, models_here
from nkat.kobold.options import AUTO, KoboldOptions, parse_arguments


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
    check_extra(options.extra)
    check_apart({"--save-config": options.save_config, "--json": options.json})
    inputs = [options.model, options.theta, options.base]
    check_record(options.json, options.force, inputs)
    if options.save_config is not None:
        check_output(options.save_config, options.force)  # before a benchmark of minutes
    interactive = options.action is None and options.backend == AUTO and sys.stdin.isatty() and sys.stdout.isatty()
    kobold = probe_kobold(find_kobold(options.kobold))
    model = options.model
    if model is None and options.action is None:
        model = default_model(interactive)
    findings = gather_findings(options, model, kobold, look_at_machine())
    recorder = Recorder(options.json, options.force)
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
    choice = ask_backend(findings.choices) if interactive else pick_choice(findings, options.backend)
    if choice is None:
        return Outcome(record)
    launch = interactive or options.action == "launch"
    return run_choice(options, findings, findings.model, choice, launch, recorder)


def run_choice(
    options: KoboldOptions, findings: Findings, model: Model, choice: Choice, launch: bool, recorder: Recorder
) -> Outcome:
    """Launches KoboldCpp with this choice, or prints the command that would."""
    kobold = findings.kobold
    print_layers(choice, model.memory, findings.machine, options)
    values = kobold_settings(kobold, choice, model.files, settings_from(options, findings))
    words = kobold_command(kobold, values, options.extra)
    if options.save_config is not None:
        save_config(options.save_config, values, words, kobold, options)
    record = findings.record()
    chosen = record | {"chosen": choice.record(), "config": values, "command": words}
    recorder.keep(chosen)
    if not launch:
        if options.action is None:
            note("add --launch to start it, or paste this:")
        print(shell_line(words))
        return Outcome(chosen)

    def on_ready(found: dict[str, Any]) -> None:  # now, not when the user has closed it
        ready = record | {"command": words} | found
        recorder.keep(ready)
        recorder.finish(ready)

    ended = launch_kobold(words, choice, kobold, model.files.lora is not None, options, on_ready)
    return Outcome(None if ended.was_ready else chosen, ended.status)


def pick_choice(findings: Findings, asked: str) -> Choice:
    """The best one, or the one asked for by its name. Raises NKATError when that cannot be."""
    if asked == AUTO:
        check_usable(findings.choices)
        return findings.choices[0]
    choice = next(choice for choice in findings.choices if choice.backend.name == asked)
    if choice.lacks == "program":
        hint = advice(choice, findings.kobold) if choice.libraries else "see --list"
        raise NKATError(f"--backend {asked}: {choice.reason}; {hint}")
    if choice.lacks == "device":
        note(f"warning: {asked}: {choice.reason}; trying it because you asked for it")
    if choice.layers is None:
        raise NKATError(f"--backend {asked}: how many layers fit cannot be told ({choice.reason}); give --gpulayers N")
    return choice


def run_benchmark(options: KoboldOptions, findings: Findings, model: Model, recorder: Recorder) -> dict[str, Any]:
    """Every usable backend and split, with and without the adapter; the fastest with it becomes the default."""
    kobold, settings = findings.kobold, settings_from(options, findings)
    usable = [choice for choice in findings.choices if choice.lacks is None]
    wanted = [choice for choice in usable if options.backend in (AUTO, choice.backend.name)]
    wanted = wanted or [pick_choice(findings, options.backend)]
    measured = measure_choices(wanted, model.files, kobold, settings, options.extra, options.timeout)
    choice, speed = fastest(as_run(measured))
    values = kobold_settings(kobold, choice, model.files, settings)
    path = remember_fastest(kobold, model.files, choice, speed, values)
    records = [item.record() for item in measured]
    found = {"benchmark": records, "fastest": choice.record(), "default_config": path and str(path)}
    recorder.keep(findings.record() | found)
    show(speed_table(measured, conditions_of(findings, model)))
    kept = "" if path is None else f", now this model's default at --contextsize {speed.context}"
    say(f"\nfastest: {choice.backend.name}{kept}")
    if path is not None:
        say(f"load it with: {config_line(kobold, path)}")
    if options.save_config is not None:
        save_config(options.save_config, values, kobold_command(kobold, values, options.extra), kobold, options)
    return findings.record() | found


def conditions_of(findings: Findings, model: Model) -> dict[str, Any]:
    """What holds of all the runs of a benchmark, for programs."""
    files, kobold = model.files, findings.kobold
    theta = {"theta_rank": files.rank, "theta_gamma": files.gamma} if files.lora else {}
    return {"model": str(files.model), **theta, "koboldcpp": kobold.version, "threads": findings.machine.cores}


def settings_from(options: KoboldOptions, findings: Findings) -> Settings:
    """KoboldCpp's settings that do not depend on the backend."""
    return Settings(options.contextsize, options.threads or findings.machine.cores, options.host, options.port)


def save_config(
    path: Path, values: dict[str, Any], command: Sequence[str], kobold: Kobold, options: KoboldOptions
) -> None:
    """Writes the settings to a `.kcpps`, with the user's own flags among them."""
    if options.extra:
        values = config_with_extra(kobold, command)
    write_config(path, values, options.force)
    note(f"wrote {path}; load it with: {config_line(kobold, path)}")


def config_line(kobold: Kobold, path: Path) -> str:
    """The command that runs KoboldCpp with the settings of a file."""
    return shell_line([*kobold.prefix(), "--config", str(path)])
