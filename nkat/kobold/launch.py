"""Starts KoboldCpp, makes sure that it runs what was chosen, and stays until it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nkat.errors import NKATError
from nkat.host.console import counted, note
from nkat.kobold.api import base_url, check_port
from nkat.kobold.choose import Choice, advice
from nkat.kobold.find import Kobold
from nkat.kobold.options import KoboldOptions
from nkat.kobold.process import KoboldProcess, Loaded, check_loaded, running, wait_until_ready


@dataclass(frozen=True, slots=True)
class Ended:
    """How a KoboldCpp ended: whether it had been ready before, and the status this script has to end with."""

    was_ready: bool
    status: int


def launch_kobold(
    command: Sequence[str],
    choice: Choice,
    kobold: Kobold,
    adapter: bool,
    options: KoboldOptions,
    on_ready: Callable[[dict[str, Any]], None],
) -> Ended:
    """Runs the command, says where KoboldCpp is and what it loaded, and returns when it has ended.

    adapter: whether the command names one
    on_ready: gets what is known once KoboldCpp answers, for the record
    Raises NKATError when it fails, or runs something else than was chosen.
    """
    url = base_url(options.host, options.port, "--ssl" in options.extra)
    check_port(options.host, options.port)
    with running(command) as process:
        name = wait_until_ready(process, url, options.timeout, library_check(choice, kobold))
        if name:
            _check_devices(choice, adapter, process)
            _print_ready(choice, process.loaded, name, url)
            on_ready({"url": url, "name": name, "pid": process.child.pid, "loaded": asdict(process.loaded)})
            process.on_line = note
        status = process.wait()
    if process.signalled is not None:
        return Ended(bool(name), 128 + process.signalled)
    if status != 0:
        raise process.failure(f"KoboldCpp ended with status {status}")
    return Ended(bool(name), 0)


def library_check(choice: Choice, kobold: Kobold) -> Callable[[Loaded], None]:
    """Raises NKATError, with advice, as soon as another library is loaded than one of this choice's."""
    hint = advice(choice, kobold)

    def check(loaded: Loaded) -> None:
        check_loaded(loaded, choice.libraries, choice.backend.name, hint)

    return check


def _check_devices(choice: Choice, adapter: bool, process: KoboldProcess) -> None:
    """The library is the right one; did it find the GPU, and the adapter its way into the model?"""
    loaded = process.loaded
    if adapter and not process.told(lambda loaded: loaded.adapter_tensors is not None):
        raise process.failure("KoboldCpp did not load the adapter: its log has no line about it")
    told = choice.backend.tells_buffers and loaded.buffers
    if told and choice.layers and not loaded.gpu_megabytes:
        raise NKATError(
            f"asked for {counted(choice.layers, 'layer')} by {choice.backend.name}, but KoboldCpp put all weights "
            "into main memory: it found no device it can use; update the graphics driver, or take --backend cpu"
        )


def _print_ready(choice: Choice, loaded: Loaded, name: str, url: str) -> None:
    where = ", ".join(f"{device} {size:.0f} MiB" for device, size in loaded.buffers.items())
    adapter = f"; adapter of {loaded.adapter_tensors} tensors" if loaded.adapter_tensors is not None else ""
    library = f"koboldcpp_{loaded.library} really loaded"
    if loaded.library is None:
        library = "KoboldCpp does not say which library it loaded"
    print(f"backend    {choice.backend.name}: {library}; {where}{adapter}")
    print(f"ready      {name} at {url}", flush=True)
    note("Ctrl-C ends it; what follows is KoboldCpp's own log")
