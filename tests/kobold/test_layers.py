"""Layers against memory: exact counts against KoboldCpp's own log, and properties of the arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from nkat.gguf.file import GGUFFile
from nkat.kobold.layers import MARGIN, ModelMemory, compute_bytes, gpu_bytes, layer_table, layers_that_fit, model_memory
from tests.support.tiny_models import write_tiny_model

MIB = 1 << 20


def memory_of(path: Path, context: int, **options: object) -> ModelMemory:
    with GGUFFile.open(path) as file:
        return model_memory(file.metadata, file.tensors, context, **options)


# "CPU KV buffer size" and "CPU compute buffer size" in MiB of KoboldCpp 1.115.1 (esobold) on CPU, whose flash attention
# is on unless it is turned off, and of 1.76, which adds 80 cells to the context and not 128.
LOGGED = [
    ("smollm2", 1024, True, 28.12, 98.25),
    ("smollm2", 131072, True, 2885.62, 141.76),
    ("smollm2", 8192, False, 185.62, 171.38),
    ("qwen", 1024, True, 15.00, 300.25),
    ("qwen", 32768, False, 387.00, 976.76),
    ("gemma3", 1024, True, None, 514.50),  # its sliding windows need less cache than is counted
]


@pytest.mark.parametrize(("name", "context", "flash", "cache", "compute"), LOGGED)
def test_as_koboldcpp_logs_it(
    name: str, context: int, flash: bool, cache: float | None, compute: float, request: pytest.FixtureRequest
) -> None:
    memory = memory_of(request.getfixturevalue(name), context, flash_attention=flash)
    found = memory.cache * len(memory.blocks) / MIB
    assert found >= 20.63 if cache is None else found == pytest.approx(cache, abs=0.01)
    assert compute - 0.01 <= memory.compute / MIB <= 1.05 * compute


def test_a_partial_split_as_koboldcpp_logs_it(smollm2: Path) -> None:
    """1.76 by Vulkan on a software device, 10 layers, --contextsize 512: 21.14 MiB of weights, 125.81 of compute."""
    memory = memory_of(smollm2, 512)
    assert sum(memory.blocks[-10:]) / MIB == pytest.approx(21.14, abs=0.01)
    assert (memory.compute + memory.largest) / MIB == pytest.approx(125.81, rel=0.01)


def test_recurrent_blocks_have_a_state_in_place_of_a_cache(tmp_path: Path) -> None:
    """llama.cpp b11434 with -c 8192: "KV buffer size = 3.00 MiB", "RS buffer size = 3.28 MiB"."""
    path = write_tiny_model(tmp_path / "m.gguf", "qwen35", blocks=8, state=64, value_heads=32, key_heads=16)
    memory = memory_of(path, 8192 - 128)
    assert memory.cache * len(memory.blocks) / MIB == pytest.approx(3.00 + 3.28, abs=0.01)


def test_blocks_are_the_bytes_of_their_tensors(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", "llama", blocks=5, qtype=gguf.GGMLQuantizationType.Q8_0)
    with GGUFFile.open(path) as file:
        per_block = [sum(t.nbytes for n, t in file.tensors.items() if n.startswith(f"blk.{i}.")) for i in range(5)]
        everything = sum(t.nbytes for t in file.tensors.values())
        embedding = file.tensors["token_embd.weight"].nbytes
    memory = memory_of(path, 256)
    assert list(memory.blocks) == per_block
    assert sum(memory.blocks) + memory.output == everything - embedding
    assert memory.layers == 6
    adapter = {"blk.1.attn_q.weight": 1000, "blk.1.ffn_up.weight": 24, "blk.4.attn_q.weight": 7}
    added = memory_of(path, 256, adapter=adapter)
    assert [a - b for a, b in zip(added.blocks, memory.blocks, strict=True)] == [0, 1024, 0, 0, 7]


def test_the_cache_grows_with_the_context_and_scores_only_without_flash_attention(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", "llama", embedding=64, heads=4, kv_heads=2)
    small, large = memory_of(path, 1024 - 128), memory_of(path, 4096 - 128)
    assert large.cache == 4 * small.cache
    assert small.cache == 1024 * 2 * (16 + 16) * 2
    scores = memory_of(path, 4096 - 128, flash_attention=False).compute - large.compute
    assert scores == 4 * 512 * (4 + 1 - 0.5) * 4096  # four heads and the mask, in place of half a mask


def test_tied_and_untied_output(tmp_path: Path) -> None:
    tied = memory_of(write_tiny_model(tmp_path / "a.gguf", "llama", tied=True), 256)
    untied = memory_of(write_tiny_model(tmp_path / "b.gguf", "llama", tied=False), 256)
    assert tied.output == untied.output


@pytest.fixture
def memory() -> ModelMemory:
    return ModelMemory((10, 20, 30, 40), cache=5, output=100, compute=7, largest=50, context=512)


def test_the_costlier_reading_of_a_layer_counts(memory: ModelMemory) -> None:
    # 0: buffers only. 1: output matrix (newer) rather than the last block. 4: output + blocks 1, 2, 3 rather than all
    # blocks. 5: everything, and nothing left to be copied.
    assert [gpu_bytes(memory, n) for n in range(6)] == [57, 157, 202, 237, 262, 227]
    heavy_blocks = ModelMemory((1000, 1000), cache=5, output=1, compute=0, largest=0, context=512)
    assert gpu_bytes(heavy_blocks, 1) == 1005
    assert gpu_bytes(heavy_blocks, 99) == gpu_bytes(heavy_blocks, 3) == heavy_blocks.total


def test_what_fits_leaves_the_margin_and_more_would_not(memory: ModelMemory) -> None:
    for free in range(400):
        fitting = layers_that_fit(memory, free, margin=10)
        if fitting:
            assert gpu_bytes(memory, fitting) + 10 <= free
        assert all(gpu_bytes(memory, n) + 10 > free for n in range(fitting + 1, memory.layers + 1))
    assert layers_that_fit(memory, 237, margin=10) == 5
    assert layers_that_fit(memory, 236, margin=10) == 2  # 3 of them would do with 247
    assert layers_that_fit(memory, MARGIN) == 0


def test_the_table_adds_up(memory: ModelMemory) -> None:
    for layers in range(6):
        sizes = [
            line.rsplit("  ", 1)[1] for line in layer_table(memory, layers, "card", 999, margin=10).splitlines()[2:]
        ]
        numbers = [0 if size.strip() == "on the CPU" else int(size.split()[0]) for size in sizes]
        assert sum(numbers[:5]) == numbers[5] == gpu_bytes(memory, layers) + 10
        assert numbers[6] == 999


def test_the_layer_that_needs_most_counts() -> None:
    assert compute_bytes(1000, 10, 20, 0) == 4 * 512 * (20 + 1000)
    assert compute_bytes(10, 10, 20, 9000) == 4 * 512 * (20 + 9000 + 100)


def test_head_counts_may_differ_by_block(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", "llama", heads=4, kv_heads=2)
    with GGUFFile.open(path) as file:
        plain = model_memory(file.metadata, file.tensors, 256)
        varied = {**file.metadata, "llama.attention.head_count_kv": [1, 2, 1]}
        assert model_memory(varied, file.tensors, 256) == plain


def test_a_quantised_cache_by_its_blocks(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", "llama", embedding=256, heads=4, kv_heads=2)

    def cache(kind: str, **options: object) -> int:
        return memory_of(path, 1024 - 128, cache_type=kind, **options).cache

    row = 2 * 64  # numbers of a token's keys in a block
    assert cache("f16") == cache("bf16") == 1024 * 2 * row * 2
    assert cache("q8_0") == 1024 * 2 * row // 32 * 34
    assert cache("q5_1") == 1024 * 2 * row // 32 * 24
    assert cache("q4_0") == 1024 * 2 * row // 32 * 18
    assert cache("q8_0", flash_attention=False) == 1024 * (row // 32 * 34 + row * 2)  # values are not


def test_a_draft_model_is_counted_whole(memory: ModelMemory) -> None:
    drafting = replace(memory, draft=30)
    assert drafting.total == memory.total + 30
    assert [gpu_bytes(drafting, n) - gpu_bytes(memory, n) for n in range(6)] == [30] * 6
    assert "draft model, its cache and buffers" in layer_table(drafting, 2, "card", 999)
    assert "draft" not in layer_table(memory, 2, "card", 999)
