"""The CUDA path where no GPU is: planes, the decode step in plain torch, the compiled kernels' code, and errors.

The kernels' arithmetic is tested by `tests/support/interpreted_kernels.py`, which needs Triton's interpreter and so a
process of its own; one test here runs it. Tests marked `gpu` need the real thing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as QType
from torch import Tensor

from nkat.engine.cuda_graph import CudaGraphDecoder, StaticDecoder
from nkat.engine.plan import TorchOps, decode_step, make_plan
from nkat.errors import NKATError
from nkat.gguf.formats import QuantError, dequantise, packed_nbytes
from nkat.kernels.cuda import linear as cuda
from nkat.kernels.cuda import matmul as cuda_matmul
from nkat.kernels.cuda import packing, planes, step_kernels
from nkat.kernels.cuda import triton as optional_triton
from nkat.kernels.cuda.planes import FORMATS
from nkat.kernels.cuda.step import TritonOps
from nkat.lm.architectures import ARCHITECTURES
from nkat.lm.config import ModelConfig
from nkat.lm.linear import StarLinear
from nkat.lm.load import LoadedModel, load_model
from nkat.lm.rope import Rope
from nkat.lm.transformer import Block, Embedding, Transformer
from nkat.theta.algebra import Theta, quantise_factors
from tests.conftest import ROOT
from tests.gguf.test_formats import HALVES, oracle, random_rows
from tests.support.tiny_models import FURTHER_FAMILIES, write_tiny_model

needs_triton = pytest.mark.skipif(optional_triton.triton is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
every_format = pytest.mark.parametrize("qtype", FORMATS, ids=lambda qtype: qtype.name)
FAMILIES = [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("gemma3", {"blocks": 7, "sliding_window": 4})]
FAMILIES += [(arch, options) for arch, options in FURTHER_FAMILIES if ARCHITECTURES[arch].has_gpu_step]
IDS = [(29 * i + 5) % 200 for i in range(12)]


def packed_weight(qtype: QType, m: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(the file's bytes of a random weight, its values in float64 by gguf-py); scales are like a real model's."""
    data = random_rows(qtype, (m, n), seed)
    blocks = data.reshape(-1, gguf.GGML_QUANT_SIZES[qtype][1])
    for start in HALVES[qtype]:
        scales = np.random.default_rng(seed + 1).uniform(0.005, 0.02, len(blocks)).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(data.reshape(-1)), torch.from_numpy(oracle(data, qtype)).double()


