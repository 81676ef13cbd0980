"""What a name means: which repository, and which of its files. Nothing here touches a network or a disk."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from nkat.errors import NKATError

PREFIX = "hf:"
USUAL = ("Q4_K_M", "Q8_0")  # what llama.cpp's -hf looks for where none is named, in this order
_REPO = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)", re.IGNORECASE)
_TYPE = re.compile(r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|B?F16|F32|(?:MX|NV)FP4\w*))(?=\.gguf$)", re.IGNORECASE)
_BESIDE = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")  # in names of what is no model by itself


@dataclass(frozen=True, slots=True)
class HubName:
    """repo: owner/name;  wanted: a quantisation (Q4_K_M, in any case) or the name of a file; None: the usual one"""

    repo: str
    wanted: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + ("" if self.wanted is None else f":{self.wanted}")


def parse_name(text: str) -> HubName | None:
    """None for what is no such name but a path. Raises NKATError for one that is not complete."""
    if not text.startswith(PREFIX):
        return None
    repo, colon, wanted = text.removeprefix(PREFIX).replace("\\", "/").partition(":")  # a path of Windows has those
    if not _REPO.fullmatch(repo) or (colon and not wanted):
        raise NKATError(f"{text}: not hf:OWNER/REPO or hf:OWNER/REPO:QUANT, such as hf:OWNER/REPO:Q4_K_M")
    return HubName(repo, wanted or None)


def choose_files(name: HubName, files: Iterable[str]) -> list[str]:
    """The file that is meant, of a model in several files all of them. Raises NKATError, with what there is, for none
    and for several.

    files: paths in the repository. Without a quantisation it is the one of USUAL that there is, else the only file;
    llama.cpp takes the first one then, which may be ten times as large as anybody wants.
    """
    models = sorted(file for file in files if _is_model(file))
    if not models:
        raise NKATError(f"{name}: there is no model in a .gguf")
    if name.wanted is None:
        found = next((found for usual in USUAL if (found := _of_type(models, usual))), models)
    elif name.wanted.lower().endswith(".gguf"):
        found = [file for file in models if name.wanted in (file, file.rpartition("/")[2])]
    else:
        found = _of_type(models, name.wanted)
    if not found:
        raise NKATError(f"{name}: there is no such file; there are {_listed(models)}")
    if len({_PART.sub("", file) for file in found}) > 1:
        raise NKATError(f"{name}: several files match, give one as {PREFIX}{name.repo}:FILE: {', '.join(found)}")
    return _with_other_parts(name, found[0], models)


def _with_other_parts(name: HubName, file: str, models: Collection[str]) -> list[str]:
    """The parts of the model that a file is one of, in order; the file alone where it is all of it."""
    part = _PART.search(file)
    if part is None:
        return [file]
    count = int(part[0][-5:])
    parts = [f"{file[: part.start()]}-{i:05d}-of-{count:05d}{file[part.end() :]}" for i in range(1, count + 1)]
    missing = next((one for one in parts if one not in models), None)
    if missing is not None:
        raise NKATError(f"{name}: the model is in {count} parts, and there is no {missing}")
    return parts


def _is_model(file: str) -> bool:
    name = file.rpartition("/")[2].lower()
    return name.endswith(".gguf") and not any(word in name for word in _BESIDE)


def _of_type(models: Iterable[str], wanted: str) -> list[str]:
    """Those of a quantisation: a whole word of the name, so that IQ4_K_M is no Q4_K_M, and Q4_K no Q4_K_M."""
    pattern = re.compile(rf"(?<![A-Za-z0-9]){re.escape(wanted)}(?=[.\-/])", re.IGNORECASE)
    return [file for file in models if pattern.search(file)]


def _listed(models: Iterable[str]) -> str:
    """The quantisations of the files, or the names of those that say none."""
    types = [_TYPE.search(_PART.sub("", file)) for file in models]
    return ", ".join(dict.fromkeys(found[1] if found else file for found, file in zip(types, models, strict=True)))
