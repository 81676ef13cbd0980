"""A model in several files, `name-00001-of-00003.gguf` and so on, as the one file that it was cut from.

What is read here is, byte for byte, what `llama-gguf-split --merge` writes: the first part's metadata with
`split.count` set to 0 and moved behind the rest, every part's tensors in order, each padded to the alignment. So a
hash, and with it a Θ, is the same for the parts and for the merged file. Nothing is copied: tensors are views of the
parts' memory maps.

Facts: https://github.com/ggml-org/llama.cpp, tools/gguf-split and src/llama-model-loader.cpp.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from gguf.constants import GGUFValueType

from nkat.gguf.file import MAGIC, GGUFError, GGUFFile, Piece

MAX_PARTS = 512  # far above any model's: each is a file that stays open
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_MERGED_COUNT = struct.pack("<Q11sIH", 11, b"split.count", GGUFValueType.UINT16, 0)
_VERSION = 3


def open_gguf(path: str | Path) -> GGUFFile:
    """Opens a GGUF, or the whole model of which it is any part. Raises GGUFError for parts that are missing or do not
    belong together, and as `GGUFFile.open` does.
    """
    path = Path(path)
    file = GGUFFile.open(path, part=True)
    if file.part_count < 2:
        return file
    paths = _paths(path, file.part_count)
    parts = []
    for number, other in enumerate(paths, 1):
        if other != path and not other.is_file():
            raise GGUFError(f"{other}: part {number} of {len(paths)} of this model is missing")
        part = file if other == path else GGUFFile.open(other, part=True)
        _check_part(part, number, file)
        parts.append(part)
    return SplitFile(parts)


def is_later_part(path: Path) -> bool:
    """Whether a name is that of a part behind the first, which stands for all of them."""
    found = _NAME.fullmatch(path.name)
    return found is not None and found[2] != "00001"


def without_number(path: Path) -> Path:
    """What the whole would be called: `name.gguf` for `name-00002-of-00003.gguf`; any other name as it is."""
    found = _NAME.fullmatch(path.name)
    return path if found is None else path.with_name(f"{found[1]}.gguf")


def _paths(path: Path, count: int) -> list[Path]:
    found = _NAME.fullmatch(path.name)
    if found is None or int(found[3]) != count:
        raise GGUFError(
            f"{path}: is a part of a model in {count} parts, and the others are not to be found by its name, which "
            f"must end in -00001-of-{count:05d}.gguf"
        )
    if count > MAX_PARTS:
        raise GGUFError(f"{path}: split.count {count} is more than the allowed {MAX_PARTS}")
    return [path.with_name(f"{found[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def _check_part(part: GGUFFile, number: int, named: GGUFFile) -> None:
    count = named.part_count
    if part.part_count != count:
        raise GGUFError(
            f"{part.path}: does not belong to {named.path.name}: split.count is {part.part_count}, not {count}"
        )
    said = part.metadata.get("split.no", 0 if number == 1 else None)
    if isinstance(said, bool) or said != number - 1:
        raise GGUFError(f"{part.path}: is not part {number} of {count}: split.no is {said!r:.80}, not {number - 1}")


class SplitFile(GGUFFile):
    """The parts as one file: positions are those in the merged one, of which the header alone is in memory."""

    def __init__(self, parts: Sequence[GGUFFile]) -> None:
        self._parts = list(parts)
        self._owner: dict[str, GGUFFile] = {}
        for part in parts:
            for name in part.tensors:
                if name in self._owner:
                    raise GGUFError(f"{part.path}: tensor {name!r} is in {self._owner[name].path.name} as well")
                self._owner[name] = part
        first = parts[0]
        expected = first.metadata.get("split.tensors.count", len(self._owner))
        if expected != len(self._owner):
            raise GGUFError(
                f"{first.path}: split.tensors.count is {expected!r:.80}, but the {len(parts)} parts hold "
                f"{len(self._owner)} tensors"
            )
        infos, size = _moved_infos(parts, first.alignment)
        self._header = _header(first, len(self._owner), infos)
        super().__init__(first.path, self._header, 0, len(self._header) + size)
        self._starts = [info.offset for info in self.tensors.values()]  # they come in order
        self._names = list(self.tensors)

    @property
    def files(self) -> list[Path]:
        return [part.path for part in self._parts]

    def close(self) -> None:
        super().close()
        for part in self._parts:
            part.close()

    def raw(self, name: str) -> np.ndarray:
        return self._owner[name].raw(name) if name in self._owner else super().raw(name)

    def release(self, name: str) -> None:
        self._owner[name].release(name)

    def place(self, name: str) -> tuple[Path, int]:
        return self._owner[name].place(name)

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        if start < len(self._header):
            yield self._header[start:end]
        position = max(start, len(self._header))
        index = max(0, bisect_right(self._starts, position) - 1)
        while position < end:
            info = self.tensors[self._names[index]] if index < len(self._names) else None
            if info is None or info.offset > position:  # no tensor at all: only the header has bytes
                return
            skipped, stop = position - info.offset, min(end, info.offset + info.nbytes)
            if skipped < info.nbytes:
                path, offset = self.place(info.name)
                yield path, offset + skipped, offset + stop - info.offset
            index += 1
            following = self._starts[index] if index < len(self._starts) else self.end
            if stop < end and following > max(position, stop):
                yield bytes(min(end, following) - max(position, stop))
            position = min(end, following)

    def read(self, start: int, end: int) -> np.ndarray:
        """As of one file; what lies in several pieces is copied."""
        maps = {part.path: part for part in self._parts}
        found = [
            np.frombuffer(piece, np.uint8) if isinstance(piece, bytes) else maps[piece[0]].read(piece[1], piece[2])
            for piece in self.pieces(start, end)
        ]
        if len(found) == 1:
            return found[0]
        whole = np.concatenate(found) if found else np.zeros(0, np.uint8)
        whole.flags.writeable = False
        return whole


def _moved_infos(parts: Sequence[GGUFFile], alignment: int) -> tuple[bytes, int]:
    """The parts' tensor entries with the offsets of the merged file, and the size of its data."""
    infos, offset = [], 0
    for part in parts:
        for info in part.tensors.values():
            entry = part.read(*info.info_span).tobytes()
            infos.append(entry[:-8] + struct.pack("<Q", offset))
            offset += info.nbytes + -info.nbytes % alignment
    return b"".join(infos), offset


def _header(first: GGUFFile, tensors: int, infos: bytes) -> bytes:
    kept = [first.read(*span).tobytes() for key, span in first.metadata.spans.items() if key != "split.count"]
    header = struct.pack("<4sIQQ", MAGIC, _VERSION, tensors, len(kept) + 1)
    header += b"".join(kept) + _MERGED_COUNT + infos
    return header + bytes(-len(header) % first.alignment)
