"""Θ in files: the `.nkat` in both layouts, Θ alone, and Θ as a LoRA adapter.

Layout `tensors`   a GGUF v3 holding the base's metadata and tensors unchanged, then for each adapted `X.weight`
                   `X.theta_p` and `X.theta_q` (I8, t×r) and `X.theta_scale` (F32, 2×r), and `nkat.*` metadata.
Layout `appended`  the base's bytes unchanged, then:

    | marker: "NKATBASE", u64 size of the base | zeros to a 4 KiB boundary | Θ as a complete GGUF | footer, 64 bytes |
    footer: "NKATTHTA", u32 version 1, u32 0, u64 offset of the Θ GGUF, u64 its length, 32 bytes SHA-256 of it

                   Programs that read tensors by their offsets (llama.cpp, KoboldCpp) load it as the base model.
                   The marker tells an append that was cut short from bytes that belong to the base.
Θ alone            the same tensors and metadata in a GGUF of their own.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from nkat.gguf.file import GGUFError, GGUFFile, TensorInfo
from nkat.gguf.names import block_number
from nkat.gguf.writer import (
    BaseView,
    FileRange,
    MetadataValue,
    NewTensor,
    Part,
    Progress,
    gguf_parts,
    part_size,
    sha256_of_parts,
)
from nkat.theta import Theta, ThetaError, coupling, low_rank_form

FORMAT_VERSION = 1
BOUNDARY = 4096
_MARKER = struct.Struct("<8sQ")
_MARKER_MAGIC = b"NKATBASE"
_FOOTER = struct.Struct("<8sIIQQ32s")
_FOOTER_MAGIC = b"NKATTHTA"
_SUFFIXES = (".theta_p", ".theta_q", ".theta_scale")
_KEY_PREFIX = "nkat."
CALIBRATION_KEY = "nkat.calibration.sha256"
KEEP_KEY = "nkat.keep.sha256"
UNFINISHED_KEY = "nkat.fit.unfinished"
HELDOUT_PREFIX = "nkat.heldout."  # of what was measured with this very Θ at this very γ


@dataclass(frozen=True, slots=True)
class ThetaSet:
    """A model's Θ: one for each adapted weight, and what the file records about them.

    thetas: name of the weight tensor (`blk.0.attn_q.weight`) → Θ, in the order of the file
    base_sha256, base_size: of the base model's own bytes; base_gguf_version: 2 or 3, needed to restore them
    notes: further `nkat.*` metadata, such as the hash of a calibration text
    """

    thetas: dict[str, Theta]
    gamma: float
    source: str
    seed: int
    base_sha256: str
    base_name: str
    base_size: int
    base_gguf_version: int = 3
    notes: dict[str, MetadataValue] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return max(theta.rank for theta in self.thetas.values())

    @property
    def nbytes(self) -> int:
        return sum(theta.nbytes for theta in self.thetas.values())

    def metadata(self) -> dict[str, MetadataValue]:
        return {
            "nkat.version": FORMAT_VERSION,
            "nkat.theta.rank": self.rank,
            "nkat.theta.gamma": self.gamma,
            "nkat.theta.source": self.source,
            "nkat.theta.count": len(self.thetas),
            "nkat.theta.seed": self.seed,
            "nkat.base.sha256": self.base_sha256,
            "nkat.base.name": self.base_name,
            "nkat.base.size": self.base_size,
            "nkat.base.gguf_version": self.base_gguf_version,
            **self.notes,
        }

    def tensors(self) -> list[NewTensor]:
        i8, f32 = GGMLQuantizationType.I8, GGMLQuantizationType.F32
        out = []
        for name, theta in self.thetas.items():
            stem = name.removesuffix(".weight")
            values = zip(_SUFFIXES, (i8, i8, f32), (theta.p, theta.q, theta.scale), strict=True)
            out += [NewTensor(stem + suffix, kind, t.contiguous().numpy()) for suffix, kind, t in values]
        return out


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What a path holds: a base model, Θ, or both.

    layout: "plain", "tensors", "appended" or "theta-only"; base is None for the last, thetas None for the first
    unfinished: an in-place append was cut short, and the bytes behind the base are its remains
    foreign_tail: bytes behind the last tensor that are not ours; they count as the base's
    """

    path: Path
    layout: str
    base: BaseView | None
    thetas: ThetaSet | None
    unfinished: bool = False
    foreign_tail: bool = False

    def base_parts(self) -> list[Part]:
        """The base model's bytes, whatever the layout."""
        if self.base is None:
            raise GGUFError(f"{self.path}: holds only theta, not a base model")
        if self.layout == "tensors":
            return self.base.parts()
        return [FileRange(self.path, 0, self.base.data_end)]

    @property
    def base_size(self) -> int:
        """Bytes of the base model."""
        return sum(part_size(part) for part in self.base_parts())


