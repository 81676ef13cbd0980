"""Θ in files: the `.nkat` in both layouts, and Θ alone.

Layout `tensors`   a GGUF v3 holding the base's metadata and tensors unchanged, then for each adapted `X.weight`
                   `X.theta_p` and `X.theta_q` (I8, t×r) and `X.theta_scale` (F32, 2×r), and `nkat.*` metadata.
Layout `appended`  the base's bytes unchanged, then:

    | marker: "NKATBASE", u64 size of the base | zeros to a 4 KiB boundary | Θ as a complete GGUF | footer, 64 bytes |
    footer: "NKATTHTA", u32 version 1, u32 0, u64 offset of the Θ GGUF, u64 its length, 32 bytes SHA-256 of it

                   Programs that read tensors by their offsets (llama.cpp, KoboldCpp) load it as the base model.
                   The marker tells an append that was cut short from bytes that belong to the base. A power cut may
                   leave zeros in its place: then they tell, or the Θ behind them, which knows its base's size.
Θ alone            the same tensors and metadata in a GGUF of their own.
Θ beside its model  the same, with the name of the first part of a split model in the same folder (`nkat.base.file`):
                   what layout `appended` is for a model in several files, whose bytes it leaves where they are.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gguf.constants import GGMLQuantizationType

from nkat.errors import NKATError
from nkat.gguf.file import VERSIONS, GGUFError, GGUFFile
from nkat.gguf.split import open_gguf
from nkat.gguf.writer import (
    BaseView,
    Part,
    Progress,
    gguf_parts,
    part_size,
    range_parts,
    sha256_of_parts,
)
from nkat.theta.algebra import Theta, ThetaError, coupling
from nkat.theta.optimal import about_missing
from nkat.theta.set import FORMAT_VERSION, KEY_PREFIX, SUFFIXES, ThetaSet, check_fits

BOUNDARY = 4096
BASE_FILE_KEY = "nkat.base.file"
_MARKER = struct.Struct("<8sQ")
_MARKER_MAGIC = b"NKATBASE"
MARKER_SIZE = _MARKER.size
_FOOTER = struct.Struct("<8sIIQQ32s")
_FOOTER_MAGIC = b"NKATTHTA"


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What a path holds: a base model, Θ, or both.

    layout: "plain", "tensors", "appended", "beside" or "theta-only"; base is None for the last, theta None for the
    first
    unfinished: an in-place append was cut short, and the bytes behind the base are its remains
    foreign_tail: bytes behind the last tensor that are not ours; they count as the base's
    """

    path: Path
    layout: str
    base: BaseView | None
    theta: ThetaSet | None
    unfinished: bool = False
    foreign_tail: bool = False

    def require_base(self) -> BaseView:
        """The base model. Raises GGUFError for a file with Θ alone."""
        if self.base is None:
            raise GGUFError(f"{self.path}: holds only Θ, not a model; give the model itself here, and this as its Θ")
        return self.base

    def require_theta(self) -> ThetaSet:
        """The Θ. Raises GGUFError for a file without any."""
        if self.theta is None:
            raise GGUFError(f"{self.path}: holds no Θ")
        return self.theta

    def base_parts(self) -> list[Part]:
        """The base model's bytes, whatever the layout."""
        base = self.require_base()
        return base.parts() if self.layout == "tensors" else range_parts(base.file, 0, base.data_end)

    @property
    def files(self) -> list[Path]:
        """Every file that it is in."""
        own = [self.path] if self.base is None else self.base.file.files
        return list(dict.fromkeys((self.path, *own)))

    @property
    def is_split(self) -> bool:
        """Whether its model is in several files."""
        return self.base is not None and len(self.base.file.files) > 1

    @property
    def base_size(self) -> int:
        """Bytes of the base model."""
        return sum(part_size(part) for part in self.base_parts())


def open_model_file(path: str | Path) -> ModelFile:
    """Opens a GGUF or `.nkat` of any layout; any part of a split model stands for all of it, and `path` of what this
    gives is the first. Raises GGUFError when the file or the Θ in it is damaged.
    """
    path = Path(path)
    if said := about_missing(path):
        raise NKATError(f"{path}: no such file{said}")
    file = open_gguf(path)
    if len(file.files) > 1:
        path = file.path
    if _is_theta(file):
        return _open_with_own_theta(path, file)
    footer = _read_footer(file)
    if footer is None:
        base_end = _find_marker(file, range(file.data_end, _aligned(file, file.data_end) + 1))
        if base_end is None and _is_lost_append(file):
            base_end = _aligned(file, file.data_end)
        unfinished = base_end is not None
        end = file.end if base_end is None else base_end
        tail = not unfinished and file.end > _aligned(file, file.data_end)
        return ModelFile(path, "plain", BaseView.whole(file, end), None, unfinished, tail)

    offset, length, digest = footer
    first = max(file.data_end, offset - BOUNDARY - _MARKER.size)
    base_end = _find_marker(file, range(first, offset))
    whole = hashlib.sha256(file.read(offset, offset + length)).digest() == digest
    if base_end is None:
        base_end = _base_end_without_marker(file, offset, length, whole)
        whole = False  # the append was cut short
    base = BaseView.whole(file, base_end)
    if not whole:
        # Blocks of an append can reach the disk out of order: to the next run this is an append that was cut short.
        return ModelFile(path, "plain", base, None, unfinished=True)
    theta_file = GGUFFile.open(path, offset, offset + length)
    if not _is_theta(theta_file):
        raise GGUFError(f"{path}: the appended part at byte {offset} holds no Θ")
    theta_set = _read_theta_set(theta_file)
    check_fits(theta_set, base.tensors, path)
    return ModelFile(path, "appended", base, theta_set)


