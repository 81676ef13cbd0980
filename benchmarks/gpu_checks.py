"""The parts of `benchmarks.gpu` that ask whether a GPU computes what it should: against float64, torch, and itself.

Each is a function of a `Job` and of what keeps its figures. The oracles are gguf-py's weights in float64 for products,
`nkat.engine.plan.TorchOps` for the operations of a decode step, and the model's own forward pass for whole steps.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from gguf.constants import GGMLQuantizationType as Q

from benchmarks.dequantise import random_rows
from benchmarks.gpu_figures import Figure, Keep, measured
from benchmarks.shapes import HALVES, tensor_types, write_shaped
from benchmarks.vit_step import make_step
from nkat.engine.cuda_graph import CudaGraphDecoder
from nkat.engine.eager import EagerDecoder
from nkat.engine.plan import decode_step, make_plan
from nkat.engine.step_check import ComparedOps
from nkat.kernels.cuda import linear as cuda
from nkat.kernels.cuda import planes
from nkat.lm.load import LoadedModel, load_model
from nkat.sources.fit.data import FitText, split_validation
from nkat.sources.fit.descent import FitData, FitSettings, Progress, fit, zero_start
from nkat.theta.algebra import Theta, quantise_factors
from nkat_vit.model import NKATViT, ViTConfig

RANK, GAMMA = 4, 0.9
_PICTURES = 512  # a batch of the image model
_SMALL_BLOCKS = 2  # of a model whose results are looked at and not its speed
_FAMILIES: dict[str, dict[str, int]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma3": {"blocks": 7, "sliding_window": 4},
}


@dataclass(frozen=True, slots=True)
class Job:
    """unit: which piece of the part; folder: for model files; blocks: of the 7B shape whose speed is measured"""

    unit: str
    device: torch.device
    folder: Path
    blocks: int

    def model(self, blocks: int) -> Path:
        """A 7B-shaped Q4_K_M file of so many blocks, written where it is not there yet."""
        path = self.folder / f"Q4_K_M-{blocks}.gguf"
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}.partial")
            write_shaped(partial, "Q4_K_M", blocks)
            partial.replace(path)
        return path


def random_thetas(blocks: int) -> dict[str, Theta]:
    """A random Θ for every layer of the blocks of a 7B shape."""
    generator = torch.Generator().manual_seed(0)
    thetas = {}
    for name, _, shape in tensor_types("Q4_K_M", blocks):
        if name.startswith("blk."):
            thetas[name] = quantise_factors(*(0.05 * torch.randn(2, max(shape), RANK, generator=generator)))
    return thetas


def random_bytes(qtype: Q, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A random weight as a file has it, uint8 [m, bytes of a row], each of whose blocks has scales of its own."""
    data = random_rows(qtype, *shape)
    blocks = data.reshape(-1, gguf.GGML_QUANT_SIZES[qtype][1])
    for at in HALVES[qtype]:
        scales = np.random.default_rng(seed + at).uniform(0.005, 0.02, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return data


def kernels(job: Job, keep: Keep) -> None:
    """One format (`job.unit`): few inputs, many, rows, Θ's term; at a size that fills no block, and at one of 7B."""
    qtype, device = Q[job.unit], job.device
    block = gguf.GGML_QUANT_SIZES[qtype][0]
    torch.manual_seed(0)
    for m, n in ((300, -(-768 // block) * block), (4096, 4096)):
        data = random_bytes(qtype, (m, n))
        values = torch.from_numpy(gguf.quants.dequantize(data, qtype)).to(device).double()
        weight = planes.pack(torch.from_numpy(data.reshape(-1)).to(device), qtype, (m, n))
        where = f"{qtype.name} {m}x{n}"
        difference = float((weight.dequantise().double() - values).abs().max())
        keep(measured(f"{where}, planes", [difference], "", at_most=0.0, target="exact"))
        ids = torch.tensor([7, 0, m - 1], device=device)
        difference = float((cuda.rows(weight, ids).double() - values[ids]).abs().max())
        keep(measured(f"{where}, rows", [difference], "", at_most=0.0, target="exact"))
        down, up = torch.randn(8, n, device=device), torch.randn(m, 8, device=device)
        strength = torch.full((1,), 0.125, device=device)
        for batch in (1, 3, 8, 40) if m < 4096 else (1, 208):
            few = batch <= cuda.VECTOR_BATCH
            x = torch.randn(batch, n, device=device).bfloat16()
            x = x.float() if few else x
            bound = x.abs().double() @ values.abs().T
            plain = cuda.linear(weight, x)
            term = 0.125 * (x.double() @ down.double().T) @ up.double().T
            most = 1e-6 if few else 2**-7
            error = float(((plain.double() - x.double() @ values.T).abs() / bound).max())
            keep(measured(f"{where}, {batch} inputs", [error], "of Σ|w||x|", at_most=most))
            exact = x.float()  # a result in bfloat16 would round what the term is added to
            found = cuda.linear(weight, exact, None, down, up, strength) - cuda.linear(weight, exact)
            error = float((found.double() - term).abs().max() / term.abs().max())
            most = 1e-4 if few else 2**-6
            keep(measured(f"{where}, {batch} inputs, Θ's term", [error], "of the largest", at_most=most))
            same = torch.equal(cuda.linear(weight, x, None, down, up, strength * 0), plain)
            keep(Figure(f"{where}, {batch} inputs, κ = 0", float(same), "", target="the same bits", met=same))


def step(job: Job, keep: Keep) -> None:
    """Every operation of some decode steps of one model (`job.unit`: tiny, or the 7B shape) beside plain torch."""
    name = job.unit
    if name in _FAMILIES:
        from tests.support.tiny_models import write_tiny_model

        path = write_tiny_model(job.folder / f"{name}.gguf", name, qtype=Q.Q8_0, **_FAMILIES[name])
    else:
        path = job.model(_SMALL_BLOCKS)
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        loaded = _with_theta(path, job.device, dtype)
        ops = ComparedOps(star=True)
        with torch.inference_mode():
            cache = loaded.model.new_cache(1, 200)
            ids = token_ids(loaded, 150)
            loaded.model(torch.tensor([ids[:140]], device=job.device), cache)
            plan = make_plan(loaded.model, cache)
            for position in range(140, 144):
                token, place = (torch.tensor([value], device=job.device) for value in (ids[position], position))
                decode_step(plan, ops, token, place)
        kind = str(dtype).removeprefix("torch.")
        for operation, error in ops.errors.items():
            keep(measured(f"{name}, {kind}: {operation}", [error], "of the largest", at_most=most))


def graph(job: Job, keep: Keep) -> None:
    """Recorded steps beside the model's own forward pass, with Θ at two strengths and without."""
    path = job.model(_SMALL_BLOCKS)
    thetas = random_thetas(_SMALL_BLOCKS)
    for dtype, most in ((torch.float32, 1e-3), (torch.bfloat16, 0.15)):
        kind = str(dtype).removeprefix("torch.")
        with _stopwatch(keep, f"{kind}: loading"):
            loaded = load_model(path, thetas=thetas, gamma=GAMMA, device=job.device, dtype=dtype, repack=True)
        eager = EagerDecoder(loaded.model, 128)
        with _stopwatch(keep, f"{kind}: making the graphs"):
            recorded = CudaGraphDecoder(loaded.model, 128)
        prompt = token_ids(loaded, 5)
        for gamma in (GAMMA, 0.5, None, GAMMA):
            errors, agreed, close = [], 0, 0
            for decoder in (eager, recorded):
                decoder.length = 0
                decoder.set_gamma(gamma)
            expected, found = eager.prefill(prompt), recorded.prefill(prompt)
            for _ in range(24):
                errors.append(float((found - expected).abs().max() / expected.std()))
                token, other = int(expected.argmax()), int(found.argmax())
                agreed += token == other
                close += bool(expected[token] - expected[other] <= 2 * most * expected.std())
                expected, found = eager.step(token), recorded.step(token)
            said = "without Θ" if gamma is None else f"γ {gamma}"
            keep(measured(f"{kind}, {said}: logits", errors, "of their spread", at_most=most))
            same = agreed == 24 if dtype == torch.float32 else close == 24
            asked = "all 24" if dtype == torch.float32 else "24 within the logits' error"
            keep(Figure(f"{kind}, {said}: greedy tokens", agreed, "of 24 equal", target=asked, met=same))


def prompt(job: Job, keep: Keep) -> None:
    """A prompt through the tensor cores' kernel beside the dequantised weights in float32, layer by layer and whole."""
    path, thetas = job.model(_SMALL_BLOCKS), random_thetas(_SMALL_BLOCKS)
    exact = load_model(path, thetas=thetas, gamma=GAMMA, device=job.device, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        kind = str(dtype).removeprefix("torch.")
        packed = load_model(exact, thetas=thetas, gamma=GAMMA, device=job.device, dtype=dtype, repack=True)
        for tokens in (7, 33, 70, 512):
            ids = torch.tensor([token_ids(exact, tokens)], device=job.device)
            with torch.inference_mode():
                expected, found = exact.model(ids)[0], packed.model(ids)[0]
            error = float((found - expected).norm() / expected.norm())
            keep(measured(f"{kind}, {tokens} tokens: logits", [error], "of their norm", at_most=0.03))


def learning(job: Job, keep: Keep) -> None:
    """Five steps of a fit on a text that repeats itself: the loss falls."""
    steps = 5
    loaded = load_model(job.model(_SMALL_BLOCKS), thetas={}, gamma=1.0, device=job.device, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(min(2000, loaded.config.vocab_size), (64,), generator=generator).repeat(96)
    text, validation = split_validation(FitText(tokens, torch.zeros(len(tokens), dtype=torch.bool), None), "text", 256)
    layers = loaded.model.star_linears()
    names = [name for name in layers if name.startswith("blk.")]
    starts = {"zero": zero_start([layers[name].shape for name in names], RANK, 0)}
    settings = FitSettings(RANK, 0.97, steps=steps, warmup=1, validate_every=steps)
    losses: list[float] = []
    seconds: list[float] = []
    last = time.perf_counter()

    def after_step(_: object, loss: float) -> None:
        nonlocal last
        losses.append(loss)
        seconds.append(time.perf_counter() - last)
        last = time.perf_counter()

    torch.cuda.reset_peak_memory_stats()
    fit(loaded.model, names, starts, FitData(text, validation), settings, Progress(after_step, lambda: False))
    keep(Figure("loss of the first step", losses[0], "nats a token"))
    fallen = losses[-1] < losses[0]
    keep(Figure(f"loss of step {steps}", losses[-1], "nats a token", target="below the first", met=fallen))
    keep(measured("speed, two blocks, 4 x 256 tokens", [1024 / s for s in seconds[1:-1]], "tokens/s"))
    keep(Figure("most memory", torch.cuda.max_memory_allocated() / 1e9, "GB"))


def image(job: Job, keep: Keep) -> None:
    """The image model's training step at STAGE2's size, bfloat16 autocast, as it is and compiled."""
    torch.manual_seed(0)
    batch = _PICTURES
    images = torch.rand(batch, 3, 32, 32, device=job.device)
    labels = torch.randint(10, (batch,), device=job.device)
    for name in ("as it is", "torch.compile"):
        model = NKATViT(ViTConfig()).to(job.device)
        model.eval()
        with torch.no_grad():
            before = F.cross_entropy(model(images)[0].float(), labels)
        compiled = torch.compile(model) if name == "torch.compile" else model
        take = make_step(compiled, images, labels, "bf16")  # type: ignore[arg-type]
        first = take()
        keep(Figure(f"{name}: first step", first, "s"))
        times = [take() for _ in range(25)]
        keep(measured(f"{name}: speed, batch {batch}", [batch / s for s in times[5:]], "pictures/s"))
        with torch.no_grad():
            after = F.cross_entropy(model.eval()(images)[0].float(), labels)
        keep(
            Figure(f"{name}: loss after 26 steps", float(after), "nats", target=f"below {float(before):.3f}",
                   met=bool(after < before))
        )  # fmt: skip


def _with_theta(path: Path, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    loaded = load_model(path, thetas={}, gamma=GAMMA, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    thetas = {}
    for i, (name, layer) in enumerate(loaded.model.star_linears().items()):
        p, q = 0.3 * torch.randn(2, max(layer.shape), 2 + i % 3, generator=generator) * (64 / max(layer.shape)) ** 0.5
        thetas[name] = quantise_factors(p, q)
    loaded.model.set_thetas(thetas)
    loaded.model.set_gamma(GAMMA)
    return loaded


def token_ids(loaded: LoadedModel, count: int) -> list[int]:
    """Some tokens of the vocabulary, the same every time."""
    return [(29 * i + 5) % min(loaded.config.vocab_size, 1000) for i in range(count)]


@contextlib.contextmanager
def _stopwatch(keep: Keep, name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    torch.cuda.synchronize()
    keep(Figure(name, time.perf_counter() - started, "s"))


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nIt is a part of another command: python -m benchmarks.gpu --help")
