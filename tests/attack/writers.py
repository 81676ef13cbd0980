"""Every command that writes, killed or out of disk at each place where it touches a file.

    python -m tests.attack.writers KILLS FULL [NAME …]     KILLS and FULL: how many of each for every writer

Each case is a process of its own, forked from one that has loaded everything. It ends by SIGKILL before its n-th call
that touches a file, or its files may grow to n bytes and no more, which is what a full disk does: the first part of a
write is taken. What it leaves must be whole, and the same command, given again, must bring it to its end and clear
the remains away. Prints a line for each fault that is found; the last line is JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import optuna
import torch
from optuna.storages.journal._storage import JournalOperation

from nkat.errors import NKATError
from nkat.gguf.file import GGUFFile
from nkat.host import commandline
from nkat.measure.texts import default_text
from nkat.study.study import FINISHED, open_storage
from nkat.theta.modelfile import open_model_file
from nkat_vit import checkpoint
from tests.support.fake_koboldcpp import NEW, install
from tests.support.tiny_models import write_tiny_model
from tests.support.vit_data import write_digits

FIT = "--fit-steps 3 --fit-batch 1 --fit-context 32 --fit-validate-every 1 --fit-start zero --no-guard --no-cuda"
IMAGES = "--dataset emnist-digits --embed-dim 16 --depth 1 --heads 2 --validation 24 --batch-size 24 --warmup 1"
# What commands import late: once here, not in every process that is forked.
LATE = ("matplotlib.figure", "matplotlib.backends.backend_agg", "scipy.stats", "torch._dynamo", "PIL.Image", "jinja2")
_TOUCHES = {
    "open", "write", "flush", "fsync", "truncate", "ftruncate", "replace", "rename", "unlink", "link", "mkdir", "chmod",
    "posix_fallocate", "close",
}  # fmt: skip
_SET_STATE = JournalOperation.SET_TRIAL_STATE_VALUES
_FILES = (io.BufferedWriter, io.BufferedRandom, io.FileIO)


@dataclass(frozen=True)
class Writer:
    """One command.

    module: whose `main` it is;  arguments: in its folder
    again: what is added where it is given again and something is there to go on from
    check: raises, or returns what is wrong, where what is in the folder is not whole
    """

    module: str
    arguments: str
    check: Callable[[Path, bytes | None], str | None]
    target: str
    again: Callable[[Path], str] = lambda folder: ""


def model_is_whole(folder: Path, old: bytes | None, name: str = "out.nkat") -> str | None:
    path = folder / name
    if not path.exists():
        return None if old is None else f"{name} is gone"
    if path.read_bytes() == old:
        return None
    opened = open_model_file(path)
    return None if opened.theta is not None and not opened.unfinished else f"{name} is half written"


def base_is_intact(folder: Path, old: bytes | None) -> str | None:
    """An in-place change keeps the model's own bytes, and the file opens at any time."""
    base = (folder / "base.gguf").read_bytes()
    path = folder / "in_place.gguf"
    if path.read_bytes()[: len(base)] != base:
        return "the base's bytes have changed"
    open_model_file(path).require_base()
    return None


def json_is_whole(folder: Path, old: bytes | None, name: str = "record.json") -> str | None:
    for path in (folder / name, *folder.rglob("*.json"), *folder.rglob("*.kcpps")):
        if path.exists():
            json.loads(path.read_text(encoding="utf-8"))
    return None if old is None or (folder / name).exists() else f"{name} is gone"


def fit_is_whole(folder: Path, old: bytes | None) -> str | None:
    state = folder / "fit.bin.fit"
    if state.exists():
        torch.load(state, weights_only=True)
    return model_is_whole(folder, old, "fit.bin")


def study_is_whole(folder: Path, old: bytes | None) -> str | None:
    out = folder / "search"
    json_is_whole(folder, None)
    for path in out.glob("optimal_*.nkat"):
        open_model_file(path).require_theta()
    journal = out / "study.journal"
    if not journal.exists():
        return None
    content = journal.read_bytes()
    said = content[: content.rfind(b"\n") + 1]
    told = {
        json.loads(line)["trial_id"] for line in said.splitlines() if b'"op_code":6' in line and b'"state":1' in line
    }
    copy = folder / "copy.journal"
    copy.write_bytes(content)
    with contextlib.redirect_stderr(io.StringIO()):
        storage = open_storage(str(copy))
        found = [t for s in storage.get_all_studies() for t in storage.get_all_trials(s._study_id, states=FINISHED)]
    for path in folder.glob("copy.journal*"):
        path.unlink()
    return None if len(found) == len(told) else f"{len(told)} trials were finished, {len(found)} are there"


