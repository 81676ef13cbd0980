"""A mixture of experts: what a token's experts give, which weights are read, and that a fit learns through them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType as QType

from nkat.engine.decoder import make_decoder
from nkat.gguf.file import GGUFFile
from nkat.gguf.weights import read_weight
from nkat.lm.activation import activate
from nkat.lm.architectures import ARCHITECTURES, STACKS
from nkat.lm.experts import ExpertStack
from nkat.lm.load import LoadedModel, load_model
from nkat.lm.transformer import Block
from nkat.sources.fit.layers import fitted_layers
from nkat.sources.make import make_thetas
from nkat.sources.options import ThetaOptions
from nkat.sources.weight import factors_from_weight
from nkat.theta.algebra import Theta, coupling, low_rank_form, quantise_factors
from nkat.theta.layers import select_layers
from nkat.theta.modelfile import open_model_file
from tests.support.tiny_models import MIXTURE_FAMILIES, write_tiny_model

IDS = torch.tensor([[(29 * i + 5) % 200 for i in range(24)]])

FAMILIES = dict(MIXTURE_FAMILIES)
every_mixture = pytest.mark.parametrize("arch", FAMILIES)


def write(folder: Path, arch: str, **options: object) -> Path:
    return write_tiny_model(folder / "tiny.gguf", arch, **FAMILIES[arch], **options)


def load(folder: Path, arch: str, **options: object) -> LoadedModel:
    return load_model(write(folder, arch), **options)


def dense(block: Block, x: torch.Tensor) -> torch.Tensor:
    """llama.cpp's formula over all experts: the softmax of all logits, of which the largest two are kept and divided by
    their sum."""
    experts = block.experts
    shares = experts.router(x).softmax(dim=-1)
    kept = shares >= shares.sort(dim=-1, descending=True).values[..., 1:2]
    shares = torch.where(kept, shares, 0.0)
    shares = shares / shares.sum(dim=-1, keepdim=True)
    gate, up, down = (experts.stack(name) for name in STACKS)
    if down.scale is not None:
        shares = shares * down.scale
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
    path = write(tmp_path, "qwen3moe", blocks=1)
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
    """Θ of what is before a mixture: a step along its gradient lowers the loss by what the gradient says."""
    model = load(tmp_path, arch, dtype=torch.float64).model
    generator = torch.Generator().manual_seed(0)
    linears = model.star_linears()
    name = next(f"blk.0.{name}.weight" for name in ("attn_v", "ssm_out") if f"blk.0.{name}.weight" in linears)
    size = max(linears[name].shape)
    start = {name: tuple(0.1 * torch.randn(size, 2, dtype=torch.float64, generator=generator) for _ in "pq")}
    with fitted_layers(model, start) as (layers, _):
        parameters = list(layers[name].parameters())

        def loss() -> torch.Tensor:
            return model.nll(model.hidden(IDS)[0, :-1], IDS[0, 1:]).mean()

        before = loss()
        gradients = torch.autograd.grad(before, parameters)
        size = sum(float(gradient.square().sum()) for gradient in gradients)
        step = 1e-6  # so small that no token goes to another expert for it
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= step * gradient
            fallen = float(before - loss())
    assert fallen == pytest.approx(step * size, rel=0.05)


def test_mxfp4_experts_decode_by_the_compiled_program(tmp_path):
    types = {f"blk.{i}.{name}.weight": QType.MXFP4 for i in range(3) for name in STACKS}
    path = write(tmp_path, "gpt-oss", feed_forward=64, qtypes=types)
    plain, repacked = load_model(path).model, load_model(path, repack=True).model
    decoder = make_decoder(repacked, 64)
    assert "compiled" in decoder.name
    with torch.inference_mode():
        expected = plain(IDS)[0, -1]
    assert (decoder.prefill(IDS[0].tolist()) - expected).abs().max() < 1e-4


# --- Θ on experts

PATTERNS = ["blk.*.ffn_down_exps.weight", "blk.1.ffn_gate_exps.weight", "blk.0.attn_q*.weight"]


def with_theta(path: Path) -> tuple[GGUFFile, dict[str, Theta]]:
    file = GGUFFile.open(path)
    names = select_layers(file.tensors, PATTERNS)
    return file, make_thetas(file, names, ThetaOptions(rank=2))


@every_mixture
def test_each_expert_has_a_theta_of_its_own(tmp_path, arch):
    """The model with Θ is the model whose weights have it in them."""
    path = write(tmp_path, arch)
    file, thetas = with_theta(path)
    theta = thetas["blk.1.ffn_gate_exps.weight"]
    assert theta.p.shape == (6, 64, 2)
    alone = quantise_factors(*factors_from_weight(read_weight(file, "blk.1.ffn_gate_exps.weight")[4], 2))
    assert torch.equal(theta.expert(4).p, alone.p)
    kappa = coupling(0.9)
    plain = load_model(path, dtype=torch.float64).model
    star = load_model(path, thetas=thetas, gamma=0.9, dtype=torch.float64).model
    merged = load_model(path, dtype=torch.float64, keep_dense=True).model
    for name, layer in merged.multipliers().items():
        if name in thetas and isinstance(layer, ExpertStack):
            for i in range(6):
                down, up = low_rank_form(*thetas[name].expert(i).factors(torch.float64), *layer.shape[1:])
                layer.expert(i).dense += kappa * up @ down / (1.0 if layer.scale is None else layer.scale[i])
        elif name in thetas:
            down, up = low_rank_form(*thetas[name].factors(torch.float64), *layer.shape)
            layer.dense += kappa * up @ down
    with torch.inference_mode():
        assert (star(IDS) - merged(IDS)).abs().max() < 1e-9
        assert (star(IDS) - plain(IDS)).abs().max() > 1e-3
        star.set_gamma(None)
        assert torch.equal(star(IDS), plain(IDS))


def test_theta_of_experts_decodes_without_the_compiled_program(tmp_path, capfd):
    path = write(tmp_path, "qwen3moe")
    _, thetas = with_theta(path)
    star = load_model(path, thetas=thetas, gamma=0.9, repack=True).model
    decoder = make_decoder(star, 64)
    assert "no Θ on experts" in capfd.readouterr().err
    with torch.inference_mode():
        expected = load_model(path, thetas=thetas, gamma=0.9).model(IDS)[0, -1]
    assert (decoder.prefill(IDS[0].tolist()) - expected).abs().max() < 1e-4
    star.set_thetas({})
    assert "compiled" in make_decoder(star, 64).name


def test_theta_of_experts_through_a_file_and_an_adapter(tmp_path, script, fails):
    path = write(tmp_path, "qwen3moe")
    convert = ["--input", path, "--output", tmp_path / "tiny.nkat", "--export-lora", tmp_path / "lora.gguf"]
    arguments = [*convert, "--theta-rank", 2, "--theta-gamma", 0.9, "--selective-layers", *PATTERNS]
    done = script("nkat_gguf_converter.py", *arguments)
    assert done.returncode == 0, done.stderr
    _, thetas = with_theta(path)
    read = open_model_file(tmp_path / "tiny.nkat").theta
    assert read.layers.keys() == thetas.keys()
    assert all(torch.equal(read.layers[name].p, thetas[name].p) for name in thetas)
    whole, of_attention = sum(t.nbytes for t in thetas.values()), thetas["blk.0.attn_q.weight"].nbytes
    assert read.bytes_per_token(1 / 3) == of_attention + (whole - of_attention) // 3
    adapter = GGUFFile.open(tmp_path / "lora.gguf")
    name = "blk.2.ffn_down_exps.weight"
    down, up = (read_weight(adapter, name + suffix) for suffix in (".lora_a", ".lora_b"))
    assert (down.shape, up.shape) == ((6, 4, 48), (6, 64, 4))
    term_down, term_up = low_rank_form(*thetas[name].expert(5).factors(), 64, 48)
    assert torch.allclose(up[5] @ down[5], coupling(0.9) * term_up @ term_down, atol=2e-5)  # float16
    only_weight = r"blk\.0\.ffn_down_exps\.weight: Θ of a mixture's experts comes of their weights alone"
    text = tmp_path / "text.txt"
    text.write_text("the rain in a tin " * 100)
    more = ["--calibrate", text]
    for source in (["fit", *more], ["residual", "--reference", path, *more]):
        assert re.search(only_weight, fails("nkat_gguf_converter.py", *arguments, "--force", "--theta-source", *source))
    merging = "--input", tmp_path / "tiny.nkat", "--merge", tmp_path / "merged.gguf"
    assert "--merge cannot put Θ into a mixture's experts" in fails("nkat_gguf_converter.py", *merging)
