"""Decoding speed of every architecture beside llama.cpp: `python -m benchmarks.architectures --speed`.

Of each a file of some 150 MB is written: the shapes of its tiny model (`tests/support/tiny_models.py`) made as wide as
those of a real model of 1 to 3 billion parameters, with few blocks and a vocabulary of some hundred tokens, in the
formats of a Q4_K_M file, or with experts in MXFP4 where the architecture has them so. Both programs decode from an
empty cache, by turns, llama-bench in the environment of the user's shell and with the flags that it is fastest with.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Q

from benchmarks.memory import last_cache_bytes
from benchmarks.shapes import MIXES, weights
from benchmarks.vs_llama_cpp import best_for_decoding, decoding_speed, summary
from nkat.engine.decoder import Decoder, make_decoder
from nkat.host import console, hardware
from nkat.host.tables import Column, Table
from nkat.lm.load import load_model
from nkat.measure.tpe import bytes_per_token
from tests.support.tiny_models import write_tiny_model

STEPS = 64
_FLOAT32 = ("ffn_gate_inp", "ssm_conv1d", "ssm_ba", "ssm_beta", "ssm_alpha")  # small, and left so
_WIDE: dict[str, Any] = {
    "blocks": 6,
    "embedding": 2048,
    "heads": 16,
    "kv_heads": 4,
    "head_dim": 128,
    "feed_forward": 5632,
    "rotary": None,
}
_MIXTURE: dict[str, Any] = {**_WIDE, "blocks": 4, "feed_forward": 768, "experts": 16, "experts_used": 4}
_DELTA_NET: dict[str, Any] = {"blocks": 4, "value_heads": 32, "key_heads": 16, "state": 128}
# What an architecture has otherwise
_OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 512},
    "gemma3": {"sliding_window": 512},
    "gemma4": {
        "kv_heads_by_block": (4,) * 6,
        "feed_forward_by_block": (5632,) * 6,
        "local_head_dim": 128,
        "layer_inputs": 256,
        "sliding_window": 512,
    },
    "glm4": {"rotary": 64},
    "olmo2": {"sliding_window": 512},
    "qwen3moe": _MIXTURE,
    "granitemoe": {**_MIXTURE, "shared_length": 1024},
    "qwen35": {**_DELTA_NET, "rotary": 64, "sections": (11, 11, 10, 0)},
    "qwen35moe": {**_MIXTURE, **_DELTA_NET, "rotary": 64, "sections": (11, 11, 10, 0), "shared_length": 512},
    "qwen3next": {**_MIXTURE, **_DELTA_NET, "rotary": 64, "shared_length": 512},
    "gpt-oss": {**_MIXTURE, "experts": 8, "feed_forward": 1536, "sliding_window": 128},
}


def write_wide_model(path: Path, arch: str) -> Path:
    """A model of the architecture whose decoding speed means something."""
    options = {**_WIDE, **_OWN.get(arch, {})}
    mix = "20B-MXFP4" if arch == "gpt-oss" else "Q4_K_M"
    choose, embedding, output = MIXES[mix]
    made: dict[tuple[Q, tuple[int, ...]], np.ndarray] = {}

    def make(name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, Q] | None:
        part = name.split(".")
        if part[-1] != "weight" or len(shape) < 2 or shape[-1] % 256 or any(word in name for word in _FLOAT32):
            return None
        tables = {"token_embd": embedding, "per_layer_token_embd": embedding, "output": output}
        qtype = choose(part[2], int(part[1]), options["blocks"]) if part[0] == "blk" else tables.get(part[0], Q.Q6_K)
        if (qtype, shape) not in made:
            made[qtype, shape] = weights(qtype, shape)
        return made[qtype, shape], qtype

    return write_tiny_model(path, arch, make=make, **options)


def _speed(decoder: Decoder, tokens: Sequence[int]) -> float:
    decoder.length = 0
    started = perf_counter()
    for token in tokens:
        decoder.step(token)
    return len(tokens) / (perf_counter() - started)


def measure(program: Path, names: Sequence[str], threads: int | None, turns: int) -> list[dict[str, Any]]:
    """A row for each architecture; program: llama-bench."""
    threads = hardware.set_threads(threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder, console.bar(len(names), "decoding speed", "architecture") as bar:
        for arch in names:
            rows.append(_compare(program, write_wide_model(Path(folder) / "wide.gguf", arch), arch, threads, turns))
            gc.collect()  # lets the file go
            bar.update()
    return rows


def _compare(program: Path, path: Path, arch: str, threads: int, turns: int) -> dict[str, Any]:
    loaded = load_model(path, int8_activations=True, repack=True)
    tokens = [i * 29 % loaded.config.vocab_size for i in range(STEPS)]
    decoder = make_decoder(loaded.model, STEPS + 1)
    _speed(decoder, tokens)  # compiles
    setting = best_for_decoding(program, path, threads)
    pairs = [(_speed(decoder, tokens), decoding_speed(program, path, setting, STEPS)) for _ in range(turns)]
    ours, theirs = ([pair[i] for pair in pairs] for i in (0, 1))
    return {
        "architecture": arch,
        "bytes": path.stat().st_size,
        "bytes_a_token": bytes_per_token(loaded.tensors, loaded.config.active_experts),
        "fits_the_last_cache": path.stat().st_size <= last_cache_bytes(),
        "threads": threads,
        "llama_cpp_setting": asdict(setting),
        "decoder": decoder.name,
        **summary(ours, theirs),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """What is printed of `measure`."""
    ratio = ("ratio", "ratio_min", "ratio_max")
    columns = [
        Column("", "architecture"),
        Column("MB", "bytes", lambda n: f"{n / 1e6:.0f}"),
        Column("MB a token", "bytes_a_token", lambda n: f"{n / 1e6:.0f}"),
        Column("in cache", "fits_the_last_cache", lambda fits: "yes" if fits else "no"),
        Column("threads", "threads"),
        Column("tok/s here", "nkat_tokens_per_second", ".1f"),
        Column("llama.cpp", "llama_cpp_tokens_per_second", ".1f"),
        Column("ratio", ratio, "{:.2f} ({:.2f}-{:.2f})".format),
    ]
    return Table("speed", columns, rows)


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nIt is a part of another command: python -m benchmarks.architectures --help")