def row_length(qtype: QType, chunks: int = 8) -> int:
    """At least `chunks` chunks, and whole blocks."""
    block = gguf.GGML_QUANT_SIZES[qtype][0]
    return -(-chunks * 32 // block) * block


# --- planes


@every_format
def test_planes_hold_the_same_weights_bit_by_bit(qtype):
    n = row_length(qtype, 3)  # rows of an odd number of chunks, where the format has such
    packed, _ = packed_weight(qtype, 5, n)
    expected = dequantise(packed, qtype, (5, n))
    weight = planes.pack(packed, qtype, (5, n))
    assert torch.equal(weight.dequantise(), expected)
    assert torch.equal(weight.rows(1, 4).rows(1, 2).dequantise(), expected[2:3])
    other, _ = packed_weight(qtype, 3, n, seed=5)
    joint = planes.concatenate([weight, planes.pack(other, qtype, (3, n))])
    assert torch.equal(joint.rows(3, 6).dequantise(), torch.cat([expected, dequantise(other, qtype, (3, n))])[3:6])
    assert not torch.equal(joint.rows(2, 5).dequantise(), joint.rows(3, 6).dequantise())
    again = planes.concatenate([joint.rows(1, 3), joint.rows(3, 7)])
    assert again.low is joint.low  # neighbours need no copy
    assert torch.equal(again.dequantise(), joint.dequantise()[1:7])
    swapped = planes.concatenate([joint.rows(3, 7), joint.rows(1, 3)])
    assert torch.equal(swapped.dequantise(), joint.dequantise()[[3, 4, 5, 6, 1, 2]])


@every_format
def test_planes_take_hardly_more_memory_than_the_file(qtype):
    packed, _ = packed_weight(qtype, 6, 512)
    weight = planes.pack(packed, qtype, (6, 512))
    more = {QType.Q3_K: 4 / 110, QType.Q4_K: 4 / 144, QType.Q5_K: 4 / 176, QType.IQ4_XS: 2 / 136}.get(qtype, 0.0)
    assert weight.nbytes == round(packed.nbytes * (1 + more))
    assert weight.rows(2, 5).nbytes * 2 == weight.nbytes


def test_packing_in_tiles_changes_nothing(monkeypatch):
    packed, _ = packed_weight(QType.Q5_K, 7, 512)
    whole = planes.pack(packed, QType.Q5_K, (7, 512))
    monkeypatch.setattr(planes, "_TILE", 3 * 256)
    tiled = planes.pack(packed, QType.Q5_K, (7, 512))
    for plane in ("low", "high", "d", "s"):
        assert torch.equal(getattr(tiled, plane), getattr(whole, plane))


def test_bytes_that_do_not_fit_are_refused():
    packed, _ = packed_weight(QType.Q4_0, 2, 64)
    with pytest.raises(QuantError, match="Q4_0 of shape \\(3, 64\\) takes 108 bytes"):
        planes.pack(packed, QType.Q4_0, (3, 64))


@needs_triton
def test_inputs_are_permuted_as_the_kernel_reads_them():
    x = torch.arange(3 * 96).view(3, 96)
    order = [cuda_matmul.permuted.fn(k, 3) for k in range(96)]
    assert sorted(order) == list(range(96))
    assert torch.equal(cuda.permute(x)[:, order], x)


# --- the decode step, in plain torch


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[..., LoadedModel]:
    """A tiny model with Θ at γ = ½, whose κ = ⅛ is the same number in every dtype."""

    def load(arch: str, qtype: QType = QType.Q8_0, dtype: torch.dtype = torch.float64, **options: Any) -> LoadedModel:
        path = write_tiny_model(tmp_path_factory.mktemp("tiny") / "model.gguf", arch, qtype=qtype, **options)
        loaded = load_model(path, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        thetas = {}
        for i, (name, layer) in enumerate(loaded.model.star_linears().items()):
            p, q = 0.3 * torch.randn(2, max(layer.shape), 2 + i % 3, generator=generator)
            if not name.endswith("attn_k.weight"):  # one of the layers that share an input goes without
                thetas[name] = quantise_factors(p, q)
        loaded.model.set_thetas(thetas)
        loaded.model.set_gamma(0.5)
        return loaded

    return load


@torch.inference_mode()
def steps(model: Transformer, ids: list[int], star: bool = True) -> Tensor:
    """Logits after each token, by `decode_step` in plain torch."""
    plan = make_plan(model, model.new_cache(1, len(ids)))
    token = torch.tensor(ids)[:, None]
    position = torch.arange(len(ids))[:, None]
    return torch.stack([decode_step(plan, TorchOps(star), t, p) for t, p in zip(token, position, strict=True)])


@torch.inference_mode()
def whole(model: Transformer, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids]))[0]


@pytest.mark.parametrize(("arch", "options"), FAMILIES)
@pytest.mark.parametrize("qtype", [QType.Q8_0, QType.F32])
def test_the_step_computes_what_the_model_computes(tiny, arch, options, qtype):
    model = tiny(arch, qtype, **options).model
    found, expected = steps(model, IDS), whole(model, IDS)
    assert (found - expected).abs().max() < 1e-11
    without = steps(model, IDS, star=False)
    model.set_gamma(None)
    assert (without - whole(model, IDS)).abs().max() < 1e-11
    assert (without - expected).abs().max() > 1  # Θ is not lost among the tolerances
    assert torch.equal(steps(model, IDS), without)  # and at strength 0 changes no bit


def test_layers_with_one_input_and_format_become_one_weight(tiny):
    loaded = tiny("llama")
    plan = make_plan(loaded.model, loaded.model.new_cache(1, 4))
    block = plan.blocks[0]
    assert [group.weight.shape for group in block.qkv.groups] == [(128, 64)]
    assert block.qkv.groups[0].segments == (64, 96)
    assert [group.weight.shape for group in block.gate_up.groups] == [(192, 64)]
    unpacked = tiny("llama", QType.F32).model
    assert len(make_plan(unpacked, unpacked.new_cache(1, 4)).blocks[0].qkv.groups) == 3


