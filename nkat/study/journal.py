"""A study's journal file whose end was torn by a power cut, a kill or a full disk."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from nkat.host.console import note
from nkat.host.files import check_output, disk_errors
from nkat.host.record import parse_json


class Journal(JournalFileBackend):
    """Optuna's, cut back to its last whole record when it is opened; a full disk is one line."""

    def __init__(self, path: str) -> None:
        lock = _Lock(path)
        if Path(path).exists():
            check_output(Path(path), force=True)  # a pipe would wait for ever
            with disk_errors(Path(path)):
                lock.acquire()  # who writes has it
                try:
                    _mend(Path(path))
                finally:
                    lock.release()
        super().__init__(path, lock_obj=lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with disk_errors(Path(self._file_path)):
            super().append_logs(logs)


class _Lock(JournalFileOpenLock):
    """Whoever has the lock finds a journal that ends in a whole line, and leaves one.

    So a process that is killed while it writes, or whose disk is full, spoils nothing for those that go on: what they
    would write behind half a line could not be read by anybody.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = Path(path)

    def acquire(self) -> bool:
        super().acquire()
        try:
            if _is_torn(self._path):
                _mend(self._path)
        except BaseException:
            super().release()
            raise
        return True

    def release(self) -> None:
        try:
            if _is_torn(self._path):  # by this process, which failed to write; nobody has read it
                _cut(self._path, self._path.read_bytes().rfind(b"\n") + 1)
        finally:
            super().release()


def _is_torn(path: Path) -> bool:
    """Whether the last line has no end. Nothing is torn in a file that is not there."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _mend(path: Path) -> None:
    """Cuts behind the last record before the first that is not whole; what is cut is kept beside the journal."""
    content = path.read_bytes()
    end = 0
    for line in re.findall(rb"[^\n]*\n|[^\n]+", content):
        if not _is_record(line):
            break
        end += len(line)
    torn = content[end:]
    if not torn and (not content or content.endswith(b"\n")):
        return
    if torn:
        kept = next(p for i in range(1, 10**6) if not (p := path.with_name(f"{path.name}.cut-{i}")).exists())
        kept.write_bytes(torn)
        note(f"note: {path}: its end was not completely written; {len(torn):,} bytes of it are now in {kept}")
    _cut(path, end, b"" if content[:end].endswith(b"\n") or not end else b"\n")


def _cut(path: Path, end: int, then: bytes = b"") -> None:
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(end)
        file.write(then)
        file.flush()
        os.fsync(file.fileno())


def _is_record(line: bytes) -> bool:
    try:
        record = parse_json(line)
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("op_code"), int)
