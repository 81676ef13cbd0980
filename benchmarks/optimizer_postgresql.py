"""Four workers on one study in a real PostgreSQL, two of them killed: the suite's own test, on a server made for it.

    python -m benchmarks.optimizer_postgresql             with PostgreSQL installed (Debian: apt-get install postgresql)
    python -m benchmarks.optimizer_postgresql --install   installs that Debian package first (as root)

Needs a driver: pip install psycopg2-binary. The server listens on a socket in a temporary folder and is gone
afterwards. Also counts finished trials per second there and in a journal file. The last line of stdout is JSON.
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
from pathlib import Path
from time import perf_counter

import optuna

from nkat.errors import NKATError
from nkat.host import commandline
from nkat.host.record import write_json
from nkat.study.study import open_storage

ROOT = Path(__file__).resolve().parent.parent
TRIALS = 40


def binaries(install: bool) -> Path:
    """The folder with initdb and pg_ctl. Raises NKATError when there is none."""
    if install:
        subprocess.run(["apt-get", "install", "-y", "-qq", "postgresql"], check=True, stdout=subprocess.DEVNULL)
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        raise NKATError("PostgreSQL is not installed; give --install, or run: apt-get install postgresql")
    return found[-1].parent


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """A fresh server; gives its URL. As root it runs as the package's user, because PostgreSQL refuses root."""
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="nkat-pg-") as scratch:
        if user:
            shutil.chown(scratch, "postgres")
        data = f"{scratch}/data"
        quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": scratch}
        subprocess.run([*user, str(folder / "initdb"), "-D", data, "-U", "nkat", "-A", "trust"], **quiet)
        options = f"-k {scratch} -c listen_addresses="
        subprocess.run([*user, str(folder / "pg_ctl"), "-D", data, "-w", "-o", options, "start"], **quiet)
        try:
            yield f"postgresql+psycopg2://nkat@/postgres?host={scratch}"
        finally:
            subprocess.run([*user, str(folder / "pg_ctl"), "-D", data, "-m", "immediate", "stop"], **quiet)


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
    with server(folder) as url, tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "NKAT_TEST_POSTGRESQL": url}
        command = [sys.executable, "-m", "pytest", "-rs", "tests/test_study.py", "-k", "postgresql"]
        started = perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        seconds = perf_counter() - started
        passed = done.returncode == 0 and "1 passed" in done.stdout
        print(done.stdout if not passed else f"four workers, two killed: no finished trial lost ({seconds:.1f} s)")
        speed = {"postgresql": trials_per_second(url), "journal": trials_per_second(f"{scratch}/speed.journal")}
    version = subprocess.run([str(folder / "postgres"), "--version"], capture_output=True, text=True, check=True).stdout
    ratio = speed["journal"] / speed["postgresql"]
    print(
        f"trials a second: {speed['postgresql']:.0f} in PostgreSQL, {speed['journal']:.0f} in a journal: {ratio:.1f}x"
    )
    write_json({"passed": passed, "version": version.strip(), "trials_per_second": speed, "ratio": ratio}, "-")
    if not passed:
        raise NKATError("the test did not pass")
