"""The two files KoboldCpp runs a Θ from: the base model as `--model`, and Θ as a LoRA adapter.

KoboldCpp refuses a GGUF with tensors it does not know, so a `.nkat` of layout `tensors` cannot be its model: the base
is found beside it by its hash, named by the user, or extracted. One of layout `appended` is its own base. The adapter
is written once; it and what is extracted live in the cache folder under a name made from what they depend on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nkat.errors import NKATError
from nkat.gguf.file import GGUFError, GGUFFile
from nkat.gguf.split import is_later_part
from nkat.gguf.writer import FileRange, part_size, sha256_of_parts, write_gguf
from nkat.host.cache import Memo, checked_sha256, own_folder
from nkat.host.console import bar, format_bytes, note
from nkat.host.record import parse_json
from nkat.theta.lora import lora_parts
from nkat.theta.modelfile import ModelFile, base_hash, open_model_file, theta_for
from nkat.theta.set import ThetaSet

_ADAPTER_FORM = 1  # to be raised when `lora_parts` writes something else
_LOADABLE = ("plain", "appended")


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What KoboldCpp is to load.

    asked: what the user named; how: where `model` comes from, in words
    lora: None when there is no Θ
    lora_bytes: the adapter's bytes by the weight they belong to
    """

    asked: Path
    model: Path
    how: str
    lora: Path | None
    lora_bytes: dict[str, int]
    rank: int | None = None
    gamma: float | None = None


def prepare_files(model_path: Path, theta_path: Path | None, base_path: Path | None) -> RunFiles:
    """Finds or makes both files. Raises NKATError when the base is not to be had, or is not the one Θ was made for."""
    asked = open_model_file(model_path)
    thetas = asked.theta
    if theta_path is not None:
        with _hashing(asked) as progress:
            thetas = theta_for(asked, theta_path, progress)
    model, how = _base_for(asked, base_path)
    if thetas is None:
        return RunFiles(model_path, model, how, None, {})
    lora, sizes = _adapter(thetas, model)
    return RunFiles(model_path, model, how, lora, sizes, thetas.rank, thetas.gamma)


def kobold_cache() -> Path:
    """Where adapters, extracted models and benchmark results are kept; made when it is not there. Raises NKATError."""
    folder = own_folder("kobold")
    if folder is None:
        raise NKATError(
            "KoboldCpp takes Θ from a file in the cache folder, and there is none; set NKAT_CACHE to another"
        )
    return folder


def model_key(files: RunFiles) -> str:
    """A name for results that belong to this model with this Θ: as long as both files are the same."""
    parts = [str(files.model.resolve()), str(files.model.stat().st_size), files.lora.stem if files.lora else "plain"]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _base_for(asked: ModelFile, named: Path | None) -> tuple[Path, str]:
    theta_set = asked.theta
    if asked.layout in _LOADABLE or theta_set is None:
        if named is not None:
            note(f"note: {asked.path} is a model KoboldCpp loads as it is, so --base is not needed")
        return asked.path.resolve(), _how_itself(asked)
    if asked.layout == "beside":
        return asked.require_base().file.path.resolve(), "the model beside it"
    if named is not None:
        _check_base(named, theta_set)
        return named.absolute(), "named by --base"
    for candidate in _candidates(asked.path, theta_set):
        if _sha256(candidate) == theta_set.base_sha256:
            return candidate.path.absolute(), f"found in {candidate.path.parent} by its hash"
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
    for path in sorted([*folder.glob("*.gguf"), *folder.glob("*.nkat")]):
        # a folder, a link to nowhere, a pipe, which would never open; or a part that the first one stands for
        if not path.is_file() or is_later_part(path):
            continue
        try:
            found = open_model_file(path)
            if found.layout in _LOADABLE and found.base_size == theta_set.base_size:
                yield found
        except (NKATError, OSError):  # somebody else's file, damaged or unreadable: not the one we want
            continue


def _check_base(path: Path, theta_set: ThetaSet) -> None:
    found = open_model_file(path)
    if found.layout not in _LOADABLE:
        raise NKATError(f"{path}: KoboldCpp cannot load it (layout {found.layout}); --base must be the base model")
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