def test_joint_weights_take_the_place_of_the_layers_own(tiny):
    model = tiny("llama").model
    expected = whole(model, IDS[:3])
    for layer in model.star_linears().values():
        layer.device_weight = planes.pack(layer.packed, layer.qtype, layer.shape)
    before = {name: layer.device_weight.dequantise() for name, layer in model.star_linears().items()}
    make_plan(model, model.new_cache(1, 4))
    after = {name: layer.device_weight for name, layer in model.star_linears().items()}
    assert all(torch.equal(after[name].dequantise(), weight) for name, weight in before.items())
    assert after["blk.0.attn_q.weight"].low.data_ptr() == after["blk.0.attn_v.weight"].low.data_ptr()
    assert after["blk.0.attn_q.weight"].low.data_ptr() != after["blk.1.attn_q.weight"].low.data_ptr()
    logits = steps(model, IDS[:3])  # of a second plan
    assert (logits - expected).abs().max() < 1e-11
    assert after["blk.0.attn_q.weight"].low is model.blocks[0].linears["attn_q"].device_weight.low


def static_decoder(model: Transformer, capacity: int = 16) -> StaticDecoder:
    return StaticDecoder(model, capacity, TorchOps(star=False), TorchOps(star=True))


def test_a_decoder_continues_prompts_and_forgets(tiny):
    model = tiny("gemma3", blocks=7, sliding_window=4).model
    decoder = static_decoder(model)
    expected = whole(model, IDS)
    assert (decoder.prefill(IDS[:5]) - expected[4]).abs().max() < 1e-4
    for i in range(5, 12):
        assert (decoder.step(IDS[i]) - expected[i]).abs().max() < 1e-4
    assert decoder.length == 12
    decoder.length = 8
    decoder.step(7)
    decoder.length = 8
    assert (decoder.step(IDS[8]) - expected[8]).abs().max() < 1e-4
    assert (decoder.step(IDS[8]) - expected[9]).abs().max() > 0.1


def test_strength_changes_between_tokens(tiny):
    model = tiny("llama").model
    decoder = static_decoder(model)
    for gamma in (0.5, 0.8, None, 0.5, 1.0):
        decoder.set_gamma(gamma)
        decoder.length = 0
        assert (torch.stack([decoder.step(i) for i in IDS[:3]]) - whole(model, IDS[:3])).abs().max() < 1e-4
    decoder.set_gamma(0.5)
    with_theta = decoder.step(3)
    decoder.length -= 1
    model.set_gamma(None)  # past the decoder
    assert (decoder.step(3) - with_theta).abs().max() > 0.1


def test_decoder_errors(tiny):
    model = tiny("llama").model
    decoder = static_decoder(model, capacity=2)
    with pytest.raises(NKATError, match="no token"):
        decoder.prefill([])
    for token in (-1, model.config.vocab_size):
        with pytest.raises(NKATError, match="outside the vocabulary"):
            decoder.step(token)
    decoder.prefill([1, 2])
    with pytest.raises(NKATError, match="holds 2 tokens"):
        decoder.step(1)
    decoder.length = 0
    layers = model.star_linears()
    model.set_thetas({name: quantise_factors(*torch.randn(2, max(layer.shape), 9)) for name, layer in layers.items()})
    with pytest.raises(NKATError, match="make a new one"):
        decoder.step(1)


# --- errors and notes


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines"),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 B. GPU 0 is full. If so, set A_VARIABLE."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_full_gpu_gives_one_line_with_the_way_out(error):
    with pytest.raises(NKATError, match="--no-cuda") as caught, cuda.out_of_memory_hint():
        raise error
    assert "\n" not in str(caught.value)
    assert ". ".join(str(error).partition("\n")[0].split(". ")[:3]).rstrip(".") in str(caught.value)
    assert "A_VARIABLE" not in str(caught.value)


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("expected scalar type Float"), ValueError("out of memory")):
        with pytest.raises(type(error), match=re.escape(str(error))), cuda.out_of_memory_hint():
            raise error