def open_model_file(path: str | Path) -> ModelFile:
    """Opens a GGUF or `.nkat` of any layout. Raises GGUFError when the file or the Θ in it is damaged."""
    path = Path(path)
    file = GGUFFile.open(path)
    if _is_theta(file):
        return _open_with_own_theta(path, file)
    footer = _read_footer(file)
    if footer is None:
        base_end = _find_marker(file, range(file.data_end, _aligned(file, file.data_end) + 1))
        unfinished = base_end is not None
        end = file.end if base_end is None else base_end
        tail = not unfinished and file.end > _aligned(file, file.data_end)
        return ModelFile(path, "plain", BaseView.whole(file, end), None, unfinished, tail)

    offset, length, digest = footer
    first = max(file.data_end, offset - BOUNDARY - _MARKER.size)
    base_end = _find_marker(file, range(first, offset))
    if base_end is None:
        raise GGUFError(f"{path}: the theta footer is there but the marker behind the base is not: the file is damaged")
    base = BaseView.whole(file, base_end)
    if hashlib.sha256(file.read(offset, offset + length)).digest() != digest:
        # Blocks of an append can reach the disk out of order: to the next run this is an append that was cut short.
        return ModelFile(path, "plain", base, None, unfinished=True)
    theta_file = GGUFFile.open(path, offset, offset + length)
    if not _is_theta(theta_file):
        raise GGUFError(f"{path}: the appended part at byte {offset} holds no theta")
    theta_set = _read_theta_set(theta_file)
    check_fits(theta_set, base.tensors, path)
    return ModelFile(path, "appended", base, theta_set)


def appended_parts(theta_set: ThetaSet, base_end: int) -> list[Part]:
    """What layout `appended` puts behind a base of `base_end` bytes: marker, padding, Θ as a GGUF, footer."""
    theta = theta_only_parts(theta_set)
    digest = hashlib.sha256()
    for part in theta:
        digest.update(part)
    length = sum(part_size(part) for part in theta)
    head = _MARKER.pack(_MARKER_MAGIC, base_end)
    head += bytes(-(base_end + len(head)) % BOUNDARY)
    footer = _FOOTER.pack(_FOOTER_MAGIC, FORMAT_VERSION, 0, base_end + len(head), length, digest.digest())
    return [head, *theta, footer]


def theta_only_parts(theta_set: ThetaSet) -> list[Part]:
    """A GGUF with Θ alone."""
    metadata = {"general.type": "theta", "general.name": f"theta for {theta_set.base_name}", **theta_set.metadata()}
    return gguf_parts(metadata, theta_set.tensors())


def embedded_parts(theta_set: ThetaSet, base: BaseView) -> list[Part]:
    """A GGUF with the base's metadata and tensors, then Θ's: layout `tensors`."""
    if not base.is_exact():
        raise GGUFError(
            f"{base.file.path}: the padding of its header is not zero, so that layout 'tensors' could not give the "
            "base back byte for byte; use --layout appended"
        )
    return gguf_parts(theta_set.metadata(), theta_set.tensors(), base)


