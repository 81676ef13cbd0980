"""Files to start from, and changes to them: single bytes, and fields where the format has them.

A case is a number: the same number is the same file everywhere.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch

from nkat.gguf.file import GGUFFile
from nkat.gguf.writer import BaseView, write_gguf
from nkat.theta.algebra import quantize_factors
from nkat.theta.lora import lora_parts
from nkat.theta.modelfile import appended_parts, embedded_parts, open_model_file, theta_only_parts
from nkat.theta.set import ThetaSet
from tests.support.tiny_models import write_tiny_model

_INTERESTING = (
    0, 1, 2, 3, 7, 8, 31, 32, 33, 64, 127, 128, 255, 256, 4096, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, 1 << 40, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-38, 1e38, 1e308, float("inf"), float("-inf"), float("nan"))
_TYPES = (*range(14), 255, 1 << 31)
_TENSOR_TYPES = (*range(45), 133, 144, 200, 1 << 31)


@dataclass(frozen=True, slots=True)
class Seed:
    """A good file, and where its fields are.

    numbers: (position, bytes) of lengths, counts, types, dimensions, offsets and whole-number values
    floats: of float32 values; texts: (position, length) of strings
    header: where the first tensor's data begin
    """

    name: str
    raw: bytes
    numbers: tuple[tuple[int, int], ...]
    floats: tuple[int, ...]
    texts: tuple[tuple[int, int], ...]
    header: int


def make_seeds(folder: Path) -> list[Seed]:
    """Models of two vocabularies, both layouts of a .nkat, Θ alone, and an adapter."""
    small = {"blocks": 1, "embedding": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "feed_forward": 32, "context": 64}
    quantised = {"qtype": gguf.GGMLQuantizationType.Q8_0}
    llama = write_tiny_model(folder / "llama.gguf", "llama", **small)
    paths = [
        llama,
        write_tiny_model(folder / "gemma3.gguf", "gemma3", **small, sliding_window=4, **quantised),
        write_tiny_model(folder / "qwen3.gguf", "qwen3", **small, rope_scaling={"type": "yarn", "factor": 2.0}),
    ]
    view = BaseView.whole(GGUFFile.open(llama))
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: quantize_factors(*torch.randn(2, 32, 2, generator=generator))
        for name in ("blk.0.attn_q.weight", "blk.0.ffn_down.weight")
    }
    size = llama.stat().st_size
    theta = ThetaSet(layers, 0.5, "weight", 0, "0" * 64, "tiny", size, notes={"nkat.theta.target_size": 9})
    for name, parts in (
        ("tensors.nkat", embedded_parts(theta, view)),
        ("appended.nkat", [llama.read_bytes(), *appended_parts(theta, size)]),
        ("theta.gguf", theta_only_parts(theta)),
        ("adapter.gguf", lora_parts(theta, view)),
    ):
        write_gguf(folder / name, parts, force=True)
        paths.append(folder / name)
    return [_seed(path) for path in paths]


def _seed(path: Path) -> Seed:
    raw = path.read_bytes()
    file = GGUFFile.open(path)
    numbers, floats, texts = [(4, 4), (8, 8), (16, 8)], [], []
    for key, (start, end) in file.metadata.spans.items():
        length = len(key.encode())
        at = start + 8 + length
        numbers += [(start, 8), (at, 4)]
        texts.append((start + 8, length))
        kind = struct.unpack_from("<I", raw, at)[0]
        if kind == 8:
            numbers.append((at + 4, 8))
            texts.append((at + 12, end - at - 12))
        elif kind == 9:
            numbers += [(at + 4, 4), (at + 8, 8), (at + 16, 8)]
        elif kind in (6, 12):
            floats.append(at + 4)
        else:
            numbers.append((at + 4, end - at - 4))
    for info in file.tensors.values():
        start, end = info.info_span
        length = len(info.name.encode())
        at = start + 8 + length
        numbers += [(start, 8), (at, 4), (end - 12, 4), (end - 8, 8)]
        numbers += [(place, 8) for place in range(at + 4, end - 12, 8)]
        texts.append((start + 8, length))
    model = open_model_file(path)
    if model.layout == "appended":  # marker and footer, and the header of Θ behind the base
        numbers += [(model.base_size + 8, 8), *((len(raw) - 64 + place, 8) for place in (8, 16, 24))]
        texts += [(model.base_size, 8), (len(raw) - 64, 8)]
    return Seed(path.name, raw, tuple(numbers), tuple(floats), tuple(texts), file.data_start)


def mutated(seeds: list[Seed], case: int) -> tuple[Seed, bytes]:
    """The file of a case, and what it was made from."""
    chance = random.Random(case)
    seed = seeds[case % len(seeds)]
    raw = bytearray(seed.raw)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        chance.choice(_CHANGES)(raw, seed, chance)
    return seed, bytes(raw)


def _place(raw: bytearray, seed: Seed, chance: random.Random) -> int:
    """Mostly in a header; that of an appended Θ stands behind the base."""
    end = len(raw) if chance.random() < 0.2 else min(len(raw), seed.header)
    return chance.randrange(max(1, end))


def _put(raw: bytearray, at: int, new: bytes) -> None:
    if at + len(new) <= len(raw):
        raw[at : at + len(new)] = new


def _byte(raw: bytearray, seed: Seed, chance: random.Random) -> None:
    _put(raw, _place(raw, seed, chance), bytes([chance.randrange(256)]))


def _number(raw: bytearray, seed: Seed, chance: random.Random) -> None:
    at, width = chance.choice(seed.numbers)
    if width not in (1, 2, 4, 8):
        return
    choices = _INTERESTING if width == 8 else chance.choice((_INTERESTING, _TYPES, _TENSOR_TYPES))
    value = chance.choice(choices)
    if chance.random() < 0.3 and at + width <= len(raw):  # near what is there
        value = int.from_bytes(raw[at : at + width], "little") + chance.choice((-32, -1, 1, 32))
    _put(raw, at, (value % (1 << 8 * width)).to_bytes(width, "little"))


def _float(raw: bytearray, seed: Seed, chance: random.Random) -> None:
    if seed.floats:
        value = chance.choice(_FLOATS)
        _put(raw, chance.choice(seed.floats), struct.pack("<f", value if abs(value) < 3e38 else float("inf")))


def _text(raw: bytearray, seed: Seed, chance: random.Random) -> None:
    at, length = chance.choice(seed.texts)
    if length:
        _put(raw, at + chance.randrange(length), bytes([chance.choice((0, 10, 45, 48, 57, 97, 128, 195, 255))]))


def _swap(raw: bytearray, seed: Seed, chance: random.Random) -> None:
    """One field gets the bytes of another of its width."""
    (a, width), (b, other) = chance.choice(seed.numbers), chance.choice(seed.numbers)
    if width == other:
        _put(raw, a, bytes(raw[b : b + width]))


def _cut(raw: bytearray, seed: Seed, chance: random.Random) -> None:
    del raw[max(1, _place(raw, seed, chance)) :]


def _drop(raw: bytearray, seed: Seed, chance: random.Random) -> None:
    at = _place(raw, seed, chance)
    if at + 64 < len(raw):
        del raw[at : at + chance.randint(1, 64)]


def _repeat(raw: bytearray, seed: Seed, chance: random.Random) -> None:
    at = _place(raw, seed, chance)
    raw[at:at] = raw[at : at + chance.randint(1, 64)]


_CHANGES: tuple[Callable[[bytearray, Seed, random.Random], None], ...] = (
    _byte, _byte, _number, _number, _number, _number, _float, _text, _text, _swap, _cut, _drop, _repeat,
)  # fmt: skip
