"""What the converter takes from other programs and gives them: importance matrices and PEFT's adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from nkat.gguf.imatrix import Imatrix, imatrix_parts, read_imatrix
from nkat.gguf.writer import write_gguf
from nkat.lm.adapters import open_adapter
from nkat.lm.peft import CONFIG, WEIGHTS
from nkat.theta.modelfile import open_model_file
from tests.convert.test_job import CONVERTER, convert, sha256
from tests.gguf.test_imatrix import EXCHANGE
from tests.support.tiny_models import write_tiny_model

TEXT = EXCHANGE / "text.txt"
NAMES = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    q4 = gguf.GGMLQuantizationType.Q4_0
    return write_tiny_model(tmp_path / "base.gguf", "llama", blocks=2, context=64, qtype=q4)


@pytest.fixture
def better(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "better.gguf", "llama", blocks=2, context=64)


@pytest.mark.isa
def test_an_importance_matrix_is_written_in_both_forms(script, fails, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model.gguf", "llama", context=64)
    arguments = ("--input", model, "--calibrate", TEXT, "--imatrix-chunks", 4)
    for form in ("gguf", "dat"):
        out = tmp_path / f"m.{form}"
        record = convert(script, *arguments, "--save-imatrix", out)["imatrix"]
        assert (record["form"], record["chunks"], record["context"], record["entries"]) == (form, 4, 64, 21)
        assert record["bytes"] == out.stat().st_size
        truth, found = read_imatrix(EXCHANGE / f"llama.imatrix.{form}"), read_imatrix(out)
        assert (found.chunks, found.datasets) == (truth.chunks, truth.datasets)
        for name, entry in truth.entries.items():
            np.testing.assert_allclose(found.entries[name].means, entry.means, atol=1e-4 * entry.means.max())
        assert "exists already" in fails(CONVERTER, *arguments, "--save-imatrix", out)
    assert not (tmp_path / "model.nkat").exists()


@pytest.mark.isa
def test_a_residual_by_an_importance_matrix(script, fails, tmp_path: Path, base: Path, better: Path) -> None:
    """Weighted by a file it is the very Θ that its numbers ask for, and the file may be of either form."""
    source = ("--theta-source", "residual", "--reference", better, "--theta-rank", 2, "--selective-layers", *NAMES)
    written = []
    for form in ("gguf", "dat"):
        imatrix, out = tmp_path / f"m.{form}", tmp_path / f"{form}.nkat"
        convert(script, "--input", base, "--calibrate", TEXT, "--save-imatrix", imatrix, "--imatrix-chunks", 3)
        record = convert(script, "--input", base, "--output", out, *source, "--imatrix", imatrix)
        assert record["residual"]["moments"] == "diagonal"
        assert record["metadata"]["nkat.imatrix.sha256"] == sha256(imatrix)
        assert 0 < record["residual"]["all"]["theta_left"] < 1
        written.append(open_model_file(out).theta)
    convert(script, "--input", base, "--output", tmp_path / "plain.nkat", *source)
    plain = open_model_file(tmp_path / "plain.nkat").theta
    for name in NAMES:
        one, other, unweighted = (found.layers[name] for found in (*written, plain))
        assert (one.p - other.p).abs().max() <= 1  # the old form rounds its means once more
        assert (one.p.int() - unweighted.p.int()).abs().max() > 3  # control: it matters
    both = ("--imatrix", imatrix, "--calibrate", TEXT)
    assert "give one of them" in fails(CONVERTER, "--input", base, "--output", tmp_path / "x", *source, *both)
    part = read_imatrix(tmp_path / "m.gguf")
    entries = {name: entry for name, entry in part.entries.items() if name != NAMES[0]}
    write_gguf(imatrix, imatrix_parts(Imatrix(entries, ("x",), 3, 64)), force=True)
    message = fails(CONVERTER, "--input", base, "--output", tmp_path / "x", *source, "--imatrix", imatrix)
    assert f"has no entry for {NAMES[0]}" in message


def test_a_repair_begins_by_an_importance_matrix(script, tmp_path: Path, base: Path, better: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text(TEXT.read_text(encoding="utf-8") * 40, encoding="utf-8")
    imatrix = tmp_path / "m.gguf"
    convert(script, "--input", base, "--calibrate", text, "--save-imatrix", imatrix, "--imatrix-chunks", 3)
    common = ("--input", base, "--reference", better, "--calibrate", text, "--repair-steps", 2, "--fit-batch", 1)
    found = convert(script, *common, "--repair", tmp_path / "r.gguf", "--imatrix", imatrix)["repair"]
    assert found["imatrix_sha256"] == sha256(imatrix)
    assert found["start"] == "closed form"
    without = convert(script, *common, "--repair", tmp_path / "s.gguf")["repair"]
    assert "imatrix_sha256" not in without
    assert found["history"][0] != without["history"][0]  # control: it begins elsewhere


def test_theta_as_a_peft_adapter(script, fails, tmp_path: Path, base: Path) -> None:
    out, peft = tmp_path / "m.nkat", tmp_path / "peft"
    record = convert(script, "--input", base, "--output", out, "--theta-rank", 2, "--export-peft", peft)
    assert sorted(path.name for path in peft.iterdir()) == [CONFIG, WEIGHTS]
    assert record["peft_bytes"] == sum(path.stat().st_size for path in peft.iterdir())
    again = convert(script, "--input", out, "--export-peft", tmp_path / "again", "--export-lora", tmp_path / "l.gguf")
    assert (peft / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()
    assert again["peft"] == str(tmp_path / "again")
    assert "exists already" in fails(CONVERTER, "--input", out, "--export-peft", peft)
    model = open_model_file(base)
    stronger = convert(script, "--input", out, "--export-peft", peft, "--theta-gamma", 0.5, "--force")
    assert stronger["gamma"] == 0.5
    weak, strong = (open_adapter(path, model).terms[NAMES[0]].product() for path in (tmp_path / "again", peft))
    np.testing.assert_allclose(strong.numpy(), weak.numpy() * 0.125 / (0.5 * 0.97 * 0.03), rtol=1e-4, atol=1e-8)
    convert(script, "--input", base, "--output", tmp_path / "d.nkat", "--export-peft", tmp_path / "dry", "--dry-run")
    assert not (tmp_path / "dry").exists()


def test_without_the_package_peft_says_which(
    fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    out = tmp_path / "x.nkat"
    message = fails(CONVERTER, "--input", base, "--output", out, "--export-peft", tmp_path / "p")
    assert "pip install safetensors" in message
    assert not out.exists()


def test_a_fit_begins_at_a_lora(script, fails, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", "llama", blocks=2, context=64)
    text = tmp_path / "long.txt"
    text.write_text(TEXT.read_text(encoding="utf-8") * 60, encoding="utf-8")
    adapter = shutil.copytree(EXCHANGE / "peft_llama", tmp_path / "adapter")
    settings = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**settings, "lora_alpha": 0.01, "alpha_pattern": {}}))  # a weak one
    fit = ("--theta-source", "fit", "--calibrate", text, "--fit-steps", 16, "--no-guard", "--fit-context", 32)
    out = tmp_path / "fitted.nkat"
    record = convert(script, "--input", base, "--output", out, *fit, "--start-from", adapter)
    began = record["fit"]["start_from"]
    assert record["fit"]["start"] == "lora"
    assert (began["kind"], began["rank"], began["layers"]) == ("peft", 3, 14)
    assert 0.3 < began["errors"]["all"] < 1.0  # Θ has no place for what is symmetric
    assert began["errors"]["layers"].keys() == open_model_file(out).theta.layers.keys()
    assert record["metadata"]["nkat.start_from.sha256"] == sha256(adapter / WEIGHTS)
    assert "in place of --fit-start" in fails(
        CONVERTER, "--input", base, "--output", tmp_path / "x", *fit, "--start-from", adapter, "--fit-start", "zero"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--save-imatrix", "m.gguf"), "--save-imatrix needs --calibrate"),
        (("--output", "x", "--imatrix-chunks", 3), "--imatrix-chunks is for --save-imatrix"),
        (("--output", "x", "--imatrix", "m.gguf"), "--imatrix is for --theta-source residual"),
        (("--output", "x", "--start-from", "adapter"), "--start-from is where --theta-source fit begins"),
        (("--output", "x", "--remove", "--export-peft", "p"), "--remove only takes Θ off"),
        (("--export-peft", "p"), "holds no Θ"),
    ],
)
def test_mistakes_are_one_line(fails, tmp_path: Path, base: Path, flags: tuple[object, ...], message: str) -> None:
    names = [tmp_path / flag if isinstance(flag, str) and not flag.startswith("--") else flag for flag in flags]
    assert message in fails(CONVERTER, "--input", base, *names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.gguf"]
