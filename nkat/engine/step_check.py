"""Whether the operations of a decode step do on this GPU what plain torch does: before they are recorded, once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nkat.engine.plan import TorchOps
from nkat.kernels.cuda import first_use
from nkat.kernels.cuda import linear as cuda
from nkat.kernels.cuda.planes import FORMATS, FileWeight, PackedWeight
from nkat.kernels.cuda.step import Attention, Input, Siblings, TritonOps
from nkat.lm.attention import query_scales
from nkat.lm.transformer import Transformer

_MOST_CAPACITY = 4096  # of a check: the attention's parts are as many as for any larger one
_TOLERANCE = {torch.float32: 1e-4}  # of the largest number; a 16-bit cache rounds what is attended to
_HALF_TOLERANCE = 2e-2


def step_works(model: Transformer, capacity: int) -> bool:
    """Whether a step of this model, with the Θ that it has now, may run on the kernels; says so where it may not.

    One whose weights are left to the reference is not recorded either: then nothing but torch runs.
    """
    layers = model.star_linears().values()
    if any(isinstance(layer.device_weight, FileWeight) and layer.qtype in FORMATS for layer in layers):
        return False  # which was said when they were loaded
    rank = max((layer.terms for layer in layers), default=0)
    config, dtype = model.config, str(model.output.dtype).removeprefix("torch.")
    name = (
        f"step {config.architecture.name} {config.embedding_length} {config.feed_forward_length} "
        f"{config.head_count}/{config.kv_head_count}x{config.head_dim} {dtype} rank {rank}"
    )
    what = "the CUDA kernels of a decode step"
    return first_use.works(name, what, model.device, lambda: check_step(model, min(capacity, _MOST_CAPACITY), rank))


def check_step(model: Transformer, capacity: int, rank: int) -> str | None:
    """How the operations between a step's multiplications differ from torch on random numbers, if they do."""
    ops = random_step(model, capacity, rank)
    for operation, error in ops.errors.items():
        exact = not operation.startswith("attend")
        tolerance = 1e-4 if exact else _TOLERANCE.get(model.output.dtype, _HALF_TOLERANCE)
        if not error <= tolerance:  # NaN is not
            return f"{operation} differs from the reference by {error:.2g} of the largest number"
    return None


def random_step(model: Transformer, capacity: int, rank: int) -> ComparedOps:
    """The operations in the sizes of this model, each run on random numbers and compared."""
    config, device = model.config, model.device
    architecture = config.architecture
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator)

    def readers(inputs: int, count: int) -> Siblings:
        down = random(count * rank, inputs).to(model.output.dtype) if rank else None
        return Siblings((), inputs, 0, rank, down, torch.ones(count, device=device))

    d, ff, heads, head_dim = config.embedding_length, config.feed_forward_length, config.head_count, config.head_dim
    ops = ComparedOps(star=rank > 0)
    branch_weight = random(d) if architecture.post_norm else None
    ops.norm(random(d), None, None, random(d), config.rms_epsilon, readers(d, 3))
    ops.norm(random(d), random(d), branch_weight, random(d), config.rms_epsilon, readers(d, 2))
    ops.activate(random(2 * ff), architecture.gelu, readers(ff, 1))
    keys, values = random(2, config.kv_head_count, capacity, head_dim).to(model.output.dtype)
    attention = Attention(
        heads=heads,
        scale=config.attention_scale,
        window=0,
        interleaved=config.rope.interleaved,
        epsilon=config.rms_epsilon,
        q_norm=random(head_dim) if architecture.qk_norm else None,
        k_norm=random(head_dim) if architecture.qk_norm else None,
        cos=random(capacity, len(model.frequencies)),
        sin=random(capacity, len(model.frequencies)),
        keys=keys,
        values=values,
        cap=config.attention_cap,
        warmth=None if query_scales(config, 0, capacity) is None else 1.0 + random(capacity).abs(),
    )
    windows = {0, config.sliding_window} if any(config.local_blocks) else {0}
    for window in sorted(windows):
        for place in (0, capacity // 3, capacity - 1):
            position = torch.tensor([place], device=device)
            qkv = random((heads + 2 * config.kv_head_count) * head_dim)
            ops.attend(qkv, replace(attention, window=window), position, readers(heads * head_dim, 1))
    return ops


class ComparedOps:
    """The operations by Triton, each compared with what plain torch makes of the same inputs.

    errors: by operation, the largest difference as a share of the largest number
    """

    def __init__(self, star: bool) -> None:
        self.star = star
        self.triton, self.torch = TritonOps(star), TorchOps(star)
        self.errors: dict[str, float] = {}

    def embed(self, weight: PackedWeight, token: Tensor, scale: float) -> Tensor:
        found = self.triton.embed(weight, token, scale)
        return self._seen("embed", found, self.torch.embed(weight, token, scale))

    def norm(
        self,
        x: Tensor,
        branch: Tensor | None,
        branch_weight: Tensor | None,
        weight: Tensor,
        epsilon: float,
        readers: Siblings,
    ) -> tuple[Tensor, Input]:
        total, found = self.triton.norm(x, branch, branch_weight, weight, epsilon, readers)
        expected_total, expected = self.torch.norm(x, branch, branch_weight, weight, epsilon, readers)
        return self._seen("norm, sum", total, expected_total), self._input("norm", found, expected)

    def linear(self, siblings: Siblings, x: Input) -> Tensor:
        return self._seen("linear", self.triton.linear(siblings, x), self.torch.linear(siblings, x))

    def attend(self, qkv: Tensor, attention: Attention, position: Tensor, readers: Siblings) -> Input:
        mine = replace(attention, keys=attention.keys.clone(), values=attention.values.clone())
        expected = self.torch.attend(qkv, mine, position, readers)
        found = self.triton.attend(qkv, attention, position, readers)
        self._seen("attend, keys", attention.keys, mine.keys)
        self._seen("attend, values", attention.values, mine.values)
        return self._input("attend", found, expected)

    def activate(self, gate_up: Tensor, gelu: bool, readers: Siblings) -> Input:
        return self._input(
            "activate", self.triton.activate(gate_up, gelu, readers), self.torch.activate(gate_up, gelu, readers)
        )

    def _input(self, name: str, found: Input, expected: Input) -> Input:
        self._seen(name, found.natural, expected.natural)
        whole = found.natural[None, : len(found.natural) // 32 * 32]
        if whole.shape[1] == len(found.natural):
            self._seen(f"{name}, permuted", found.permuted, cuda.permute(whole))
        if found.inner is not None and expected.inner is not None:
            self._seen(f"{name}, Θ's products", found.inner.sum(dim=2), expected.inner.sum(dim=2))
        return found

    def _seen(self, name: str, found: Tensor, expected: Tensor) -> Tensor:
        largest = expected.double().abs().max().clamp_min(1e-30)
        error = float((found.double() - expected.double()).abs().max() / largest)
        before = self.errors.get(name, 0.0)
        self.errors[name] = error if not error <= before else before  # NaN stays
        return found
