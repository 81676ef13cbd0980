"""A study in a real PostgreSQL whose workers, and then the server itself, are killed.

    python -m benchmarks.optimizer_postgresql             with PostgreSQL installed (Debian: apt-get install postgresql)
    python -m benchmarks.optimizer_postgresql --install   installs that Debian package first (as root)

Needs a driver: pip install psycopg2-binary. The server listens on a socket in a temporary folder and is gone
afterwards. The suite's own test of four workers of which two are killed runs on it; then a search of a tiny model by
the command line, with two workers, loses its server in the middle, ends, and is resumed on the server started again.
Also counts finished trials per second there and in a journal file. The last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.optimizer_postgresql")

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, sleep

import optuna
import psutil

from nkat.errors import NKATError
from nkat.host import commandline
from nkat.host.record import write_json
from nkat.measure.texts import default_text
from nkat.study.study import FINISHED, open_storage
from tests.support.tiny_models import write_tiny_model

ROOT = Path(__file__).resolve().parent.parent
TRIALS = 40
SEARCH_TRIALS = 24


def binaries(install: bool) -> Path:
    """The folder with initdb and pg_ctl. Raises NKATError when there is none."""
    if install:
        subprocess.run(["apt-get", "install", "-y", "-qq", "postgresql"], check=True, stdout=subprocess.DEVNULL)
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        raise NKATError("PostgreSQL is not installed; give --install, or run: apt-get install postgresql")
    return found[-1].parent


class Server:
    """A PostgreSQL of its own in a folder. As root it runs as the package's user, because PostgreSQL refuses root."""

    def __init__(self, binaries: Path, scratch: Path) -> None:
        self.binaries, self.scratch = binaries, scratch
        self.url = f"postgresql+psycopg2://nkat@/postgres?host={scratch}"
        self._user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self._user:
            shutil.chown(scratch, "postgres")
        self._run("initdb", "-U", "nkat", "-A", "trust")

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._user, str(self.binaries / program), "-D", f"{self.scratch}/data", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self.scratch)

    def start(self) -> None:
        self._run("pg_ctl", "-w", "-o", f"-k {self.scratch} -c listen_addresses=", "-l", f"{self.scratch}/log", "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-m", "immediate", "stop")

    def kill(self) -> None:
        """SIGKILL to the server and all its processes, at once."""
        main = psutil.Process(int((self.scratch / "data" / "postmaster.pid").read_text().split()[0]))
        family = [main, *main.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=30)


@contextlib.contextmanager
def server(binaries: Path) -> Iterator[Server]:
    """A fresh one that runs, and is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="nkat-pg-") as scratch:
        made = Server(binaries, Path(scratch))
        made.start()
        try:
            yield made
        finally:
            made.stop()


@dataclass(frozen=True)
class Killed:
    """What became of a search whose server was killed: finished trials before and at the end, what it said."""

    before: int
    kept: int
    after: int
    said: list[str]
    one_line: bool

    @property
    def passed(self) -> bool:
        return self.one_line and self.kept == self.before > 0 and self.after >= SEARCH_TRIALS


def kill_in_the_middle(running: Server, folder: Path) -> Killed:
    """Two workers' search; the server is killed after some trials, and started again for --resume."""
    model = write_tiny_model(folder / "tiny.gguf", "llama")
    text = folder / "text.txt"
    text.write_text(default_text().content[:20000], encoding="utf-8")
    out = folder / "out"
    command = [
        sys.executable,
        "nkat_auto_optimizer.py",
        "--model",
        model,
        "--text",
        text,
        "--chunks",
        2,
        "--threads",
        1,
    ]
    command += ["--mode", "custom", "--trials", SEARCH_TRIALS, "--workers", 2, "--output-dir", out]
    words = [str(word) for word in [*command, "--storage", running.url, "--study-name", "killed"]]

    def finished() -> dict[int, float | None]:
        with contextlib.suppress(KeyError):
            study = optuna.load_study(study_name="killed", storage=open_storage(running.url))
            return {trial.number: trial.value for trial in study.get_trials(states=FINISHED)}
        return {}

    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, stdin=subprocess.DEVNULL) as search:
        while len(finished()) < SEARCH_TRIALS // 3 and search.poll() is None:
            sleep(0.1)
        before = finished()
        running.kill()
        _, errors = search.communicate(timeout=300)
    log = out / "worker-1.log"
    logged = log.read_text(encoding="utf-8") if log.exists() else ""
    lines = (errors + logged).replace("\r", "\n").splitlines()  # of progress bars too
    said = [line for line in lines if "error: " in line or "warning: " in line or "Traceback" in line]
    one_line = search.returncode == 2 and "Traceback" not in errors + logged and len(said) >= 1
    running.start()
    again = subprocess.run([*words, "--resume"], cwd=ROOT, capture_output=True, text=True, check=False)
    if again.returncode != 0:
        print(again.stderr)
    after = finished()
    kept = sum(number in after and after[number] == value for number, value in before.items())
    return Killed(len(before), kept, len(after), said, one_line)


def trials_per_second(where: str) -> float:
    """Finished trials a second of one worker whose objective costs nothing."""
    study = optuna.create_study(
        storage=open_storage(where), study_name="speed", sampler=optuna.samplers.RandomSampler()
    )
    started = perf_counter()
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=TRIALS)
    return TRIALS / (perf_counter() - started)


def main() -> None:
    parser = commandline.parser(__doc__.splitlines()[0], "  python -m benchmarks.optimizer_postgresql --install")
    parser.add_argument("--install", action="store_true", help="install Debian's postgresql first")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = binaries(options.install)
    with server(folder) as running, tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "NKAT_TEST_POSTGRESQL": running.url}
        command = [sys.executable, "-m", "pytest", "-rs", "tests/study/test_study.py", "-k", "postgresql"]
        started = perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        seconds = perf_counter() - started
        passed = done.returncode == 0 and "1 passed" in done.stdout
        print(done.stdout if not passed else f"four workers, two killed: no finished trial lost ({seconds:.1f} s)")
        killed = kill_in_the_middle(running, Path(scratch))
        print(
            f"server killed after {killed.before} finished trials: {killed.kept} of them are there after --resume, "
            f"{killed.after} in all"
        )
        print("\n".join(killed.said))
        speed = {"postgresql": trials_per_second(running.url), "journal": trials_per_second(f"{scratch}/speed.journal")}
    version = subprocess.run([str(folder / "postgres"), "--version"], capture_output=True, text=True, check=True).stdout
    ratio = speed["journal"] / speed["postgresql"]
    print(
        f"trials a second: {speed['postgresql']:.0f} in PostgreSQL, {speed['journal']:.0f} in a journal: {ratio:.1f}x"
    )
    passed = passed and killed.passed
    record = asdict(killed)
    write_json(
        {
            "passed": passed,
            "server_killed": record,
            "version": version.strip(),
            "trials_per_second": speed,
            "ratio": ratio,
        },
        "-",
    )
    if not passed:
        raise NKATError("the test did not pass")
