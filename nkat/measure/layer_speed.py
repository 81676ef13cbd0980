"""The star product by itself: packed weight × x with and without the star term, for each kind of layer of a model.

Where torch computes (CUDA included), `StarLinear.forward` of the model's own layers is timed, one at a time; with the
compiled CPU kernels some layers of the kind at once, as one program, because calling one from Python takes longer than
a small layer itself. A layer of that program rounds its inputs, reads and writes all by itself, where a decoder shares
some of that work between layers: its steps are faster than the sum of these times.

Before every timed call a buffer of 256 MiB is read, so that weights come from memory, as they do in a model that does
not fit the cache; the layers of a kind take turns. Bytes of a layer: weight and Θ as that kernel reads them, x and y,
each once. The share is of the bandwidth that a copy of a large buffer reaches on the same device (bytes read and
written). Both arms alternate, and the overhead is the median of paired ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from nkat.host.console import bar
from nkat.host.tables import Column, Table
from nkat.lm.linear import StarLinear
from nkat.lm.transformer import Transformer
from nkat.measure.speed import PairedOverhead, Timings

BATCHES = (1, 8, 512)
LIMIT_SECONDS = 3.0  # a layer that takes long is timed less often, three times at least
_MINIMUM = 3
_TOGETHER = 16  # layers, times tokens, that one program of compiled kernels handles
_LARGE_BYTES = 256 << 20  # more than any processor's or GPU's cache that one program fills

Prepare = Callable[[Sequence[StarLinear]], Callable[[], object]]  # layers → what runs them


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers of one shape, block format and rank of Θ.

    names: of their roles, as "attn_q"; rank: of Θ, 0: none
    """

    names: tuple[str, ...]
    layers: tuple[StarLinear, ...]
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.layers[0].shape

    @property
    def type(self) -> str:
        return self.layers[0].qtype.name


@dataclass(frozen=True, slots=True)
class GemmRow:
    """One kind of layer at one batch size; nbytes: read and written by one call, without and with the star term."""

    kind: LayerKind
    batch: int
    without: Timings
    nbytes: int
    with_theta: Timings | None
    nbytes_with_theta: int
    overhead: PairedOverhead | None

    def record(self, copy_speed: float) -> dict[str, Any]:
        """copy_speed: bytes per second that a copy reaches."""
        m, n = self.kind.shape
        row: dict[str, Any] = {
            "layers": list(self.kind.names),
            "count": len(self.kind.layers),
            "outputs": m,
            "inputs": n,
            "type": self.kind.type,
            "theta_rank": self.kind.rank,
            "batch": self.batch,
            "without": _speed(self.without, self.nbytes, copy_speed),
            "with_theta": None,
            "overhead": None,
        }
        if self.with_theta is not None and self.overhead is not None:
            row["with_theta"] = _speed(self.with_theta, self.nbytes_with_theta, copy_speed)
            row["overhead"] = self.overhead.record()
        return row


_Kind = tuple[tuple[int, int], GGMLQuantizationType, int]  # shape, type, Θ's rank


def layer_kinds(model: Transformer) -> list[LayerKind]:
    """The model's linear layers, grouped; in the order in which the file has them."""
    groups: dict[_Kind, tuple[dict[str, None], list[StarLinear]]] = {}
    for name, layer in model.star_linears().items():
        rank = 0 if layer.theta is None else layer.theta.rank
        names, layers = groups.setdefault((layer.shape, layer.qtype, rank), ({}, []))
        names[name.removesuffix(".weight").split(".")[-1]] = None
        layers.append(layer)
    return [LayerKind(tuple(names), tuple(layers), key[2]) for key, (names, layers) in groups.items()]


def gemm_table(
    rows: Sequence[Mapping[str, Any]], caption: str = "", conditions: Mapping[str, Any] | None = None
) -> Table:
    """Records of rows as a table."""
    parts = {"without": "", "with_theta": "with_theta_"}
    flat = []
    for row in rows:
        line = {key: value for key, value in row.items() if key not in (*parts, "overhead")}
        for part, prefix in parts.items():
            line |= {f"{prefix}{key}": value for key, value in (row[part] or {}).items()}
        flat.append(line | {f"cost_{key}": value for key, value in (row["overhead"] or {}).items()})
    times = "microseconds", "p10_microseconds", "p90_microseconds"
    columns = [
        Column("layers", "layers", " ".join),
        Column("count", "count"),
        Column("shape", ("outputs", "inputs"), "{}x{}".format),
        Column("type", ("type", "theta_rank"), lambda name, _: name),
        Column("batch", "batch"),
        Column("µs", (*times, "runs"), "{:,.0f}".format),
        Column("GB/s", "gb_per_second", ".2f"),
        Column("of copy", "bandwidth_share", ".0%"),
        Column("µs with Θ", tuple(f"with_theta_{name}" for name in times), "{:,.0f}".format),
        Column("what Θ costs", ("cost_percentage", "cost_p10", "cost_p90"), "{:+.1f} % ({:+.0f} to {:+.0f})".format),
    ]
    return Table("gemm", columns, flat, caption, conditions or {})


