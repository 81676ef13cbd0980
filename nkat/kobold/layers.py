"""How many of a model's layers fit into a GPU's free memory, counted from the GGUF itself.

Weights and KV cache are exact: they are the bytes of the tensors and of the cache that KoboldCpp allocates. The compute
buffer is what llama.cpp's graph needs for a batch of 512 tokens, by the formula in `compute_bytes`, and the margin is
for what no file tells (the driver's own context, the desktop). docs/results/kobold.md compares with KoboldCpp's log.

"Layers" are KoboldCpp's: a model of n blocks has n + 1, the last being the output matrix. Versions differ in which one
goes first (older ones the last block, newer ones the output matrix), so the larger of the two counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from nkat.errors import NKATError
from nkat.gguf.file import TensorInfo
from nkat.gguf.names import block_number
from nkat.host.console import format_bytes, format_table
from nkat.kobold.command import F16

BATCH = 512  # tokens, KoboldCpp's default
MARGIN = 768 << 20
_EXTRA_CELLS = 128  # KoboldCpp adds them to the context against fragmentation (80 in 1.76)
_CELL_MULTIPLE = 256  # llama.cpp rounds the cache up (32 without flash attention)
_MAX_SIZE = (1 << 31) - 1  # as in `nkat.lm.config`: lengths and counts are 32-bit integers in llama.cpp, too


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Bytes of a model's parts.

    blocks: weights of each block, with its share of the adapter
    cache: KV cache of one block, on average where some have a state of fixed size in its place
    output: output matrix and norm; a matrix shared with the embedding is copied to the GPU
    compute: buffers for a batch
    largest: the largest weight; it is copied to the GPU for large batches when it does not live there
    context: tokens the cache is for; cache_type: how its numbers are stored
    draft: a draft model with its own cache and buffers, all of which is on the GPU where there is one
    """

    blocks: tuple[int, ...]
    cache: int
    output: int
    compute: int
    largest: int
    context: int
    cache_type: str = F16
    draft: int = 0

    @property
    def layers(self) -> int:
        return len(self.blocks) + 1

    @property
    def total(self) -> int:
        """Everything, wherever it is."""
        return sum(self.blocks) + len(self.blocks) * self.cache + self.output + self.compute + self.draft


