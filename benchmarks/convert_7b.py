"""Converts a synthetic 7B-shaped Q4_K file: time and peak memory of the real converter, in a process of its own.

    python -m benchmarks.convert_7b                       32 blocks, 4 GB, in a temporary folder
    python -m benchmarks.convert_7b --blocks 4            a quick look

The shapes are Llama 2 7B's (d 4096, FFN 11008, vocabulary 32000). The Q4_K blocks hold random quants and small random
scales: a flat spectrum, the slowest case for the SVD. The last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.convert_7b")

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from nkat.errors import NKATError
from nkat.gguf.writer import NewTensor, gguf_parts, part_size, write_gguf
from nkat.host import commandline, console
from nkat.host.console import format_bytes
from nkat.host.hardware import describe
from nkat.host.record import write_json

DIM, FFN, VOCABULARY = 4096, 11008, 32000
BLOCK_WEIGHTS = {
    "attn_q": (DIM, DIM),
    "attn_k": (DIM, DIM),
    "attn_v": (DIM, DIM),
    "attn_output": (DIM, DIM),
    "ffn_gate": (FFN, DIM),
    "ffn_up": (FFN, DIM),
    "ffn_down": (DIM, FFN),
}
ROOT = Path(__file__).resolve().parent.parent


def write_model(path: Path, blocks: int) -> int:
    """Writes the synthetic model and returns its size in bytes."""
    rng = np.random.default_rng(0)
    packed = {shape: _random_q4_k(rng, shape) for shape in {*BLOCK_WEIGHTS.values(), (VOCABULARY, DIM)}}
    q4_k = GGMLQuantizationType.Q4_K
    shapes = {"token_embd.weight": (VOCABULARY, DIM), "output.weight": (VOCABULARY, DIM)}
    shapes |= {f"blk.{i}.{name}.weight": shape for i in range(blocks) for name, shape in BLOCK_WEIGHTS.items()}
    tensors = [NewTensor(name, q4_k, packed[shape], shape) for name, shape in shapes.items()]
    parts = gguf_parts({"general.architecture": "llama", "llama.block_count": blocks}, tensors)
    size = sum(part_size(part) for part in parts)
    with console.bar(size, "writing the synthetic model", "B") as bar:
        write_gguf(path, parts, force=True, progress=bar.update)
    return size


def _random_q4_k(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Packed Q4_K: uint8 [blocks, 144], random but for d and dmin, its first two halves, which are small."""
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // 256, 144), dtype=np.uint8)
    blocks[:, :4] = np.array([1e-4, 5e-4], dtype=np.float16).view(np.uint8)
    return blocks


def convert(model: Path, output: Path, rank: int, threads: int | None) -> dict[str, float]:
    """Runs the converter and returns its seconds and its peak resident memory in bytes (Linux and macOS)."""
    command = [sys.executable, str(ROOT / "nkat_gguf_converter.py"), "--input", str(model), "--output", str(output)]
    command += ["--theta-rank", str(rank), *(["--threads", str(threads)] if threads else [])]
    started = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise NKATError(f"the converter ended with status {child.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": time.perf_counter() - started, "peak_bytes": usage.ru_maxrss * unit}


def main() -> None:
    parser = commandline.parser(__doc__.splitlines()[0], "  python -m benchmarks.convert_7b --blocks 4")
    parser.add_argument("--blocks", type=commandline.positive_int, default=32)
    parser.add_argument("--rank", type=commandline.positive_int, default=4)
    parser.add_argument("--threads", type=commandline.thread_count)
    parser.add_argument("--folder", type=Path, help="where the two files of 4 GB go (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        model = Path(scratch) / "synthetic-7b-q4_k.gguf"
        size = write_model(model, options.blocks)
        result = convert(model, Path(scratch) / "synthetic-7b.nkat", options.rank, options.threads)
    print(
        f"{format_bytes(size)}, {options.blocks} blocks, rank {options.rank}: {result['seconds']:.1f} s, "
        f"peak memory {format_bytes(result['peak_bytes'])}"
    )
    record = {"benchmark": "convert_7b", "bytes": size, "blocks": options.blocks, "rank": options.rank, **result}
    write_json({**record, "machine": describe(torch.device("cpu"))}, "-")
