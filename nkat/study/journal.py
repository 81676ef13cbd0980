"""A study's journal file whose end was torn by a power cut, a kill or a full disk."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from nkat.host.console import note
from nkat.host.files import disk_errors


class Journal(JournalFileBackend):
    """Optuna's, cut back to its last whole record when it is opened; a full disk is one line."""

    def __init__(self, path: str) -> None:
        lock = JournalFileOpenLock(path)
        if Path(path).is_file():
            with disk_errors(Path(path)):
                lock.acquire()  # who writes has it
                try:
                    _mend(Path(path))
                finally:
                    lock.release()
        super().__init__(path, lock_obj=lock)

    def append_logs(self, logs: list[dict[str, object]]) -> None:
        with disk_errors(Path(self._file_path)):
            super().append_logs(logs)


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
    with path.open("r+b") as file:
        if torn:
            kept = next(p for i in range(1, 10**6) if not (p := path.with_name(f"{path.name}.cut-{i}")).exists())
            kept.write_bytes(torn)
            note(f"note: {path}: its end was not completely written; {len(torn):,} bytes of it are now in {kept}")
        file.truncate(end)
        if end and not content[:end].endswith(b"\n"):  # only the line break is missing
            file.seek(end)
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())


def _is_record(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and isinstance(record.get("op_code"), int)
