"""Starts a program, makes sure that it runs what was chosen, and stays until it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nkat.errors import NKATError
from nkat.host.console import counted, note
from nkat.kobold.api import base_url, check_port
from nkat.kobold.choose import Choice, advice
from nkat.kobold.command import given
from nkat.kobold.options import KoboldOptions
from nkat.kobold.process import Loaded, ServerProcess, check_loaded, running, wait_until_ready
from nkat.kobold.program import Program
from nkat.kobold.runtimes import RUNTIMES


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended: whether it had been ready before, and the status this script has to end with."""

    was_ready: bool
    status: int


def launch(
    command: Sequence[str],
    choice: Choice,
    program: Program,
    adapters: int,
    options: KoboldOptions,
    on_ready: Callable[[dict[str, Any]], None],
) -> Ended:
    """Runs the command, says where the program is and what it loaded, and returns when it has ended.

    adapters: how many the model that is loaded at the start has
    on_ready: gets what is known once it answers, for the record
    Raises NKATError when it fails, or runs something else than was chosen.
    """
    runtime = options.runtime
    url = base_url(options.host, options.port, given(options.extra, runtime.secure_flag))
    check_port(options.host, options.port, {one.title: one.watch.name_of for one in RUNTIMES.values()})
    with running(command, runtime.watch) as process:
        name = wait_until_ready(process, url, options.timeout, library_check(choice, program))
        if name:
            _check_devices(choice, adapters, options.autofit, process)
            process.check_log(url)
            if options.draftmodel is not None and any(
                runtime.watch.undrafted.search(line) for line in list(process.lines)
            ):
                raise process.failure(f"{runtime.title} would run without the draft model")
            _print_ready(choice, process, name, url)
            on_ready({"url": url, "name": name, "pid": process.child.pid, "loaded": asdict(process.loaded)})
            process.on_line = note
        status = process.wait()
    if process.signalled is not None:
        return Ended(bool(name), 128 + process.signalled)
    if status != 0:
        raise process.failure(f"{runtime.title} ended with status {status}")
    return Ended(bool(name), 0)


def library_check(choice: Choice, program: Program) -> Callable[[Loaded], None]:
    """Raises NKATError, with advice, as soon as another library is loaded than one of this choice's."""

    def check(loaded: Loaded) -> None:
        if choice.libraries:
            check_loaded(loaded, choice.libraries, choice.backend.name, advice(choice, program))

    return check


def _check_devices(choice: Choice, adapters: int, autofit: bool, process: ServerProcess) -> None:
    """The library is the right one; did it find the GPU, and the adapters their way into the model?"""
    loaded, title = process.loaded, process.watch.title
    if adapters and not process.told(lambda loaded: loaded.adapters >= adapters):
        missing = "the adapter" if adapters == 1 else f"{counted(adapters, 'adapter')}"
        raise process.failure(f"{title} did not load {missing}: its log has no line about it")
    told = choice.backend.tells_buffers and loaded.buffers
    if told and not loaded.gpu_megabytes and autofit:
        note(f"warning: {title} put all weights into main memory: nothing fitted, or it found no device it can use")
    elif told and not loaded.gpu_megabytes and choice.layers:
        raise NKATError(
            f"asked for {counted(choice.layers, 'layer')} by {choice.backend.name}, but {title} put all weights "
            "into main memory: it found no device it can use; update the graphics driver, or take --backend cpu"
        )


def _check_draft(options: KoboldOptions, process: ServerProcess) -> None:
    watch = process.watch
    if options.draftmodel is not None and any(watch.undrafted.search(line) for line in list(process.lines)):
        raise process.failure(f"{watch.title} would run without the draft model")


def _print_ready(choice: Choice, process: ServerProcess, name: str, url: str) -> None:
    loaded, title = process.loaded, process.watch.title
    told = [", ".join(f"{device} {size:.0f} MiB" for device, size in loaded.buffers.items())]
    if loaded.adapters:
        which = "adapter" if loaded.adapters == 1 else f"{loaded.adapters} adapters"
        told.append(f"{which} of {loaded.adapter_tensors} tensors")
    if loaded.library is not None:
        told.insert(0, f"koboldcpp_{loaded.library} really loaded")
    elif process.watch.library is not None:
        told.insert(0, f"{title} does not say which library it loaded")
    print(f"backend    {choice.backend.name}: {'; '.join(part for part in told if part)}")
    print(f"ready      {name} at {url}", flush=True)
    note("Ctrl-C ends it; what follows is its own log")
