"""KoboldCpp's own benchmark, run and read.

It processes a full context of tokens but for the last hundred, generates those, prints both speeds and ends. One run of
it is one measurement: differences of a few per cent are noise.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from nkat.errors import NKATError
from nkat.host import console
from nkat.kobold.choose import Choice
from nkat.kobold.process import Loaded, running

_VALUE = re.compile(r"^(ProcessingSpeed|GenerationSpeed|TotalTime|MaxCtx|GenAmount): ([\d.]+)")
_END = "Server was not started"
_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Speed:
    """processing, generation: tokens a second; seconds: of both together; context, generated: tokens"""

    processing: float
    generation: float
    seconds: float
    context: int
    generated: int


def read_result(lines: Iterable[str]) -> Speed | None:
    """The figures KoboldCpp printed, or None when it did not get that far."""
    found = {match[1]: float(match[2]) for line in lines if (match := _VALUE.match(line))}
    if len(found) < 5:
        return None
    return Speed(
        processing=found["ProcessingSpeed"],
        generation=found["GenerationSpeed"],
        seconds=found["TotalTime"],
        context=int(found["MaxCtx"]),
        generated=int(found["GenAmount"]),
    )


def measure_speed(command: Sequence[str], what: str, seconds: float, check: Callable[[Loaded], None]) -> Speed:
    """Runs the benchmark of this command. Raises NKATError when KoboldCpp fails or loads something else."""
    started = time.monotonic()
    with (
        running([*command, "--benchmark"]) as process,
        console.bar(None, what, at_once=True, form="{desc}: {elapsed}") as bar,
    ):
        while (status := process.poll()) is None and not any(line.startswith(_END) for line in list(process.lines)):
            check(process.loaded)
            if time.monotonic() - started > seconds:
                raise process.failure(f"{what}: not done within {seconds:.0f} seconds (--timeout allows more)")
            bar.update(0)
            time.sleep(_POLL_SECONDS)
        if process.signalled is not None:
            raise KeyboardInterrupt
        check(process.loaded)
        speed = read_result(process.lines)
        if speed is None:
            raise process.failure(f"{what}: KoboldCpp ended with status {status} and gave no figures")
    return speed


def layer_splits(choice: Choice) -> list[Choice]:
    """The layer splits worth measuring: what fits, half of it, and none (the GPU then only processes prompts)."""
    if not choice.backend.on_gpu or choice.layers is None:
        return [choice]
    counts = dict.fromkeys([choice.layers, choice.layers // 2, 0])
    return [replace(choice, layers=count) for count in counts]


def fastest(measured: Sequence[tuple[Choice, Speed]]) -> tuple[Choice, Speed]:
    """The one that generates fastest; of those within 3 % of it, the one that processes prompts fastest."""
    if not measured:
        raise NKATError("no backend could be measured")
    best = max(speed.generation for _, speed in measured)
    near = [item for item in measured if item[1].generation >= 0.97 * best]
    return max(near, key=lambda item: item[1].processing)