def lora_parts(theta_set: ThetaSet, base: BaseView, gamma: float | None = None) -> list[Part]:
    """κ(γ)Θ as a llama.cpp LoRA adapter of rank 2r: W x + lora_b (lora_a x), in F16.

    lora_a [2r, n] = [Qᵀ; Pᵀ], lora_b [m, 2r] = κ [P, −Q]; `adapter.lora.alpha` = 2r, so that llama.cpp's own factor
    alpha / rank is 1. A layer of lower rank than the largest has that factor divided out.
    """
    kappa = coupling(theta_set.gamma if gamma is None else gamma)
    alpha = 2 * theta_set.rank
    tensors = []
    for name, theta in theta_set.thetas.items():
        m, n = base.tensors[name].shape
        down, up = low_rank_form(*theta.factors(), m, n)
        up *= kappa * (2 * theta.rank) / alpha
        for suffix, factor in ((".lora_a", down), (".lora_b", up)):
            half = factor.to(torch.float16)
            if not bool(torch.isfinite(half).all()):
                raise ThetaError(f"{name}: theta's factors are too large for a LoRA adapter in F16")
            tensors.append(NewTensor(name + suffix, GGMLQuantizationType.F16, half.contiguous().numpy()))
    metadata: dict[str, MetadataValue] = {
        "general.type": "adapter",
        "general.architecture": str(base.file.metadata["general.architecture"]),
        "general.name": f"NKAT theta for {theta_set.base_name}",
        "adapter.type": "lora",
        "adapter.lora.alpha": np.float32(alpha),
        "nkat.theta.gamma": theta_set.gamma if gamma is None else gamma,
        "nkat.base.sha256": theta_set.base_sha256,
    }
    return gguf_parts(metadata, tensors)


def theta_for(model: ModelFile, theta_path: Path, progress: Progress | None = None) -> ThetaSet:
    """The Θ in a file of its own, checked to have been made for this very model. Raises GGUFError otherwise."""
    theta_set = open_model_file(theta_path).thetas
    if theta_set is None:
        raise GGUFError(f"{theta_path}: holds no theta")
    if model.base is None:
        raise GGUFError(f"{model.path}: holds only theta, not a model")
    same = model.base_size == theta_set.base_size
    if not same or sha256_of_parts(model.base_parts(), progress) != theta_set.base_sha256:
        raise GGUFError(f"{theta_path}: was made for another model ({theta_set.base_name}), not for {model.path}")
    check_fits(theta_set, model.base.tensors, theta_path)
    return theta_set


def check_fits(theta_set: ThetaSet, tensors: Mapping[str, TensorInfo], path: Path) -> None:
    """Raises GGUFError unless every Θ belongs to a 2-D weight of the base and fits its shape."""
    for name, theta in theta_set.thetas.items():
        info = tensors.get(name)
        if info is None:
            raise GGUFError(f"{path}: theta for {name!r}, which the base model does not have")
        if len(info.shape) != 2 or theta.size > max(info.shape):
            raise GGUFError(f"{path}: theta of size {theta.size} does not fit {name!r} of shape {info.shape}")


def check_judging_text(theta_set: ThetaSet, text_sha256: str, path: Path) -> None:
    """Raises GGUFError when the text a Θ is to be judged on is the one it was made from."""
    if text_sha256 in (theta_set.notes.get(CALIBRATION_KEY), theta_set.notes.get(KEEP_KEY)):
        raise GGUFError(f"{path}: this theta was made from that very text, so it cannot be judged on it; give another")


def truncate_rank(theta_set: ThetaSet, rank: int) -> ThetaSet:
    """Keeps the first `rank` columns of every Θ: each source orders them by importance.

    What was measured with all of them is no longer noted.
    """
    thetas = {
        name: Theta(t.p[:, :rank].contiguous(), t.q[:, :rank].contiguous(), t.scale[:, :rank].contiguous())
        for name, t in theta_set.thetas.items()
    }
    notes = {key: value for key, value in theta_set.notes.items() if not key.startswith(HELDOUT_PREFIX)}
    return replace(theta_set, thetas=thetas, notes=notes)