def test_without_triton_the_kernels_say_so(monkeypatch):
    monkeypatch.setattr(optional_triton, "triton", None)
    packed, _ = packed_weight(QType.Q4_0, 4, 64)
    weight = planes.pack(packed, QType.Q4_0, (4, 64))
    with pytest.raises(NKATError, match=r"pip install triton.*--no-cuda"):
        cuda.linear(weight, torch.randn(1, 64))
    with pytest.raises(NKATError, match=r"pip install triton.*--no-cuda"):
        TritonOps(star=False)


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce GTX 1660")
    with pytest.raises(NKATError, match=r"GTX 1660 has compute capability 7.5.*need 8.0.*--no-cuda"):
        packing._check_capability(torch.device("cuda", 63))


def test_formats_without_a_kernel_are_dequantised(monkeypatch):
    monkeypatch.delitem(FORMATS, QType.Q4_1)
    packed, values = packed_weight(QType.Q4_1, 6, 64)
    weight = planes.pack(packed, QType.Q4_1, (6, 64))
    x, down, up, bias = torch.randn(3, 64), torch.randn(4, 64), torch.randn(6, 4), torch.randn(6)
    plain = cuda.linear(weight, x, bias)
    assert torch.allclose(plain.double(), x.double() @ values.T + bias.double(), atol=1e-4)
    found = cuda.linear(weight, x, bias, down, up, 0.25)
    assert torch.allclose(found - plain, 0.25 * (x @ down.T) @ up.T, atol=1e-4)
    assert torch.equal(cuda.linear(weight, x, bias, down, up, torch.zeros(1)), plain)
    assert torch.allclose(cuda.rows(weight, torch.tensor([5, 0])).double(), values[[5, 0]], atol=1e-6)
    assert torch.allclose(cuda.linear(weight.rows(2, 5), x, bias[2:5]), plain[:, 2:5], atol=1e-4)


def test_gradients_come_from_the_dequantised_weight():
    packed, values = packed_weight(QType.Q4_K, 6, 256)
    weight = planes.pack(packed, QType.Q4_K, (6, 256))
    x, down, up = (torch.randn(shape, requires_grad=True) for shape in ((3, 256), (4, 256), (6, 4)))
    cuda.linear(weight, x, None, down, up, 0.5).sum().backward()
    effective = values + 0.5 * (up @ down).detach().double()
    assert torch.allclose(x.grad.double(), effective.sum(dim=0).expand(3, 256), atol=1e-4)
    assert torch.allclose(up.grad, 0.5 * (x @ down.T).sum(dim=0).detach().expand(6, 4), atol=1e-4)


# --- the kernels


