"""Divergences and task scores against llama-perplexity's: figures that it printed once, and the program where given."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nkat.lm.load import LoadedModel, load_model
from nkat.measure.base_file import open_base_file
from nkat.measure.compare import save_base
from nkat.measure.judge import Judge, text_passages
from nkat.measure.task_scores import Solved, solve
from nkat.measure.tasks import READERS
from nkat.measure.texts import Text
from tests.support.task_files import choices, write_hellaswag, write_multiple_choice, write_winogrande
from tests.support.tiny_models import write_tiny_model

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "judging.json").read_text(encoding="utf-8"))
CONTENT = "\n".join(f"{c} {' '.join(e)}" for c, e, _ in choices(60, seed=2)) + "\n"
TEXT = Text("sample", CONTENT, "e" * 64)
WRITERS = {"hellaswag": write_hellaswag, "winogrande": write_winogrande, "multiple_choice": write_multiple_choice}
TIE = 1e-3  # endings that are nearer than this may change places on another processor


def models(folder: Path, arch: str) -> tuple[LoadedModel, LoadedModel]:
    """A base, and the same weights that turn a little otherwise."""
    base = write_tiny_model(folder / f"{arch}_a.gguf", arch, 0)
    return load_model(base), load_model(write_tiny_model(folder / f"{arch}_b.gguf", arch, 0, freq_base=9000.0))


def kept_base(folder: Path, base: LoadedModel, golden: dict[str, Any]) -> Path:
    passages = text_passages(base, TEXT, golden["chunks"], golden["context"])
    path = folder / "base.kld"
    save_base(path, base.model, passages.chunks, batch=4)
    return path


@pytest.mark.isa
@pytest.mark.parametrize("arch", GOLDEN)
def test_divergences(tmp_path: Path, arch: str) -> None:
    """To the digits that were printed: the same base file, the same statistics of it."""
    golden = GOLDEN[arch]
    base, own = models(tmp_path, arch)
    stored = open_base_file(kept_base(tmp_path, base, golden))
    judge = Judge(own, text_passages(own, TEXT, golden["chunks"], golden["context"]))
    reference, (found,) = judge.beside(stored)
    assert [found.perplexity.ppl, found.perplexity.stderr] == pytest.approx(golden["ppl"], rel=1e-3)
    assert [reference.ppl, reference.stderr] == pytest.approx(golden["ppl_base"], rel=1e-3)
    assert [found.change.log_ratio, found.change.log_ratio_stderr] == pytest.approx(golden["log_ratio"], abs=3e-4)
    record = found.divergence.record()
    kl, change = record["kl"], record["delta_p_percent"]
    expected = golden["kl"]
    assert [kl["mean"], kl["stderr"]] == pytest.approx(expected["mean"], rel=1e-3)
    names = {"Maximum": kl["max"], "Minimum": kl["min"], "Median": kl["quantiles"]["50"]}
    names |= {name: kl["quantiles"][f"{float(name):g}"] for name in ("99.9", "99.0", "95.0", "90.0", "10.0")}
    for name, value in names.items():
        assert value == pytest.approx(expected[name], rel=3e-3, abs=1e-5), name
    moved = golden["delta_p"]
    assert [change["mean"], change["stderr"]] == pytest.approx(moved["mean"], abs=2e-3)
    assert [change["rms"], change["rms_stderr"]] == pytest.approx(moved["rms"], abs=2e-3)
    names = {"Maximum": change["max"], "Minimum": change["min"], "Median": change["quantiles"]["50"]}
    names |= {n: change["quantiles"][f"{float(n):g}"] for n in ("99.0", "95.0", "90.0", "75.0", "25.0", "10.0", "1.0")}
    for name, value in names.items():
        assert value == pytest.approx(moved[name], abs=1e-3, rel=3e-3), name
    agreement = [record["same_top_percent"], record["same_top_percent_stderr"]]
    assert agreement == pytest.approx(golden["same_top"], abs=0.6)  # a token of 186 may tip over


def decisions(solved: Solved) -> str:
    """Which tasks were solved; "?" where two endings are too near to tell."""
    marks = []
    for right, means in zip(solved.right.tolist(), solved.means, strict=True):
        best = sorted((m for m in means if not math.isnan(m)), reverse=True)
        marks.append("?" if len(best) > 1 and best[0] - best[1] < TIE else str(int(right)))
    return "".join(marks)


def agree(found: str, expected: str) -> bool:
    pairs = zip(found, expected, strict=True)
    return found.count("?") < len(found) // 4 and all(a in ("?", b) for a, b in pairs)


@pytest.mark.isa
@pytest.mark.parametrize("arch", GOLDEN)
def test_tasks(tmp_path: Path, arch: str) -> None:
    """The tasks that are drawn, in the order in which they are, and each one's outcome."""
    loaded, golden = models(tmp_path, arch)[0], GOLDEN[arch]

    def solved(kind: str, most: int) -> Solved:
        return solve(loaded, READERS[kind](WRITERS[kind](tmp_path / kind), most), arms=1)[0]

    assert agree(decisions(solved("hellaswag", 20)), golden["hellaswag"])
    assert agree(decisions(solved("multiple_choice", 0)), golden["multiple_choice"])
    assert agree(decisions(solved("multiple_choice", 10)), golden["multiple_choice_10"])
    assert not agree(decisions(solved("multiple_choice", 0))[::-1], golden["multiple_choice"])
    for most, name in ((0, "winogrande"), (8, "winogrande_8")):
        for found, (first, second, _) in zip(solved("winogrande", most).means, golden[name], strict=True):
            expected = [math.nan if mean is None else mean for mean in (first, second)]
            assert found == pytest.approx(expected, abs=5e-4, nan_ok=True)


def test_the_program_itself(tmp_path: Path) -> None:
    """Both ways: it reads the base file that we wrote, and we the one that it wrote."""
    program = os.environ.get("LLAMA_PERPLEXITY")
    if program is None:
        pytest.skip("LLAMA_PERPLEXITY does not name llama.cpp's llama-perplexity")
    golden = GOLDEN["llama"]
    base, own = models(tmp_path, "llama")
    ours, theirs, text = kept_base(tmp_path, base, golden), tmp_path / "theirs.kld", tmp_path / "text.txt"
    text.write_text(CONTENT, encoding="utf-8")
    size = ["-c", str(golden["context"]), "-b", str(golden["context"]), "-t", "1"]
    exact = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]

    def run(*arguments: object) -> str:
        command = [program, *map(str, arguments), *size, *exact]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
        return done.stdout

    run("-m", base.file.path, "-f", text, "--chunks", golden["chunks"], "--kl-divergence-base", theirs)
    assert theirs.stat().st_size == ours.stat().st_size
    assert theirs.read_bytes()[:20] == ours.read_bytes()[:20]
    judge = Judge(own, text_passages(own, TEXT, golden["chunks"], golden["context"]))
    by_ours, by_theirs = (judge.beside(open_base_file(path))[1][0].divergence.mean for path in (ours, theirs))
    assert by_ours == pytest.approx(by_theirs, rel=1e-3)
    for _ in range(20):  # its last lines are lost now and then when it ends
        said = run("-m", own.file.path, "--kl-divergence-base", ours, "--kl-divergence")
        if printed := re.search(r"Mean +KLD: +([\d.]+)", said):
            break
    assert printed is not None
    assert float(printed[1]) == pytest.approx(by_ours, rel=0.01)
