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
from nkat.theta.algebra import quantise_factors
from nkat.theta.lora import lora_parts
from nkat.theta.modelfile import appended_parts, embedded_parts, open_model_file, theta_only_parts
from nkat.theta.set import ThetaSet
from tests.support.tiny_models import write_tiny_model

_INTERESTING = (
    0, 1, 2, 3, 7, 8, 31, 32, 33, 64, 127, 128, 255, 256, 4096, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, 1 << 40, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-38, 1e38, 1e308, float("inf"), float("-inf"), float("nan"))
_STRINGS = (
    b"", b"x", b"a b", b"\0", b"\xff\xfe", b"caf\xe9", b"a\nb\x1b[2J", "Θ▁é世".encode(),
    b"llama", b"gemma3", b"qwen2", b"gpt2",
    b"default", b"yarn", b"none", b"<0x0A>", b"0" * 64, b"{{ messages }}", b"x" * 5000,
)  # fmt: skip
_ARCHITECTURES = ("llama", "gemma3", "qwen3")
_MODEL_KEYS = (
    "vocab_size", "expert_count", "nextn_predict_layers", "attention.sliding_window",
    "attention.sliding_window_pattern", "attention.key_length",
    "attention.value_length", "attention.causal", "attention.scale", "rope.dimension_count", "rope.scaling.type",
    "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "rope.freq_base", "rope.freq_base_swa", "attn_logit_softcapping", "logit_scale", "attention.head_count_kv",
)  # fmt: skip
_KEYS = (
    "split.count", "split.no", "general.alignment", "general.name", "general.type", "nkat.version", "nkat.base.size",
    "nkat.base.gguf_version", "nkat.theta.count", "nkat.theta.gamma", "nkat.theta.rank", "nkat.calibration.sha256",
    "nkat.fit.unfinished", "nkat.other", "tokenizer.chat_template", "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges",
    "tokenizer.ggml.pre", "adapter.type",
)  # fmt: skip
_TYPES = (*range(14), 255, 1 << 31)
_TENSOR_TYPES = (*range(45), 133, 144, 200, 1 << 31)


@dataclass(frozen=True, slots=True)
class Seed:
    """A good file, and where its fields are.

    numbers: (position, bytes) of lengths, counts, types, dimensions, offsets and whole-number values
    floats: of float32 values; texts: (position, length) of strings
    entries: (start, end, key) of metadata; header_end: where the padding before the data begins
    header: where the first tensor's data begin
    """

    name: str
    raw: bytes
    numbers: tuple[tuple[int, int], ...]
    floats: tuple[int, ...]
    texts: tuple[tuple[int, int], ...]
    entries: tuple[tuple[int, int, str], ...]
    header_end: int
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
        name: quantise_factors(*torch.randn(2, 32, 2, generator=generator))
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
    entries = tuple((start, end, key) for key, (start, end) in file.metadata.spans.items())
    header_end = max((info.info_span[1] for info in file.tensors.values()), default=file.metadata_span[1])
    return Seed(path.name, raw, tuple(numbers), tuple(floats), tuple(texts), entries, header_end, file.data_start)


def mutated(seeds: list[Seed], case: int) -> tuple[Seed, bytes]:
    """The file of a case, and what it was made from."""
    chance = random.Random(case)
    seed = seeds[case % len(seeds)]
    if chance.random() < 0.5:
        raw = bytearray(_with_another_value(seed, chance))
        changes = chance.choice((0, 0, 0, 1))
    else:
        raw = bytearray(seed.raw)
        changes = chance.choice((1, 1, 1, 2, 4))
    for _ in range(changes):
        chance.choice(_CHANGES)(raw, seed, chance)
    return seed, bytes(raw)


def _with_another_value(seed: Seed, chance: random.Random) -> bytes:
    """A file whose every length is right: one value is of another type or size, or there is one more, or one less."""
    start, end, key = chance.choice(seed.entries)
    raw, count = seed.raw, len(seed.entries)
    what = chance.random()
    if what < 0.1:
        new, count = b"", count - 1
    elif what < 0.4:  # one more, in front, that readers look at
        missing = sorted({*_KEYS, *(f"{arch}.{name}" for arch in _ARCHITECTURES for name in _MODEL_KEYS)})
        key = chance.choice([name for name in missing if name not in {k for _, _, k in seed.entries}])
        new, count = _entry(key, chance) + raw[start:end], count + 1
    else:
        new = _entry(key, chance)
    header = raw[:16] + struct.pack("<Q", count) + raw[24:start] + new + raw[end : seed.header_end]
    return header + bytes(-len(header) % 32) + raw[seed.header :]


def _entry(key: str, chance: random.Random) -> bytes:
    name = key.encode()
    return struct.pack("<Q", len(name)) + name + _value(chance, 0)


def _value(chance: random.Random, depth: int) -> bytes:
    kind = chance.choice((*range(13), 4, 4, 6, 8, 9))
    if kind != 9:
        return struct.pack("<I", kind) + _scalar(kind, chance)
    element = 9 if depth < 2 and chance.random() < 0.1 else chance.choice([k for k in range(13) if k != 9])
    count = chance.choice((0, 1, 1, 2, 3, 400))
    head = struct.pack("<IIQ", 9, element, count)
    if element == 9:
        return head[:-8] + struct.pack("<Q", 1) + struct.pack("<IQ", 4, 1) + bytes(4)
    return head + b"".join(_scalar(element, chance) for _ in range(count))


def _scalar(kind: int, chance: random.Random) -> bytes:
    if kind == 8:
        text = chance.choice(_STRINGS)
        return struct.pack("<Q", len(text)) + text
    if kind in (6, 12):
        value = chance.choice(_FLOATS)
        return (
            struct.pack("<d", value) if kind == 12 else struct.pack("<f", value if abs(value) < 3e38 else float("inf"))
        )
    width = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 7: 1, 10: 8, 11: 8}[kind]
    value = chance.choice(_INTERESTING) if kind != 7 else chance.choice((0, 1, 1, 2))
    return (value % (1 << 8 * width)).to_bytes(width, "little")


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