def model_memory(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    context: int,
    adapter: Mapping[str, int] | None = None,
    flash_attention: bool = True,
    cache_type: str = F16,
) -> ModelMemory:
    """Reads a GGUF's metadata and tensor sizes.

    adapter: bytes of the adapter by the name of the weight it belongs to
    flash_attention: without it the attention scores of a whole batch are kept, and values are not quantised
    cache_type: of the KV cache, one of `CACHE_TYPES`
    """
    arch = metadata.get("general.architecture", "")
    count = max((block_number(name) for name in tensors), default=-1) + 1
    if count > len(tensors):  # a block's number is only a name: no list may become as long as it says
        raise NKATError(f"a tensor belongs to block {count - 1}, but the model has only {len(tensors)} tensors")
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) < 2:
        raise NKATError("tensor token_embd.weight is missing or not 2-D: this GGUF is not a language model")
    blocks = [0] * count
    for name, info in tensors.items():
        if block_number(name) >= 0:
            blocks[block_number(name)] += info.nbytes
    for name, size in (adapter or {}).items():
        if 0 <= block_number(name) < count:
            blocks[block_number(name)] += size
    embedding = tensors["token_embd.weight"]
    matrix = tensors.get("output.weight", embedding)
    norm = tensors.get("output_norm.weight")

    heads = _largest(metadata.get(f"{arch}.attention.head_count", 0))
    kv_heads = _largest(metadata.get(f"{arch}.attention.head_count_kv", heads))
    width = _largest(metadata.get(f"{arch}.embedding_length", embedding.shape[1]))
    head_size = width // heads if heads else 0
    key = _largest(metadata.get(f"{arch}.attention.key_length", head_size))
    value = _largest(metadata.get(f"{arch}.attention.value_length", head_size))
    cells = -(-(context + _EXTRA_CELLS) // _CELL_MULTIPLE) * _CELL_MULTIPLE
    keys_and_values = cells * (
        _row_bytes(kv_heads * key, cache_type) + _row_bytes(kv_heads * value, cache_type if flash_attention else F16)
    )
    recurrent = len(_recurrent_blocks(tensors))
    held = (count - recurrent) * keys_and_values + recurrent * _state_bytes(metadata, arch)
    return ModelMemory(
        blocks=tuple(blocks),
        cache=-(-held // max(1, count)),  # blocks of both kinds take turns
        output=matrix.nbytes + (norm.nbytes if norm else 0),
        compute=compute_bytes(
            vocabulary=embedding.shape[0],
            width=width,
            feed_forward=_largest(metadata.get(f"{arch}.feed_forward_length", 4 * width)),
            scores=cells // 2 if flash_attention else (heads + 1) * cells,
        ),
        largest=max(info.nbytes for info in tensors.values()),
        context=context,
        cache_type=cache_type,
    )


def _recurrent_blocks(tensors: Mapping[str, TensorInfo]) -> set[int]:
    """Those that have a state in place of keys and values."""
    states, keys = (
        {block_number(name) for name in tensors if name.endswith(end)} for end in (".ssm_out.weight", ".attn_k.weight")
    )
    return states - keys


def _state_bytes(metadata: Mapping[str, Any], arch: str) -> int:
    """Of a recurrent block: the convolution's inputs and the state, float32 (llama.cpp's src/llama-hparams.cpp)."""
    keys = ("conv_kernel", "inner_size", "state_size", "group_count")
    kernel, inner, size, groups = (_largest(metadata.get(f"{arch}.ssm.{key}", 0)) for key in keys)
    return 4 * (max(0, kernel - 1) * (inner + 2 * groups * size) + inner * size)


def _row_bytes(count: int, cache_type: str) -> int:
    """Bytes of one token's keys or values in a block's cache."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[cache_type.upper()]]
    return -(-count // block) * size


def compute_bytes(vocabulary: int, width: int, feed_forward: int, scores: int) -> int:
    """Float32 intermediates of a batch that live at the same time, in the layer that needs most.

    scores: numbers a token in attention: the mask and every head's score for each cell of the cache; with flash
    attention the mask alone, in float16
    The last layer holds the logits, a feed-forward network three of its inner vectors, attention ten vectors of the
    model's width beside the scores; the residual stream and one vector more live through all of them.
    """
    return 4 * BATCH * (2 * width + max(vocabulary, 3 * feed_forward, scores + 10 * width))


def gpu_bytes(memory: ModelMemory, layers: int) -> int:
    """GPU memory for this many layers, margin not included; 0 layers still need the compute buffer."""
    return sum(_parts(memory, layers)[1:]) + memory.draft


def _parts(memory: ModelMemory, layers: int) -> tuple[int, int, int, int, int]:
    """(blocks on the GPU, bytes of their weights, of their cache, of the output matrix, of compute buffers)."""
    count = len(memory.blocks)

    def split(blocks: int, output: int) -> tuple[int, int, int, int, int]:
        compute = memory.compute if blocks == count and output else memory.compute + memory.largest
        return blocks, sum(memory.blocks[count - blocks :]), blocks * memory.cache, output, compute

    if layers > count:
        return split(count, memory.output)
    if layers == 0:
        return split(0, 0)
    return max(split(layers, 0), split(layers - 1, memory.output), key=lambda parts: sum(parts[1:]))


def layers_that_fit(memory: ModelMemory, free: int, margin: int = MARGIN) -> int:
    """The most layers whose bytes leave the margin free; 0 when not one does."""
    fitting = (n for n in range(memory.layers, 0, -1) if gpu_bytes(memory, n) + margin <= free)
    return next(fitting, 0)


def layer_table(memory: ModelMemory, layers: int, device: str, free: int, margin: int = MARGIN) -> str:
    """For people: where the bytes of this split go."""
    blocks, weights, cache, output, compute = _parts(memory, layers)
    rows = [
        [f"weights of {blocks} of {len(memory.blocks)} blocks", format_bytes(weights)],
        [f"their KV cache for {memory.context} tokens, {memory.cache_type.upper()}", format_bytes(cache)],
        ["output matrix", format_bytes(output) if output else "on the CPU"],
        ["compute buffers (estimated)", format_bytes(compute)],
        *([["draft model, its cache and buffers", format_bytes(memory.draft)]] if memory.draft else []),
        ["margin for driver and desktop", format_bytes(margin)],
        [f"needed for {layers} of {memory.layers} layers", format_bytes(gpu_bytes(memory, layers) + margin)],
        [f"free on {device}", format_bytes(free)],
    ]
    return format_table(rows, ["on the GPU", "bytes"])


def _largest(value: Any) -> int:
    """Some models have a value for each block."""
    items = list(value) if isinstance(value, np.ndarray | list) else [value]
    if not all(isinstance(item, int | np.integer) and 0 <= item <= _MAX_SIZE for item in items):
        raise NKATError(f"the model's metadata gives {value!r:.80} for a size")
    return max((int(item) for item in items), default=0)
