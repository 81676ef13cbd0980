"""A GGUF cut into parts as `llama-gguf-split --split` cuts it, byte for byte (`tests/golden/split.json` says so)."""

from __future__ import annotations

import struct
from pathlib import Path

from nkat.gguf.file import GGUFFile, TensorInfo

U16, I32 = 2, 5  # numbers of GGUF's value types


def entry(key: str, kind: int, value: int) -> bytes:
    layout = {U16: "<IH", I32: "<Ii"}[kind]
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack(layout, kind, value)


def split_model(path: Path, most: int, *, first_is_empty: bool = False, stem: str | None = None) -> list[Path]:
    """Writes the parts beside the model, each of at most so many tensors; returns their paths in order."""
    file = GGUFFile.open(path)
    infos = list(file.tensors.values())
    groups = [infos[i : i + most] for i in range(0, len(infos), most)]
    if first_is_empty:
        groups.insert(0, [])
    names = [f"{stem or path.stem}-{i:05d}-of-{len(groups):05d}.gguf" for i in range(1, len(groups) + 1)]
    for number, (name, group) in enumerate(zip(names, groups, strict=True)):
        kept = file.read(*file.metadata_span).tobytes() if number == 0 else b""
        counts = entry("split.no", U16, number) + entry("split.tensors.count", I32, len(infos))
        counts += entry("split.count", U16, len(groups))
        entries = (len(file.metadata) if number == 0 else 0) + 3
        path.with_name(name).write_bytes(_part(file, group, entries, kept + counts))
    return [path.with_name(name) for name in names]


def _part(file: GGUFFile, group: list[TensorInfo], entries: int, metadata: bytes) -> bytes:
    infos, data = b"", b""
    for info in group:
        infos += file.read(*info.info_span).tobytes()[:-8] + struct.pack("<Q", len(data))
        data += file.raw(info.name).tobytes() + bytes(-info.nbytes % 32)
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(group), entries) + metadata + infos
    return header + bytes(-len(header) % 32) + data