def scale_by_depth(theta_set: ThetaSet, factor: float) -> ThetaSet:
    """Θ of block l multiplied by factor^l: a strength that decays with depth, kept in the INT8 scales."""
    thetas = {}
    for name, theta in theta_set.thetas.items():
        scale = theta.scale.clone()
        scale[0] *= factor ** max(0, block_number(name))
        thetas[name] = replace(theta, scale=scale)
    return replace(theta_set, thetas=thetas, notes={**theta_set.notes, "nkat.theta.depth_decay": factor})


def _is_theta(file: GGUFFile) -> bool:
    return "nkat.version" in file.metadata


def _open_with_own_theta(path: Path, file: GGUFFile) -> ModelFile:
    theta_set = _read_theta_set(file)
    count = len(file.tensors) - len(_SUFFIXES) * len(theta_set.thetas)
    if count == 0:
        return ModelFile(path, "theta-only", None, theta_set)
    if any(name.endswith(_SUFFIXES) for name in list(file.tensors)[:count]):
        raise GGUFError(f"{path}: theta tensors stand between the base's tensors")
    keys = list(file.metadata)
    first_own = next(i for i, key in enumerate(keys) if key.startswith(_KEY_PREFIX))
    if not all(key.startswith(_KEY_PREFIX) for key in keys[first_own:]):
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


def _read_theta_set(file: GGUFFile) -> ThetaSet:
    version = _entry(file, "nkat.version", int)
    if version != FORMAT_VERSION:
        raise GGUFError(f"{file.path}: nkat.version {version} is not supported, only {FORMAT_VERSION}")
    thetas = {}
    for name in file.tensors:
        if name.endswith(_SUFFIXES[0]):
            stem = name.removesuffix(_SUFFIXES[0])
            thetas[stem + ".weight"] = _read_theta(file, stem)
    found = sum(name.endswith(_SUFFIXES) for name in file.tensors)
    if not thetas or found != len(_SUFFIXES) * len(thetas) or _entry(file, "nkat.theta.count", int) != len(thetas):
        raise GGUFError(f"{file.path}: nkat.theta.count does not agree with the {found} theta tensors in the file")
    gamma = _entry(file, "nkat.theta.gamma", float)
    coupling(gamma)  # raises when out of range
    theta_set = ThetaSet(
        thetas=thetas,
        gamma=gamma,
        source=_entry(file, "nkat.theta.source", str),
        seed=_entry(file, "nkat.theta.seed", int),
        base_sha256=_entry(file, "nkat.base.sha256", str),
        base_name=_entry(file, "nkat.base.name", str),
        base_size=_entry(file, "nkat.base.size", int),
        base_gguf_version=_entry(file, "nkat.base.gguf_version", int),
    )
    known = theta_set.metadata()
    notes = {k: file.metadata[k] for k in file.metadata if k.startswith(_KEY_PREFIX) and k not in known}
    return replace(theta_set, notes=notes)


def _read_theta(file: GGUFFile, stem: str) -> Theta:
    def read(suffix: str, kind: GGMLQuantizationType, dtype: str) -> torch.Tensor:
        name = stem + suffix
        info = file.tensors.get(name)
        if info is None or info.type != kind or len(info.shape) != 2:
            raise GGUFError(f"{file.path}: tensor {name!r} is missing or is not a 2-D {kind.name} tensor")
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
    for position in positions:
        found = file.read(position, min(position + _MARKER.size, file.end)).tobytes()
        if found and _MARKER.pack(_MARKER_MAGIC, position).startswith(found):
            return position
    return None


def _read_footer(file: GGUFFile) -> tuple[int, int, bytes] | None:
    """(offset, length, sha256) of an appended Θ, or None when the file does not end with a whole footer."""
    start = file.end - _FOOTER.size
    if start < file.data_end:
        return None
    magic, version, _, offset, length, digest = _FOOTER.unpack(file.read(start, file.end))
    if magic != _FOOTER_MAGIC:
        return None
    if version != FORMAT_VERSION:
        raise GGUFError(f"{file.path}: theta footer at byte {start}: version {version} is not supported")
    if offset % BOUNDARY or offset < file.data_end or offset + length != start:
        raise GGUFError(
            f"{file.path}: theta footer at byte {start}: offset {offset} and length {length} are impossible"
        )
    return offset, length, digest
