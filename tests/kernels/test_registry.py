"""Which types each device has a kernel for, and what becomes of a model with one of the others.

The tests of the fall-back take away some of the CPU's kernels, which has one for every type.
"""

from __future__ import annotations

import json
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType as QType

from nkat.engine.compiled import CompiledDecoder
from nkat.engine.decoder import make_decoder
from nkat.engine.eager import EagerDecoder
from nkat.engine.generate import Sampler, Sampling, generate
from nkat.gguf.formats import SUPPORTED_TYPES
from nkat.kernels import registry
from nkat.kernels.cpu.formats import BLOCK_LAYOUTS
from nkat.kernels.cpu.matmul import FLOAT_TYPES
from nkat.kernels.cuda.planes import FORMATS
from nkat.kernels.registry import DEVICES, kernel_types, say_fallbacks
from nkat.lm import load
from nkat.lm.linear import StarLinear
from nkat.lm.load import LoadedModel, load_model
from nkat.lm.request import Request
from nkat.lm.transformer import Embedding, Transformer
from nkat.measure import startup
from nkat.measure.layer_speed import bench_gemm
from nkat.theta.algebra import quantise_factors
from tests.support.random_blocks import UNKNOWN
from tests.support.tiny_models import write_tiny_model

ENGINE = "nkat_inference_engine.py"

# A new type gets a line here. A device that is left out of it runs the type on the reference.
KERNELS = {
    QType.F32: {"cpu"},
    QType.F16: {"cpu"},
    QType.BF16: {"cpu"},
    QType.Q4_0: {"cpu", "cuda"},
    QType.Q4_1: {"cpu", "cuda"},
    QType.Q5_0: {"cpu", "cuda"},
    QType.Q5_1: {"cpu", "cuda"},
    QType.Q8_0: {"cpu", "cuda"},
    QType.Q2_K: {"cpu", "cuda"},
    QType.Q3_K: {"cpu", "cuda"},
    QType.Q4_K: {"cpu", "cuda"},
    QType.Q5_K: {"cpu", "cuda"},
    QType.Q6_K: {"cpu", "cuda"},
    QType.IQ4_NL: {"cpu", "cuda"},
    QType.IQ4_XS: {"cpu", "cuda"},
    QType.MXFP4: {"cpu"},
    QType.NVFP4: {"cpu"},
    QType.TQ1_0: {"cpu"},
    QType.TQ2_0: {"cpu"},
    QType.IQ1_S: {"cpu"},
    QType.IQ1_M: {"cpu"},
    QType.IQ2_XXS: {"cpu"},
    QType.IQ2_XS: {"cpu"},
    QType.IQ2_S: {"cpu"},
    QType.IQ3_XXS: {"cpu"},
    QType.IQ3_S: {"cpu"},
}

# where the types without a kernel are: (types by tensor, further options of the tiny model, types, tensors)
PLACES = {
    "a linear layer": ({"blk.1.ffn_down.weight": QType.Q4_1}, {}, "Q4_1", 1),
    "the embedding": ({"token_embd.weight": QType.Q4_1}, {}, "Q4_1", 1),
    "the output layer": ({"output.weight": QType.Q4_1}, {}, "Q4_1", 1),
    "embedding and output in one": ({"token_embd.weight": QType.Q4_1}, {"tied": True}, "Q4_1", 1),
    "two types": (
        {"blk.0.attn_q.weight": QType.Q5_0, "blk.2.attn_k.weight": QType.Q4_1, "output.weight": QType.Q4_1},
        {},
        "Q4_1, Q5_0",
        3,
    ),
    "float weights": ({"blk.1.attn_v.weight": QType.F16}, {}, "F16", 1),
}
PROMPT = "the rain in a tin"
IDS = [(29 * i + 5) % 200 for i in range(20)]

every_place = pytest.mark.parametrize("place", PLACES)


# --- the table


def test_every_supported_type_is_in_the_table():
    assert KERNELS.keys() == SUPPORTED_TYPES


@pytest.mark.parametrize("device", DEVICES)
def test_each_device_has_the_kernels_of_the_table(device):
    assert kernel_types(device) == {qtype for qtype, devices in KERNELS.items() if device in devices}


# --- the fall-back


@pytest.fixture
def fewer_kernels(monkeypatch):
    """Takes the CPU's kernels for Q4_1, Q5_0 and F16 away."""
    monkeypatch.delitem(BLOCK_LAYOUTS, QType.Q4_1)
    monkeypatch.delitem(BLOCK_LAYOUTS, QType.Q5_0)
    monkeypatch.delitem(FLOAT_TYPES, QType.F16)
    registry._say.cache_clear()


def tiny(folder: Path, place: str) -> Path:
    qtypes, options, _, _ = PLACES[place]
    return write_tiny_model(folder / "tiny.gguf", "llama", qtype=QType.Q8_0, qtypes=qtypes, **options)


def line(place: str, device: str = "CPU") -> str:
    """What stderr is to say."""
    _, _, types, count = PLACES[place]
    subject = "1 tensor runs" if count == 1 else f"{count} tensors run"
    return f"no {device} kernel for {types}: {subject} on the reference, unpacked anew at every use, which is slower\n"


def with_theta(path: Path, **options: Any) -> LoadedModel:
    loaded = load_model(path, **options)
    generator = torch.Generator().manual_seed(0)
    loaded.model.set_thetas(
        {
            name: quantise_factors(*torch.randn(2, max(layer.shape), 3, generator=generator))
            for name, layer in loaded.model.star_linears().items()
        }
    )
    loaded.model.set_gamma(0.99)
    return loaded


def eager(loaded: LoadedModel, ids: list[int]) -> torch.Tensor:
    return EagerDecoder(loaded.model, len(ids)).prefill(ids)