@needs_triton
@pytest.mark.slow
def test_arithmetic_in_tritons_interpreter():
    """`TRITON_INTERPRET` counts when Triton is imported, and must not reach the other tests."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/support/interpreted_kernels.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\b\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


@dataclass
class Recorder:
    """In place of a kernel: takes launches down instead of doing them."""

    kernel: Any
    launches: list[tuple[tuple[int, ...], tuple, dict[str, Any]]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **keywords: self.launches.append((grid, arguments, keywords))


POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def compiled(kernel: Any, arguments: tuple, keywords: dict[str, Any], capability: int) -> Any:
    """What Triton makes of this launch for a GPU that need not be there; pointers are taken to be aligned."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in keywords.items() if name in kernel.arg_names}
    options = {name: value for name, value in keywords.items() if name not in constants}
    signature, attributes = dict.fromkeys(kernel.arg_names, "constexpr"), {}
    for i, argument in enumerate(arguments):
        kind = POINTERS[argument.dtype] if isinstance(argument, Tensor) else {int: "i32", float: "fp32"}[type(argument)]
        signature[kernel.arg_names[i]] = kind
        if isinstance(argument, Tensor) or (isinstance(argument, int) and argument % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton_compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture
def recorders(monkeypatch, tmp_path) -> Iterator[dict[str, Recorder]]:
    """Recorders in place of all kernels, by name."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = {}
    for module in (cuda_matmul, step_kernels):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            found[name] = Recorder(getattr(module, name))
            monkeypatch.setattr(module, name, found[name])
    return found


def meta_weight(qtype: QType, m: int, n: int) -> Tensor:
    return torch.empty(packed_nbytes(qtype, (m, n)), dtype=torch.uint8, device="meta")


def seven_billion(blocks: int) -> Transformer:
    """A model with Llama 2 7B's shapes and the formats of its Q4_K_M, Θ of rank 4, and no memory behind it."""
    d, ff, heads, vocabulary = 4096, 11008, 32, 32000
    rope = Rope(True, 128, 1e4, 1.0, False, 4096, 1.0)
    config = ModelConfig(
        ARCHITECTURES["llama"], 4096, vocabulary, d, ff, blocks, heads, heads, 128, 1e-5, rope, rope,
        (False,) * blocks, 0, 128**-0.5, 1.0,
    )  # fmt: skip
    theta = Theta(*torch.ones(2, 32000, 4, dtype=torch.int8), torch.ones(2, 4))

    def linear(name: str, m: int, n: int) -> StarLinear:
        qtype = QType.Q6_K if name in ("attn_v", "ffn_down", "output") else QType.Q4_K
        size = max(m, n)
        own = Theta(theta.p[:size], theta.q[:size], theta.scale)
        return StarLinear(meta_weight(qtype, m, n), qtype, (m, n), dtype=torch.bfloat16, theta=own)

    def block(index: int) -> Block:
        linears = {name: linear(name, *shape) for name, shape in config.linears(index).items()}
        norms = {name: torch.empty(d, device="meta") for name in ("attn_norm", "ffn_norm")}
        return Block(config, index, linears, norms)

    embedding = Embedding(meta_weight(QType.Q4_K, vocabulary, d), QType.Q4_K, (vocabulary, d))
    norm = torch.empty(d, device="meta")
    model = Transformer(config, embedding, [block(i) for i in range(blocks)], norm, linear("output", vocabulary, d))
    model.set_gamma(0.97)
    return model


@needs_triton
@pytest.mark.slow
def test_every_launch_of_a_7b_step_compiles_for_hopper(recorders):
    model = seven_billion(blocks=2)
    with torch.inference_mode():
        plan = make_plan(model, model.new_cache(1, 1024))
        where = torch.empty(1, dtype=torch.int64, device="meta")
        decode_step(plan, TritonOps(star=True), where, where)
    launches = {name: len(recorder.launches) for name, recorder in recorders.items()}
    assert launches == {
        "vector_kernel": 2 * 5 + 1,  # q and k; v, which has another format; output; gate and up; down
        "matrix_kernel": 0,
        "rows_kernel": 1,
        "norm_kernel": 2 * 2 + 1,
        "attention_kernel": 2,
        "combine_kernel": 2,
        "activation_kernel": 2,
    }
    seen = set()
    for name, recorder in recorders.items():
        for _, arguments, keywords in recorder.launches:
            key = (name, tuple(keywords.items()), tuple(getattr(a, "dtype", a) for a in arguments))
            if key not in seen:
                seen.add(key)
                code = compiled(recorder.kernel, arguments, keywords, 90)
                assert len(code.asm["cubin"]) > 1000
                assert code.metadata.shared < 99 << 10  # what an RTX 30 or 40 has
                if name == "vector_kernel":
                    check_vector_code(code)
    assert len(seen) >= 9


def check_vector_code(code: Any) -> None:
    """16-byte loads for weights and inputs; subnormals survive; what is read stays with the thread that read it."""
    ptx = code.asm["ptx"]
    assert ptx.count("ld.global.v4") >= 8 + 8  # as many rows; and x
    assert ".ftz" not in ptx
    last = [found for found in re.finditer(r"bra\S*\s+(\$L__BB\w+);", ptx) if f"\n{found[1]}:" in ptx[: found.start()]]
    assert last, "no loop"
    loop = ptx[ptx.index(f"\n{last[0][1]}:") : last[0].start()]
    assert "fma.rn.f32" in loop
    assert "ld.shared" not in loop
    assert "st.shared" not in loop
    # Triton 3.6 spreads the loads of d over other threads than those that need them: two float16 of each chunk
    assert loop.count("bar.sync") <= (0 if triton_version() >= (3, 9) else 2 * 2)


def triton_version() -> tuple[int, ...]:
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


@needs_triton
@pytest.mark.slow
def test_where_rows_are_written_is_counted_in_64_bits(recorders):
    """A prompt of 524288 tokens of a model of width 4096 has 2³¹ elements."""
    weight = planes.pack(meta_weight(QType.Q4_0, 64, 256), QType.Q4_0, (64, 256))
    cuda.rows(weight, torch.empty(3, dtype=torch.int64, device="meta"))
    recorder = recorders["rows_kernel"]
    _, arguments, keywords = recorder.launches.pop()
    ir = compiled(recorder.kernel, arguments, keywords, 80).asm["ttir"]
    program = re.escape(re.search(r"(%\w+) = tt.get_program_id x", ir)[1])
    assert re.search(rf"arith.extsi {program} : i32 to i64", ir)
    assert not re.search(rf"arith.muli {program},", ir)


@needs_triton
@pytest.mark.slow
@every_format
def test_every_format_compiles_for_ampere(recorders, qtype):
    m, n = 64, row_length(qtype, 8)
    weight = planes.pack(meta_weight(qtype, m, n), qtype, (m, n))
    factors = (torch.empty(4, n, device="meta"), torch.empty(m, 4, device="meta"))
    cuda.linear(weight, torch.empty(1, n, device="meta"), None, *factors, torch.empty(1, device="meta"))
    recorder = recorders["vector_kernel"]
    _, arguments, keywords = recorder.launches.pop()
    assert ".ftz" not in compiled(recorder.kernel, arguments, keywords, 80).asm["ptx"]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_prefill_uses_tensor_cores(recorders, capability):
    m, n = 256, 512
    weight = planes.pack(meta_weight(QType.Q4_K, m, n), QType.Q4_K, (m, n))
    factors = [torch.empty(8, n, device="meta"), torch.empty(m, 8, device="meta")]
    x = torch.empty(256, n, dtype=torch.bfloat16, device="meta")
    cuda.linear(weight, x, None, *factors, torch.empty(1, device="meta"))
    recorder = recorders["matrix_kernel"]
    _, arguments, keywords = recorder.launches.pop()
    code = compiled(recorder.kernel, arguments, keywords, capability)
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in code.asm["ptx"]
    assert "bf16" in code.asm["ptx"]
    assert code.metadata.shared < 99 << 10


# --- on a GPU


@pytest.mark.gpu
@needs_gpu
@needs_triton
@every_format
@pytest.mark.parametrize("batch", [1, 3, 8, 40])
def test_gpu_multiplies_as_float64_does(qtype, batch):
    m, n = 300, row_length(qtype, 24)
    packed, values = packed_weight(qtype, m, n)
    weight = planes.pack(packed.cuda(), qtype, (m, n))
    x = torch.randn(batch, n).bfloat16().float()
    down, up = torch.randn(8, n), torch.randn(m, 8)
    expected = x.double() @ values.T + 0.125 * (x.double() @ down.double().T) @ up.double().T
    strength = torch.full((1,), 0.125, device="cuda")
    found = cuda.linear(weight, x.cuda(), None, down.cuda(), up.cuda(), strength).cpu()
    tolerance = (1e-6 if batch <= cuda.VECTOR_BATCH else 2**-7) * (x.abs().double() @ values.abs().T)
    assert bool(((found - expected).abs() <= tolerance + 1e-3 * (found - x.double() @ values.T).abs()).all())
    plain = cuda.linear(weight, x.cuda())
    assert torch.equal(cuda.linear(weight, x.cuda(), None, down.cuda(), up.cuda(), strength * 0), plain)
    assert torch.equal(cuda.rows(weight, torch.tensor([7, 0], device="cuda")).cpu().double(), values[[7, 0]])


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize(("arch", "options"), FAMILIES)
def test_gpu_graph_decodes_as_the_model_does(tiny, tmp_path, arch, options):
    reference = tiny(arch, dtype=torch.float32, **options).model
    path: Path = write_tiny_model(tmp_path / "model.gguf", arch, qtype=QType.Q8_0, **options)
    thetas = {n: layer.theta for n, layer in reference.star_linears().items() if layer.theta is not None}
    model = load_model(path, thetas=thetas, gamma=0.5, device="cuda", dtype=torch.float32).model
    decoder = CudaGraphDecoder(model, 16)
    for gamma in (0.5, 0.9, None, 0.5):
        decoder.set_gamma(gamma)
        reference.set_gamma(gamma)
        decoder.length = 0
        expected = whole(reference, IDS)
        assert (decoder.prefill(IDS[:3]).cpu() - expected[2]).abs().max() < 2e-2
        for i in range(3, 12):
            assert (decoder.step(IDS[i]).cpu() - expected[i]).abs().max() < 1e-3
