"""The truncated SVD of Θ against the full SVD, on the matrix sizes of a 7B model: time and accuracy.

    python -m benchmarks.svd
    python -m benchmarks.svd --size 2048 --rank 8 --rounds 3

Two matrices: Gaussian noise, whose flat spectrum is the worst case, and noise over a decaying low-rank part, which is
what weights look like. The error is the largest relative one of the `rank` singular values. The last line is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.svd")

from statistics import median
from time import perf_counter

import torch

from nkat.host import commandline
from nkat.host.hardware import describe, set_threads
from nkat.host.record import print_record
from nkat.host.tables import Column, Table, show
from nkat.theta.svd import truncated_svd


def matrices(size: int) -> dict[str, torch.Tensor]:
    """Float32 [size, size] by name; the second has 64 directions that stand out of the noise, as weights have."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(size, size, generator=generator)
    left, right = (torch.linalg.qr(torch.randn(size, 64, generator=generator)).Q for _ in range(2))
    edge = 2.0 * size**0.5  # the noise's largest singular value
    strengths = torch.linspace(6.0, 1.2, 64) * edge
    return {"noise": noise, "noise + low rank": noise + (left * strengths) @ right.T}


def main() -> None:
    parser = commandline.parser(__doc__.splitlines()[0], "  python -m benchmarks.svd --size 2048")
    parser.add_argument("--size", type=commandline.positive_int, default=4096)
    parser.add_argument("--rank", type=commandline.positive_int, default=4)
    parser.add_argument("--rounds", type=commandline.positive_int, default=3)
    parser.add_argument("--threads", type=commandline.thread_count)
    commandline.add_output_format(parser)
    options = parser.parse_args()
    set_threads(options.threads)
    records = []
    for name, matrix in matrices(options.size).items():
        truncated_svd(matrix[:512, :512].contiguous(), options.rank)  # warm-up
        ours, full = [], []
        for _ in range(options.rounds):
            started = perf_counter()
            found = truncated_svd(matrix, options.rank)[1]
            ours.append(perf_counter() - started)
            started = perf_counter()
            exact = torch.linalg.svd(matrix, full_matrices=False)[1][: options.rank]
            full.append(perf_counter() - started)
        records.append(
            {
                "matrix": name,
                "size": options.size,
                "rank": options.rank,
                "truncated_s": median(ours),
                "full_s": median(full),
                "ratio": median(full) / median(ours),
                "error": float(((found - exact) / exact).abs().max()),
                "rounds": options.rounds,
            }
        )
    columns = [
        Column(f"{options.size}x{options.size}", "matrix"),
        Column("truncated s", "truncated_s", ".3f"),
        Column("full s", "full_s", ".2f"),
        Column("ratio", "ratio", "{:.1f}x".format),
        Column("error", "error", ".1e"),
    ]
    show(Table("svd", columns, records, conditions={"size": options.size, "rank": options.rank}))
    print_record({"benchmark": "svd", "results": records, "machine": describe(torch.device("cpu"))})
