"""The files that a Θ is run from: the base model, and Θ as a LoRA adapter.

Programs made of llama.cpp refuse a GGUF with tensors they do not know, so a `.nkat` of layout `tensors` cannot be their
model: the base is found beside it by its hash, named by the user, or extracted. One of layout `appended` is its own
base. The adapter is written once; it and what is extracted live in the cache folder under a name made from what they
depend on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nkat.errors import NKATError
from nkat.gguf.file import GGUFError, GGUFFile
from nkat.gguf.writer import FileRange, part_size, sha256_of_parts, write_gguf
from nkat.host.cache import Memo, checked_sha256, own_folder
from nkat.host.console import bar, format_bytes, note
from nkat.host.record import parse_json
from nkat.kobold.neighbours import files_in, readable
from nkat.theta.combine import Weighted, WeightedFile, combined
from nkat.theta.lora import lora_parts
from nkat.theta.modelfile import ModelFile, base_hash, open_model_file, thetas_for
from nkat.theta.set import ThetaSet

_ADAPTER_FORM = 1  # to be raised when `lora_parts` writes something else
_LOADABLE = ("plain", "appended")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter, and the factor that the program is to put before it; about: what is in it, for people."""

    path: Path
    weight: float = 1.0
    about: str = ""


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What a program is to load.

    asked: what the user named; how: where `model` comes from, in words
    adapters: () when there is no Θ
    lora_bytes: the adapters' bytes by the weight they belong to
    rank, gamma: of a single Θ
    """

    asked: Path
    model: Path
    how: str
    adapters: tuple[Adapter, ...]
    lora_bytes: dict[str, int]
    rank: int | None = None
    gamma: float | None = None


def prepare_files(
    model_path: Path, named: Sequence[WeightedFile], base_path: Path | None, separate: bool = False
) -> RunFiles:
    """Finds or makes what a program loads.

    named: Θ in files of their own, in place of the model's
    separate: several are given beside each other, each with its weight, instead of as one adapter
    Raises NKATError when the base is not to be had, or is not the one a Θ was made for.
    """
    asked = open_model_file(model_path)
    parts = _parts(asked, named)
    model, how = _base_for(asked, base_path)
    groups = [[part] for part in parts] if separate else [parts]
    # Names with a colon, as Windows has them, cannot be told from a weight behind one: there it goes into the file.
    outside = separate and parts and ":" not in str(kobold_cache())
    sizes: dict[str, int] = {}
    adapters = []
    for group in groups:
        weight = group[0].weight if outside else 1.0
        one = combined([replace(part, weight=1.0) for part in group] if outside else group)
        if one is None:  # all of it is off
            continue
        path, own = _adapter(one, model)
        for name, size in own.items():
            sizes[name] = sizes.get(name, 0) + size
        adapters.append(Adapter(path, weight, "; ".join(_about(part) for part in group)))
    only = parts[0].theta if len(parts) == 1 else None
    rank, gamma = (only.rank, only.gamma) if only is not None else (None, None)
    return RunFiles(model_path, model, how, tuple(adapters), sizes, rank, gamma)


def _parts(asked: ModelFile, named: Sequence[WeightedFile]) -> list[Weighted]:
    """The Θ in these files, or else the model's own."""
    if not named:
        return [] if asked.theta is None else [Weighted(asked.theta, name=asked.path.name)]
    with _hashing(asked) as progress:
        found = thetas_for(asked, [file.path for file in named], progress)
    return [Weighted(theta, file.weight, file.path.name) for theta, file in zip(found, named, strict=True)]


def _about(part: Weighted) -> str:
    strength = "" if part.weight == 1 else f", weight {part.weight:g}"
    return f"rank {part.theta.rank}, gamma {part.theta.gamma:g}{strength}"


def kobold_cache() -> Path:
    """Where adapters, extracted models and benchmark results are kept; made when it is not there. Raises NKATError."""
    folder = own_folder("kobold")
    if folder is None:
        raise NKATError(
            "Θ is given to the program in a file of the cache folder, and there is none; set NKAT_CACHE to another"
        )
    return folder


def model_key(files: RunFiles) -> str:
    """A name for results that belong to this model with this Θ: as long as both files are the same."""
    thetas = [f"{one.path.stem}{'' if one.weight == 1 else f' {one.weight!r}'}" for one in files.adapters] or ["plain"]
    parts = [str(files.model.resolve()), str(files.model.stat().st_size), *thetas]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _base_for(asked: ModelFile, named: Path | None) -> tuple[Path, str]:
    theta_set = asked.theta
    if asked.layout in _LOADABLE or theta_set is None:
        if named is not None:
            note(f"note: {asked.path} is a model that is loaded as it is, so --base is not needed")
        return asked.path.absolute(), _how_itself(asked)
    if asked.layout == "beside":
        return asked.require_base().file.path.absolute(), "the model beside it"
    if named is not None:
        _check_base(named, theta_set)
        return named.absolute(), "named by --base"
    candidates = {one.path: one for one in _candidates(asked.path, theta_set)}
    for path, digest in readable(list(candidates), lambda path: (path, _sha256(candidates[path]))):
        if digest == theta_set.base_sha256:
            return path.absolute(), f"found in {path.parent} by its hash"
    if asked.base is None:
        raise NKATError(
            f"{asked.path}: holds only Θ, and its base model ({theta_set.base_name}) is not beside it; "
            "name it with --base FILE"
        )
    return _extract(asked, theta_set), "extracted"


