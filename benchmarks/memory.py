"""How fast this machine's memory can be read: what decoding a model cannot be faster than.

    python -m benchmarks.memory --threads 2

Several kernels that do nothing but read, 512 bits at a time, go over an array far larger than the last cache: one to
eight streams for each thread, with requests for lines at several distances ahead, into the first or the second cache.
No pattern is the best everywhere (a distance that helps one processor hinders another's own prefetching), so the
fastest of them, in its fastest round, is the ceiling. The last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.memory")

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from nkat.errors import NKATError
from nkat.host import commandline, console, hardware
from nkat.host.console import format_bytes, say
from nkat.host.record import print_record
from nkat.host.tables import Column, Table, show
from nkat.kernels.cpu.jit import compile_kernel
from nkat.kernels.cpu.llvm import I32, Builder
from nkat.kernels.cpu.program import Program, aligned, pool

STREAMS = (1, 2, 4, 8)
AHEAD = {1: (0, 512, 1024, 2048, 4096, 8192), 2: (2048, 8192)}  # bytes, by the cache that they are asked into
_STRIDE = 256  # bytes read of each stream in turn


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The fastest reading found. ahead, level: how the lines were asked for, 0 bytes: not at all."""

    gb_per_second: float
    streams: int
    ahead: int
    level: int


def last_cache_bytes() -> int:
    """Size of the largest cache that the system names (Linux), shared by however many; else 0."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes)


def measure_ceiling(threads: int, rounds: int = 3) -> Ceiling:
    """The ceiling for so many threads. Raises NKATError where memory has no room for an array beyond the cache."""
    size = max(1 << 30, 3 * last_cache_bytes())
    if size > hardware.total_and_free_memory()[1] // 2:
        raise NKATError(f"measuring the memory's speed takes {format_bytes(size)}, which are not free")
    data = aligned((size // 8,), np.int64)
    data[:] = 1
    found = np.zeros((threads, 64), np.uint8)
    best = []
    patterns = [(s, ahead, level) for s in STREAMS for level, distances in AHEAD.items() for ahead in distances]
    with console.bar(len(patterns), "speed of the memory", "pattern") as bar:
        for streams, ahead, level in patterns:
            program = Program()
            program.add(_read_kernel(streams, ahead, level), (data, data.nbytes // _STRIDE, found))
            times = []
            for _ in range(rounds):
                started = perf_counter()
                program.run(pool(threads))
                times.append(perf_counter() - started)
            best.append(Ceiling(data.nbytes / min(times) / 1e9, streams, ahead, level))
            bar.update()
    return max(best, key=lambda ceiling: ceiling.gb_per_second)


def share_of(gb_per_second: float, ceiling: Ceiling) -> float:
    """Raises NKATError above 1: then one of the two was not measured rightly."""
    share = gb_per_second / ceiling.gb_per_second
    if share > 1.0:
        raise NKATError(
            f"{gb_per_second:.1f} GB/s were read where {ceiling.gb_per_second:.1f} were found to be the most: "
            "run it again on a quiet machine"
        )
    return share


@functools.cache
def _read_kernel(streams: int, ahead: int, level: int) -> int:
    """arguments: data, its length in _STRIDE bytes, out [thread, 64]"""

    def emit(k: Builder) -> None:
        data, count = k.pointer(0), k.integer(1)
        part = count // k.threads // streams * _STRIDE
        start = data + part * streams * k.thread
        sums = [k.variable(k.value(0, I32(16))) for _ in range(_STRIDE // 64)]
        with k.loop(0, part, _STRIDE) as i:
            for stream in range(streams):
                at = start + part * stream + i
                for j, total in enumerate(sums):
                    if ahead:
                        k.prefetch(at + (ahead + 64 * j), level)
                    total.value = total.value ^ k.load(I32(16), at + 64 * j)
        k.store(sums[0].value ^ sums[1].value ^ sums[2].value ^ sums[3].value, k.pointer(2) + k.thread * 64)

    return compile_kernel(f"read_{streams}_{ahead}_{level}", emit)


def main() -> None:
    parser = commandline.parser("How fast memory can be read.", "  python -m benchmarks.memory --threads 2")
    parser.add_argument("--threads", type=commandline.thread_count, metavar="N")
    parser.add_argument("--rounds", type=commandline.positive_int, default=3, metavar="N")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    threads = hardware.set_threads(options.threads)
    ceilings = {count: measure_ceiling(count, options.rounds) for count in sorted({1, threads})}
    records = [{"threads": count, **asdict(c)} for count, c in ceilings.items()]
    columns = [
        Column("threads", "threads"),
        Column("GB/s", "gb_per_second", ".1f"),
        Column("streams", "streams"),
        Column(
            "bytes asked for ahead",
            ("ahead", "level"),
            lambda ahead, level: f"{ahead} into L{level}" if ahead else "none",
        ),
    ]
    show(Table("memory", columns, records))
    say()
    record = {"last_cache_bytes": last_cache_bytes(), "ceilings": records}
    print_record({**record, "machine": hardware.describe(torch.device("cpu"))})
