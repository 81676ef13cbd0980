"""The file behind a name, of a model in several the first: from Hugging Face's cache, into which they are fetched.

`huggingface_hub` speaks to the server and keeps the cache, which it shares with whatever else uses it (HF_HOME,
HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean there). It no longer goes on with a download that was
interrupted: every run fetches to a file of a new name, and deletes it. So the bytes are fetched here, to the
`.incomplete` file that its older versions used and its tools know, checked against the hash that the server gives, and
put where it looks for them.

Limits: files of more than 50 GB come by another protocol only, and are left to `hf download`. What has come is written
10 MB at a time, so as much may be fetched twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NoReturn, cast, overload

from nkat.errors import NKATError
from nkat.host.console import bar, format_bytes, note
from nkat.host.files import disk_errors, file_digest, make_folder
from nkat.hub.names import HubName, choose_files, parse_name

_SECONDS = 10  # for an answer of the server
_HASH, _SHA256 = re.compile("[0-9a-f]{40}|[0-9a-f]{64}"), 64  # digits, of git's or the file's own


@overload
def local_model(path: Path) -> Path: ...
@overload
def local_model(path: None) -> None: ...
def local_model(path: Path | None) -> Path | None:
    """The path itself, or where the file of a name is, which is fetched when the cache does not have it.

    Raises NKATError in one line for a name that means no file or several, and for whatever the server, the network or
    the disk refuses.
    """
    name = None if path is None or path.exists() else parse_name(str(path))
    return path if name is None else fetch(name)


def is_name(path: Path) -> bool:
    """Whether `local_model` would look for it elsewhere."""
    return not path.exists() and parse_name(str(path)) is not None


def fetch(name: HubName) -> Path:
    """See `local_model`. Asks the server which files there are now; without a network, what the cache has is used."""
    hub = _library()
    try:
        listed = hub.HfApi().model_info(name.repo, timeout=_SECONDS)
    except hub.errors.HFValidationError as error:
        raise NKATError(f"{name}: {_reason(error)}") from None
    except hub.errors.OfflineModeIsEnabled:
        return _cached(hub, name, "HF_HUB_OFFLINE is set")
    except (hub.errors.HTTPError, OSError) as error:
        if _is_refusal(hub, error):
            _refuse(hub, name, error)
        why = _reason(error)
        found = _cached(hub, name, why)
        note(f"note: {name}: no answer from {hub.constants.ENDPOINT} ({why}); the copy in the cache is used")
        return found
    files = choose_files(name, [sibling.rfilename for sibling in listed.siblings or ()])
    try:
        paths = [_there(hub, name, file, listed.sha) for file in files]
    except (hub.errors.HTTPError, OSError, ValueError) as error:
        _refuse(hub, name, error)
    return paths[0]


def _there(hub: ModuleType, name: HubName, file: str, revision: str) -> Path:
    """Where the cache has a file, into which it is fetched first."""
    known = hub.try_to_load_from_cache(name.repo, file, revision=revision)
    if isinstance(known, str):
        return Path(known)
    blob = _fetch_blob(hub, name, file, revision)
    # Finds the bytes where it would have put them: what is left is the name that belongs to them.
    path = Path(hub.hf_hub_download(name.repo, file))
    if not path.is_symlink():  # where a system has no links the name is a copy
        blob.unlink(missing_ok=True)
    return path


def _library() -> ModuleType:
    """huggingface_hub, without its own progress bars, warnings and messages to its makers."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when it is first imported
    import huggingface_hub  # not before it is needed: few commands are given a name
    import huggingface_hub.errors
    import huggingface_hub.file_download

    huggingface_hub.logging.set_verbosity_error()
    return huggingface_hub


def _fetch_blob(hub: ModuleType, name: HubName, file: str, revision: str) -> Path:
    """Puts the bytes of a file where the cache has them, going on with what is there of them; returns where."""
    url = hub.hf_hub_url(name.repo, file, revision=revision)
    found = hub.get_hf_file_metadata(url, timeout=_SECONDS)
    if found.size is None or not _HASH.fullmatch(found.etag or ""):  # which is to be a file's name, too
        raise NKATError(f"{name}: the server does not say the size and the hash of {file}, so it cannot be checked")
    if found.size > hub.constants.MAX_HTTP_DOWNLOAD_SIZE:
        raise NKATError(
            f"{name}: {file} has {format_bytes(found.size)}, which come by another protocol: "
            f"`hf download {name.repo} {file}` fetches it, and then it is found here"
        )
    folder = Path(hub.constants.HF_HUB_CACHE)
    repo_folder = hub.file_download.repo_folder_name(repo_id=name.repo, repo_type="model")
    blob = folder / repo_folder / "blobs" / found.etag
    for needed in (blob.parent, folder / ".locks" / repo_folder):
        make_folder(needed)
    with _alone(folder / ".locks" / repo_folder / f"{found.etag}.lock"):
        if not blob.exists():
            partial = blob.with_name(f"{found.etag}.incomplete")
            _download(hub, name, file, url, found.size, partial)
            _check(name, file, partial, found.etag, found.size)
            partial.replace(blob)
    return blob