def appended_parts(theta_set: ThetaSet, base_end: int) -> list[Part]:
    """What layout `appended` puts behind a base of `base_end` bytes: marker, padding, Θ as a GGUF, footer."""
    theta = theta_only_parts(theta_set)
    digest = bytes.fromhex(sha256_of_parts(theta))
    length = sum(part_size(part) for part in theta)
    head = _MARKER.pack(_MARKER_MAGIC, base_end)
    head += bytes(-(base_end + len(head)) % BOUNDARY)
    footer = _FOOTER.pack(_FOOTER_MAGIC, FORMAT_VERSION, 0, base_end + len(head), length, digest)
    return [head, *theta, footer]


def theta_only_parts(theta_set: ThetaSet, base_file: str | None = None) -> list[Part]:
    """A GGUF with Θ alone. base_file: name of the model's first part, beside which it is to be"""
    metadata = {"general.type": "theta", "general.name": f"theta for {theta_set.base_name}", **theta_set.metadata()}
    if base_file is not None:
        metadata[BASE_FILE_KEY] = base_file
    return gguf_parts(metadata, theta_set.tensors())


def embedded_parts(theta_set: ThetaSet, base: BaseView) -> list[Part]:
    """A GGUF with the base's metadata and tensors, then Θ's: layout `tensors`."""
    if not base.is_exact():
        raise GGUFError(
            f"{base.file.path}: the padding of its header is not zero, so that layout 'tensors' could not give the "
            "base back byte for byte; use --layout appended"
        )
    return gguf_parts(theta_set.metadata(), theta_set.tensors(), base)


def layout_parts(theta_set: ThetaSet, model: ModelFile, layout: str) -> list[Part]:
    """A file with the model and this Θ, in layout "tensors" or "appended"; of a split model the latter is Θ alone."""
    if layout == "appended" and model.is_split:
        return theta_only_parts(theta_set, model.require_base().file.path.name)
    if layout == "appended":
        return [*model.base_parts(), *appended_parts(theta_set, model.base_size)]
    return embedded_parts(theta_set, model.require_base())


def theta_for(model: ModelFile, theta_path: Path, progress: Progress | None = None) -> ThetaSet:
    """The Θ in a file of its own, checked to have been made for this very model. Raises GGUFError otherwise."""
    return thetas_for(model, [theta_path], progress)[0]


def thetas_for(model: ModelFile, paths: Sequence[Path], progress: Progress | None = None) -> list[ThetaSet]:
    """The same of several files; the model is hashed once. Its own file gives the Θ that it holds."""
    base, digest, found = model.require_base(), "", []
    for path in paths:
        if model.theta is not None and os.path.realpath(path) == os.path.realpath(model.path):
            found.append(model.theta)
            continue
        theta_set = open_model_file(path).require_theta()
        if model.base_size == theta_set.base_size and not digest:
            digest = sha256_of_parts(model.base_parts(), progress)
        if digest != theta_set.base_sha256:
            raise GGUFError(f"{path}: was made for another model ({theta_set.base_name}), not for {model.path}")
        check_fits(theta_set, base.tensors, path)
        found.append(theta_set)
    return found


def _is_theta(file: GGUFFile) -> bool:
    return "nkat.version" in file.metadata


