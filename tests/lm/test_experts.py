"""A mixture of experts: what a token's experts give, which weights are read, and that a fit learns through them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType as QType

from nkat.engine.decoder import make_decoder
from nkat.lm.activation import activate
from nkat.lm.architectures import ARCHITECTURES, STACKS
from nkat.lm.load import LoadedModel, load_model
from nkat.lm.transformer import Block
from nkat.sources.fit.layers import fitted_layers
from tests.support.tiny_models import write_tiny_model

IDS = torch.tensor([[(29 * i + 5) % 200 for i in range(24)]])

every_mixture = pytest.mark.parametrize("arch", ["qwen3moe", "gpt-oss"])


def load(folder: Path, arch: str, **options: object) -> LoadedModel:
    return load_model(write_tiny_model(folder / "tiny.gguf", arch), **options)


def dense(block: Block, x: torch.Tensor) -> torch.Tensor:
    """llama.cpp's formula over all experts: the softmax of all logits, of which the largest two are kept and divided by
    their sum."""
    experts = block.experts
    shares = experts.router(x).softmax(dim=-1)
    kept = shares >= shares.sort(dim=-1, descending=True).values[..., 1:2]
    shares = torch.where(kept, shares, 0.0)
    shares = shares / shares.sum(dim=-1, keepdim=True)
    gate, up, down = (experts.stack(name) for name in STACKS)
    outputs = [
        down.expert(i)(activate(block.config.architecture, gate.expert(i)(x), up.expert(i)(x))) for i in range(6)
    ]
    return sum(shares[..., i : i + 1] * output for i, output in enumerate(outputs))


@every_mixture
def test_a_mixture_is_its_definition(tmp_path, arch):
    block = load(tmp_path, arch, dtype=torch.float64).model.blocks[1]
    x = torch.randn(2, 7, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = block.experts(x), dense(block, x)
        assert (found - expected).abs().max() < 1e-12
        assert (found - dense(block, x.roll(1, dims=1))).abs().max() > 0.1


def test_the_clamped_activation_is_that_of_its_definition():
    gate, up = torch.tensor([-20.0, -1.0, 0.5, 30.0]), torch.tensor([-9.0, 0.25, 2.0, 8.0])
    below = torch.tensor([-20.0, -1.0, 0.5, 7.0])
    expected = below / (1 + torch.exp(-1.702 * below)) * (torch.tensor([-7.0, 0.25, 2.0, 7.0]) + 1)
    assert torch.allclose(activate(ARCHITECTURES["gpt-oss"], gate, up), expected, atol=1e-6)
    assert not torch.allclose(activate(ARCHITECTURES["qwen3moe"], gate, up), expected, atol=0.1)


@pytest.mark.parametrize("repack", [False, True])
def test_experts_that_no_token_goes_to_are_not_read(tmp_path, repack):
    """One token goes to two of six experts. The others are made numbers that would spoil everything they touch."""
    path = write_tiny_model(tmp_path / "tiny.gguf", "qwen3moe", blocks=1)
    loaded = load_model(path, repack=repack)
    decoder = make_decoder(loaded.model, 8)
    logits = decoder.step(7).clone()
    stacks = [loaded.model.blocks[0].experts.stack(name) for name in STACKS]
    if repack:
        assert all(int(stack.compiled.there.any(axis=1).sum()) == 2 for stack in stacks)
        return
    used = set(stacks[0]._layers)
    assert len(used) == 2
    assert all(set(stack._layers) == used for stack in stacks)
    for index, spoiled in ((i, stack) for i in range(6) if i not in used for stack in stacks):
        packed = spoiled.packed.clone()
        packed.view(6, -1)[index] = 0xFF  # NaN
        spoiled.packed = packed
        spoiled._layers.clear()
    decoder.length = 0
    assert torch.equal(decoder.step(7), logits)
    decoder.length = 0
    assert not all(decoder.step(token).isfinite().all() for token in range(6))  # others do go there


@every_mixture
def test_a_fit_learns_through_the_experts(tmp_path, arch):
    """Θ of attention before a mixture: a step along its gradient lowers the loss by what the gradient says."""
    model = load(tmp_path, arch, dtype=torch.float64).model
    generator = torch.Generator().manual_seed(0)
    start = {
        "blk.0.attn_v.weight": tuple(0.1 * torch.randn(64, 2, dtype=torch.float64, generator=generator) for _ in "pq")
    }
    with fitted_layers(model, start) as (layers, _):
        parameters = list(layers["blk.0.attn_v.weight"].parameters())

        def loss() -> torch.Tensor:
            return model.nll(model.hidden(IDS)[0, :-1], IDS[0, 1:]).mean()

        before = loss()
        gradients = torch.autograd.grad(before, parameters)
        size = sum(float(gradient.square().sum()) for gradient in gradients)
        step = 1e-4
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= step * gradient
            fallen = float(before - loss())
    assert fallen == pytest.approx(step * size, rel=0.05)


def test_mxfp4_experts_decode_by_the_compiled_program(tmp_path):
    types = {f"blk.{i}.{name}.weight": QType.MXFP4 for i in range(3) for name in STACKS}
    path = write_tiny_model(tmp_path / "tiny.gguf", "gpt-oss", feed_forward=64, qtypes=types)
    plain, repacked = load_model(path).model, load_model(path, repack=True).model
    decoder = make_decoder(repacked, 64)
    assert "compiled" in decoder.name
    with torch.inference_mode():
        expected = plain(IDS)[0, -1]
    assert (decoder.prefill(IDS[0].tolist()) - expected).abs().max() < 1e-4