def _how_itself(asked: ModelFile) -> str:
    if asked.is_split:
        return f"the file itself, the first of {len(asked.files)}, of which KoboldCpp finds the others"
    return "the file itself" if asked.layout == "plain" else "the file itself (Θ is behind it)"


def _near(path: Path, theta_set: ThetaSet) -> Iterator[Path]:
    """Folders a base may be in: beside the file, where the optimiser's record says, and the usual models folder."""
    folders = [path.absolute().parent]
    record = path.with_suffix(".json")
    if record.is_file():
        try:
            said = parse_json(record.read_bytes())
        except (OSError, ValueError):  # some other file that happens to have this name
            said = None
        if isinstance(said, dict) and said.get("model_sha256") == theta_set.base_sha256:
            folders.append(Path(str(said.get("model"))).absolute().parent)
    folders += [Path.cwd(), Path.cwd() / "models"]
    yield from (folder for folder in dict.fromkeys(folders) if os.path.isdir(folder))  # noqa: PTH112 - any name


def _candidates(path: Path, theta_set: ThetaSet) -> list[ModelFile]:
    """Those of the base's size, plain files first, wherever they are: one with a Θ behind it carries bytes that nothing
    needs. Among each kind the nearest comes first.
    """
    found = [one for folder in _near(path, theta_set) for one in _of_its_size(folder, theta_set)]
    return sorted(found, key=lambda one: one.layout != "plain")


def _of_its_size(folder: Path, theta_set: ThetaSet) -> Iterator[ModelFile]:
    for found in readable(files_in(folder, ".gguf", ".nkat"), open_model_file):
        if found.layout in _LOADABLE and found.base_size == theta_set.base_size:
            yield found


def _check_base(path: Path, theta_set: ThetaSet) -> None:
    found = open_model_file(path)
    if found.layout not in _LOADABLE:
        raise NKATError(f"{path}: it cannot be loaded (layout {found.layout}); --base must be the base model")
    if found.base_size != theta_set.base_size or _sha256(found) != theta_set.base_sha256:
        raise NKATError(f"{path}: is not the model this Θ was made for ({theta_set.base_name})")


def _extract(asked: ModelFile, theta_set: ThetaSet) -> Path:
    target = kobold_cache() / f"{asked.path.stem}-{theta_set.base_sha256[:12]}.gguf"
    if target.is_file() and target.stat().st_size == theta_set.base_size:
        with contextlib.suppress(GGUFError):  # damaged: extracted again
            if _sha256(open_model_file(target)) == theta_set.base_sha256:
                return target
    note(
        f"the base model is not beside {asked.path}: extracting it to {target} "
        f"({format_bytes(theta_set.base_size)}); --base FILE would use yours"
    )
    with _hashing(asked) as progress:
        base_hash(asked, progress)
    with bar(asked.base_size, "extracting the base", "B") as progress_bar:
        write_gguf(target, asked.base_parts(), force=True, progress=progress_bar.update)
    return target


def _adapter(thetas: ThetaSet, model: Path) -> tuple[Path, dict[str, int]]:
    """The adapter in the cache, written when it is not there or not as it was written, and its bytes by weight."""
    target = kobold_cache() / f"theta-{_theta_key(thetas)}.gguf"
    parts = lora_parts(thetas, open_model_file(model).require_base())
    size = sum(part_size(part) for part in parts)
    there = target.is_file() and target.stat().st_size == size
    if not there or sha256_of_parts([FileRange(target, 0, size)]) != sha256_of_parts(parts):
        write_gguf(target, parts, force=True)
    sizes: dict[str, int] = {}
    with GGUFFile.open(target) as file:
        for name, info in file.tensors.items():
            weight = name.removesuffix(".lora_a").removesuffix(".lora_b")
            sizes[weight] = sizes.get(weight, 0) + info.nbytes
    return target, sizes


def _theta_key(thetas: ThetaSet) -> str:
    digest = hashlib.sha256(f"{_ADAPTER_FORM}|{thetas.base_sha256}|{thetas.gamma!r}".encode())
    for name, theta in thetas.layers.items():
        digest.update(name.encode())
        for tensor in (theta.p, theta.q, theta.scale):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:16]


def _sha256(model: ModelFile) -> str:
    """SHA-256 of the base in a file, remembered as long as the file keeps its size and time."""
    stats = [(path.resolve(), path.stat()) for path in model.files]
    key = "|".join(f"{path}|{found.st_size}|{found.st_mtime_ns}" for path, found in stats)
    memo = Memo.open("kobold/hashes.json")
    known = memo.get(lambda hashes: checked_sha256(hashes[key]))
    if known is not None:
        return known
    with _hashing(model) as progress:
        digest = sha256_of_parts(model.base_parts(), progress)
    memo.set({key: digest})
    return digest


@contextlib.contextmanager
def _hashing(model: ModelFile) -> Iterator[Callable[[int], object]]:
    """A progress bar over the base's bytes; gives what is to be called with the number of bytes just done."""
    total = model.base_size if model.base else 0
    with bar(total, f"hashing {model.path.name}", "B") as progress:
        yield progress.update