def resume_search(folder: Path) -> str:
    """--resume where there is a study to go on with: whole lines of the journal that make one."""
    journal = folder / "search" / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    made = any(b'"op_code":0' in line and line.endswith(b"\n") for line in lines)
    return "--resume --force" if made else "--force"


def run_is_whole(folder: Path, old: bytes | None) -> str | None:
    for name, kind in (("last.pt", "run"), ("best.pt", "weights")):
        if (folder / "run" / name).exists():
            checkpoint.load(folder / "run" / name, kind)
    return json_is_whole(folder, None)


CONVERT = "--threads 1 --theta-rank"
MAKE = f"--input base.gguf --output out.nkat --force {CONVERT} 2"
CONVERTER = "nkat.convert.job"
WRITERS = {
    "convert": Writer(CONVERTER, MAKE, model_is_whole, "out.nkat"),
    "in place": Writer(
        CONVERTER, f"--input in_place.gguf --in-place --force {CONVERT} 2", base_is_intact, "in_place.gguf",
    ),
    "remove": Writer(CONVERTER, "--input in_place.gguf --in-place --remove", base_is_intact, "in_place.gguf"),
    "adapter": Writer(
        CONVERTER, "--input out.nkat --export-lora lora.gguf --force",
        lambda folder, old: GGUFFile.open(folder / "lora.gguf") and None, "lora.gguf",
    ),
    "fit": Writer(
        CONVERTER,
        f"--input base.gguf --output fit.bin --theta-only --theta-source fit --calibrate text.txt {CONVERT} 2 {FIT}",
        fit_is_whole, "fit.bin",
        lambda folder: "--resume" if (folder / "fit.bin.fit").exists() else "--force",
    ),
    "search": Writer(
        "nkat.search.main",
        "--model base.gguf --text text.txt --chunks 2 --threads 1 --mode custom --trials 3 --output-dir search",
        study_is_whole, "search/study.journal",
        resume_search,
    ),
    "image training": Writer(
        "nkat_vit.train", f"{IMAGES} --data-root data --output run --epochs 2 --save-steps 1 --threads 1",
        run_is_whole, "run/last.pt",
        lambda folder: "--resume" if (folder / "run" / "last.pt").exists() else "--force",
    ),
    "settings": Writer(
        "nkat.kobold.session",
        "--model base.gguf --kobold kobold --backend cpu --dry-run --save-config record.kcpps --force",
        lambda folder, old: json_is_whole(folder, old, "record.kcpps"), "record.kcpps",
    ),
    "record": Writer(
        CONVERTER, f"{MAKE} --json record.json", json_is_whole, "record.json",
    ),
}  # fmt: skip


def prepare(folder: Path) -> None:
    base = write_tiny_model(folder / "base.gguf", "llama", blocks=2, qtype=gguf.GGMLQuantizationType.Q8_0)
    (folder / "text.txt").write_text(default_text().content[:20000], encoding="utf-8")
    write_digits(folder / "data")
    install(folder / "kobold", NEW)
    shutil.copyfile(base, folder / "in_place.gguf")
    for outputs in ("--input base.gguf --output out.nkat", "--input in_place.gguf --in-place"):
        run(Writer(CONVERTER, f"{outputs} {CONVERT} 1", json_is_whole, ""), folder)
    (folder / "lora.gguf").write_bytes(base.read_bytes())  # older outputs, which must not be lost
    for name in ("record.json", "record.kcpps"):
        (folder / name).write_text("{}", encoding="utf-8")


@dataclass
class Ended:
    """status: as by a shell, negative for a signal;  said: on stderr;  touched: calls that touch files"""

    status: int
    said: str
    touched: int


def run(writer: Writer, folder: Path, more: str = "", kill_at: int = 0, room: int | None = None) -> Ended:
    """The command in a process of its own."""
    count = folder.parent / "count"
    count.write_text("0", encoding="utf-8")
    said, stderr = os.pipe()  # no file: that could be full
    pid = os.fork()
    if pid == 0:
        try:
            os.close(said)
            _child(writer, folder, more, kill_at, room, stderr, count)
        finally:
            os._exit(99)
    os.close(stderr)
    with open(said, encoding="utf-8", errors="replace") as stream:  # noqa: PTH123
        text = stream.read()
    _, status = os.waitpid(pid, 0)
    return Ended(os.waitstatus_to_exitcode(status), text, int(count.read_text(encoding="utf-8")))


