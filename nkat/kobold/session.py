"""Picks the backend for KoboldCpp and runs a model with its Θ in it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nkat.errors import NKATError
from nkat.host import commandline
from nkat.host.console import format_bytes, format_table, note
from nkat.host.files import check_output
from nkat.host.record import check_record, write_json
from nkat.kobold.api import base_url, check_port, is_private
from nkat.kobold.benchmark import Speed, fastest, layer_splits, measure_speed
from nkat.kobold.choose import Choice, advice, choices, memory_of, prefer
from nkat.kobold.command import Settings, check_extra, kobold_command, kobold_settings, shell_line
from nkat.kobold.config import config_with_extra, recall_fastest, remember_fastest, write_config
from nkat.kobold.files import RunFiles, prepare_files
from nkat.kobold.find import Kobold, find_kobold, probe_kobold
from nkat.kobold.layers import ModelMemory, gpu_bytes, layer_table
from nkat.kobold.machine import Machine, free_bytes, look_at_machine
from nkat.kobold.menu import ask_backend, ask_model, check_usable, choice_table, models_here
from nkat.kobold.options import parse_arguments
from nkat.kobold.process import KoboldProcess, Loaded, check_loaded, running, wait_until_ready

#!/usr/bin/env python3


def main() -> None:
    options = parse_arguments(sys.argv[1:])
    check_extra(options.extra)
    check_record(options.json, options.force)
    if options.save_config is not None:
        check_output(options.save_config, options.force)  # before a benchmark of minutes
    interactive = options.action is None and options.backend == "auto" and sys.stdin.isatty() and sys.stdout.isatty()
    kobold = probe_kobold(find_kobold(options.kobold))
    if options.model is None and options.action is None:
        options.model = default_model(interactive)
    machine = look_at_machine()
    session = Session(options, kobold, machine)
    record = session.run(interactive)
    if options.json:
        write_json(record, options.json, options.force)
    if session.status:
        sys.exit(session.status)


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


class Session:
    """One run of this script: what was found, and what is done with it."""

    def __init__(self, options: argparse.Namespace, kobold: Kobold, machine: Machine) -> None:
        self.options, self.kobold, self.machine = options, kobold, machine
        self.settings = Settings(options.contextsize, options.threads or machine.cores, options.host, options.port)
        self.files: RunFiles | None = None
        self.memory: ModelMemory | None = None
        self.status = 0
        if options.model is not None:
            self.files = prepare_files(options.model, options.theta, options.base)
            self.memory = memory_of(self.files, options.contextsize, kobold, options.extra)
        self.choices = choices(kobold, machine, self.memory, options.gpulayers)
        if self.files is not None and options.gpulayers is None:
            best = recall_fastest(kobold, self.files, options.contextsize)
            if best is not None:
                self.choices = prefer(self.choices, best.backend, best.layers, best.generation)

    def run(self, interactive: bool) -> dict[str, Any]:
        record = self.describe()
        self.print_findings()
        if self.files is None:
            if self.options.action is None:
                note("no .nkat or .gguf here; name a model with --model FILE")
            return record
        if self.options.action == "list":
            return record
        if self.options.action == "benchmark":
            return record | self.benchmark()
        choice = ask_backend(self.choices) if interactive else self.pick()
        if choice is None:
            return record
        self.print_layers(choice)
        values = self.config(choice)
        words = kobold_command(self.kobold, values, self.options.extra)
        record |= {"chosen": choice.record(), "config": values, "command": words}
        if self.options.save_config is not None:
            self.save(values, words)
        if self.options.action == "launch" or interactive:
            return record | self.launch(choice, words)
        if self.options.action is None:
            note("add --launch to start it, or paste this:")
        print(shell_line(words))
        return record

    def describe(self) -> dict[str, Any]:
        """What was found, for --json."""
        found: dict[str, Any] = {
            "kobold": {
                "path": str(self.kobold.path),
                "version": self.kobold.version,
                "libraries": None if self.kobold.libraries is None else sorted(self.kobold.libraries),
                "flags": sorted(self.kobold.flags),
            },
            "machine": {
                "features": sorted(self.machine.features),
                "cores": self.machine.cores,
                "memory": self.machine.memory,
                "available": self.machine.available,
                "gpus": [asdict(gpu) for gpu in self.machine.gpus],
            },
            "choices": [choice.record() for choice in self.choices],
        }
        if self.files is not None and self.memory is not None:
            found["files"] = {
                "asked": str(self.files.asked),
                "model": str(self.files.model),
                "how": self.files.how,
                "lora": str(self.files.lora) if self.files.lora else None,
                "rank": self.files.rank,
                "gamma": self.files.gamma,
            }
            found["memory"] = {
                "blocks": list(self.memory.blocks),
                "cache_per_block": self.memory.cache,
                "output": self.memory.output,
                "compute": self.memory.compute,
                "total": self.memory.total,
            }
        return found

    def print_findings(self) -> None:
        carried = self.kobold.libraries
        print(f"KoboldCpp  {self.kobold.version or 'of unknown version'}, {self.kobold.path}")
        print(f"libraries  {'cannot be told' if carried is None else ', '.join(sorted(carried)) or 'none'}")
        for gpu in self.machine.gpus:
            print(f"GPU        {gpu.name} ({gpu.kind}, by {gpu.source}), {_memory_text(gpu.total, gpu.free)}")
        print(f"memory     {_memory_text(self.machine.memory, self.machine.available)}")
        if self.files is not None:
            print(f"model      {self.files.model} ({self.files.how})")
            if self.files.lora is None:
                print("Θ          none: this is a plain model")
            else:
                size = format_bytes(sum(self.files.lora_bytes.values()))
                print(f"Θ          {self.files.lora} ({size}, rank {self.files.rank}, gamma {self.files.gamma:g})")
        print()
        print(choice_table(self.choices))
        print()

    def pick(self) -> Choice:
        """The best one, or the one asked for. Raises NKATError when that cannot be."""
        asked = self.options.backend
        if asked == "auto":
            check_usable(self.choices)
            return self.choices[0]
        choice = next(choice for choice in self.choices if choice.backend.name == asked)
        if choice.lacks == "program":
            hint = advice(choice, self.kobold) if choice.libraries else "see --list"
            raise NKATError(f"--backend {asked}: {choice.reason}; {hint}")
        if choice.lacks == "device":
            note(f"warning: {asked}: {choice.reason}; trying it because you asked for it")
        if choice.layers is None:
            raise NKATError(
                f"--backend {asked}: how many layers fit cannot be told ({choice.reason}); give --gpulayers N"
            )
        return choice

    def print_layers(self, choice: Choice) -> None:
        """The arithmetic behind the number of layers, and warnings about what will not go well."""
        assert self.memory is not None
        if choice.backend.on_gpu and choice.device is not None and choice.layers is not None:
            free = free_bytes(choice.device)
            print(layer_table(self.memory, choice.layers, choice.device.name, free))
            print()
            if choice.layers and gpu_bytes(self.memory, choice.layers) > free:
                note(f"warning: {choice.layers} layers need more than is free on {choice.device.name}")
        elif self.memory.total > self.machine.available:
            note(
                f"warning: the model needs {format_bytes(self.memory.total)} but only "
                f"{format_bytes(self.machine.available)} of memory are free"
            )
        if not choice.backend.on_gpu and self.options.gpulayers:
            note(f"note: {choice.backend.name} runs on the processor, so --gpulayers has no meaning")
        if not is_private(self.options.host):
            note(
                f"warning: --host {self.options.host or '(empty)'}: everybody in your network can use this KoboldCpp; "
                "-- --password WORD asks them for a password"
            )

    def config(self, choice: Choice) -> dict[str, Any]:
        assert self.files is not None
        return kobold_settings(self.kobold, choice, self.files, self.settings)

    def save(self, values: dict[str, Any], words: list[str]) -> None:
        if self.options.extra:
            values = config_with_extra(self.kobold, words)
        write_config(self.options.save_config, values, self.options.force)
        line = shell_line([*self.kobold.prefix(), "--config", str(self.options.save_config)])
        note(f"wrote {self.options.save_config}; load it with: {line}")

    def launch(self, choice: Choice, words: list[str]) -> dict[str, Any]:
        """Starts KoboldCpp, says where it is and what it loaded, and stays until it ends."""
        options = self.options
        url = base_url(options.host, options.port, "--ssl" in options.extra)
        check_port(options.host, options.port)
        with running(words) as process:
            name = wait_until_ready(process, url, options.timeout, self.checker(choice))
            if name:
                self.check_devices(choice, process)
                found = self.report_ready(choice, process, name, url)
                if options.json:  # now, not when the user has closed it
                    write_json(self.describe() | {"command": words} | found, options.json, options.force)
                    options.json = None
                process.on_line = note
            status = process.wait()
        if process.signalled is not None:
            self.status = 128 + process.signalled
        elif status != 0:
            raise process.failure(f"KoboldCpp ended with status {status}")
        return {}

    def checker(self, choice: Choice) -> Callable[[Loaded], None]:
        hint = advice(choice, self.kobold)

        def check(loaded: Loaded) -> None:
            check_loaded(loaded, choice.libraries, choice.backend.name, hint)

        return check

    def check_devices(self, choice: Choice, process: KoboldProcess) -> None:
        """The library is the right one; did it find the GPU, and the adapter its way into the model?"""
        loaded = process.loaded
        assert self.files is not None
        if self.files.lora is not None and not process.told(lambda loaded: loaded.adapter_tensors is not None):
            raise process.failure("KoboldCpp did not load the adapter: its log has no line about it")
        told = choice.backend.tells_buffers and loaded.buffers
        if told and choice.layers and not loaded.gpu_megabytes:
            raise NKATError(
                f"asked for {choice.layers} layers by {choice.backend.name}, but KoboldCpp put all weights into main "
                "memory: it found no device it can use; update the graphics driver, or take --backend cpu"
            )

    def report_ready(self, choice: Choice, process: KoboldProcess, name: str, url: str) -> dict[str, Any]:
        loaded = process.loaded
        where = ", ".join(f"{device} {size:.0f} MiB" for device, size in loaded.buffers.items())
        adapter = f"; adapter of {loaded.adapter_tensors} tensors" if loaded.adapter_tensors is not None else ""
        library = f"koboldcpp_{loaded.library} really loaded"
        if loaded.library is None:
            library = "KoboldCpp does not say which library it loaded"
        print(f"backend    {choice.backend.name}: {library}; {where}{adapter}")
        print(f"ready      {name} at {url}", flush=True)
        note("Ctrl-C ends it; what follows is KoboldCpp's own log")
        return {"url": url, "name": name, "pid": process.child.pid, "loaded": asdict(loaded)}

    def benchmark(self) -> dict[str, Any]:
        """Every usable backend and split, with and without the adapter; the fastest with it becomes the default."""
        assert self.files is not None
        wanted = [c for c in self.choices if c.lacks is None and self.options.backend in ("auto", c.backend.name)]
        rows, results = [], []
        measured: list[tuple[Choice, Speed]] = []
        arms = {"": self.files}
        if self.files.lora is not None:
            arms = {"with Θ": self.files, "without": replace(self.files, lora=None)}
        for split in [split for choice in wanted or [self.pick()] for split in layer_splits(choice)]:
            label = split.backend.name if split.all_layers is None else f"{split.backend.name}, {split.layers} layers"
            for arm, files in arms.items():
                words = kobold_command(
                    self.kobold, kobold_settings(self.kobold, split, files, self.settings), self.options.extra
                )
                try:
                    speed = measure_speed(words, f"{label} {arm}".strip(), self.options.timeout, self.checker(split))
                except NKATError as error:
                    note(f"warning: {label}: {error}")
                    break
                rows.append([label, arm, f"{speed.processing:.1f}", f"{speed.generation:.1f}"])
                results.append({"backend": split.backend.name, "layers": split.layers, "arm": arm} | asdict(speed))
                if files is self.files:
                    measured.append((split, speed))
        choice, speed = fastest(measured)
        path = remember_fastest(self.kobold, self.files, choice, speed, self.config(choice))
        print(format_table(rows, ["backend", "Θ", "processing tok/s", "generation tok/s"]))
        print(f"\nfastest: {choice.backend.name}, now this model's default at --contextsize {speed.context}")
        print(f"load it with: {shell_line([*self.kobold.prefix(), '--config', str(path)])}")
        if self.options.save_config is not None:
            values = self.config(choice)
            self.save(values, kobold_command(self.kobold, values, self.options.extra))
        return {"benchmark": results, "fastest": choice.record(), "default_config": str(path)}


def _memory_text(total: int, free: int | None) -> str:
    return f"{format_bytes(total)}, {'free: not told' if free is None else f'{format_bytes(free)} free'}"


if __name__ == "__main__":
    commandline.run(main)
