"""The CPU kernels by block format: how near decoding comes to the memory's speed, and prefill beside torch's GEMM.

    python -m benchmarks.cpu_kernels
    python -m benchmarks.cpu_kernels --threads 1 --types Q4_K Q6_K --megabytes 256

For each format a random weight larger than the cache is multiplied by one token (inputs rounded to INT8, and exact) and
a smaller one by 256 tokens. `share` is the bytes that one token reads in a second over the most that this memory gives
(`benchmarks.memory`); what bounds a format is the memory where it is near 1, else the processor. `ratio` is the time of
`torch.nn.functional.linear` in bfloat16, on the weight unpacked, over the kernel's with 256 tokens, the two taking
turns. Medians of the rounds. The last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.cpu_kernels")

from dataclasses import asdict
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from benchmarks.dequantise import random_rows
from benchmarks.memory import Ceiling, last_cache_bytes, measure_ceiling, share_of
from nkat.errors import NKATError
from nkat.gguf.formats import dequantise
from nkat.host import commandline, console, hardware
from nkat.host.console import say
from nkat.host.record import print_record
from nkat.host.tables import Column, Table, show
from nkat.kernels.cpu.formats import BLOCK_LAYOUTS
from nkat.kernels.cpu.jit import best_isa
from nkat.kernels.cpu.linear import CpuLinear

COLUMNS, TOKENS = 2048, 256


def weights(qtype: GGMLQuantizationType, rows: int) -> np.ndarray:
    """Random packed bytes [rows, bytes a row] whose scales are of a usual size.

    The exponents of MXFP4 would be random otherwise, and half of the products numbers below float32's normal ones,
    which a processor computes many times as slowly: no model has such weights.
    """
    some = random_rows(qtype, rows, COLUMNS)
    if qtype == GGMLQuantizationType.MXFP4:
        exponents = some.reshape(-1, GGML_QUANT_SIZES[qtype][1])[:, 0]
        exponents[:] = 118 + exponents % 8
    return some


def measure(qtype: GGMLQuantizationType, nbytes: int, rounds: int, threads: int, ceiling: Ceiling) -> dict[str, Any]:
    some = weights(qtype, 1024)
    copies = -(-nbytes // some.nbytes)
    rows, row_bytes = copies * len(some), some.shape[1]
    packed = torch.from_numpy(some).view(-1).repeat(copies)
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

    times: dict[str, list[float]] = {name: [] for name in ("int8", "exact", "gemm", "torch")}
    for _ in range(rounds + 1):  # the first, which compiles, is dropped
        times["int8"].append(seconds(layers[False], one))
        times["exact"].append(seconds(layers[True], one))
        times["gemm"].append(seconds(small, x))
        started = perf_counter()
        torch.nn.functional.linear(x16, weight)
        times["torch"].append(perf_counter() - started)
    kept = {name: values[1:] for name, values in times.items()}
    products = part * COLUMNS * TOKENS
    speed, exact_speed = (layers[False].tiles.nbytes / median(kept[name]) / 1e9 for name in ("int8", "exact"))
    return {
        "format": qtype.name,
        "bytes": layers[False].tiles.nbytes,
        "decode_gb_per_second": speed,
        "decode_share": share_of(speed, ceiling),
        "exact_decode_share": share_of(exact_speed, ceiling),
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
        "--megabytes", type=commandline.positive_int, metavar="N", help="of a weight (default: twice the last cache)"
    )
    parser.add_argument("--rounds", type=commandline.positive_int, default=9, metavar="N")
    parser.add_argument("--threads", type=commandline.thread_count, metavar="N")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    threads = hardware.set_threads(options.threads)
    known = {q.name: q for q in BLOCK_LAYOUTS}
    for name in options.types:
        if name not in known:
            raise NKATError(f"--types: {name} has no kernel; there are {', '.join(known)}")
    ceiling = measure_ceiling(threads)
    nbytes = options.megabytes * 1_000_000 if options.megabytes else max(200_000_000, 2 * last_cache_bytes())
    records = []
    with console.bar(len(options.types), "formats", "format") as bar:
        for name in options.types:
            records.append(measure(known[name], nbytes, options.rounds, threads, ceiling))
            bar.update()
    columns = [
        Column("format", "format"),
        Column("decode GB/s", "decode_gb_per_second", ".1f"),
        Column("share", "decode_share", ".2f"),
        Column("exact share", "exact_decode_share", ".2f"),
        Column("prefill GMAC/s", "prefill_gmac_per_second", ".0f"),
        Column("torch bf16", "torch_bfloat16_gmac_per_second", ".0f"),
        Column("ratio", "prefill_ratio", ".2f"),
    ]
    show(Table("cpu kernels", columns, records, conditions={"threads": threads, "isa": best_isa()}))
    say(f"The most that {threads} threads read here: {ceiling.gb_per_second:.1f} GB/s.\n")
    machine = hardware.describe(torch.device("cpu"))
    record = {"isa": best_isa(), "threads": threads, "ceiling": asdict(ceiling), "formats": records}
    print_record({**record, "machine": machine})
