"""The Θ that a search learns from a text: one nested fit of the largest rank, kept in the output folder.

What is kept: `fit_rank8.bin`, Θ alone; `fit_rank8.json` beside it, how it was learned; while it is being learned, the
state of the fit behind `.fit`, and what short fits found behind `.tries`. A search that is resumed goes on from there,
and processes that share a search share the fit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nkat.errors import NKATError
from nkat.gguf.writer import FileRange, sha256_of_parts, write_gguf
from nkat.host import hardware
from nkat.host.console import note
from nkat.host.files import check_output, disk_errors
from nkat.host.locks import try_lock
from nkat.host.programs import shell_line
from nkat.host.record import parse_json, write_json
from nkat.host.threads import most_threads
from nkat.host.tools import tool_command
from nkat.lm.load import LoadedModel
from nkat.measure.perplexity import change_text
from nkat.measure.texts import Text
from nkat.search.options import SearchOptions
from nkat.sources.fit.descent import FitSettings
from nkat.sources.fit.job import FitRequest, FitResult, run_fit
from nkat.sources.fit.options import choice_space, fit_flags
from nkat.sources.fit.rate import rate_scale
from nkat.sources.make import describe_theta_set
from nkat.sources.options import ThetaOptions
from nkat.theta.modelfile import open_model_file, theta_only_parts
from nkat.theta.set import ThetaSet

_RATES = (1.0 / 3.0, 1.0, 2.0)  # times the learning rate that the fit would have
_LENGTHS = (4, 2)  # of the steps that it would have, a fourth and a half
_LONGER = 2  # times the steps, where the longer of the short fits was the better one


@dataclass(frozen=True, slots=True)
class Learned:
    """theta_set: of the largest rank, as its file has it;  record: what the `.json` beside the file says"""

    theta_set: ThetaSet
    record: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Learner:
    """What a search's fit is made from.

    names: the weights that get a Θ;  settings: of the fit where no short fit finds better ones
    """

    options: SearchOptions
    model: LoadedModel
    base_sha256: str
    names: list[str]
    settings: FitSettings
    text: Text
    reference: LoadedModel | None

    @property
    def path(self) -> Path:
        return fit_path(self.options, self.settings.rank)

    @property
    def asked(self) -> dict[str, Any]:
        """All that two searches with the same fit have in common. JSON values only."""
        fit = self.options.fit
        settings = asdict(self.settings) | {"start": fit.start, "precision": fit.precision, "ignore": list(fit.ignore)}
        return {**settings, "model_sha256": self.base_sha256, "calibration_sha256": self.text.sha256}

    def learn(self) -> Learned:
        """The fit that is kept, or a new one. Raises KeyboardInterrupt where that was interrupted: it goes on then."""
        if found := self._kept():
            return found
        if self.options.study.join:
            raise NKATError(f"{self.path}: the fit that this search's processes share is not there")
        with _alone(self.path), _all_threads(self.options):
            return self._kept() or self._make()

    def _kept(self) -> Learned | None:
        """What an earlier process has kept, if it is whole. Raises NKATError for another fit, unless it may go."""
        try:
            record = parse_json(self.path.with_suffix(".json").read_bytes())
            theta_set = open_model_file(self.path).require_theta()
            asked, whole = dict(record["asked"]), record["sha256"] == _hash(self.path)
        except (OSError, ValueError, LookupError, TypeError, NKATError):  # none, or not what this module writes
            return None
        differ = [key for key, value in self.asked.items() if asked.get(key) != value]
        if whole and differ and not self.options.study.force:
            key = differ[0]
            raise NKATError(
                f"{self.path}: was learned with another {key}: {asked.get(key)!r} there, {self.asked[key]!r} here; "
                "give another --output-dir, or --force to learn it anew"
            )
        return Learned(theta_set, {**record, "file": str(self.path)}) if whole and not differ else None

    def _make(self) -> Learned:
        tries = self._short_fits() if self.options.study.mode == "full" else []
        chosen = best_of(tries, self.settings, self._varied())
        settings = replace(self.settings, **chosen)
        if "learning_rate" in chosen:
            settings = replace(settings, scaled=False)  # as where a user names one
        result = self._fit(settings, self.path.with_name(self.path.name + ".fit"), self.options.fit.start)
        options = ThetaOptions(settings.rank, settings.gamma, settings.seed, source="fit", notes=result.notes)
        theta_set = describe_theta_set(self.model.file, result.thetas, options, self.base_sha256)
        write_gguf(self.path, theta_only_parts(theta_set), force=True)
        record = {
            "file": str(self.path),
            "sha256": _hash(self.path),
            "command": self._command(chosen),
            "asked": self.asked,
            "short_fits": tries,
            **result.record,
        }
        write_json(record, str(self.path.with_suffix(".json")), force=True)
        for leftover in self.path.parent.glob(f"{self.path.name}.*"):
            if leftover != _lock_path(self.path):
                leftover.unlink()
        return Learned(open_model_file(self.path).require_theta(), record)

    def _fit(self, settings: FitSettings, state: Path, start: str) -> FitResult:
        fit = self.options.fit
        resume = self.options.study.resume and state.is_file()
        check_output(state, force=True)  # a pipe would wait for ever
        request = FitRequest(
            model=self.model,
            base_sha256=self.base_sha256,
            names=self.names,
            settings=settings,
            calibrate=self.text,
            reference=self.reference,
            keep=None,
            ignore=fit.ignore,
            start=start,
            precision=fit.precision,
            fast=fit.fast,
            state=state,
            resume=resume,
            allow_cuda=fit.allow_cuda,
            space=choice_space([settings.rank], settings.gamma, guarded=False),  # the trials choose
            guard=None,
        )
        result = run_fit(request)
        if not result.finished:
            note(f"the fit is kept in {state}; --resume goes on from there")
            raise KeyboardInterrupt
        return result

    def _varied(self) -> tuple[bool, bool]:
        """Whether the short fits may choose the learning rate, and the steps: what the user has not fixed."""
        given = self.options.fit.settings
        return "learning_rate" not in given, "steps" not in given

    def _short_fits(self) -> list[dict[str, Any]]:
        """Fits that are short, each to its end: what the learning rate and the steps change on the kept-back slice."""
        rates, lengths = self._varied()
        if not rates and not lengths:
            return []
        settings = self.settings
        usual = settings.learning_rate * (rate_scale(self.model.model) if settings.scaled else 1.0)
        wanted = [
            (float(f"{usual * rate:.2g}"), max(1, settings.steps // length))
            for rate in (_RATES if rates else (1.0,))
            for length in (_LENGTHS if lengths else _LENGTHS[:1])
        ]
        kept = self.path.with_name(f"{self.path.name}.tries")
        rows = self._kept_tries(kept)
        for number, (rate, steps) in enumerate(wanted[len(rows) :], len(rows) + 1):
            short = replace(
                settings,
                learning_rate=rate,
                scaled=False,
                steps=steps,
                warmup=min(settings.warmup, steps // 4),
                validate_every=steps,
            )
            row: dict[str, Any] = {"learning_rate": rate, "steps": steps}
            state = self.path.with_name(f"{self.path.name}.try-{number}")
            start = "zero" if self.options.fit.start == "auto" else self.options.fit.start
            try:
                found = self._fit(short, state, start).record
                row |= {name: found[f"heldout_{name}"] for name in ("change_percent", "change_percent_stderr")}
                said = change_text(row["change_percent"], row["change_percent_stderr"])
            except NKATError as error:  # it diverged, or made nothing better: that is what was asked
                row["failed"] = said = str(error)
            note(f"short fit {number} of {len(wanted)}: learning rate {rate:g}, {steps} steps: {said}")
            rows.append(row)
            write_json({"asked": self.asked, "rows": rows}, str(kept), force=True)
        return rows

    def _kept_tries(self, path: Path) -> list[dict[str, Any]]:
        if not self.options.study.resume or not path.is_file():
            return []
        record = parse_json(path.read_bytes())
        return record["rows"] if record["asked"] == self.asked else []

    def _command(self, chosen: Mapping[str, Any]) -> str:
        """The converter's command that makes the same file again."""
        options, settings = self.options, self.settings
        assert options.calibrate is not None
        words: list[object] = [*tool_command("convert"), "--input", options.model.absolute()]
        words += ["--output", self.path.absolute(), "--force", "--theta-only", "--theta-source", "fit"]
        words += ["--calibrate", options.calibrate.absolute()]
        words += [] if options.reference is None else ["--reference", options.reference.absolute()]
        words += ["--theta-rank", settings.rank, "--theta-gamma", f"{settings.gamma:g}", "--seed", settings.seed]
        words += ["--threads", torch.get_num_threads()]
        words += fit_flags(replace(options.fit, settings={**options.fit.settings, **chosen}, guard=None))
        return shell_line(words)


