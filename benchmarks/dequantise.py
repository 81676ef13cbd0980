"""How fast `nkat.gguf.formats.dequantise` unpacks each block format, side by side with gguf-py in one process.

    python -m benchmarks.dequantise
    python -m benchmarks.dequantise --threads 1 --rows 4096 --columns 4096 --rounds 9 --types Q4_K Q6_K

The two take turns, so that a busy machine slows both; the ratio is gguf-py's median time over ours, with the range of
the rounds' own ratios. Both results lie in new memory on each call, as when a model's weights are unpacked one after
another, and are compared bit by bit first. F32 is left out: both return a view. The packed bytes are random, apart from
the exponent bits of float16 and bfloat16 numbers, which would otherwise make NaN. gguf-py uses one thread.
The last line on stdout is the result as JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.dequantise")

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from gguf import quants as gguf_quants
from gguf.constants import GGMLQuantizationType

from nkat.errors import NKATError
from nkat.gguf.formats import SUPPORTED_TYPES, dequantise, packed_nbytes
from nkat.host.commandline import add_output_format, parser, positive_int, thread_count
from nkat.host.console import bar
from nkat.host.hardware import describe, set_threads
from nkat.host.record import print_record
from nkat.host.tables import Column, Table, show

TYPES = sorted(SUPPORTED_TYPES - {GGMLQuantizationType.F32})


def random_rows(qtype: GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Random packed bytes (rows, bytes a row) in which every float16 or bfloat16, wherever it lies, is finite."""
    shape = (rows, packed_nbytes(qtype, (columns,)))
    # the top exponent bit of either type is bit 6 of the second byte
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8) & np.uint8(0xBF)


def timed(function: Callable[[], object]) -> float:
    """Milliseconds of one call, including the release of its result."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def measure(qtype: GGMLQuantizationType, rows: int, columns: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of both and the ratio. Raises NKATError when the results differ in any bit."""
    data = random_rows(qtype, rows, columns)
    packed = torch.from_numpy(data).view(-1)

    def theirs() -> np.ndarray:
        return gguf_quants.dequantize(data, qtype)

    def ours() -> torch.Tensor:
        return dequantise(packed, qtype, (rows, columns))

    if not np.array_equal(theirs().view(np.int32), ours().numpy().view(np.int32)):  # also the warm-up
        raise NKATError(f"{qtype.name}: the result is not gguf-py's")
    times = [(timed(theirs), timed(ours)) for _ in range(rounds)]
    gguf_ms, nkat_ms = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [gguf / nkat for gguf, nkat in times]
    return {
        "gguf_py_ms": round(gguf_ms, 2),
        "nkat_ms": round(nkat_ms, 2),
        "ratio": round(gguf_ms / nkat_ms, 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "weights_per_second": round(rows * columns / nkat_ms * 1e3),
    }


def main() -> None:
    options = parser(__doc__.partition("\n")[0], "  python -m benchmarks.dequantise --threads 1 --types Q4_K Q6_K")
    options.add_argument("--rows", type=positive_int, default=4096, metavar="M")
    options.add_argument("--columns", type=positive_int, default=4096, metavar="N")
    options.add_argument("--rounds", type=positive_int, default=7, metavar="N")
    options.add_argument("--threads", type=thread_count, metavar="N")
    names = [qtype.name for qtype in TYPES]
    options.add_argument("--types", nargs="+", choices=names, default=names, metavar="TYPE", help=", ".join(names))
    add_output_format(options)
    args = options.parse_args()

    set_threads(args.threads)
    results = {}
    with bar(len(args.types), "dequantise", "type") as progress:
        for name in args.types:
            results[name] = measure(GGMLQuantizationType[name], args.rows, args.columns, args.rounds)
            progress.update()
    columns = [
        Column("type", "type"),
        Column("gguf-py ms", "gguf_py_ms", ".1f"),
        Column("nkat ms", "nkat_ms", ".1f"),
        Column("ratio", "ratio", ".2f"),
        Column("range", ("ratio_min", "ratio_max"), "{:.2f}-{:.2f}".format),
        Column("G weights/s", "weights_per_second", lambda speed: f"{speed / 1e9:.2f}"),
    ]
    show(Table("dequantise", columns, [{"type": name, **result} for name, result in results.items()]))
    record = {
        "benchmark": "dequantise",
        "rows": args.rows,
        "columns": args.columns,
        "rounds": args.rounds,
        "smallest_ratio": min(r["ratio"] for r in results.values()),
        "types": results,
        "machine": describe(torch.device("cpu")),
    }
    print_record(record)
