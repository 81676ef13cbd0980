"""The parts of `benchmarks.gpu` that ask how fast: decoding, Θ's cost, memory, prompts, and each format's kernels.

What is compared takes turns in one process. Speeds of memory are in bytes of the file: those that the file's weights
take, without an embedding that is only looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_checks import Job, random_bytes, random_thetas, token_ids
from benchmarks.gpu_figures import Figure, Keep, measured
from benchmarks.shapes import BLOCK_WEIGHTS, DIM
from nkat.engine.cuda_graph import CudaGraphDecoder
from nkat.engine.decoder import make_decoder
from nkat.kernels.cuda import linear as cuda
from nkat.kernels.cuda import planes
from nkat.kernels.cuda.planes import FORMATS
from nkat.lm.load import LoadedModel, load_model

GAMMA = 0.97
PROMPT, TOKENS, TURNS = 512, 128, 7
SHARE = 60.0  # per cent of the copy's speed that decoding shall reach
COST = 2.0  # per cent that Θ may take
MEMORY = 1.1  # times the file and the KV cache
_COPIED = 2 << 30  # bytes: many times the L2 of any card


def copy_speeds(device: torch.device, rounds: int = 10) -> list[float]:
    """GB/s of copies within the device's memory, bytes read and bytes written counted."""
    source = torch.ones(_COPIED // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return [2 * _COPIED / 1e9 / seconds for seconds in device_seconds(lambda: target.copy_(source), rounds)]


def device_seconds(work: Callable[[], object], rounds: int) -> list[float]:
    """The device's own time for each of some rounds of the same work, one warm-up left out."""
    work()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    torch.cuda.synchronize()
    for start, stop in events:
        start.record()
        work()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in events]


def decoding(job: Job, keep: Keep) -> None:
    """Decoding through the graphs with and without Θ in turns, the copy's speed before and after, and the memory."""
    copies = copy_speeds(job.device)
    torch.cuda.empty_cache()
    path = job.model(job.blocks)
    torch.cuda.reset_peak_memory_stats()
    started = perf_counter()
    loaded, decoder = _decoder(job)
    torch.cuda.synchronize()
    keep(Figure("loading, and making the graphs", perf_counter() - started, "s"))
    tokens = token_ids(loaded, PROMPT)

    def speed(gamma: float | None) -> float:
        decoder.set_gamma(gamma)
        decoder.length = PROMPT
        token = tokens[0]
        torch.cuda.synchronize()
        began = perf_counter()
        for _ in range(TOKENS):
            token = int(decoder.step(token).argmax())
        return TOKENS / (perf_counter() - began)

    decoder.prefill(tokens)
    for gamma in (None, GAMMA):
        speed(gamma)  # warms up
    speeds: dict[float | None, list[float]] = {None: [], GAMMA: []}
    for turn in range(TURNS):
        for gamma in (None, GAMMA) if turn % 2 else (GAMMA, None):
            speeds[gamma].append(speed(gamma))
    needed = bytes_a_token(loaded)
    file_bytes, cache = path.stat().st_size, decoder.cache_nbytes
    used, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    alone = {}
    for gamma in (None, GAMMA):
        decoder.set_gamma(gamma)

        def once() -> None:
            decoder.length = PROMPT
            decoder.step(1)

        alone[gamma] = device_seconds(once, 60)
    copies += copy_speeds(job.device)
    keep(measured("speed of a copy, bytes read and written", copies, "GB/s"))
    keep(measured("decoding without Θ", speeds[None], "tokens/s"))
    keep(measured(f"decoding with Θ of rank 4 in every layer of the blocks, γ {GAMMA}", speeds[GAMMA], "tokens/s"))
    read = [needed * tokens_a_second / 1e9 for tokens_a_second in speeds[None]]
    keep(measured(f"weights read: {needed / 1e9:.3f} GB a token", read, "GB/s"))
    share = [100 * gb / median(copies) for gb in read]
    keep(measured("share of the copy's speed", share, "%", at_least=SHARE))
    cost = [100 * (off / on - 1) for off, on in zip(speeds[None], speeds[GAMMA], strict=True)]
    keep(measured("Θ's cost in time, paired", cost, "%", at_most=COST))
    for gamma, seconds in alone.items():
        said = "without Θ" if gamma is None else "with Θ"
        keep(measured(f"a step {said} on the device alone", [1e3 * s for s in seconds], "ms"))
    keep(Figure("file", file_bytes / 1e9, "GB"))
    keep(Figure("KV cache", cache / 1e9, "GB"))
    bound = 100 * (MEMORY - 1)
    for name, peak in (("used by tensors", used), ("taken by torch", reserved)):
        more = 100 * (peak / (file_bytes + cache) - 1)
        keep(measured(f"most memory {name} ({peak / 1e9:.2f} GB), over file and cache", [more], "%", at_most=bound))


