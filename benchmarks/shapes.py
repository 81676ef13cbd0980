"""Writes a model file of a real model's shape with random weights, in the mix of block formats that people have.

    python -m benchmarks.shapes Q4_K_M model.gguf                32 blocks, 4.1 GB
    python -m benchmarks.shapes Q6_K model.gguf --blocks 8       a quarter of the blocks, where memory is short
    python -m benchmarks.shapes 30B-A3B-Q4_K_M model.gguf --blocks 8         a mixture of experts: 2.9 GB
    python -m benchmarks.shapes 9B-delta-Q4_K_M model.gguf --blocks 8        with gated delta nets: 1.3 GB

Speed depends on shapes and formats, not on the values, so that such a file stands for the files that people run; its
text means nothing. The shape is Llama 2 7B's (d 4096, FFN 11008, 32 heads, vocabulary 32000) or, with that vocabulary,
of a mixture of experts: Qwen3 30B-A3B's (8 of 128 experts), gpt-oss 20B's (4 of 32, in MXFP4), or of a model with gated
delta nets: Qwen 3.5 9B's. Which tensor gets which format follows llama.cpp (`llama_tensor_get_type` in
src/llama-quant.cpp); llama.cpp reads the files too. Weights have mean near 0 and a standard deviation of 0.02. One
block's weights stand in every block of its format: neither program reads values twice for that, since the file holds
each copy.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.shapes")

import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Q

from benchmarks.dequantise import random_rows
from nkat.errors import NKATError
from nkat.gguf.formats import dequantise
from nkat.host import commandline

DIM, FFN, HEADS, BLOCKS, VOCABULARY = 4096, 11008, 32, 32, 32000
BLOCK_WEIGHTS = {
    "attn_q": (DIM, DIM),
    "attn_k": (DIM, DIM),
    "attn_v": (DIM, DIM),
    "attn_output": (DIM, DIM),
    "ffn_gate": (FFN, DIM),
    "ffn_up": (FFN, DIM),
    "ffn_down": (DIM, FFN),
}
WEIGHT_STD = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """A real model's. Lengths in elements.

    weights, vectors: shapes of a block's quantised weights, and of its norms and biases (all ones), by name
    routers: of weights that are F32 in every file;  experts: how many there are, and how many a token goes to
    recurrent: of all blocks but every fourth one;  states: key heads and value heads of these, elements of each
    """

    architecture: str
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    weights: Mapping[str, tuple[int, ...]]
    vectors: Mapping[str, tuple[int, ...]]
    routers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    experts: tuple[int, int] = (0, 0)
    window: int = 0
    recurrent: Shape | None = None
    states: tuple[int, int, int] = (0, 0, 0)

    def of(self, block: int) -> Shape:
        return self if self.recurrent is None or block % 4 == 3 else self.recurrent


def _mixture(
    architecture: str, dim: int, heads: int, kv_heads: int, head_dim: int, inner: int, experts: tuple[int, int]
) -> Shape:
    rows, kv_rows, count = heads * head_dim, kv_heads * head_dim, experts[0]
    weights = {"attn_q": (rows, dim), "attn_k": (kv_rows, dim), "attn_v": (kv_rows, dim), "attn_output": (dim, rows)}
    stacks = {"ffn_gate": (count, inner, dim), "ffn_up": (count, inner, dim), "ffn_down": (count, dim, inner)}
    routers = {"ffn_gate_inp": (count, dim)}
    vectors = {"attn_norm.weight": (dim,)}
    window = 0
    if architecture == "gpt-oss":
        biased = {**weights, **routers, **{f"{name}_exps": shape for name, shape in stacks.items()}}
        vectors |= {f"{name}.bias": shape[:-1] for name, shape in biased.items()}
        vectors |= {"post_attention_norm.weight": (dim,), "attn_sinks.weight": (heads,)}
        window = 128
    else:
        vectors |= {"ffn_norm.weight": (dim,), "attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    weights |= {f"{name}_exps": shape for name, shape in stacks.items()}
    return Shape(architecture, dim, heads, kv_heads, head_dim, inner, weights, vectors, routers, experts, window)


def _hybrid(dim: int, heads: int, kv_heads: int, head_dim: int, inner: int, states: tuple[int, int, int]) -> Shape:
    """Of qwen35."""
    key_heads, value_heads, size = states
    rows, kv_rows, values = heads * head_dim, kv_heads * head_dim, value_heads * size
    channels = 2 * key_heads * size + values
    feed_forward = {"ffn_gate": (inner, dim), "ffn_up": (inner, dim), "ffn_down": (dim, inner)}
    attention = {
        "attn_q": (2 * rows, dim),
        "attn_k": (kv_rows, dim),
        "attn_v": (kv_rows, dim),
        "attn_output": (dim, rows),
    }
    inputs = {"attn_qkv": channels, "attn_gate": values, "ssm_alpha": value_heads, "ssm_beta": value_heads}
    net = {**{name: (outputs, dim) for name, outputs in inputs.items()}, "ssm_out": (dim, values)}
    norms = {"attn_norm.weight": (dim,), "post_attention_norm.weight": (dim,)}
    qk_norms = {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    by_head = {"ssm_dt.bias": (value_heads,), "ssm_a": (value_heads,), "ssm_norm.weight": (size,)}
    vectors = {**norms, **by_head, "ssm_conv1d.weight": (channels, 4)}
    sizes = ("qwen35", dim, heads, kv_heads, head_dim, inner)
    recurrent = Shape(*sizes, {**net, **feed_forward}, vectors)
    return Shape(*sizes, {**attention, **feed_forward}, {**norms, **qk_norms}, recurrent=recurrent, states=states)


_NORMS = {f"{name}.weight": (DIM,) for name in ("attn_norm", "ffn_norm")}
LLAMA_7B = Shape("llama", DIM, HEADS, HEADS, DIM // HEADS, FFN, BLOCK_WEIGHTS, _NORMS)
# By the mix; all others are of LLAMA_7B
SHAPES = {
    **dict.fromkeys(("30B-A3B-Q4_K_M", "30B-A3B-IQ2_M"), _mixture("qwen3moe", 2048, 32, 4, 128, 768, (128, 8))),
    "20B-MXFP4": _mixture("gpt-oss", 2880, 64, 8, 64, 2880, (32, 4)),
    "9B-delta-Q4_K_M": _hybrid(4096, 16, 4, 256, 12288, (16, 32, 128)),
}
# Of a block: where its float16 numbers are; the second, of what is taken off, in units of the first
HALVES: dict[Q, dict[int, float]] = {
    Q.Q4_0: {0: 1.0},
    Q.Q4_1: {0: 1.0, 2: -7.5},
    Q.Q5_0: {0: 1.0},
    Q.Q5_1: {0: 1.0, 2: -15.5},
    Q.Q8_0: {0: 1.0},
    Q.Q2_K: {80: 1.0, 82: 1.5},
    Q.Q3_K: {108: 1.0},
    Q.Q4_K: {0: 1.0, 2: 7.5},
    Q.Q5_K: {0: 1.0, 2: 15.5},
    Q.Q6_K: {208: 1.0},
    Q.IQ4_NL: {0: 1.0},
    Q.IQ4_XS: {0: 1.0},
    Q.MXFP4: {},
    **{qtype: {0: 1.0} for qtype in (Q.IQ1_S, Q.IQ2_XXS, Q.IQ2_XS, Q.IQ2_S, Q.IQ3_XXS, Q.IQ3_S)},
}
# Whose bytes are drawn from all there are: of a codebook that a file uses half of, more would stay in a cache
_EVERY_BIT = {Q.MXFP4} | {qtype for qtype in HALVES if qtype.name[:3] in ("IQ1", "IQ2", "IQ3")}


def _more_bits(block: int, blocks: int) -> bool:
    """The blocks that llama.cpp gives more bits to: the first and last eighth, and every third between."""
    return block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2


def _uniform(qtype: Q) -> Callable[[str, int, int], Q]:
    return lambda name, block, blocks: qtype


def _k_mix(most: Q, better: Q) -> Callable[[str, int, int], Q]:
    """Q4_K_M and Q5_K_M."""

    def choose(name: str, block: int, blocks: int) -> Q:
        much = name.removesuffix("_exps") in ("attn_v", "attn_qkv", "ffn_down")
        return better if much and _more_bits(block, blocks) else most

    return choose


def _q3_k_m(name: str, block: int, blocks: int) -> Q:
    if name == "attn_v":
        return Q.Q5_K if block < 2 else Q.Q4_K
    if name == "ffn_down" and block < blocks // 16:
        return Q.Q5_K
    return Q.Q4_K if name in ("attn_output", "ffn_down") else Q.Q3_K


def _mix(
    most: Q, named: Mapping[str, Q] = {}, first: Mapping[str, Q] = {}, middle: Mapping[str, Q] = {}
) -> Callable[[str, int, int], Q]:
    """named: weights that have another format; first, middle: in the first eighth of the blocks, and in all but the
    first and the last."""

    def choose(name: str, block: int, blocks: int) -> Q:
        name = name.removesuffix("_exps")
        if name in first and block < blocks // 8:
            return first[name]
        if name in middle and blocks // 8 <= block < 7 * blocks // 8:
            return middle[name]
        return named.get(name, most)

    return choose


def _iq2(most: Q, better: Q, values: Q, output: Q) -> Callable[[str, int, int], Q]:
    """IQ1 and IQ2, and what their values and outputs of attention have."""
    return _mix(most, {"attn_v": values, "attn_output": output}, first={"ffn_down": better})


def _mxfp4(name: str, block: int, blocks: int) -> Q:
    return Q.MXFP4 if name.endswith("_exps") else Q.Q8_0


_GATED = ("ffn_gate", "ffn_up")
# Formats of the blocks' weights, the embedding and the output layer
MIXES: dict[str, tuple[Callable[[str, int, int], Q], Q, Q]] = {
    "Q2_K": (_mix(Q.Q2_K, dict.fromkeys(("attn_v", "attn_output", "ffn_down"), Q.Q3_K)), Q.Q2_K, Q.Q6_K),
    "Q3_K_M": (_q3_k_m, Q.Q3_K, Q.Q6_K),
    "Q4_0": (_uniform(Q.Q4_0), Q.Q4_0, Q.Q6_K),
    "Q4_K": (_uniform(Q.Q4_K), Q.Q4_K, Q.Q4_K),
    "Q4_K_M": (_k_mix(Q.Q4_K, Q.Q6_K), Q.Q4_K, Q.Q6_K),
    "Q5_K_M": (_k_mix(Q.Q5_K, Q.Q6_K), Q.Q5_K, Q.Q6_K),
    "Q6_K": (_uniform(Q.Q6_K), Q.Q6_K, Q.Q6_K),
    "Q8_0": (_uniform(Q.Q8_0), Q.Q8_0, Q.Q8_0),
    "IQ4_XS": (_mix(Q.IQ4_XS, first={"ffn_down": Q.Q5_K}), Q.IQ4_XS, Q.Q6_K),
    "IQ1_S": (_iq2(Q.IQ1_S, Q.Q2_K, Q.Q2_K, Q.IQ2_XXS), Q.Q2_K, Q.Q5_K),
    "IQ2_XXS": (_iq2(Q.IQ2_XXS, Q.Q2_K, Q.Q2_K, Q.IQ2_XXS), Q.Q2_K, Q.Q5_K),
    "IQ2_XS": (_iq2(Q.IQ2_XS, Q.Q2_K, Q.Q2_K, Q.IQ2_XS), Q.Q2_K, Q.Q5_K),
    "IQ2_M": (_iq2(Q.IQ2_S, Q.IQ3_S, Q.IQ3_S, Q.IQ3_S), Q.IQ3_S, Q.Q5_K),
    "IQ3_XXS": (_mix(Q.IQ3_XXS, {"attn_q": Q.IQ2_S, "attn_k": Q.IQ2_S, "attn_output": Q.IQ3_S}), Q.IQ3_S, Q.Q5_K),
    "IQ3_XS": (
        _mix(Q.IQ3_S, dict.fromkeys(("attn_q", "attn_k"), Q.IQ3_XXS), middle=dict.fromkeys(_GATED, Q.IQ3_XXS)),
        Q.IQ3_S,
        Q.Q6_K,
    ),
    "IQ3_S": (_uniform(Q.IQ3_S), Q.IQ3_S, Q.Q6_K),
    "IQ3_M": (
        _mix(Q.IQ3_S, dict.fromkeys(("attn_v", "attn_output"), Q.Q4_K), first={"ffn_down": Q.Q4_K}),
        Q.IQ3_S,
        Q.Q6_K,
    ),
    "30B-A3B-Q4_K_M": (_k_mix(Q.Q4_K, Q.Q6_K), Q.Q4_K, Q.Q6_K),
    "30B-A3B-IQ2_M": (_iq2(Q.IQ2_S, Q.IQ3_S, Q.Q4_K, Q.IQ3_S), Q.IQ3_S, Q.Q5_K),
    "20B-MXFP4": (_mxfp4, Q.Q8_0, Q.Q8_0),
    "9B-delta-Q4_K_M": (_k_mix(Q.Q4_K, Q.Q6_K), Q.Q4_K, Q.Q6_K),
}


def weights(qtype: Q, shape: tuple[int, ...]) -> np.ndarray:
    """Packed random weights, uint8 [..., m, bytes of a row], of mean near 0 and standard deviation WEIGHT_STD."""
    *stack, m, n = shape
    if stack:
        return weights(qtype, (math.prod(stack) * m, n)).reshape(*stack, m, -1)
    if qtype == Q.F32:
        values = WEIGHT_STD * np.random.default_rng(0).standard_normal((m, n))
        return values.astype(np.float32).view(np.uint8).reshape(m, -1)
    packed = random_rows(qtype, m, n)
    block_bytes = gguf.GGML_QUANT_SIZES[qtype][1]
    blocks = packed.reshape(-1, block_bytes)

    if qtype in _EVERY_BIT:
        rng = np.random.default_rng(0)
        blocks[:] = rng.integers(0, 256, blocks.shape, dtype=np.uint8)
    if qtype == Q.MXFP4:  # scales are powers of two: a mix of the two nearest
        blocks[:, 0] = 119 + (rng.random(len(blocks)) < 0.684)
        return packed

    def scaled(by: float) -> np.ndarray:
        for at, factor in HALVES[qtype].items():
            blocks[:, at : at + 2] = np.array([by * factor], np.float16).view(np.uint8)
        return packed

    sample = torch.from_numpy(scaled(1.0)[:16].reshape(-1).copy())
    return scaled(WEIGHT_STD / float(dequantise(sample, qtype, (16, n)).std()))


def tensor_types(mix: str, blocks: int) -> Iterator[tuple[str, Q, tuple[int, ...]]]:
    """Name, format and shape of each weight."""
    choose, embedding, output = MIXES[mix]
    model = SHAPES.get(mix, LLAMA_7B)
    yield "token_embd.weight", embedding, (VOCABULARY, model.dim)
    for block in range(blocks):
        for name, shape in model.of(block).weights.items():
            yield f"blk.{block}.{name}.weight", choose(name, block, blocks), shape
        for name, shape in model.routers.items():
            yield f"blk.{block}.{name}.weight", Q.F32, shape
    yield "output.weight", output, (VOCABULARY, model.dim)


def _describe(writer: gguf.GGUFWriter, model: Shape, blocks: int) -> None:
    """Hyper-parameters and a vocabulary of bytes and made-up words."""
    writer.add_name("random weights")
    writer.add_block_count(blocks)
    writer.add_context_length(4096)
    writer.add_embedding_length(model.dim)
    writer.add_feed_forward_length(model.feed_forward)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(model.head_dim // (1 if model.recurrent is None else 4))
    if model is not LLAMA_7B:
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)
    if model.recurrent is not None:
        key_heads, value_heads, size = model.states
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(value_heads * size)
        writer.add_ssm_state_size(size)
        writer.add_ssm_time_step_rank(value_heads)
        writer.add_ssm_group_count(key_heads)
        writer.add_rope_dimension_sections([11, 11, 10, 0])
    if model.experts[0]:
        writer.add_expert_count(model.experts[0])
        writer.add_expert_used_count(model.experts[1])
        writer.add_expert_feed_forward_length(model.feed_forward)
    if model.window:
        writer.add_sliding_window(model.window)
    writer.add_tokenizer_model("llama")
    words = [f"▁w{i}" for i in range(VOCABULARY - 259)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words])
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(words))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_shaped(path: Path, mix: str, blocks: int = BLOCKS) -> int:
    """Writes the model and returns its size in bytes."""
    model = SHAPES.get(mix, LLAMA_7B)
    writer = gguf.GGUFWriter(path, model.architecture)
    _describe(writer, model, blocks)
    packed: dict[tuple[Q, tuple[int, ...]], np.ndarray] = {}
    for name, qtype, shape in tensor_types(mix, blocks):
        if (qtype, shape) not in packed:
            packed[qtype, shape] = weights(qtype, shape)
        writer.add_tensor(name, packed[qtype, shape], raw_dtype=qtype)
    vectors = {f"blk.{i}.{name}": shape for i in range(blocks) for name, shape in model.of(i).vectors.items()}
    for name, shape in {**vectors, "output_norm.weight": (model.dim,)}.items():
        value = -1.0 if name.endswith("ssm_a") else 1.0  # a memory that fades
        writer.add_tensor(name, np.full(shape, value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()
    return path.stat().st_size


def models(names: Sequence[str], blocks: int) -> Iterator[Path]:
    """Files to measure, by path or by a mix's name: those of a mix are written for the while, and deleted behind it."""
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(name)
            if name not in MIXES or path.exists():
                yield path
                continue
            path = Path(folder) / f"{name}-{blocks}.gguf"
            write_shaped(path, name, blocks)
            yield path
            gc.collect()  # lets the file go
            path.unlink()


def main() -> None:
    parser = commandline.parser(__doc__.splitlines()[0], "  python -m benchmarks.shapes Q4_K_M model.gguf --blocks 8")
    parser.add_argument("mix", choices=MIXES, metavar="MIX", help=", ".join(MIXES))
    parser.add_argument("output", type=Path, metavar="FILE")
    parser.add_argument("--blocks", type=commandline.positive_int, default=BLOCKS, metavar="N")
    options = parser.parse_args()
    if options.output.exists():
        raise NKATError(f"{options.output}: exists already")
    write_shaped(options.output, options.mix, options.blocks)
