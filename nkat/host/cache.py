"""The user's cache folder: what is in it is either this user's own, or checked before it is used.

Nothing here stops a command. Where there is no cache, or none that can be trusted or written to, what would be kept is
made again each time, and one line says so. Folders are made for the user alone (0700).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from nkat.errors import NKATError
from nkat.host.console import note
from nkat.host.files import atomic_output
from nkat.host.record import parse_json

_Found = TypeVar("_Found")

_DIGEST = hashlib.sha256().digest_size
_KEY_NAME, _KEY_SIZE = "key", 32
_said: set[str] = set()  # folders of which it is said already that they are no cache


def cache_folder() -> Path | None:
    """$NKAT_CACHE, else the user's: fetched models, compiled kernels, adapters, what was found out about KoboldCpp.

    It need not be there. None where there can be none. An empty variable counts as unset.
    """
    if named := os.environ.get("NKAT_CACHE"):
        return _absolute("NKAT_CACHE", named)
    variable = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"
    if named := os.environ.get(variable):
        folder = _absolute(variable, named)
        return None if folder is None else folder / "nkat"
    home = _home()
    if home is None:
        return None
    return home / ("AppData/Local" if os.name == "nt" else ".cache") / "nkat"


def own_folder(name: str = "", make: bool = True) -> Path | None:
    """A folder in the cache whose content this user alone can have written. None where there is none to be had.

    make: otherwise None, without a word, when it is not there
    """
    root = cache_folder()
    if root is None:
        return None
    folder = root
    try:
        if make:
            root.parent.mkdir(parents=True, exist_ok=True)
        for part in ("", *PurePosixPath(name).parts):
            folder = folder / part
            if make:
                folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.stat()
            if os.name != "nt" and (found.st_uid != os.geteuid() or found.st_mode & 0o022):
                _no_cache(root, f"{folder} is another user's, or others may write to it")
                return None
    except FileNotFoundError:
        if make:
            _no_cache(root, f"{folder} cannot be made")
        return None
    except (OSError, ValueError) as error:
        _no_cache(root, f"{folder}: {getattr(error, 'strerror', None) or error}")
        return None
    return folder


def load_sealed(name: str) -> bytes | None:
    """What `keep_sealed` kept under this name: None where there is nothing, or something that it did not write."""
    path = _sealed_path(name, make=False)
    if path is None:
        return None
    try:
        key = _key(path[0])
        if key is None or not path[1].is_file():
            return None
        content = path[1].read_bytes()
    except OSError:
        return None
    if hmac.compare_digest(content[:_DIGEST], _seal(key, name, content[_DIGEST:])):
        return content[_DIGEST:]
    _once(str(path[0] / _KEY_NAME), f"note: {path[1]} is damaged or was not made by this user here: it is made anew")
    return None


def keep_sealed(name: str, data: bytes) -> None:
    """Keeps what must not be anybody else's, such as machine code, with a seal that only this user's key makes."""
    path = _sealed_path(name, make=True)
    if path is None:
        return
    with _cannot_be_kept(path[0]):
        key = _key(path[0])
        if key is not None:
            with atomic_output(path[1], _DIGEST + len(data), force=True, cache=True) as file:
                file.write(_seal(key, name, data) + data)


@dataclass(frozen=True, slots=True)
class Memo:
    """What was found out once, in a JSON file of the cache: an object of names and values.

    It can be deleted at any time, so nothing that is wrong with it is an error: unreadable or damaged means empty, and
    what cannot be kept is found out again.
    """

    name: str

    @classmethod
    def open(cls, name: str) -> Memo:
        """`name`: below the cache folder, such as "kobold/programs.json"; it need not be there."""
        return cls(name)

    @property
    def path(self) -> Path | None:
        """Where it is, or would be; None without a cache."""
        folder = cache_folder()
        return None if folder is None else folder / self.name

    def get(self, read: Callable[[dict[str, Any]], _Found]) -> _Found | None:
        """What `read` takes from the content, or None where that is missing or of another form than `read` expects."""
        try:
            return read(self._content())
        except (LookupError, TypeError, ValueError):
            return None

    def set(self, found: Mapping[str, Any]) -> None:
        """Adds these names, or gives them new values; the file changes in one step. Says so when it cannot."""
        path = self._own(make=True)
        if path is None:
            return
        data = json.dumps(self._content() | dict(found), indent=2).encode()
        with _cannot_be_kept(path.parent), atomic_output(path, len(data), force=True, cache=True) as file:
            file.write(data)

    def _own(self, make: bool) -> Path | None:
        parent = PurePosixPath(self.name).parent
        folder = own_folder(str(parent), make)
        return None if folder is None else folder / PurePosixPath(self.name).name

    def _content(self) -> dict[str, Any]:
        path = self._own(make=False)
        try:
            if path is None or not path.is_file():  # a pipe would wait for ever
                return {}
            content = parse_json(path.read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def checked_sha256(found: object) -> str:
    """What a `Memo` holds as a file's SHA-256. Raises ValueError where it is none, so that it counts as unknown."""
    if not isinstance(found, str) or not re.fullmatch("[0-9a-f]{64}", found):
        raise ValueError("not a SHA-256")
    return found


