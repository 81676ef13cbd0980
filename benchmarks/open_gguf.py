"""Time to open a GGUF: this toolkit's reader against gguf-py's, in turns, in one process.

    python -m benchmarks.open_gguf                      every fetched model
    python -m benchmarks.open_gguf model.gguf --rounds 3

Opening means: header, metadata index and tensor table are there; no long array is decoded. gguf-py has no lazy mode.
The file is in the page cache after the first, unmeasured round of ours. The last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.open_gguf")

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import gguf
import torch

from nkat.gguf.file import GGUFFile
from nkat.host import commandline
from nkat.host.hardware import describe
from nkat.host.record import print_record
from nkat.host.tables import Column, Table, show
from nkat.models import MODELS, cached


def seconds(opener: Callable[[Path], object], path: Path) -> float:
    """Wall-clock seconds of opening the file once."""
    started = perf_counter()
    opener(path)
    return perf_counter() - started


def main() -> None:
    parser = commandline.parser(__doc__.splitlines()[0], "  python -m benchmarks.open_gguf --rounds 5")
    parser.add_argument("models", nargs="*", type=Path, help="GGUF files (default: every fetched model)")
    parser.add_argument("--rounds", type=commandline.positive_int, default=3)
    commandline.add_output_format(parser)
    options = parser.parse_args()
    paths = options.models or [path for name in MODELS if (path := cached(name))]
    records = []
    for path in paths:
        GGUFFile.open(path)
        ours, theirs = [], []
        for _ in range(options.rounds):
            ours.append(seconds(GGUFFile.open, path))
            theirs.append(seconds(gguf.GGUFReader, path))
        with GGUFFile.open(path) as file:
            tokens = len(file.metadata.get("tokenizer.ggml.tokens", []))
        records.append(
            {
                "file": path.name,
                "tokens": tokens,
                "nkat_s": median(ours),
                "gguf_py_s": median(theirs),
                "ratio": median(theirs) / median(ours),
                "rounds": options.rounds,
            }
        )
    columns = [
        Column("file", "file"),
        Column("tokens", "tokens", ","),
        Column("nkat s", "nkat_s", ".4f"),
        Column("gguf-py s", "gguf_py_s", ".2f"),
        Column("ratio", "ratio", "{:.0f}x".format),
    ]
    show(Table("open gguf", columns, records))
    print_record({"benchmark": "open_gguf", "results": records, "machine": describe(torch.device("cpu"))})
