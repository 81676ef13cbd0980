"""What every program that runs a model is given: a base model, and the same with Θ."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from tests.conftest import Script
from tests.support.tiny_models import write_tiny_model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base.gguf", "llama", qtype=gguf.GGMLQuantizationType.Q8_0)


@pytest.fixture
def nkat(script: Script, base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.nkat"
    assert script("nkat_gguf_converter.py", "--input", base, "--output", path).returncode == 0
    return path