def _child(writer: Writer, folder: Path, more: str, kill_at: int, room: int | None, stderr: int, count: Path) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number, handle in enumerate((nowhere, nowhere, stderr)):
        os.dup2(handle, number)
    os.chdir(folder)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = [writer.module, *writer.arguments.split(), *more.split()]
    touched = 0
    main = importlib.import_module(writer.module).main

    def watch(_: types.FrameType, event: str, function: Any) -> None:
        nonlocal touched
        if event != "c_call" or function.__name__ not in _TOUCHES:
            return
        owner = getattr(function, "__self__", None)
        if not isinstance(owner, _FILES) and getattr(owner, "__name__", "") not in ("posix", "io", "_io"):
            return
        touched += 1
        if touched == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if room is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    status: Any = 0
    sys.setprofile(watch)
    try:
        commandline.run(main)
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException as error:
        import traceback

        sys.setprofile(None)
        traceback.print_exception(error)
        status = 1
    sys.setprofile(None)
    sys.stderr.flush()
    if room is None:
        count.write_text(str(touched), encoding="utf-8")
    os._exit(status if isinstance(status, int) else 1)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.tmp") if ".nkat-" in path.name]


def wrong(writer: Writer, folder: Path, old: bytes | None) -> str | None:
    try:
        return writer.check(folder, old)
    except (NKATError, ValueError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def try_case(name: str, pristine: Path, scratch: Path, kill_at: int, room: int | None) -> tuple[str, list[str]]:
    """What became of the case, and what is wrong with it."""
    writer, folder = WRITERS[name], scratch / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, folder)
    target = folder / writer.target
    old = target.read_bytes() if target.exists() else None
    ended = run(writer, folder, kill_at=kill_at, room=room)
    faults = []
    if problem := wrong(writer, folder, old):
        faults.append(f"is not whole: {problem}")
    if room is not None:
        if ended.status not in (0, 2):
            faults.append(f"status {ended.status}: {ended.said[-300:]}")
        if "Traceback" in ended.said:
            faults.append(f"a traceback: {ended.said[-300:]}")
        if ended.status == 2 and ended.said.count("error: ") != 1:
            faults.append(f"not one line: {ended.said[-300:]}")
        if leftovers(folder):
            faults.append(f"remains: {leftovers(folder)}")
        outcome = "refused" if ended.status == 2 else "enough"
    else:
        outcome = "killed" if ended.status == -signal.SIGKILL else "ended"
    left = leftovers(folder)
    again = run(writer, folder, writer.again(folder))
    if again.status != 0 and "has no Θ to remove" not in again.said:
        faults.append(f"given again: status {again.status}: {again.said[-300:]}")
    elif problem := wrong(writer, folder, None):
        faults.append(f"given again, is not whole: {problem}")
    if remains := leftovers(folder):
        faults.append(f"given again, remains: {remains}")
    elif left and "note: removed" not in again.said:
        faults.append("remains were removed without a word")
    return outcome, [f"{name}, {f'call {kill_at}' if room is None else f'{room} bytes'}: {fault}" for fault in faults]


def attack_writers(
    kills: int, full: int, names: Sequence[str], tell: Callable[[str], object] = print
) -> dict[str, Any]:
    """Counts by writer: calls that touch files, kills, disks that were full, faults."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for module in [*LATE, *(writer.module for writer in WRITERS.values())]:
        importlib.import_module(module)
    chance, record = random.Random(0), {}
    with tempfile.TemporaryDirectory(prefix="nkat-writers-") as name:
        scratch = Path(name)
        os.environ |= {"NKAT_CACHE": f"{name}/cache", "HOME": name}
        pristine = scratch / "pristine"
        pristine.mkdir()
        prepare(pristine)
        for name in names:
            for _ in range(2):  # the first also puts compiled kernels into the cache, which the cases will find there
                shutil.rmtree(scratch / "whole", ignore_errors=True)
                shutil.copytree(pristine, scratch / "whole")
                whole = run(WRITERS[name], scratch / "whole")
                if whole.status != 0:
                    raise RuntimeError(f"{name}: {whole.said}")
            size = (scratch / "whole" / WRITERS[name].target).stat().st_size
            shutil.rmtree(scratch / "whole")
            points = sorted(chance.sample(range(1, whole.touched + 1), min(kills, whole.touched)))
            rooms = sorted({0, 1, size - 1, *(chance.randrange(size) for _ in range(full))})[:full] if full else []
            counts = {"calls": whole.touched, **dict.fromkeys(("killed", "ended", "refused", "enough", "faults"), 0)}
            for kill_at, room in [(point, None) for point in points] + [(0, room) for room in rooms]:
                outcome, faults = try_case(name, pristine, scratch, kill_at, room)
                counts[outcome] += 1
                counts["faults"] += len(faults)
                for fault in faults:
                    print(fault, flush=True)
            record[name] = counts
            print(f"{name}: {counts}", file=sys.stderr, flush=True)
    return record


if __name__ == "__main__":
    print(json.dumps(attack_writers(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or list(WRITERS))))