def steps(job: Job, keep: Keep) -> None:
    """Where a decode step's time goes: the kernels of a recorded step, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    _, decoder = _decoder(job)
    decoder.prefill([1] * PROMPT)
    for gamma in (None, GAMMA):
        said = "without Θ" if gamma is None else "with Θ"
        decoder.set_gamma(gamma)
        decoder.step(1)
        torch.cuda.synchronize()
        count = 10
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(count):
                decoder.length = PROMPT
                decoder.step(1)
            torch.cuda.synchronize()
        rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
        total = sum(row.self_device_time_total for row in rows) / count / 1e3
        keep(Figure(f"{said}: all kernels of a step", total, "ms", count))
        for row in rows[:8]:
            name = f"{said}: {row.key.partition('(')[0][:60]}, {row.count // count} a step"
            keep(Figure(name, row.self_device_time_total / count / 1e3, "ms", count))


def prompts(job: Job, keep: Keep) -> None:
    """Prompts through the model beside torch's float16 products of the same shapes alone, in turns."""
    loaded, decoder = _decoder(job)
    halves = {
        shape: torch.randn(shape, device=job.device, dtype=torch.float16) for shape in set(BLOCK_WEIGHTS.values())
    }
    for tokens in (128, 512, 2048):
        _prompt_of(token_ids(loaded, tokens), job.blocks, decoder, halves, keep)


def _prompt_of(
    ids: list[int], blocks: int, decoder: CudaGraphDecoder, halves: dict[tuple[int, int], Tensor], keep: Keep
) -> None:
    tokens = len(ids)
    x = {weight.shape[1]: weight.new_ones(tokens, weight.shape[1]) for weight in halves.values()}

    def products() -> None:
        for _ in range(blocks):
            for shape in BLOCK_WEIGHTS.values():
                F.linear(x[shape[1]], halves[shape])

    def ours(gamma: float | None) -> None:
        decoder.set_gamma(gamma)
        decoder.length = 0
        decoder.prefill(ids)

    arms: dict[str, Callable[[], None]] = {
        "torch": products,
        "without Θ": lambda: ours(None),
        "with Θ": lambda: ours(GAMMA),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(5):
        for name, work in arms.items():
            seconds[name] += device_seconds(work, 1)
    for name in ("without Θ", "with Θ"):
        keep(measured(f"{tokens} tokens {name}", [tokens / s for s in seconds[name]], "tokens/s"))
    keep(measured(f"{tokens} tokens, float16 products alone", [tokens / s for s in seconds["torch"]], "tokens/s"))
    ratio = [a / b for a, b in zip(seconds["torch"], seconds["without Θ"], strict=True)]
    keep(measured(f"{tokens} tokens, speed over that of the products alone", ratio, ""))
    cost = [100 * (a / b - 1) for a, b in zip(seconds["with Θ"], seconds["without Θ"], strict=True)]
    keep(measured(f"{tokens} tokens, Θ's cost in time, paired", cost, "%", at_most=COST))


def formats(job: Job, keep: Keep) -> None:
    """Each format's own speed: one input beside the copy, 512 inputs beside torch's bfloat16 product."""
    copy = median(copy_speeds(job.device, 5))
    m, n, tokens = 11008, DIM, 512
    many = torch.randn(tokens, n, device=job.device).bfloat16()
    dense = torch.randn(m, n, device=job.device).bfloat16()
    operations = 2e-12 * m * n * tokens
    speeds = [operations / s for s in device_seconds(lambda: F.linear(many, dense), 20)]
    keep(measured("bfloat16 by torch, 512 inputs", speeds, "TFLOP/s"))
    permuted, out = cuda.permute(torch.randn(1, n, device=job.device)), torch.empty(1, m, device=job.device)
    for qtype in FORMATS:
        packed = torch.from_numpy(random_bytes(qtype, (m, n)).reshape(-1)).to(job.device)
        weights = [
            planes.pack(packed, qtype, (m, n)) for _ in range(8)
        ]  # more bytes than an L2 holds, one after another
        seconds = _in_a_graph(lambda: [cuda.vector(w, permuted, out=out) for w in weights])  # noqa: B023
        shares = [100 * len(weights) * packed.nbytes / 1e9 / s / copy for s in seconds]
        keep(measured(f"{qtype.name}, one input", shares, "% of the copy's speed"))
        seconds = device_seconds(lambda: [cuda.matrix(w, many) for w in weights], 10)  # noqa: B023
        keep(measured(f"{qtype.name}, 512 inputs", [len(weights) * operations / s for s in seconds], "TFLOP/s"))


def _in_a_graph(work: Callable[[], object]) -> list[float]:
    """The device's seconds for work that is too short for Python to start it as fast as the device does it."""
    work()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return device_seconds(graph.replay, 20)


def bytes_a_token(loaded: LoadedModel) -> int:
    """Bytes of the file that a token reads: all but the embedding, of which it reads a row."""
    return sum(tensor.nbytes for name, tensor in loaded.tensors.items() if name != "token_embd.weight")


def _decoder(job: Job) -> tuple[LoadedModel, CudaGraphDecoder]:
    loaded = load_model(
        job.model(job.blocks), thetas=random_thetas(job.blocks), gamma=GAMMA, device=job.device, repack=True
    )
    decoder = make_decoder(loaded.model, 2048 + 64)
    assert isinstance(decoder, CudaGraphDecoder)
    return loaded, decoder


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nIt is a part of another command: python -m benchmarks.gpu --help")
