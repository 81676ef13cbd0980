"""The files in a search's output folder, and whose they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna

from nkat.errors import NKATError
from nkat.host.console import note
from nkat.host.files import check_apart
from nkat.host.page import REPORT
from nkat.host.record import parse_json, write_json
from nkat.study.options import StudyOptions
from nkat.study.study import exists_already, find_study, open_storage, study_id, without_password

HISTORY, SUMMARY, PICTURE = "optimization_history.json", "optuna_study.json", "optimization_results.png"


def check_place(options: StudyOptions, name: str, has_begun: bool = False) -> None:
    """Raises NKATError, before time is spent, where a study would be continued unasked, is not there to be continued,
    or where the folder's reports are another study's.

    name: of the study, where the user gives none;  has_begun: there is something else to be continued
    """
    check_apart(
        {"--json": options.json, **{file: options.output_dir / file for file in (HISTORY, SUMMARY, PICTURE, REPORT)}}
    )
    name = options.study_name or name
    where, folder = options.storage_url, options.output_dir
    names, study = [], None
    if "://" in where or Path(where).is_file():  # a journal that is not there would be made
        storage = open_storage(where)
        names, study = optuna.get_all_study_names(storage), find_study(storage, name)
    if study is None and options.resume and not has_begun:
        held = f"; it holds {', '.join(names)}" if names else ""
        raise NKATError(f"{without_password(where)}: there is no study {name!r} to resume{held}")
    if study is not None and not options.may_join:
        raise exists_already(study)
    if options.force:
        return
    others = names if options.storage is None and study is None else []
    owner = _reports_of(folder)
    if owner is not None and (study is None or owner != (name, study_id(study))):
        others = [owner[0]]
    if others:
        raise NKATError(
            f"{folder}: holds another search, {others[0]!r}; give another --output-dir, or --force to replace its "
            "reports"
        )


def _reports_of(folder: Path) -> tuple[str, str | None] | None:
    """Name and id of the study whose reports a folder has; None when it has none."""
    if not any((folder / name).exists() for name in (HISTORY, SUMMARY)):
        return None
    try:
        if not (folder / SUMMARY).is_file():  # a pipe would wait for ever
            return "unknown", None
        summary = parse_json((folder / SUMMARY).read_bytes())
        return str(summary["study"]), summary.get("study_id")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "unknown", None


def write_records(folder: Path, trials: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> None:
    """Every trial, and the summary."""
    write_json({"trials": list(trials)}, str(folder / HISTORY), force=True)
    write_json(dict(record), str(folder / SUMMARY), force=True)


def note_earlier(folder: Path, pattern: str, current: str | None) -> None:
    """Says which files of an earlier report are still there, and are not what this one found best."""
    for path in sorted(folder.glob(pattern)):
        if current is None or path != Path(current):
            note(f"note: {path} is from an earlier report, and not the best any more")
