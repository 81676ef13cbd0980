"""A part of `benchmarks.gpu`: the checks at a kernel's first use pass here, they find a fault, and what they cost."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gguf.constants import GGMLQuantizationType as Q

from benchmarks.gpu_checks import GAMMA, Job, random_bytes, random_thetas, token_ids
from benchmarks.gpu_figures import Figure, Keep, measured
from nkat.engine import decoder
from nkat.engine.cuda_graph import CudaGraphDecoder
from nkat.engine.eager import EagerDecoder
from nkat.kernels.cuda import first_use, step_kernels
from nkat.kernels.cuda import matmul as cuda_matmul
from nkat.kernels.cuda.packing import pack
from nkat.kernels.cuda.planes import PlaneWeight
from nkat.lm.load import LoadedModel, load_model

_BLOCKS = 2


def checks(job: Job, keep: Keep) -> None:
    """A format; a 7B shape from file to first token, with and without checks; a kernel that is wrong on purpose."""
    _fresh_caches(job, "first")
    if job.unit.startswith("7B"):
        _model(job, keep)
    elif job.unit == "wrong product":
        _planted(job, keep, cuda_matmul, "vector_kernel", 0, "for Q4_K")
    elif job.unit == "wrong step":
        _planted(job, keep, step_kernels, "combine_kernel", 3, "decode step")
    else:
        _format(job, keep)


def _fresh_caches(job: Job, name: str) -> None:
    """As on a machine where nothing was ever run."""
    folder = job.folder / f"{job.unit} {name}".replace(" ", "-")
    folder.mkdir(mode=0o700)
    os.environ["NKAT_CACHE"] = str(folder / "nkat")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    first_use.verdicts.clear()


def _format(job: Job, keep: Keep) -> None:
    qtype, shape = Q[job.unit], (4096, 4096)
    packed = torch.from_numpy(random_bytes(qtype, shape).reshape(-1)).to(job.device)

    def timed() -> tuple[float, bool, str]:
        torch.cuda.synchronize()
        with contextlib.redirect_stderr(io.StringIO()) as said:
            started = time.perf_counter()
            weight = pack(packed, qtype, shape)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        return seconds, isinstance(weight, PlaneWeight), said.getvalue().strip()

    first, passed, said = timed()
    keep(Figure(f"{qtype.name}: checked, {said or 'nothing said'}", float(passed), "", target="no fault", met=passed))
    first_use.verdicts.clear()
    again, _, _ = timed()
    keep(Figure(f"{qtype.name}: first check, all compiled anew", first - again, "s"))
    _fresh_caches(job, "compiled")
    compiled, _, _ = timed()
    keep(measured(f"{qtype.name}: first check, compiled before", [compiled - again], "s", at_most=2.0))


def _model(job: Job, keep: Keep) -> None:
    if job.unit.endswith("unchecked"):
        first_use.works = lambda *_: True  # type: ignore[assignment]
    path = job.model(_BLOCKS)
    started = time.perf_counter()
    loaded, made, said = _load(lambda: load_model(path, thetas=random_thetas(_BLOCKS), gamma=GAMMA, **_place(job)))
    keep(Figure(f"{job.unit}: from file to decoder, nothing compiled before", time.perf_counter() - started, "s"))
    right = isinstance(made, CudaGraphDecoder) and not said
    keep(Figure(f"{job.unit}: {said or 'nothing said'}", float(right), "", target="a recorded step", met=right))
    first_use.verdicts.clear()
    del loaded, made
    started = time.perf_counter()
    _load(lambda: load_model(path, thetas=random_thetas(_BLOCKS), gamma=GAMMA, **_place(job)))
    keep(Figure(f"{job.unit}: the same again", time.perf_counter() - started, "s"))


def _planted(job: Job, keep: Keep, module: Any, kernel: str, result: int, named: str) -> None:
    path = job.model(_BLOCKS)
    exact = load_model(path, device=job.device, dtype=torch.float32)
    ids = token_ids(exact, 6)
    expected = [EagerDecoder(exact.model, 16).prefill(ids[:count]) for count in (5, 6)]
    for turn in ("found", "kept"):
        with _wrong(module, kernel, result):
            loaded, made, said = _load(lambda: load_model(path, **_place(job)))
            found = [made.prefill(ids[:5]), made.step(ids[5]).clone()]
        one_line = said.count("\n") == 0 and named in said
        keep(Figure(f"{job.unit}, {turn}: {said}", float(one_line), "", target="one line that says so", met=one_line))
        errors = [float((f - e).abs().max() / e.std()) for f, e in zip(found, expected, strict=True)]
        keep(measured(f"{job.unit}, {turn}: logits", errors, "of their spread", at_most=0.15))
        first_use.verdicts.clear()
        del loaded, made


def _place(job: Job) -> dict[str, Any]:
    return {"device": job.device, "dtype": torch.bfloat16, "repack": True}


def _load(load: Callable[[], LoadedModel]) -> tuple[LoadedModel, decoder.Decoder, str]:
    """A model, its decoder, and what was said about kernels on the way."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        loaded = load()
        made = decoder.make_decoder(loaded.model, 128)
        torch.cuda.synchronize()
    return loaded, made, said.getvalue().strip()


@dataclass(frozen=True, slots=True)
class _Wrong:
    """A kernel whose result, the argument of this number, is wrong in one place: that of 4 bits, if it has bits."""

    kernel: Any
    result: int

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            self.kernel[grid](*arguments, **keywords)
            if keywords.get("bits", 4) == 4:
                arguments[self.result].view(-1)[:1].add_(1.0)

        return launch


@contextlib.contextmanager
def _wrong(module: Any, kernel: str, result: int) -> Iterator[None]:
    before = getattr(module, kernel)
    setattr(module, kernel, _Wrong(before, result))
    try:
        yield
    finally:
        setattr(module, kernel, before)


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nIt is a part of another command: python -m benchmarks.gpu --help")