def _open_with_own_theta(path: Path, file: GGUFFile) -> ModelFile:
    theta_set = _read_theta_set(file)
    count = len(file.tensors) - len(SUFFIXES) * len(theta_set.layers)
    base_file = file.metadata.get(BASE_FILE_KEY)
    if count == 0 and base_file is None:
        return ModelFile(path, "theta-only", None, theta_set)
    if count == 0:
        return _open_beside(path, theta_set, base_file)
    if any(name.endswith(SUFFIXES) for name in list(file.tensors)[:count]):
        raise GGUFError(f"{path}: Θ tensors stand between the base's tensors")
    keys = list(file.metadata)
    first_own = next(i for i, key in enumerate(keys) if key.startswith(KEY_PREFIX))
    if not all(key.startswith(KEY_PREFIX) for key in keys[first_own:]):
        raise GGUFError(f"{path}: nkat metadata stands between the base's metadata")
    base = BaseView(
        file=file,
        version=theta_set.base_gguf_version,
        metadata_count=first_own,
        metadata_end=file.metadata.spans[keys[first_own]][0],
        tensor_count=count,
        data_end=file.end,
    )
    data_bytes = theta_set.base_size - part_size(base.parts()[0])
    base = replace(base, data_end=file.data_start + data_bytes)
    last = max(t.offset + t.nbytes for t in base.tensors.values())
    if not last <= base.data_end <= file.end:
        raise GGUFError(f"{path}: nkat.base.size {theta_set.base_size} does not agree with the base's tensors")
    check_fits(theta_set, base.tensors, path)
    return ModelFile(path, "tensors", base, theta_set)


def _open_beside(path: Path, theta_set: ThetaSet, base_file: object) -> ModelFile:
    """A file with Θ alone that names the model beside it."""
    named = isinstance(base_file, str) and base_file and Path(base_file).name == base_file
    if not isinstance(base_file, str) or not named or re.search(r"[/\\\0]|^\.", base_file):
        raise GGUFError(f"{path}: metadata {BASE_FILE_KEY} is {base_file!r:.80}, not the name of a file beside it")
    base_path = path.parent / base_file
    if not base_path.exists():
        raise NKATError(f"{path}: holds Θ for the model {base_file}, which is not beside it")
    file = open_gguf(base_path)
    if _is_theta(file):
        raise GGUFError(f"{path}: metadata {BASE_FILE_KEY} names {base_file}, which holds a Θ itself")
    model = ModelFile(path, "beside", BaseView.whole(file), theta_set)
    if model.base_size != theta_set.base_size:
        raise GGUFError(f"{path}: was made for another model than {base_path} is now")
    check_fits(theta_set, model.require_base().tensors, path)
    return model


def _read_theta_set(file: GGUFFile) -> ThetaSet:
    version = _entry(file, "nkat.version", int)
    if version != FORMAT_VERSION:
        raise GGUFError(f"{file.path}: nkat.version {version} is not supported, only {FORMAT_VERSION}")
    thetas = {}
    for name in file.tensors:
        if name.endswith(SUFFIXES[0]):
            stem = name.removesuffix(SUFFIXES[0])
            thetas[stem + ".weight"] = _read_theta(file, stem)
    found = sum(name.endswith(SUFFIXES) for name in file.tensors)
    if not thetas or found != len(SUFFIXES) * len(thetas) or _entry(file, "nkat.theta.count", int) != len(thetas):
        raise GGUFError(f"{file.path}: nkat.theta.count does not agree with the {found} Θ tensors in the file")
    gamma = _entry(file, "nkat.theta.gamma", float)
    coupling(gamma)  # raises when out of range
    theta_set = ThetaSet(
        layers=thetas,
        gamma=gamma,
        source=_entry(file, "nkat.theta.source", str),
        seed=_entry(file, "nkat.theta.seed", int),
        base_sha256=_entry(file, "nkat.base.sha256", str),
        base_name=_entry(file, "nkat.base.name", str),
        base_size=_entry(file, "nkat.base.size", int),
        base_gguf_version=_entry(file, "nkat.base.gguf_version", int),
    )
    if theta_set.base_gguf_version not in VERSIONS:
        raise GGUFError(f"{file.path}: nkat.base.gguf_version is {theta_set.base_gguf_version}, not 2 or 3")
    known = {*theta_set.metadata(), BASE_FILE_KEY}
    notes = {k: file.metadata[k] for k in file.metadata if k.startswith(KEY_PREFIX) and k not in known}
    for key, value in notes.items():
        if not isinstance(value, bool | int | float | str) or (isinstance(value, int) and value < 0):
            raise GGUFError(f"{file.path}: metadata {key} is {value!r:.80}, not a number from 0 on or a text")
    return replace(theta_set, notes=notes)


def _read_theta(file: GGUFFile, stem: str) -> Theta:
    def read(suffix: str, kind: GGMLQuantizationType, dtype: str) -> torch.Tensor:
        name = stem + suffix
        info = file.tensors.get(name)
        if info is None or info.type != kind or len(info.shape) not in (2, 3):
            raise GGUFError(
                f"{file.path}: tensor {name!r} is missing or is not a 2-D {kind.name} tensor (3-D: experts)"
            )
        return torch.from_numpy(file.raw(name).view(dtype).reshape(info.shape).copy())

    i8, f32 = GGMLQuantizationType.I8, GGMLQuantizationType.F32
    try:
        theta = Theta(read(".theta_p", i8, "<i1"), read(".theta_q", i8, "<i1"), read(".theta_scale", f32, "<f4"))
    except ThetaError as error:
        raise GGUFError(f"{file.path}: {stem}: {error}") from None
    if not bool((torch.isfinite(theta.scale) & (theta.scale >= 0)).all()):
        raise GGUFError(f"{file.path}: {stem}.theta_scale holds NaN, infinity or a negative number")
    return theta


