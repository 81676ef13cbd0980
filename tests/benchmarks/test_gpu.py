"""The benchmark of a GPU where there is none: its refusal, its parts' failures, its page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_figures import Figure, keeper, kept, measured, number, page, problems
from nkat.host.record import parse_json
from tests.conftest import ROOT

KEEPS = "from pathlib import Path; import sys; from benchmarks.gpu_figures import *; "
KEEPS += "keeper(Path(sys.argv[1]))(measured('speed', [1.0, 3.0, 2.0], 'GB/s', at_least=1.5)); "
MACHINE = {
    "device_name": "H100", "capability": "9.0", "memory_bytes": 80 * 10**9, "driver": "580.1", "cuda": "13.0",
    "torch": "2.11.0", "triton": "3.6.0", "python": "3.12.3", "os": "Linux 6", "processor": "Xeon", "cores": 16,
}  # fmt: skip


def a_record(**parts: Any) -> dict[str, Any]:
    return {"machine": MACHINE, "date": "2026-11-26", "seconds": 12.0, "git_commit": "abc", "parts": parts}


def a_part(*figures: Figure, errors: tuple[str, ...] = ()) -> dict[str, Any]:
    from dataclasses import asdict

    return {"command": "x", "seconds": 3.0, "figures": [asdict(f) for f in figures], "errors": list(errors)}


def test_without_a_gpu_it_is_one_line_and_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--output", str(tmp_path / "page.md")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_targets_are_met_by_the_median_and_never_by_nan():
    assert measured("a", [1.0, 3.0, 9.0], "%", at_most=3.0).met is True
    assert measured("a", [1.0, 3.1, 9.0], "%", at_most=3.0).met is False
    assert measured("a", [2.9], "GB/s", at_least=3.0).met is False
    assert measured("a", [float("nan")], "", at_most=1.0) == Figure("a", None, "", 1, target="at most 1", met=False)
    assert measured("a", [1.0], "s").met is None
    assert [number(v) for v in (0.0, 0.01234567, 1.5e-7, 1234.5, 2e6)] == [
        "0",
        "0.01235",
        "1.50e-07",
        "1234",
        "2.00e+06",
    ]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (KEEPS, None),
        (KEEPS + "raise SystemExit('error: the card is on fire')", "error: the card is on fire"),
        (KEEPS + "import os; os._exit(3)", "ended with status 3 and said nothing"),
        (KEEPS + "import time; time.sleep(60)", "not done after"),
    ],
)
def test_what_a_part_had_kept_outlives_its_failure(code, error, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    part = gpu.Part("a part", "", 30, ("one",))
    found = gpu.run_part("p", part, lambda unit, into: [sys.executable, "-c", code, str(into)], 12 if error else 30)
    assert [f["value"] for f in found["figures"]] == [2.0]
    if error is None:
        assert found["errors"] == []
    else:
        assert found["errors"][0].startswith(f"one: {error}")


def test_after_a_failure_the_other_parts_run_and_all_is_saved_at_once(monkeypatch):
    parts = {name: gpu.Part(name, "", 10) for name in ("first", "second", "third")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    ran = []

    def run_part(name, part, command, seconds):
        ran.append(name)
        return a_part(errors=("it broke",) if name == "first" else ())

    monkeypatch.setattr(gpu, "run_part", run_part)
    saved: list[str] = []
    gpu.run_parts(["first", "second"], lambda *_: [], 100.0, lambda name, record: saved.append(name))
    assert ran == saved == ["first", "second"]
    late: dict[str, Any] = {}
    gpu.run_parts(["third"], lambda *_: [], 4.0, lambda name, record: late.update(record))
    assert late["errors"] == ["not begun: the limit of 4 s is reached"]


def test_the_page_says_what_failed_what_was_missed_and_what_was_not_run():
    slow = measured("share", [50.0, 55.0, 58.0], "%", at_least=60.0)
    good = measured("Σ|w|", [1e-7], "", at_most=1e-6)
    record = a_record(kernels=a_part(good), decode=a_part(slow, errors=("CUDA error: a | line",)))
    text = " ".join(page(record, {"kernels": "Kernels", "decode": "Decoding", "fit": "A fit"}).split())
    assert "H100 (compute capability 9.0, 80.0 GB), driver 580.1, CUDA 13.0, torch 2.11.0, Triton 3.6.0" in text
    assert "| share | 55 % | 50 to 58 | 3 | at least 60 % | MISSED |" in text
    assert "| Σ\\|w\\| | 1.00e-07 | | 1 | at most 1.00e-06 | met |" in text
    assert "**Failed**: CUDA error: a | line" in text
    assert "Not run (`--only fit`)." in text
    assert problems(record) == ["decode: failed: CUDA error: a | line", "decode: share: 55 % is not at least 60 %"]
    assert "every target was met" not in text
    assert "every target was met" in page(a_record(kernels=a_part(good)), {"kernels": "Kernels"})


def test_the_page_has_one_line_for_many_cases_and_the_missed_ones_by_name():
    names = ["Q4_0 300x768", "Q4_0 4096x4096", "Q8_0 300x768", "Q8_0 4096x4096"]
    cases = [
        measured(f"{name}, rows", [value], "", at_most=2.0) for name, value in zip(names, (0, 1, 2, 3), strict=True)
    ]
    single = measured("a speed, all in all", [1.0, 2.0], "s")
    record = a_record(kernels=a_part(*cases, single))
    text = " ".join(page(record, {"kernels": "Kernels"}).split())
    assert "| 4 cases: rows (1 of 4 missed) | 1.5 | 0 to 3 | 4 | at most 2 | MISSED |" in text
    assert "- kernels: Q8_0 4096x4096, rows: 3 is not at most 2" in text
    assert "| a speed, all in all | 1.5 s |" in text
    assert "4 cases" not in page(a_record(kernels=a_part(*cases[:3], single)), {"kernels": "Kernels"})


def test_figures_of_another_machine_are_not_kept(tmp_path, capsys):
    path = tmp_path / "cuda.json"
    assert gpu.earlier_parts(path, MACHINE) == {}
    from nkat.host.record import write_json

    write_json(a_record(kernels=a_part(), gone=a_part()), str(path))
    assert list(gpu.earlier_parts(path, MACHINE)) == ["kernels"]
    assert gpu.earlier_parts(path, {**MACHINE, "driver": "590"}) == {}
    assert "of another driver (580.1)" in capsys.readouterr().err
    path.write_text("[]")
    assert gpu.earlier_parts(path, MACHINE) == {}


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path: Path = tmp_path / "kept.jsonl"
    assert kept(path) == []
    keeper(path)(Figure("a", 1.0, "s"))
    with path.open("a") as file:
        file.write('{"name": "b", "val')
    assert [figure["name"] for figure in kept(path)] == ["a"]
    assert parse_json(path.read_text().splitlines()[0])["value"] == 1.0
