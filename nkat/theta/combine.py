"""Several Θ as one: their weighted sum, exactly.

    Σᵢ wᵢ κ(γᵢ) Θᵢ = κ(γ) Θ        Θ = Σᵢ sᵢ Θᵢ,  sᵢ = wᵢ κ(γᵢ) / κ(γ)

Θ has the factors' columns behind one another, so that its rank is the sum of theirs, and each sᵢ in the scales of its
P's columns: nothing is quantised again. γ is that of the strongest part, so that one part of weight 1 is itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nkat.errors import NKATError
from nkat.gguf.writer import MetadataValue, Progress
from nkat.theta.algebra import Theta, ThetaError, coupling, pad_rows
from nkat.theta.modelfile import ModelFile, thetas_for
from nkat.theta.set import COMBINED, DECAY_KEY, GUARD_PREFIX, HELDOUT_PREFIX, KEY_PREFIX, ThetaSet

_PART_PREFIX = f"{KEY_PREFIX}part."  # of what is noted about the parts of a sum
_SCALED = re.compile(r"(.+?):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?:,(?=.)|$)")


@dataclass(frozen=True, slots=True)
class Weighted:
    """One Θ of a sum. name: for people and for the file's notes"""

    theta: ThetaSet
    weight: float = 1.0
    name: str = ""


@dataclass(frozen=True, slots=True)
class WeightedFile:
    """A file with Θ, and how much of it counts. Picklable."""

    path: Path
    weight: float = 1.0


def weighted_file(text: str) -> WeightedFile:
    """A path, and behind a colon how much of it counts, unless a file is called so. Raises NKATError for a weight that
    is no finite number.
    """
    name, colon, number = text.rpartition(":")
    if not colon or not name or Path(text).exists():
        return WeightedFile(Path(text))
    try:
        weight = float(number)
    except ValueError:  # a Windows drive, or a name with a colon
        return WeightedFile(Path(text))
    if not math.isfinite(weight):
        raise NKATError(f"the weight behind the colon must be a number, got {number!r}")
    return WeightedFile(Path(name), weight)


def scaled_files(text: str) -> list[WeightedFile]:
    """FILE:WEIGHT, or several with commas between them, as llama.cpp writes adapters. Raises ValueError for others.

    A name may have colons and commas of its own: it ends where a number stands behind a colon.
    """
    found, end = [], 0
    for match in _SCALED.finditer(text):
        if match.start() != end:
            break
        found.append(WeightedFile(Path(match[1]), float(match[2])))
        end = match.end()
    if not found or end != len(text):
        raise ValueError(f"{text!r} is not FILE:WEIGHT, such as theta.bin:0.5")
    return found


def combined_for(
    model: ModelFile, files: Sequence[WeightedFile], gamma: float | None = None, progress: Progress | None = None
) -> ThetaSet | None:
    """The sum of the Θ in these files, each checked to be of this very model; None where all of it is off.

    The model's own file may be among them, for the Θ that it holds.  gamma: in place of every part's own
    Raises NKATError for a file without Θ, or with one of another model.
    """
    sets = thetas_for(model, [file.path for file in files], progress)
    parts = [
        Weighted(
            found if gamma is None or len(files) == 1 else replace(found, gamma=gamma), file.weight, file.path.name
        )
        for found, file in zip(sets, files, strict=True)
    ]
    return combined(parts)


