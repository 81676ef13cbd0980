"""Converts a synthetic 7B-shaped Q4_K file: time and peak memory of the real converter, in a process of its own.

    python -m benchmarks.convert_7b                       32 blocks, 4 GB, in a temporary folder
    python -m benchmarks.convert_7b --blocks 4            a quick look

The file is that of `benchmarks.shapes`, all Q4_K. Its weights are random: a flat spectrum, the slowest case for the
SVD. The last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.convert_7b")

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.shapes import write_shaped
from nkat.errors import NKATError
from nkat.host import commandline
from nkat.host.console import format_bytes
from nkat.host.hardware import describe
from nkat.host.record import print_record
from nkat.host.tables import Column, Table, show

ROOT = Path(__file__).resolve().parent.parent


def convert(model: Path, output: Path, rank: int, threads: int | None) -> dict[str, float]:
    """Runs the converter and returns its seconds and its peak resident memory in bytes (Linux and macOS)."""
    command = [sys.executable, str(ROOT / "nkat_gguf_converter.py"), "--input", str(model), "--output", str(output)]
    command += ["--theta-rank", str(rank), *(["--threads", str(threads)] if threads else [])]
    started = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise NKATError(f"the converter ended with status {child.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": time.perf_counter() - started, "peak_bytes": usage.ru_maxrss * unit}


def main() -> None:
    parser = commandline.parser(__doc__.splitlines()[0], "  python -m benchmarks.convert_7b --blocks 4")
    parser.add_argument("--blocks", type=commandline.positive_int, default=32)
    parser.add_argument("--rank", type=commandline.positive_int, default=4)
    parser.add_argument("--threads", type=commandline.thread_count)
    parser.add_argument("--folder", type=Path, help="where the two files of 4 GB go (default: a temporary folder)")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        model = Path(scratch) / "synthetic-7b-q4_k.gguf"
        size = write_shaped(model, "Q4_K", options.blocks)
        result = convert(model, Path(scratch) / "synthetic-7b.nkat", options.rank, options.threads)
    record = {"benchmark": "convert_7b", "bytes": size, "blocks": options.blocks, "rank": options.rank, **result}
    columns = [
        Column("file", "bytes", format_bytes),
        Column("blocks", "blocks"),
        Column("rank", "rank"),
        Column("seconds", "seconds", ".1f"),
        Column("peak memory", "peak_bytes", format_bytes),
    ]
    show(Table("convert", columns, [record]))
    print_record({**record, "machine": describe(torch.device("cpu"))})