def _absolute(variable: str, named: str) -> Path | None:
    """A relative one would be another folder wherever a command is called, and whoever made that could fill it."""
    path = Path(named)
    if path.is_absolute():
        return path
    _no_cache(path, f"{variable} is {named!r}, which is no absolute path")
    return None


def _home() -> Path | None:
    try:
        if os.name != "nt" and not os.environ.get("HOME"):
            import pwd

            home = Path(pwd.getpwuid(os.geteuid()).pw_dir)
        else:
            home = Path.home()
        if home.is_absolute() and home.is_dir():
            return home
    except (OSError, RuntimeError, KeyError, ImportError):  # a user without an entry
        home = Path("~")
    _no_cache(home, f"there is no home folder ({home})")
    return None


def _sealed_path(name: str, make: bool) -> tuple[Path, Path] | None:
    """The cache's folder, where the key is, and the file."""
    root = own_folder(make=make)
    folder = own_folder(str(PurePosixPath(name).parent), make)
    return None if root is None or folder is None else (root, folder / PurePosixPath(name).name)


def _seal(key: bytes, name: str, data: bytes) -> bytes:
    """Of the name too, so that one file cannot be put in another's place."""
    return hmac.digest(key, name.encode() + b"\0" + data, "sha256")


def _key(root: Path) -> bytes | None:
    """The user's key, made when there is none. One that others can read, or that is damaged, is replaced."""
    path = root / _KEY_NAME
    for _ in range(3):  # another process may make or replace it meanwhile
        try:
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError:
            _make_key(path)
            continue
        except OSError:  # a link
            path.unlink()
            continue
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            private = os.name == "nt" or (found.st_uid == os.geteuid() and not found.st_mode & 0o077)
            key = file.read(_KEY_SIZE + 1) if stat.S_ISREG(found.st_mode) else b""
        if private and len(key) == _KEY_SIZE:
            return key
        path.unlink(missing_ok=True)
    return None


def _make_key(path: Path) -> None:
    """Whole or not at all, and never in place of one that another process made at the same time."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".key-", suffix=".tmp")  # for the user alone
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_KEY_SIZE))
            file.flush()
            os.fsync(handle)
        try:
            os.link(name, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def _cannot_be_kept(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _no_cache(folder, f"{folder}: cannot be written: {error.strerror or error}")
    except NKATError as error:
        _no_cache(folder, str(error))


def _no_cache(folder: Path, reason: str) -> None:
    _once(str(folder), f"note: without a cache: {reason}")


def _once(what: str, text: str) -> None:
    if what not in _said:
        _said.add(what)
        note(text)