def fit_path(options: SearchOptions, rank: int) -> Path:
    return options.study.output_dir / f"fit_rank{rank}.bin"


def has_begun(options: SearchOptions) -> bool:
    """Whether there is a fit, or a part of one, in the folder that a search can go on from."""
    return options.learns and any(options.study.output_dir.glob("fit_rank*.bin*"))


def best_of(
    tries: list[dict[str, Any]], settings: FitSettings, varied: tuple[bool, bool] = (True, True)
) -> dict[str, Any]:
    """The fields of FitSettings that short fits chose; {} where there were none. Raises NKATError where all failed.

    varied: whether the learning rate, and the steps, may be chosen. A fit that is twice as long gets its chance where
    the longer of the short ones was better by more than its error.
    """
    if not tries:
        return {}
    good = [row for row in tries if "failed" not in row]
    if not good:
        raise NKATError(tries[-1]["failed"])
    best = min(good, key=lambda row: row["change_percent"])
    chosen: dict[str, Any] = {"learning_rate": best["learning_rate"]} if varied[0] else {}
    shorter = [r for r in good if r["learning_rate"] == best["learning_rate"] and r["steps"] < best["steps"]]
    gained = any(best["change_percent"] + best["change_percent_stderr"] < row["change_percent"] for row in shorter)
    if varied[1] and gained:
        chosen["steps"] = _LONGER * settings.steps
    return chosen


def _hash(path: Path) -> str:
    return sha256_of_parts([FileRange(path, 0, path.stat().st_size)])


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No two processes learn into the same file."""
    lock = _lock_path(path)
    check_output(lock, force=True)  # a pipe would wait for ever
    with disk_errors(lock):
        file = lock.open("ab")
    with file:
        if try_lock(file.fileno()) is False:
            raise NKATError(f"{path}: another process is learning it just now; --resume when it has ended")
        yield
    lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _all_threads(options: SearchOptions) -> Iterator[None]:
    """The fit has the threads of all the processes that will share it, which begin when it is there."""
    before = torch.get_num_threads()
    if options.study.workers > 1:
        hardware.set_threads(min(most_threads(), before * options.study.workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)
