"""Several Θ on one model: bytes in memory and bytes that a token reads, counted, with all, one and none of them on.

    python -m benchmarks.several model.gguf
    python -m benchmarks.several model.gguf --counts 1 2 16 --rank 8

Each Θ is made from the weights, with another seed. What a token reads is taken from the arguments of the compiled
program's steps while it runs. The last line is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.several")

from pathlib import Path
from typing import Any

import torch

from nkat.engine.compiled import CompiledDecoder
from nkat.errors import NKATError
from nkat.host import commandline
from nkat.host.console import format_bytes
from nkat.host.hardware import describe, set_threads
from nkat.host.record import print_record
from nkat.host.tables import Column, Table, show
from nkat.lm.load import LoadedModel, load_model
from nkat.lm.mix import ThetaMix
from nkat.sources.make import describe_theta_set, make_thetas
from nkat.sources.options import DEFAULT_GAMMA, DEFAULT_RANK, ThetaOptions
from nkat.theta.layers import select_layers
from nkat.theta.modelfile import ModelFile, open_model_file
from nkat.theta.set import ThetaSet


def make_sets(model: ModelFile, count: int, rank: int) -> dict[str, ThetaSet]:
    """Θ by name; the weights are decomposed once, and the others differ from the first in nothing that is counted."""
    base = model.require_base()
    options = ThetaOptions(rank, DEFAULT_GAMMA, 0)
    thetas = make_thetas(base.file, select_layers(base.tensors, None), options)
    return {str(i): describe_theta_set(model, thetas, options, "0" * 64) for i in range(count)}


def measure(loaded: LoadedModel, sets: dict[str, ThetaSet]) -> dict[str, Any]:
    """The counts for these Θ on a model that has none yet."""
    layers = loaded.model.star_linears().values()
    weights = {id(layer): layer.require_compiled().tiles.ctypes.data for layer in layers}
    mix = ThetaMix(loaded.model, sets)
    decoder = CompiledDecoder(loaded.model, 16, torch.get_num_threads())

    def read(on: dict[str, float]) -> int:
        """INT8 factors that a token's steps read: for each term a row of `down` and a column of `up`."""
        mix.set_weights(on)
        decoder.length = 0
        decoder.step(1)
        return sum(sum(layer.shape) * int(step.terms[0]) for layer, step in decoder.stars if step.outputs)

    stars = [layer.require_compiled().star for layer in layers]
    record = {
        "thetas": len(sets),
        "stored_bytes": mix.nbytes,
        "kernel_bytes": sum(star.nbytes for star in stars if star is not None),
        "read_all_on": read(dict.fromkeys(sets, 1.0)),
        "read_one_on": read({next(iter(sets)): 1.0}),
        "read_none_on": read({}),
    }
    if any(layer.require_compiled().tiles.ctypes.data != weights[id(layer)] for layer in layers):
        raise NKATError("a weight was packed again")
    return record


def main() -> None:
    parser = commandline.parser(__doc__.splitlines()[0], "  python -m benchmarks.several model.gguf --counts 1 2 4 8")
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--counts", type=commandline.positive_int, nargs="+", default=[1, 2, 4, 8], metavar="K")
    parser.add_argument("--rank", type=commandline.positive_int, default=DEFAULT_RANK, metavar="R")
    parser.add_argument("--threads", type=commandline.thread_count, metavar="N")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    set_threads(options.threads)
    model = open_model_file(options.model)
    sets = make_sets(model, max(options.counts), options.rank)
    records = []
    for count in options.counts:
        loaded = load_model(model, thetas={}, gamma=1.0, int8_activations=True, repack=True)
        records.append(measure(loaded, {name: sets[name] for name in list(sets)[:count]}))
    columns = [
        Column("Θ", "thetas"),
        Column("stored", "stored_bytes", format_bytes),
        Column("for the kernels", "kernel_bytes", format_bytes),
        Column("a token reads, all on", "read_all_on", format_bytes),
        Column("one on", "read_one_on", format_bytes),
        Column("none on", "read_none_on", format_bytes),
    ]
    conditions = {"model": str(options.model), "rank": options.rank}
    show(Table("several", columns, records, conditions=conditions))
    print_record({"benchmark": "several", **conditions, "results": records, "machine": describe(torch.device("cpu"))})
