"""Θ folded into the weights: the quantisers, the file, what is lost, and the command line."""

from __future__ import annotations

import hashlib
import json
import sys
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from nkat.convert.merge import gain_kept, gain_text, merge_weight, write_merged
from nkat.errors import NKATError
from nkat.gguf.file import GGUFFile
from nkat.gguf.formats import dequantise
from nkat.gguf.quantise import quantisation_steps, quantise, requantise
from nkat.gguf.weights import read_weight
from nkat.measure.perplexity import Perplexity
from nkat.theta.algebra import quantise_factors
from nkat.theta.modelfile import open_model_file
from tests.support.oracle import dense_theta
from tests.support.tiny_models import write_tiny_model

pytest.importorskip("libgguf", reason="libgguf is not installed: pip install libgguf")

CONVERTER = "nkat_gguf_converter.py"
LEGACY = [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
# Most to fewest bits. The step of Q2_K is that of 2 bits, and so on.
BY_PRECISION = [Type.F32, Type.F16, Type.Q8_0, Type.Q6_K, Type.Q5_K, Type.Q4_K, Type.Q3_K, Type.Q2_K]

# SHA-256 of names, types and bytes of all tensors, by name, that llama.cpp b11434 makes of SmolLM2's Q4_1 file:
# llama-quantize --allow-requantize SmolLM2-135M-Instruct.Q4_1.gguf out.gguf Q4_0 (and Q3_K_S)
LLAMA_QUANTIZE = {
    "Q4_0": "c8b60556052d6e0c5bf551ad1462daa3544d8ff80119bee17b840bfb2585fbd2",
    "Q3_K_S": "75dc49a3cc9a0f5d7c8c2b661016ff8eb051a72980d0820e369d5a8b413e69e7",
}


def q4_0(info) -> Type:
    return Type.Q4_0 if info.name.startswith("blk.") and len(info.shape) == 2 else info.type


def q3_k_s(info) -> Type:
    """As llama-quantize does: rows that are not whole blocks of 256 fall back to Q4_0."""
    return Type.Q3_K if q4_0(info) == Type.Q4_0 and info.shape[1] % 256 == 0 else q4_0(info)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A text of three chunks of 512 tokens for the tiny models."""
    path = tmp_path / "words.txt"
    rng = np.random.RandomState(0)
    path.write_text(" ".join(rng.choice(["the", "a", "engine", "in", "river", "stone", "and", "light"], 1200)))
    return path


def convert(script, *arguments: object) -> dict:
    done = script(CONVERTER, *arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def random_theta(size: int, rank: int = 2, scale: float = 1.0):
    return quantise_factors(scale * torch.randn(size, rank), torch.randn(size, rank))


@pytest.mark.parametrize("qtype", LEGACY)
def test_quantize_is_bit_equal_to_gguf_py(qtype: Type) -> None:
    weight = torch.randn(24, 96)
    expected = gguf.quants.quantize(weight.numpy(), qtype).view(np.uint8).reshape(-1)
    np.testing.assert_array_equal(quantise(weight, qtype), expected)


def test_more_bits_lose_less() -> None:
    """Also for the K-quants, which gguf-py cannot make: the errors fall by what a bit is worth."""
    weight = torch.randn(16, 512)
    errors = []
    for qtype in BY_PRECISION[2:]:
        again = dequantise(torch.from_numpy(quantise(weight, qtype)), qtype, weight.shape)
        errors.append(float((again - weight).norm() / weight.norm()))
    assert all(0.2 < few / more < 0.75 for few, more in pairwise(errors)), errors
    assert errors[0] < 0.01


# type: the error over the weights, at most
FROM_GRIDS = {
    Type.NVFP4: 0.13,
    Type.IQ3_S: 0.3,
    Type.IQ2_XS: 0.5,
    Type.IQ1_M: 0.8,
}


@pytest.mark.parametrize("qtype", FROM_GRIDS, ids=lambda qtype: qtype.name)
def test_weights_come_back_from_grids_and_nvfp4(qtype: Type) -> None:
    """What libgguf packs is what is unpacked here; in another order hardly anything would be left."""
    weight = torch.randn(16, 512)
    again = dequantise(torch.from_numpy(quantise(weight, qtype)), qtype, weight.shape)
    assert 0.05 < float((again - weight).norm() / weight.norm()) < FROM_GRIDS[qtype]
    assert float((again.roll(1, dims=1) - weight).norm() / weight.norm()) > 1.0


@pytest.mark.parametrize(("name", "rule"), [("Q4_0", q4_0), ("Q3_K_S", q3_k_s)])
def test_requantised_smollm2_is_llama_quantize_s(tmp_path: Path, smollm2: Path, name: str, rule) -> None:
    out = tmp_path / "out.gguf"
    requantise(smollm2, out, rule)
    digest = hashlib.sha256()
    with GGUFFile.open(out) as file:
        for tensor in sorted(file.tensors):
            digest.update(tensor.encode() + file.tensors[tensor].type_name.encode())
            digest.update(file.raw(tensor))
    assert digest.hexdigest() == LLAMA_QUANTIZE[name]


def test_requantise_keeps_everything_else(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", "qwen2")
    out = tmp_path / "out.gguf"
    requantise(base, out, q4_0)
    old, new = gguf.GGUFReader(base), gguf.GGUFReader(out)
    assert [t.name for t in old.tensors] == [t.name for t in new.tensors]
    for a, b in zip(old.tensors, new.tensors, strict=True):
        assert list(a.shape) == list(b.shape)
        if a.name.startswith("blk.") and len(a.shape) == 2:
            assert b.tensor_type == Type.Q4_0
            np.testing.assert_array_equal(b.data, gguf.quants.quantize(a.data, Type.Q4_0))
        else:
            np.testing.assert_array_equal(a.data, b.data)
    with GGUFFile.open(base) as a, GGUFFile.open(out) as b:
        assert a.read(*a.metadata_span).tobytes() == b.read(*b.metadata_span).tobytes()
    with pytest.raises(NKATError, match="exists already"):
        requantise(base, out, q4_0)


@pytest.mark.parametrize("qtype", BY_PRECISION)
def test_what_merging_loses_depends_on_the_step(qtype: Type) -> None:
    weight = dequantise(torch.from_numpy(quantise(torch.randn(32, 256), qtype)), qtype, (32, 256))
    theta = random_theta(256)
    for kappa, small in ((1e-2, qtype not in (Type.F32, Type.F16)), (1.0, False)):
        packed, loss = merge_weight(weight, theta, kappa, qtype)
        change = kappa * dense_theta(*theta.factors())[:32, :256]
        merged = dequantise(torch.from_numpy(packed), qtype, (32, 256))
        figures = loss.describe()
        expected = float((merged - weight - change).norm() / change.norm())
        assert figures["error_over_theta"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        kept = float(((merged - weight) * change).sum() / change.square().sum())
        assert figures["theta_kept"] == pytest.approx(kept, rel=1e-4, abs=1e-6)
        if not small:
            assert figures["theta_kept"] == pytest.approx(1.0, abs=0.05)
        if qtype == Type.F32:
            assert figures["error_over_theta"] < 1e-4
        if qtype in (Type.Q2_K, Type.Q3_K) and small:
            assert figures["theta_in_steps"] < 0.2
            assert figures["error_over_theta"] > 0.5  # control: a Θ far below a step does not survive


def test_steps_are_those_of_the_format() -> None:
    half = torch.randn(8, 64).half()
    expected = np.spacing(np.abs(half.numpy())).astype("f4")
    np.testing.assert_array_equal(quantisation_steps(half.float(), Type.F16).numpy(), expected)
    packed = quantise(torch.randn(8, 64), Type.Q4_1)
    weight = dequantise(torch.from_numpy(packed), Type.Q4_1, (8, 64))
    scale = packed.reshape(-1, 20)[:, :2].copy().view("f2").astype("f4").reshape(8, 2)
    steps = quantisation_steps(weight, Type.Q4_1).reshape(8, 2, 32).numpy()
    exact = np.isclose(steps, scale[..., None], rtol=1e-3)
    assert exact.mean() > 0.95  # in a group where no two weights are neighbours the gap is wider
    assert bool((steps > 0.99 * scale[..., None]).all())


@pytest.mark.isa
@pytest.mark.parametrize("layout", ["plain", "tensors", "appended"])
def test_only_adapted_tensors_change(script, tmp_path: Path, layout: str) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", "llama", qtype=Type.Q8_0)
    made, out = tmp_path / "made.nkat", tmp_path / "merged.gguf"
    layers = ["blk.0.attn_q.weight", "blk.2.ffn_down.weight"]
    convert(script, "--input", base, "--output", made, "--selective-layers", *layers, "--theta-gamma", 0.9)
    theta_set = open_model_file(made).theta
    if layout == "appended":
        convert(script, "--input", base, "--output", made, "--layout", layout, "--force", "--selective-layers", *layers)
    model = open_model_file(base if layout == "plain" else made)
    assert model.layout == layout
    losses = write_merged(out, model, theta_set, 0.9)
    assert sorted(losses) == sorted(layers)
    assert out.stat().st_size == base.stat().st_size
    assert open_model_file(out).layout == "plain"
    with GGUFFile.open(base) as a, GGUFFile.open(out) as b:
        assert a.read(0, a.data_start).tobytes() == b.read(0, b.data_start).tobytes()
        changed = [name for name in a.tensors if not np.array_equal(a.raw(name), b.raw(name))]
        assert sorted(changed) == sorted(layers)
        for name in layers:
            theta = theta_set.layers[name]
            m, n = a.tensors[name].shape
            wanted = read_weight(a, name) + 0.045 * dense_theta(*theta.factors())[:m, :n]
            expected = gguf.quants.quantize(wanted.numpy(), Type.Q8_0).view(np.uint8).reshape(-1)
            # Θ is summed in another order here than where it is merged, so a weight on the edge between two numbers of
            # the format may fall to either; none did in any setting of make test-isa.
            assert np.mean(b.raw(name) != expected) < 1e-3
            found = dequantise(torch.from_numpy(b.raw(name).copy()), Type.Q8_0, (m, n))
            step = wanted.view(m, -1, 32).abs().amax(dim=-1, keepdim=True) / 127
            assert float(((found - wanted).view(m, -1, 32).abs() / step).max()) < 0.6  # half, and the scale's rounding
            assert np.mean(a.raw(name) != expected) > 0.1  # control


def test_merged_float_model_is_the_model_with_theta(script, tmp_path: Path, words: Path) -> None:
    """In F32 nothing is lost; and a Θ of the other strength is another model."""
    base = write_tiny_model(tmp_path / "base.gguf", "llama")
    made, out, other = tmp_path / "made.nkat", tmp_path / "merged.gguf", tmp_path / "other.gguf"
    convert(script, "--input", base, "--output", made, "--theta-gamma", 0.9)
    merge = convert(script, "--input", made, "--merge", out, "--text", words, "--chunks", 2)["merge"]
    measured = merge["perplexity"]
    assert measured["merged"]["perplexity"] == pytest.approx(measured["theta"]["perplexity"], rel=1e-5)
    assert abs(measured["theta"]["perplexity"] / measured["base"]["perplexity"] - 1) > 1e-3  # control
    assert merge["types"][0]["type"] == "F32"
    assert merge["types"][0]["theta_kept"] == pytest.approx(1, abs=1e-3)
    assert out.stat().st_size == base.stat().st_size
    weaker = convert(script, "--input", made, "--merge", other, "--text", words, "--theta-gamma", 0.99)["merge"]
    assert weaker["gamma"] == 0.99
    change = [abs(record["perplexity"]["merged"]["change_percent"]) for record in (merge, weaker)]
    assert change[1] < change[0]
    assert other.read_bytes() != out.read_bytes()


@pytest.mark.isa
def test_theta_made_and_merged_in_one_call(script, tmp_path: Path, words: Path) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", "qwen2", qtype=Type.Q4_0, blocks=1)
    made, two, one, both = (tmp_path / name for name in ("made.nkat", "two.gguf", "one.gguf", "both.gguf"))
    convert(script, "--input", base, "--output", made, "--theta-rank", 2)
    convert(script, "--input", made, "--merge", two, "--text", words)
    record = convert(script, "--input", base, "--merge", one, "--theta-rank", 2, "--text", words)
    assert record["output"] is None
    assert record["output_bytes"] is None
    assert record["merge"]["types"][0]["tensors"] == 7
    assert one.read_bytes() == two.read_bytes()
    arguments = ["--input", base, "--output", made, "--merge", both, "--theta-rank", 2, "--text", words, "--force"]
    assert convert(script, *arguments)["output"] == str(made)
    assert both.read_bytes() == one.read_bytes()
    assert open_model_file(made).theta.rank == 2
    residual = ["--theta-source", "residual", "--reference", write_tiny_model(tmp_path / "hi.gguf", "qwen2", blocks=1)]
    record = convert(script, "--input", base, "--merge", one, "--text", words, "--force", *residual)
    assert record["residual"]["all"]["theta_left"] < 1
    assert one.read_bytes() != two.read_bytes()  # control: another Θ is another file


def test_dry_run_and_mistakes_leave_nothing(script, fails, monkeypatch, tmp_path: Path, words: Path) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", "llama", qtype=Type.Q8_0)
    made, out = tmp_path / "made.nkat", tmp_path / "out.gguf"
    convert(script, "--input", base, "--output", made)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    record = convert(script, "--input", made, "--merge", out, "--dry-run")
    assert record["merge"]["perplexity"] is None
    assert record["merge"]["types"][0]["weights_moved"] > 0
    short = tmp_path / "short.txt"
    short.write_text("hello")
    before[short] = short.read_bytes()
    cases = [
        (["--input", made, "--merge", made, "--force"], "same file as the input"),
        (["--input", made, "--merge", words], "exists already; give --force"),
        (["--input", made, "--merge", out, "--text", short], "too short"),
        (["--input", made, "--merge", out, "--theta-gamma", 1, "--text", words], "there is nothing to merge"),
        (["--input", base, "--output", out, "--merge", out], "are the same file"),
        (["--input", made, "--output", out, "--merge", tmp_path / "x", "--remove"], "--remove only takes Θ off"),
        (["--input", made, "--merge", out, "--layout", "tensors"], "say what --output is to be"),
    ]
    for arguments, message in cases:
        assert message in fails(CONVERTER, *arguments), arguments
    monkeypatch.setitem(sys.modules, "libgguf", None)
    assert "pip install libgguf" in fails(CONVERTER, "--input", made, "--merge", out, "--text", words)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_theta_made_from_the_judging_text_is_refused(script, fails, tmp_path: Path, words: Path) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", "llama", qtype=Type.Q4_0, blocks=1)
    reference = write_tiny_model(tmp_path / "hi.gguf", "llama", blocks=1)
    made, out = tmp_path / "made.nkat", tmp_path / "out.gguf"
    other = tmp_path / "other.txt"
    other.write_text(words.read_text()[::-1])
    residual = ["--theta-source", "residual", "--reference", reference, "--calibrate", words, "--text", other]
    convert(script, "--input", base, "--output", made, *residual)
    message = fails(CONVERTER, "--input", made, "--merge", out, "--text", words)
    assert "made from that very text" in message
    assert not out.exists()


def test_a_gain_that_the_kept_share_does_not_explain_is_not_printed_without_a_word() -> None:
    assert gain_text(0.6, 0.02, 0.58) == "merging keeps 60 % ± 2 of Θ's gain (of ln perplexity)."
    said = gain_text(1.0, 0.04, 0.259)
    assert said.startswith(
        "merging keeps 100 % ± 4 of Θ's gain (of ln perplexity), though the weights keep 26 % of κΘ."
    )
    assert "though" not in gain_text(1.0, 0.5, 0.259)  # within its error, there is nothing to explain
    assert "though" not in gain_text(0.9, 0.0, None)


def test_the_share_of_the_gain_has_the_error_of_a_ratio() -> None:
    """Against resampling the tokens."""
    draw = torch.Generator().manual_seed(0)
    base = torch.rand(40, 50, generator=draw, dtype=torch.float64) * 5
    gain = 0.1 + 0.3 * torch.randn(40, 50, generator=draw, dtype=torch.float64)
    merged = 0.5 * gain + 0.1 * torch.randn(40, 50, generator=draw, dtype=torch.float64)
    share, stderr = gain_kept(*(Perplexity(nll) for nll in (base, base - gain, base - merged)))
    assert share == pytest.approx(float(merged.sum() / gain.sum()))
    picks = torch.randint(2000, (4000, 2000), generator=draw)
    ratios = merged.flatten()[picks].sum(1) / gain.flatten()[picks].sum(1)
    assert stderr == pytest.approx(float(ratios.std()), rel=0.1)
    assert gain_kept(*(Perplexity(nll) for nll in (base, base + gain, base))) is None  # no gain, no share