def _download(hub: ModuleType, name: HubName, file: str, url: str, size: int, partial: Path) -> None:
    """Until the partial file has all of its bytes, of which it may have some already."""
    with disk_errors(partial), partial.open("ab") as out:
        have = out.tell()
        if have > size:  # another file's remains
            out.truncate(0)
            have = 0
        free = shutil.disk_usage(partial.parent).free
        if free < size - have:
            raise NKATError(
                f"{name}: {format_bytes(size - have)} are to be fetched into {partial.parent}, "
                f"and the disk has {format_bytes(free)} free"
            )
        going_on = f", of which {format_bytes(have)} are there" if have else ""
        note(f"fetching {name}: {file}, {format_bytes(size)}{going_on}")
        try:
            with bar(size, "fetching", "B") as progress, _without_its_bars(hub):
                counted = cast(BinaryIO, _Counted(out, progress))
                headers = hub.utils.build_hf_headers()
                hub.file_download.http_get(url, counted, resume_size=have, headers=headers, expected_size=size)
        except KeyboardInterrupt:
            note(f"{format_bytes(partial.stat().st_size)} are kept: the same command goes on from there")
            raise


@contextlib.contextmanager
def _without_its_bars(hub: ModuleType) -> Iterator[None]:
    if hub.utils.are_progress_bars_disabled():
        yield
        return
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        hub.utils.enable_progress_bars()


class _Counted:
    """A file that moves a progress bar to where it ends."""

    def __init__(self, file: BinaryIO, progress: Any) -> None:
        self._file, self._progress, self._shown = file, progress, 0
        self._show()

    def write(self, data: bytes) -> int:
        written = self._file.write(data)
        self._show()
        return written

    def _show(self) -> None:
        at = self._file.tell()
        self._progress.update(at - self._shown)
        self._shown = at

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._file, attribute)


def _check(name: HubName, file: str, partial: Path, etag: str, size: int) -> None:
    """Deletes what is not what the server says it is. Large files have their SHA-256 as a name, small ones git's."""
    of_git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    digest = hashlib.sha256() if len(etag) == _SHA256 else of_git
    found = file_digest(partial, digest, "checking")
    if found != etag:
        partial.unlink()
        raise NKATError(
            f"{name}: what came of {file} has hash {found}, and the server says {etag}: it is damaged and was deleted; "
            "try again"
        )


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time fetches a file, whichever program it is of."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(lock, timeout=1))
        except Timeout:
            note("another process is fetching this file; waiting for it")
            stack.enter_context(WeakFileLock(lock))
        yield


def _cached(hub: ModuleType, name: HubName, why: str) -> Path:
    """The file that the cache has of the newest revision it knows. Raises NKATError where it has none that is meant."""
    folder = Path(hub.constants.HF_HUB_CACHE, hub.file_download.repo_folder_name(repo_id=name.repo, repo_type="model"))
    reference = folder / "refs" / "main"
    if not reference.is_file():
        raise NKATError(f"{name}: not in the cache, and cannot be fetched: {why}")
    snapshot = folder / "snapshots" / reference.read_text(encoding="utf-8").strip()
    files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf") if path.is_file()]
    try:
        return snapshot / choose_files(name, files)[0]
    except NKATError as error:
        raise NKATError(f"{error} (in the cache; no others can be fetched: {why})") from None


def _is_refusal(hub: ModuleType, error: Exception) -> bool:
    """Whether the server has understood and said no, so that asking the cache would be to hide it."""
    response = getattr(error, "response", None)
    return response is not None and 400 <= response.status_code < 500 and response.status_code != 429


def _refuse(hub: ModuleType, name: HubName, error: Exception) -> NoReturn:
    errors, server = hub.errors, hub.constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        raise NKATError(
            f"{name}: its terms have to be accepted first, at {server}/{name.repo}; then give your token in HF_TOKEN"
        ) from None
    if isinstance(error, errors.RepositoryNotFoundError):
        raise NKATError(
            f"{name}: {server} has no such model, or a private one, for which HF_TOKEN must hold a token"
        ) from None
    if isinstance(error, errors.HfHubHTTPError | errors.HTTPError):
        raise NKATError(f"{name}: cannot be fetched from {server}: {_reason(error)}; what has come is kept") from None
    raise NKATError(f"{name}: cannot be fetched: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """The first line of what a library says, which may be several with advice for programmers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
