"""The library: what `import nkat` gives, on a model of a few thousand weights, against what the scripts do."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

import nkat
from nkat.measure.texts import default_text
from nkat.theta.modelfile import open_model_file
from tests.conftest import Script
from tests.gguf.test_imatrix import EXCHANGE
from tests.support.public_names import check_light, check_names
from tests.support.tiny_models import write_tiny_model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny.gguf", "llama", qtype=gguf.GGMLQuantizationType.Q8_0)


@pytest.fixture
def model(path: Path) -> nkat.Model:
    return nkat.open_model(path)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    target = tmp_path / "text.txt"
    target.write_text(default_text().content[:9000], encoding="utf-8")
    return target


def test_at_most_ten_names_and_all_of_them_documented() -> None:
    check_names(nkat)


def test_importing_the_package_loads_nothing_heavy() -> None:
    check_light(nkat, {"torch", "numpy", "gguf", "optuna", "llvmlite"}, "open_model")


@pytest.mark.parametrize(("layout", "flags"), [("tensors", []), ("appended", ["--layout", "appended"])])
def test_it_makes_the_file_that_the_converter_makes(
    model: nkat.Model, path: Path, tmp_path: Path, script: Script, layout: str, flags: list[str]
) -> None:
    nkat.save(nkat.make_theta(model, rank=2, gamma=0.95), tmp_path / "a.nkat", model, layout=layout)
    arguments = ["--theta-rank", 2, "--theta-gamma", 0.95, *flags]
    done = script("nkat_gguf_converter.py", "--input", path, "--output", tmp_path / "b.nkat", *arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.nkat").read_bytes() == (tmp_path / "b.nkat").read_bytes()
    nkat.save(nkat.make_theta(model, rank=2, gamma=0.96), tmp_path / "c.nkat", model, layout=layout)
    assert (tmp_path / "a.nkat").read_bytes() != (tmp_path / "c.nkat").read_bytes()  # control


def test_perplexity_is_the_engines(model: nkat.Model, text: Path, tmp_path: Path, script: Script) -> None:
    theta = nkat.make_theta(model, gamma=0.9)
    nkat.save(theta, tmp_path / "tiny.nkat", model)
    arguments = ["--perplexity", "--text", text, "--chunks", 2, "--json", "-"]
    done = script("nkat_inference_engine.py", "--model", tmp_path / "tiny.nkat", *arguments)
    record = json.loads(done.stdout.splitlines()[-1])
    score = nkat.perplexity(model, text, theta, chunks=2)
    assert score.perplexity.ppl == pytest.approx(record["nkat_perplexity"], rel=1e-6)
    assert score.change.percent == pytest.approx(record["perplexity_change_percent"], rel=1e-4)
    plain = nkat.perplexity(model, text.read_text(encoding="utf-8"), chunks=2)
    assert plain.perplexity.ppl == pytest.approx(record["baseline_perplexity"], rel=1e-6)
    assert plain.change.percent == 0.0 != score.change.percent


def test_theta_goes_to_a_file_and_back(model: nkat.Model, path: Path, tmp_path: Path) -> None:
    theta = nkat.make_theta(model, rank=3, layers=["blk.*.attn_q.weight"])
    nkat.save(theta, tmp_path / "theta.bin", layout="theta-only")
    again = nkat.load_theta(tmp_path / "theta.bin", model)
    assert again.metadata() == theta.metadata()
    assert [t.nbytes for t in again.layers.values()] == [t.nbytes for t in theta.layers.values()]
    nkat.save(theta, tmp_path / "tiny.nkat", model)
    assert nkat.open_model(tmp_path / "tiny.nkat").theta.metadata() == theta.metadata()
    nkat.save(theta, tmp_path / "lora.gguf", model, layout="lora")
    assert gguf.GGUFReader(tmp_path / "lora.gguf").get_field("adapter.type") is not None
    nkat.save(theta, tmp_path / "peft", model, layout="peft")
    assert sorted(file.name for file in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_residual_needs_its_reference(model: nkat.Model, text: Path, tmp_path: Path) -> None:
    reference = write_tiny_model(tmp_path / "high.gguf", "llama")
    theta = nkat.make_theta(model, reference=reference, calibrate=text)
    assert theta.source == "residual"
    assert theta.notes["nkat.calibration.tokens"] > 0
    with pytest.raises(nkat.NKATError, match="there is none"):
        nkat.make_theta(model, calibrate=text)
    imatrix = EXCHANGE / "llama.imatrix.gguf"
    weighted = nkat.make_theta(model, reference=reference, imatrix=imatrix)
    assert weighted.layers["blk.0.attn_q.weight"].p.ne(theta.layers["blk.0.attn_q.weight"].p).any()
    with pytest.raises(nkat.NKATError, match="in place of calibrate"):
        nkat.make_theta(model, reference=reference, calibrate=text, imatrix=imatrix)
    with pytest.raises(nkat.NKATError, match="made from that very text"):
        nkat.perplexity(model, text, theta)


def test_a_fit_is_better_on_its_own_text(model: nkat.Model, text: Path) -> None:
    theta = nkat.fit_theta(model, text, rank=2, steps=12, learning_rate=0.02)
    assert theta.source == "fit"
    assert theta.notes["nkat.heldout.change_percent"] < 0
    with pytest.raises(nkat.NKATError, match="too short"):
        nkat.fit_theta(model, "a few words")


def test_generation_is_repeatable_and_feels_theta(model: nkat.Model) -> None:
    one, two = (nkat.generate(model, "the hen", max_tokens=12, seed=3) for _ in range(2))
    assert one == two
    strong = nkat.make_theta(model, rank=8, gamma=0.5)
    assert nkat.generate(model, "the hen", strong, max_tokens=12, seed=3) != one
    assert nkat.generate(model, "the hen", max_tokens=12, seed=3) == one  # Θ is off again


def test_several_thetas_by_name(model: nkat.Model, text: Path, tmp_path: Path) -> None:
    style, facts = nkat.make_theta(model, rank=4, gamma=0.6), nkat.make_theta(model, rank=3, gamma=0.5, seed=2)
    mix = model.mix({"style": style, "facts": facts})
    assert mix.theta is None
    alone = nkat.generate(model, "the hen", style, max_tokens=12, temperature=0)
    mix.set_weights({"style": 1.0})
    assert mix.theta is style
    mix.set_weights({"style": 1.0, "facts": 2.0})
    both = nkat.generate(model, "the hen", mix.theta, max_tokens=12, temperature=0)
    score = nkat.perplexity(model, text, mix.theta, chunks=1)
    mix.set_weights({"style": 1.0})
    assert nkat.generate(model, "the hen", mix.theta, max_tokens=12, temperature=0) == alone != both
    mix.set_weights({"style": 1.0, "facts": 2.0})
    nkat.save(mix.theta, tmp_path / "both.nkat", model)
    saved = nkat.open_model(tmp_path / "both.nkat")
    assert nkat.perplexity(saved, text, saved.theta, chunks=1).perplexity.ppl == score.perplexity.ppl
    other = nkat.open_model(write_tiny_model(tmp_path / "other.gguf", "llama", seed=7))
    with pytest.raises(nkat.NKATError, match="Θ 'style' was made for another model"):
        other.mix({"style": style})


def test_mistakes_are_the_one_error(model: nkat.Model, path: Path, tmp_path: Path) -> None:
    theta = nkat.make_theta(model)
    other = nkat.open_model(write_tiny_model(tmp_path / "other.gguf", "llama", seed=7))
    for call, message in (
        (lambda: nkat.open_model(tmp_path / "missing.gguf"), "missing.gguf"),
        (lambda: nkat.make_theta(model, rank=10**6), "impossible"),
        (lambda: nkat.make_theta(model, gamma=2.0), "gamma"),
        (lambda: nkat.save(theta, tmp_path / "x.nkat"), "needs the model"),
        (lambda: nkat.save(theta, tmp_path / "x.nkat", other), "another model"),
        (lambda: nkat.save(theta, tmp_path / "x.nkat", model, layout="zip"), "none of"),
        (lambda: nkat.save(theta, path, model), "same file"),
        (lambda: nkat.perplexity(model, "short", theta), "too short"),
        (lambda: nkat.generate(model, "a", temperature=-1.0), "temperature"),
    ):
        with pytest.raises(nkat.NKATError, match=message):
            call()
    assert not (tmp_path / "x.nkat").exists()
    assert open_model_file(path).theta is None