@torch.inference_mode()
def copy_speed(device: torch.device, repetitions: int = 10) -> float:
    """Bytes per second, read and written, of the median copy of a large buffer on this device."""
    source = torch.ones(_LARGE_BYTES // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # the system hands pages out at the first write
    times = [_timed(lambda: target.copy_(source), device) for _ in range(repetitions)]
    return 2 * _LARGE_BYTES / median(times)


@torch.inference_mode()
def bench_gemm(
    model: Transformer, gamma: float | None, *, repetitions: int, batches: Sequence[int] = BATCHES, seed: int = 0
) -> list[GemmRow]:
    """Times every kind of layer at every batch size; leaves Θ's strength at `gamma`.

    gamma: strength of the arm with Θ; None: the model has none, or only the plain arm is wanted
    """
    kinds = layer_kinds(model)
    evict = _evictor(model.device)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    with bar(len(kinds) * len(batches), "layers", "shape") as progress:
        for kind in kinds:
            for batch in batches:
                x = torch.randn(batch, kind.shape[1], generator=generator).to(model.device, kind.layers[0].dtype)
                rows.append(_bench(kind, x, gamma if kind.rank else None, repetitions, evict))
                progress.update()
    model.set_gamma(gamma)
    return rows


def _bench(
    kind: LayerKind, x: torch.Tensor, gamma: float | None, repetitions: int, evict: Callable[[], object]
) -> GemmRow:
    batch = x.shape[0]
    prepare = _one_layer(x) if kind.layers[0].compiled is None else _compiled_layers(kind, x)
    together = 1 if kind.layers[0].compiled is None else max(1, _TOGETHER // batch)
    strengths = [None] if gamma is None else [None, gamma]
    seconds: dict[float | None, list[float]] = {strength: [] for strength in strengths}
    began = perf_counter()
    for count in range(-1, repetitions):  # the first pair warms up
        turn = [kind.layers[(count * together + i) % len(kind.layers)] for i in range(together)]
        for strength in strengths[:: -1 if count % 2 else 1]:
            for layer in turn:
                layer.set_gamma(strength)
            run = prepare(turn)
            evict()
            took = _timed(run, x.device)
            if count >= 0:
                seconds[strength].append(took / together)
        if count + 1 >= _MINIMUM and perf_counter() - began > LIMIT_SECONDS:
            break
    weight, star = _held_bytes(kind.layers[0])
    nbytes = weight + x.nbytes + batch * kind.shape[0] * x.element_size()
    without = Timings(tuple(seconds[None]), batch)
    if gamma is None:
        return GemmRow(kind, batch, without, nbytes, None, nbytes, None)
    run_with = Timings(tuple(seconds[gamma]), batch)
    overhead = PairedOverhead(run_with.seconds, without.seconds)
    return GemmRow(kind, batch, without, nbytes, run_with, nbytes + star, overhead)


def _one_layer(x: torch.Tensor) -> Prepare:
    return lambda layers: lambda: layers[0](x)


def _compiled_layers(kind: LayerKind, x: torch.Tensor) -> Prepare:
    """Makes programs that run layers one after the other on x; running one gives the last one's y, padded."""
    from nkat.kernels.cpu.batch import batch_tokens, make_scratch  # LLVM is loaded only where it is used
    from nkat.kernels.cpu.linear import CpuLinear, Panels, token_state
    from nkat.kernels.cpu.program import Program, aligned, pool

    def compiled(layer: StarLinear) -> CpuLinear:
        assert layer.compiled is not None
        return layer.compiled

    threads = pool(torch.get_num_threads())
    first, inputs = compiled(kind.layers[0]), x.numpy()
    tokens = 1 if len(x) == 1 else batch_tokens()
    panels = Panels(first.rounding, kind.shape[1], len(x), tokens, token_state(len(x)))
    y = aligned((len(panels.q) * tokens, first.padded_rows), np.float32)
    scratch = make_scratch(threads.count, tokens)
    terms = 1 if first.star is None else first.star.terms
    u = aligned((len(panels.q), terms, tokens), np.float32)

    def prepare(layers: Sequence[StarLinear]) -> Callable[[], object]:
        program = Program()
        for layer in layers:
            linear = compiled(layer)
            star = linear.star if layer.kappa != 0.0 else None
            panels.fill(program, inputs, inputs.strides[0])
            if star is not None:
                star.set_kappa(layer.kappa)
                linear.down(program, panels, u)
            program.barrier()
            linear.multiply(program, panels, y, y.strides[0], scratch, None if star is None else u)
            program.barrier()

        def run() -> np.ndarray:
            program.run(threads)
            return y

        return run

    return prepare


def _held_bytes(layer: StarLinear) -> tuple[int, int]:
    """Bytes of the weight and of Θ as the layer's kernel reads them."""
    if layer.compiled is not None:
        star = 0 if layer.compiled.star is None else layer.compiled.star.nbytes
        return layer.compiled.nbytes - star, star
    star = 0 if layer.down is None or layer.up is None else layer.down.nbytes + layer.up.nbytes
    weight = layer.file_bytes if layer.device_weight is None else layer.device_weight
    return weight.nbytes, star


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on CUDA by events on the stream, so that launching is not in it where the GPU is busy."""
    if device.type != "cuda":
        started = perf_counter()
        run()
        return perf_counter() - started
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    run()
    after.record()
    torch.cuda.synchronize(device)
    return float(before.elapsed_time(after)) / 1e3


def _evictor(device: torch.device) -> Callable[[], object]:
    """Reads a large buffer; reading leaves nothing that has to be written back during the next call."""
    buffer = torch.ones(_LARGE_BYTES // 4, device=device)
    return lambda: buffer.sum()


def _speed(timings: Timings, nbytes: int, copy: float) -> dict[str, Any]:
    return {
        "microseconds": 1e6 * timings.median,
        "p10_microseconds": 1e6 * timings.percentile(10),
        "p90_microseconds": 1e6 * timings.percentile(90),
        "gb_per_second": nbytes / timings.median / 1e9,
        "bandwidth_share": nbytes / timings.median / copy,
        "runs": len(timings.seconds),
    }