def _entry(file: GGUFFile, key: str, kind: type) -> Any:
    value = file.metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise GGUFError(f"{file.path}: metadata {key} is missing or is not of type {kind.__name__}")
    return value


def _aligned(file: GGUFFile, position: int) -> int:
    return position + -position % file.alignment


def _find_marker(file: GGUFFile, positions: range) -> int | None:
    """The first of `positions` where a marker stands, or the part of one that the end of the file left."""
    for position in positions[: max(0, file.end - positions.start)]:  # a file may end before its last padding does
        found = file.read(position, min(position + _MARKER.size, file.end)).tobytes()
        if found and _MARKER.pack(_MARKER_MAGIC, position).startswith(found):
            return position
    return None


def _is_lost_append(file: GGUFFile) -> bool:
    """Whether what stands behind the base, where there is no marker, is what a power cut left of an append.

    That is zeros alone, as many as the marker, which is on the disk first, or as reach into Θ and its footer; or zeros
    up to the boundary where a Θ stands. Others' bytes behind a base, zeros for padding too, are neither.
    """
    start = _aligned(file, file.data_end)
    theta = start + MARKER_SIZE + -(start + MARKER_SIZE) % BOUNDARY
    if file.end == start + MARKER_SIZE:
        return _is_zero(file, start, file.end)
    if file.end < theta + _FOOTER.size or not _is_zero(file, start, theta):
        return False
    return file.read(theta, theta + 4).tobytes() == b"GGUF" or _is_zero(file, theta, file.end)


def _base_end_without_marker(file: GGUFFile, offset: int, length: int, whole: bool) -> int:
    """Where the base ends before an appended Θ whose marker is lost. Raises GGUFError where nothing tells.

    whole: the Θ is as its footer says
    """
    start = _aligned(file, file.data_end)
    if whole:
        theta_file = GGUFFile.open(file.path, offset, offset + length)
        size = theta_file.metadata.get("nkat.base.size")
        if isinstance(size, int) and file.data_end <= size <= offset - MARKER_SIZE:
            return size
    elif offset - start <= MARKER_SIZE + BOUNDARY and _is_zero(file, start, offset):
        return start
    raise GGUFError(f"{file.path}: the Θ footer is there but the marker behind the base is not: the file is damaged")


def _is_zero(file: GGUFFile, start: int, end: int) -> bool:
    """Read in pieces: it may be as long as the file."""
    pieces = range(start, end, 1 << 24)
    return not any(file.read(piece, min(piece + (1 << 24), end)).any() for piece in pieces)


def _read_footer(file: GGUFFile) -> tuple[int, int, bytes] | None:
    """(offset, length, sha256) of an appended Θ, or None when the file does not end with a whole footer."""
    start = file.end - _FOOTER.size
    if start < file.data_end:
        return None
    magic, version, _, offset, length, digest = _FOOTER.unpack(file.read(start, file.end))
    if magic != _FOOTER_MAGIC:
        return None
    if version != FORMAT_VERSION:
        raise GGUFError(f"{file.path}: Θ footer at byte {start}: version {version} is not supported")
    if offset % BOUNDARY or offset < file.data_end or offset + length != start:
        raise GGUFError(f"{file.path}: Θ footer at byte {start}: offset {offset} and length {length} are impossible")
    return offset, length, digest


def architecture_of(file: GGUFFile) -> str:
    """What kind of model a file says it is. Raises GGUFError where it does not say."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise GGUFError(
            f"{file.path}: metadata general.architecture is missing or is no text: this GGUF is not a language model"
        )
    return name


def base_name(model: ModelFile) -> str:
    """The model's own name from its metadata, or its file's name."""
    name = model.require_base().file.metadata.get("general.name")
    return name if isinstance(name, str) and name else Path(model.path).stem


def base_hash(model: ModelFile, progress: Callable[[int], object] | None = None) -> str:
    """SHA-256 of the base model's bytes; for an already converted file, checked against what the file records."""
    digest = sha256_of_parts(model.base_parts(), progress)
    if model.theta is not None and digest != model.theta.base_sha256:
        raise NKATError(
            f"{model.path}: the base model's sha256 is {digest[:16]}… but the file records "
            f"{model.theta.base_sha256[:16]}…: the file is damaged"
        )
    return digest
