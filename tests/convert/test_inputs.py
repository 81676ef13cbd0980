"""A conversion opens and loads each model once, whatever it is asked to measure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from nkat.gguf.file import GGUFFile
from nkat.gguf.weights import same_weights
from nkat.lm.load import load_model
from nkat.lm.tokenizer import Tokenizer
from nkat.measure.texts import default_text
from tests.conftest import Script
from tests.support.tiny_models import write_tiny_model

CONVERTER = "nkat_gguf_converter.py"
FIT = ["--theta-source", "fit", "--fit-steps", 4, "--fit-batch", 1, "--fit-context", 48, "--fit-validate-every", 2]
FIT += ["--fit-start-steps", 1, "--fit-learning-rate", 0.02, "--no-cuda"]


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """The input, and the same at a higher precision."""
    low = write_tiny_model(tmp_path / "low.gguf", "llama", qtype=gguf.GGMLQuantizationType.Q4_0)
    return low, write_tiny_model(tmp_path / "high.gguf", "llama", qtype=gguf.GGMLQuantizationType.Q8_0)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was opened from its start, and how often a vocabulary was read."""
    counts: Counter[str] = Counter()
    open_file, read_vocabulary = GGUFFile.open.__func__, Tokenizer.from_metadata.__func__

    def count_open(cls: type[GGUFFile], path: str | Path, *place: int, part: bool = False) -> GGUFFile:
        counts[Path(path).name] += not place
        return open_file(cls, path, *place, part=part)

    def count_vocabulary(cls: type[Tokenizer], *arguments: object) -> Tokenizer:
        counts["vocabularies"] += 1
        return read_vocabulary(cls, *arguments)

    monkeypatch.setattr(GGUFFile, "open", classmethod(count_open))
    monkeypatch.setattr(Tokenizer, "from_metadata", classmethod(count_vocabulary))
    return counts


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_fit_with_everything_opens_and_loads_each_model_once(
    models: tuple[Path, Path], opened: Counter[str], tmp_path: Path, script: Script, precision: str
) -> None:
    low, high = models
    text, judged = tmp_path / "calibration.txt", tmp_path / "judged.txt"
    text.write_text(default_text().content[:6000])
    judged.write_text(default_text().content[20000:26000])
    done = script(
        *(CONVERTER, "--input", low, "--output", tmp_path / "out.nkat", "--calibrate", text, "--reference", high),
        *(*FIT, "--fit-precision", precision, "--theta-rank", 2, "--text", judged, "--chunks", 2, "--strengths"),
    )
    assert done.returncode == 0, done.stderr
    assert opened == {"low.gguf": 1, "high.gguf": 1, "vocabularies": 2}


def test_ranks_and_residual_share_one_load(
    models: tuple[Path, Path], opened: Counter[str], tmp_path: Path, script: Script
) -> None:
    low, high = models
    judged, calibrate = tmp_path / "judged.txt", tmp_path / "calibration.txt"
    judged.write_text(default_text().content[:6000])
    calibrate.write_text(default_text().content[20000:26000])
    done = script(
        *(CONVERTER, "--input", low, "--output", tmp_path / "out.nkat", "--theta-source", "residual"),
        *("--reference", high, "--calibrate", calibrate, "--optimize-rank", "--text", judged, "--chunks", 2),
        "--strengths",
    )
    assert done.returncode == 0, done.stderr
    assert opened == {"low.gguf": 1, "high.gguf": 1, "vocabularies": 2}


def test_a_second_load_would_be_counted(models: tuple[Path, Path], opened: Counter[str]) -> None:
    """The control; and a model over a loaded one counts for nothing."""
    loaded = load_model(models[0])
    load_model(loaded, keep_dense=True)
    assert opened == {"low.gguf": 1, "vocabularies": 1}
    load_model(models[0])
    assert opened == {"low.gguf": 2, "vocabularies": 2}


def test_a_reference_with_the_inputs_weights_is_refused(tmp_path: Path, fails: Callable[..., str]) -> None:
    """Whatever it is called, and whatever else is in it."""
    model, better = tmp_path / "model.gguf", tmp_path / "better.gguf"
    for path, quantised in ((model, gguf.GGMLQuantizationType.Q8_0), (better, gguf.GGMLQuantizationType.F32)):
        write_tiny_model(path, "llama", qtype=quantised)
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(model.read_bytes().replace(b"tiny llama", b"TINY LLAMA"))
    assert renamed.read_bytes() != model.read_bytes()
    text = tmp_path / "text.txt"
    text.write_text(default_text().content[:20000])
    common = (CONVERTER, "--input", model, "--output", tmp_path / "out.nkat", "--theta-source")
    searched = ("nkat_auto_optimizer.py", "--model", model, "--output-dir", tmp_path / "out", "--text", text)
    for same in (model, renamed):
        commands = [
            (*common, "residual", "--reference", same),
            (*common, "fit", "--calibrate", text, "--reference", same, "--fit-steps", 1),
            (*searched, "--chunks", 2, "--theta-source", "residual", "--reference", same),
        ]
        for command in commands:
            assert f"{same}: has the same weights as the input" in fails(*command)
    files = [GGUFFile.open(path) for path in (model, renamed, better)]
    names = list(files[0].tensors)
    assert same_weights(files[0], files[1], names)
    assert not same_weights(files[0], files[2], names)  # control
    assert not same_weights(files[0], files[1], [*names, "no such tensor"])
