"""A model's Θ as one thing: cut, scaled, checked against its model; its metadata's keys, its tensors' suffixes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType

from nkat.errors import NKATError
from nkat.gguf.file import GGUFError, TensorInfo
from nkat.gguf.names import block_number
from nkat.gguf.writer import (
    MetadataValue,
    NewTensor,
)
from nkat.theta.algebra import Theta, coupling
from nkat.theta.lowrank import LowRank

FORMAT_VERSION = 1
SUFFIXES = (".theta_p", ".theta_q", ".theta_scale")
KEY_PREFIX = "nkat."
CALIBRATION_KEY = "nkat.calibration.sha256"
KEEP_KEY = "nkat.keep.sha256"
DECAY_KEY = "nkat.theta.depth_decay"
UNFINISHED_KEY = "nkat.fit.unfinished"
# Of what was measured with this very Θ at this very γ: on the text it was learned from, where that was kept back, and
# on the guard's text on which it costs most.
HELDOUT_PREFIX = "nkat.heldout."
GUARD_PREFIX = "nkat.guard."
COMBINED = "combined"  # source of what is the sum of several
FULL_STRENGTH = 0.5  # the γ at which a LoRA is on: κ is 1/8 there, by which floats are divided without rounding


@dataclass(frozen=True, slots=True)
class ThetaSet:
    """A model's Θ: one for each adapted weight, and what the file records about them.

    layers: name of the weight tensor (`blk.0.attn_q.weight`) → Θ, in the order of the file
    base_sha256, base_size: of the base model's own bytes; base_gguf_version: 2 or 3, needed to restore them
    notes: further `nkat.*` metadata, such as the hash of a calibration text
    """

    layers: dict[str, Theta]
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
        return max(theta.rank for theta in self.layers.values())

    @property
    def nbytes(self) -> int:
        return sum(theta.nbytes for theta in self.layers.values())

    def bytes_per_token(self, active_experts: float) -> int:
        """Of its bytes those that a token reads: of experts only those it goes to (`ModelConfig.active_experts`)."""
        shares = ((theta.nbytes, 1.0 if theta.experts is None else active_experts) for theta in self.layers.values())
        return sum(round(nbytes * share) for nbytes, share in shares)

    def metadata(self) -> dict[str, MetadataValue]:
        return {
            "nkat.version": FORMAT_VERSION,
            "nkat.theta.rank": self.rank,
            "nkat.theta.gamma": self.gamma,
            "nkat.theta.source": self.source,
            "nkat.theta.count": len(self.layers),
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
        for name, theta in self.layers.items():
            stem = name.removesuffix(".weight")
            values = zip(SUFFIXES, (i8, i8, f32), (theta.p, theta.q, theta.scale), strict=True)
            out += [NewTensor(stem + suffix, kind, t.contiguous().numpy()) for suffix, kind, t in values]
        return out


@dataclass(frozen=True, slots=True)
class LoraSet:
    """Low-rank terms of a model, to be run as Θ is: at γ = `gamma` they act as their adapters say.

    layers: by weight name; their `up` is divided by κ(γ), which the layers multiply by
    adapters: what a record says of those that they come of
    """

    layers: Mapping[str, LowRank]
    source: str = "lora"
    gamma: float = FULL_STRENGTH
    adapters: tuple[Mapping[str, Any], ...] = ()
    notes: Mapping[str, MetadataValue] = field(default_factory=dict)

    @classmethod
    def of(cls, terms: Mapping[str, LowRank], adapters: tuple[Mapping[str, Any], ...] = ()) -> LoraSet:
        kappa = coupling(FULL_STRENGTH)
        layers = {name: LowRank(term.up / kappa, term.down) for name, term in terms.items()}
        return cls(layers, adapters=adapters)

    @property
    def rank(self) -> int:
        return max(term.rank for term in self.layers.values())

    @property
    def nbytes(self) -> int:
        return sum(term.nbytes for term in self.layers.values())

    def bytes_per_token(self, active_experts: float) -> int:
        """All of them: there are none of experts."""
        return self.nbytes


TermSet = ThetaSet | LoraSet


def check_fits(theta_set: ThetaSet, tensors: Mapping[str, TensorInfo], path: Path) -> None:
    """Raises GGUFError unless every Θ belongs to a weight of the base and fits its shape, in size and in rank."""
    for name, theta in theta_set.layers.items():
        info = tensors.get(name)
        if info is None:
            raise GGUFError(f"{path}: Θ for {name!r}, which the base model does not have")
        shape, experts = info.shape[-2:], () if theta.experts is None else (theta.experts,)
        if len(info.shape) < 2 or info.shape[:-2] != experts or theta.size > max(shape):
            raise GGUFError(f"{path}: Θ of size {theta.size} does not fit {name!r} of shape {info.shape}")
        # The same bound as for one that is made. Beyond it a few bytes of a small corner become a large matrix, as
        # the kernels' factors have a row for every row of the weight.
        limit = min(*shape, theta.size)
        if not 1 <= theta.rank <= limit:
            raise GGUFError(f"{path}: Θ of rank {theta.rank} for {name!r}: it must be from 1 to {limit}")


def check_judging_text(theta_set: TermSet, text_sha256: str, path: Path) -> None:
    """Raises GGUFError when the text a Θ is to be judged on is the one it was made from."""
    texts = tuple(key.removeprefix(KEY_PREFIX) for key in (CALIBRATION_KEY, KEEP_KEY))  # of a sum of Θ each part's
    if any(value == text_sha256 for key, value in theta_set.notes.items() if key.endswith(texts)):
        raise GGUFError(f"{path}: this Θ was made from that very text, so it cannot be judged on it; give another")


def truncate_rank(theta_set: ThetaSet, rank: int) -> ThetaSet:
    """Keeps the first `rank` columns of every Θ: each source orders them by importance.

    What was measured with all of them is no longer noted.
    """
    thetas = {
        name: Theta(t.p[..., :rank].contiguous(), t.q[..., :rank].contiguous(), t.scale[..., :rank].contiguous())
        for name, t in theta_set.layers.items()
    }
    notes = {key: value for key, value in theta_set.notes.items() if not key.startswith((HELDOUT_PREFIX, GUARD_PREFIX))}
    return replace(theta_set, layers=thetas, notes=notes)


def scale_by_depth(theta_set: ThetaSet, factor: float) -> ThetaSet:
    """Θ of block l multiplied by factor^l: a strength that decays with depth, kept in the INT8 scales."""
    thetas = {}
    for name, theta in theta_set.layers.items():
        scale = theta.scale.clone()
        scale[..., 0, :] *= factor ** max(0, block_number(name))
        thetas[name] = replace(theta, scale=scale)
    return replace(theta_set, layers=thetas, notes={**theta_set.notes, DECAY_KEY: factor})


def part_of(
    theta_set: ThetaSet, *, rank: int, gamma: float, names: Collection[str] | None = None, depth_decay: bool = False
) -> ThetaSet:
    """The first columns of some layers' Θ at a strength: what of a Θ is written where none is made anew.

    names: of the weights that keep theirs; None: all
    depth_decay: also block l's Θ times gamma^l
    Raises NKATError for a rank that the Θ has not, names of which it has none, or a decay that it has already.
    """
    if rank > theta_set.rank:
        raise NKATError(f"the Θ has rank {theta_set.rank}, which is below {rank}")
    if rank < theta_set.rank and theta_set.source == COMBINED:
        raise NKATError("the Θ is a sum of several, whose columns are in no order of importance: cut its parts instead")
    kept = {name: theta for name, theta in theta_set.layers.items() if names is None or name in names}
    if not kept:
        raise NKATError("the Θ has none for the layers that were asked for")
    if (rank, gamma, len(kept), depth_decay) == (theta_set.rank, theta_set.gamma, len(theta_set.layers), False):
        return theta_set  # with what was measured of it
    part = truncate_rank(replace(theta_set, layers=kept, gamma=gamma), rank)
    if not depth_decay:
        return part
    if DECAY_KEY in theta_set.notes:
        raise NKATError("the Θ decays with depth already")
    return scale_by_depth(part, gamma)
