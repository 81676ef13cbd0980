"""Hostile model files: how many are read, refused in one line, or end otherwise. The last line is JSON.

    python -m benchmarks.attack --count 100000
    python -m benchmarks.attack --writers 50       every command that writes, killed and out of disk 50 times each

The cases are those of `tests.attack`: the same number is the same file. Ends with status 1 when one was not handled.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, so that Ctrl-C in them is no traceback
    from nkat.host.start import start

    start("benchmarks.attack")

import os
import subprocess
import sys
from time import perf_counter

from nkat.host import commandline
from nkat.host.console import bar, say
from nkat.host.record import print_record
from nkat.host.tables import Column, Table, show
from tests.attack.run import OUTCOMES, attack


def main() -> None:
    parser = commandline.parser(
        __doc__.splitlines()[0],
        "  python -m benchmarks.attack --count 100000\n  python -m benchmarks.attack --writers 50",
    )
    parser.add_argument("--count", type=commandline.positive_int, default=10_000, metavar="N")
    parser.add_argument("--first", type=commandline.non_negative_int, default=0, metavar="N", help="first case")
    parser.add_argument("--processes", type=commandline.positive_int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--writers", type=commandline.positive_int, metavar="N", help="kills and full disks instead")
    commandline.add_output_format(parser)
    options = parser.parse_args()
    if options.writers:
        command = [sys.executable, "-m", "tests.attack.writers", str(options.writers), str(options.writers)]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="")
        sys.exit(done.returncode or len(done.stdout.splitlines()) > 1)
    started = perf_counter()
    with bar(options.count, "attack", "case") as progress:
        result = attack(options.count, first=options.first, processes=options.processes, on_case=progress.update)
    for fault in result.faults:
        say(fault)
    rows = [{"outcome": kind, "cases": result.counts[kind]} for kind in OUTCOMES]
    show(Table("attack", [Column("outcome", "outcome"), Column("cases", "cases", ",")], rows))
    seconds = perf_counter() - started
    print_record({"count": options.count, "first": options.first, "seconds": seconds, **result.record()})
    if not result.clean:
        sys.exit(1)
