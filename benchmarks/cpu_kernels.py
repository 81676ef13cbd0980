"""The CPU kernels by block format: how near decoding comes to the memory's speed, and prefill beside torch's GEMM.

    python -m benchmarks.cpu_kernels
    python -m benchmarks.cpu_kernels --threads 1 --types Q4_K Q6_K --megabytes 256

For each format a random weight larger than the cache is multiplied by one token (inputs rounded to INT8, and exact) and
by 256 tokens. Taking turns with it in the same run: a kernel that only reads as many bytes, and `torch.nn.functional.
linear` in bfloat16 on the dequantised weight. `share` is the kernel's bytes a second over the reader's, `ratio` torch's
time over the kernel's, each the median of the rounds. What bounds a format: the memory where the share is near 1, else
the processor. The last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.cpu_kernels")

import functools
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from benchmarks.dequantise import random_rows
from nkat.errors import NKATError
from nkat.gguf.formats import dequantise
from nkat.host import commandline, console, hardware
from nkat.host.console import format_table
from nkat.host.record import write_json
from nkat.kernels.cpu.formats import BLOCK_LAYOUTS
from nkat.kernels.cpu.jit import best_isa, compile_kernel
from nkat.kernels.cpu.linear import CpuLinear
from nkat.kernels.cpu.llvm import I32, Builder
from nkat.kernels.cpu.program import Program, pool

COLUMNS, TOKENS = 2048, 256


def read_all(data: np.ndarray, threads: int) -> float:
    """Seconds to read an array once."""
    found = np.zeros((threads, 64), np.uint8)
    program = Program()
    program.add(_read_kernel(), (data, data.nbytes // 256, found))
    started = perf_counter()
    program.run(pool(threads))
    return perf_counter() - started


@functools.cache
def _read_kernel() -> int:
    def emit(k: Builder) -> None:
        data, count = k.pointer(0), k.integer(1)
        sums = [k.variable(k.value(0, I32(16))) for _ in range(4)]
        with k.loop(count * k.thread // k.threads, count * (k.thread + 1) // k.threads) as i:
            for j, total in enumerate(sums):
                total.value = total.value ^ k.load(I32(16), data + (i * 256 + 64 * j))
        k.store(sums[0].value ^ sums[1].value ^ sums[2].value ^ sums[3].value, k.pointer(2) + k.thread * 64)

    return compile_kernel("read_all", emit)


def measure(qtype: GGMLQuantizationType, megabytes: int, rounds: int, threads: int) -> dict[str, Any]:
    row_bytes = random_rows(qtype, 1, COLUMNS).nbytes
    rows = megabytes * 1_000_000 // row_bytes // 16 * 16
    packed = torch.from_numpy(random_rows(qtype, rows, COLUMNS)).view(-1)
    layers = {exact: CpuLinear(packed, qtype, (rows, COLUMNS), exact=exact) for exact in (False, True)}
    part = min(rows, 2048)
    weight = dequantise(packed[: part * row_bytes], qtype, (part, COLUMNS)).bfloat16()
    small = CpuLinear(packed[: part * row_bytes], qtype, (part, COLUMNS))
    x = torch.randn(TOKENS, COLUMNS, generator=torch.Generator().manual_seed(0))
    x16, one = x.bfloat16(), x[:1]

    def seconds(linear: CpuLinear, inputs: torch.Tensor) -> float:
        started = perf_counter()
        linear.rows(inputs, 0, linear.shape[0], 0.0, threads)
        return perf_counter() - started

    copy = layers[False].tiles.copy()  # read in place of what is multiplied next, which would find it in the cache
    times: dict[str, list[float]] = {name: [] for name in ("read", "int8", "exact", "gemm", "torch")}
    for _ in range(rounds + 1):  # the first, which compiles, is dropped
        times["read"].append(read_all(copy, threads))
        times["int8"].append(seconds(layers[False], one))
        times["exact"].append(seconds(layers[True], one))
        times["gemm"].append(seconds(small, x))
        started = perf_counter()
        torch.nn.functional.linear(x16, weight)
        times["torch"].append(perf_counter() - started)
    kept = {name: values[1:] for name, values in times.items()}
    products = part * COLUMNS * TOKENS
    nbytes = layers[False].tiles.nbytes
    return {
        "format": qtype.name,
        "bytes": nbytes,
        "read_gb_per_second": nbytes / median(kept["read"]) / 1e9,
        "decode_gb_per_second": nbytes / median(kept["int8"]) / 1e9,
        "decode_share": _ratio(kept["read"], kept["int8"]),
        "exact_decode_share": _ratio(kept["read"], kept["exact"]),
        "prefill_gmac_per_second": products / median(kept["gemm"]) / 1e9,
        "torch_bfloat16_gmac_per_second": products / median(kept["torch"]) / 1e9,
        "prefill_ratio": _ratio(kept["torch"], kept["gemm"]),
    }


def _ratio(a: list[float], b: list[float]) -> float:
    return median(x / y for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = commandline.parser("CPU kernels by block format.", "  python -m benchmarks.cpu_kernels --threads 2")
    parser.add_argument("--types", nargs="+", metavar="TYPE", default=[q.name for q in BLOCK_LAYOUTS])
    parser.add_argument(
        "--megabytes", type=commandline.positive_int, default=200, metavar="N", help="of a weight (default 200)"
    )
    parser.add_argument("--rounds", type=commandline.positive_int, default=9, metavar="N")
    parser.add_argument("--threads", type=commandline.thread_count, metavar="N")
    options = parser.parse_args()
    threads = hardware.set_threads(options.threads)
    known = {q.name: q for q in BLOCK_LAYOUTS}
    for name in options.types:
        if name not in known:
            raise NKATError(f"--types: {name} has no kernel; there are {', '.join(known)}")
    records = []
    with console.bar(len(options.types), "formats", "format") as bar:
        for name in options.types:
            records.append(measure(known[name], options.megabytes, options.rounds, threads))
            bar.update()
    rows = [
        [
            r["format"],
            f"{r['decode_gb_per_second']:.1f}",
            f"{r['decode_share']:.2f}",
            f"{r['exact_decode_share']:.2f}",
            f"{r['prefill_gmac_per_second']:.0f}",
            f"{r['torch_bfloat16_gmac_per_second']:.0f}",
            f"{r['prefill_ratio']:.2f}",
        ]
        for r in records
    ]
    header = ["format", "decode GB/s", "share", "exact share", "prefill GMAC/s", "torch bf16", "ratio"]
    print(format_table(rows, header) + "\n")
    machine = hardware.describe(torch.device("cpu"))
    write_json({"isa": best_isa(), "threads": threads, "formats": records, "machine": machine}, "-")