@every_place
def test_a_model_with_a_type_without_a_kernel_runs_on_the_reference(tmp_path, capsys, fewer_kernels, place):
    path = tiny(tmp_path, place)
    loaded = with_theta(path, repack=True)
    made = make_decoder(loaded.model, len(IDS))
    assert isinstance(made, EagerDecoder)
    assert capsys.readouterr().err == line(place)
    for layer in loaded.model.star_linears().values():  # the others keep their kernels
        assert (layer.compiled is None) == (layer.qtype not in kernel_types("cpu"))
    reference = with_theta(path)
    result = made.prefill(IDS[:12])
    assert float((result - eager(reference, IDS[:12])).abs().max()) < 3e-4
    assert float((result - eager(reference, IDS[1:12])).abs().max()) > 0.1
    for token in IDS[12:]:
        result = made.step(token)
    assert float((result - eager(reference, IDS)).abs().max()) < 3e-4
    assert capsys.readouterr().err == ""


@every_place
def test_with_its_kernels_the_same_model_is_compiled_and_nothing_is_said(tmp_path, capsys, place):
    loaded = load_model(tiny(tmp_path, place), repack=True)
    assert isinstance(make_decoder(loaded.model, 8), CompiledDecoder)
    assert capsys.readouterr().err == ""


def test_the_reference_rounds_inputs_where_the_kernels_do(tmp_path, fewer_kernels):
    path = tiny(tmp_path, "two types")
    mixed = eager(load_model(path, repack=True, int8_activations=True), IDS)
    rounded = eager(load_model(path, int8_activations=True), IDS)
    exact = eager(load_model(path), IDS)
    assert float((mixed - rounded).abs().max()) < 0.1 * float((exact - rounded).abs().max())


def test_a_single_layer_falls_back(fewer_kernels):
    packed = torch.randn(48, 64).half().view(torch.uint8).view(-1)
    layers = [StarLinear(packed, QType.F16, (48, 64)) for _ in range(2)]
    layers[1].repack()
    assert layers[1].compiled is None
    x = torch.randn(2, 3, 64)
    assert torch.equal(layers[0](x), layers[1](x))


@every_place
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_generation_by_the_command_line(script, tmp_path, fewer_kernels, place, activations):
    path = tiny(tmp_path, place)
    flags = ("--generate", PROMPT, "--max-tokens", 12, "--temperature", 0, "--activations", activations)
    done = script(ENGINE, "--model", path, *flags, "--no-cuda", "--json", "-")
    assert done.returncode == 0, done.stderr
    said, speed = done.stderr.splitlines(keepends=True)
    assert said == line(place)
    assert speed.startswith("prompt ")
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["decoder"] == EagerDecoder.name
    loaded = load_model(path, int8_activations=activations == "int8")
    prompt = loaded.tokenizer.encode(PROMPT, add_special=True)
    greedy = Sampler(Sampling(temperature=0), 0)
    decoder = EagerDecoder(loaded.model, len(prompt) + 12)
    expected = generate(decoder, loaded.tokenizer, prompt, greedy, max_tokens=12, on_text=lambda piece: None)
    assert record["tokens"] == expected.tokens
    assert len(set(expected.tokens)) > 3


def test_layers_without_a_kernel_can_be_timed(tmp_path, fewer_kernels):
    model = load_model(tiny(tmp_path, "two types"), repack=True).model
    types = {row.kind.type for row in bench_gemm(model, None, repetitions=1, batches=(1,))}
    assert types == {"Q4_1", "Q5_0", "Q8_0"}


def test_a_type_that_cannot_be_unpacked_is_an_error_of_one_line(fails, tmp_path):
    options = {"embedding": 256, "feed_forward": 256, "qtype": UNKNOWN}
    path = write_tiny_model(tmp_path / "unknown.gguf", "llama", **options)
    message = fails(ENGINE, "--model", path, "--generate", PROMPT, "--no-cuda")
    assert message.endswith("tensor token_embd.weight has the type Q8_K, which is not supported")


def test_a_run_that_loads_twice_says_it_once(tmp_path, capsys, fewer_kernels):
    for _ in range(2):
        load_model(tiny(tmp_path, "two types"), repack=True)
    assert capsys.readouterr().err == line("two types")


def test_the_process_that_measures_loading_leaves_it_to_its_caller(tmp_path, capsys, fewer_kernels):
    receiver, sender = Pipe(duplex=False)
    startup._answer(sender, Request(tiny(tmp_path, "two types"), repack=True), PROMPT, 1)
    assert isinstance(receiver.recv(), startup.Startup)
    assert capsys.readouterr().err == ""


def test_a_gpu_says_it_in_the_same_way(tmp_path, capsys, monkeypatch):
    """Loading as far as a machine without a GPU can go: the weights stay where they are."""
    monkeypatch.delitem(FORMATS, QType.Q4_1)
    monkeypatch.delitem(FORMATS, QType.Q5_0)
    registry._say.cache_clear()
    loaded = load_model(tiny(tmp_path, "two types"))
    monkeypatch.setattr(Transformer, "device", torch.device("cuda"))
    for kind in (StarLinear, Embedding):
        monkeypatch.setattr(kind, "repack", lambda *arguments: None)
    load._repack(loaded.model, loaded.gguf, loaded.tensors)
    assert capsys.readouterr().err == line("two types", "CUDA")


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_said_of_types_with_a_kernel(capsys, device):
    registry._say.cache_clear()
    say_fallbacks(device, [qtype for qtype, devices in KERNELS.items() if device in devices])
    say_fallbacks(device, [])
    assert capsys.readouterr().err == ""