def combined(parts: Sequence[Weighted], like: ThetaSet | None = None) -> ThetaSet | None:
    """The weighted sum of Θ of one model, as one; None where nothing is left of it. One of weight 1 alone is itself.

    like: an earlier sum of the same Θ with weights of the same signs, whose factors are taken again as they are

    Raises NKATError for Θ of different models, or a weight that is no number or too large.
    """
    for part in parts:
        if not math.isfinite(part.weight):
            raise NKATError(f"the weight of a Θ must be a finite number, and {part.name or 'one'} has {part.weight}")
        if part.theta.base_sha256 != parts[0].theta.base_sha256:
            raise NKATError(
                f"Θ of different models cannot be added: {parts[0].name or 'one'} was made for "
                f"{parts[0].theta.base_name}, and {part.name or 'another'} for {part.theta.base_name}"
            )
    on = [part for part in parts if part.weight != 0.0]
    if not on:
        return None
    if len(on) == 1 and on[0].weight == 1.0:
        return on[0].theta
    strongest = max((part.theta for part in on), key=lambda theta: coupling(theta.gamma))
    shares = [_share(part, strongest.gamma) for part in on]
    layers: dict[str, Theta] = {}
    for name in dict.fromkeys(name for part in on for name in part.theta.layers):
        those = [(part.theta.layers[name], s) for part, s in zip(on, shares, strict=True) if name in part.theta.layers]
        thetas, factors = [theta for theta, _ in those], [s for _, s in those]
        if like is None:
            layers[name] = joined(thetas, factors)
        else:
            layers[name] = replace(like.layers[name], scale=joined_scales(thetas, factors))
    return ThetaSet(
        layers=layers,
        gamma=strongest.gamma,
        source=COMBINED,
        seed=on[0].theta.seed,
        base_sha256=on[0].theta.base_sha256,
        base_name=on[0].theta.base_name,
        base_size=on[0].theta.base_size,
        base_gguf_version=on[0].theta.base_gguf_version,
        notes=_notes(on),
    )


def joined(thetas: Sequence[Theta], shares: Sequence[float]) -> Theta:
    """Σ share·Θ of one weight: the columns behind one another. A negative share exchanges P and Q, as −Θ does."""
    size = max(theta.size for theta in thetas)

    def behind_one_another(factor: str) -> torch.Tensor:
        those = [_padded(theta, factor, share < 0, size) for theta, share in zip(thetas, shares, strict=True)]
        return those[0] if len(those) == 1 else torch.cat(those, dim=-1).contiguous()

    return Theta(behind_one_another("p"), behind_one_another("q"), joined_scales(thetas, shares))


def joined_scales(thetas: Sequence[Theta], shares: Sequence[float]) -> torch.Tensor:
    """The scales of `joined`. Raises ThetaError where they are too large for float32."""
    scales = []
    for theta, share in zip(thetas, shares, strict=True):
        scale = theta.scale.flip(-2) if share < 0 else theta.scale.clone()
        scale[..., 0, :] *= abs(share)
        scales.append(scale)
    whole = torch.cat(scales, dim=-1).contiguous()
    if not bool(torch.isfinite(whole).all()):
        raise ThetaError("the weights of Θ are too large: a scale is beyond what a number can hold")
    return whole


def _share(part: Weighted, gamma: float) -> float:
    if part.theta.gamma == gamma:
        return part.weight
    return part.weight * coupling(part.theta.gamma) / coupling(gamma)


def _padded(theta: Theta, factor: str, exchanged: bool, size: int) -> torch.Tensor:
    """P or Q, the other one where they are exchanged, with zeros down to `size` rows."""
    values = theta.q if (factor == "q") != exchanged else theta.p
    if theta.size == size:
        return values
    if theta.experts is None:
        return pad_rows(values, size)
    return torch.stack([pad_rows(values[i], size) for i in range(theta.experts)])


def _notes(parts: Sequence[Weighted]) -> dict[str, MetadataValue]:
    """What the parts are, and theirs; not what was measured of each, which holds for no sum."""
    notes: dict[str, MetadataValue] = {}
    for i, part in enumerate(parts):
        own: dict[str, MetadataValue] = {
            "name": part.name.encode(errors="replace").decode(),  # a file's may be no text
            "weight": float(part.weight),
            "gamma": part.theta.gamma,
            "source": part.theta.source,
            "seed": part.theta.seed,
            "rank": part.theta.rank,
        }
        theirs = {
            key.removeprefix(KEY_PREFIX): value
            for key, value in part.theta.notes.items()
            if not key.startswith((HELDOUT_PREFIX, GUARD_PREFIX))
        }
        notes |= {f"{_PART_PREFIX}{i}.{key}": value for key, value in (own | theirs).items()}
        if DECAY_KEY in part.theta.notes:
            notes[DECAY_KEY] = part.theta.notes[DECAY_KEY]
    return notes
