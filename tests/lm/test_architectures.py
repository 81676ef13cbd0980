"""The rows of architectures: each is judged by llama.cpp, each field counts, and no other file knows a name."""

import ast
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nkat.lm.architectures import (
    ARCHITECTURES,
    BLOCK_LINEARS,
    QKV,
    ROUTER,
    SCALES,
    STACKS,
    Architecture,
    Recurrent,
    Routing,
    Sizes,
    Window,
    scale_by_head,
)
from nkat.lm.config import ConfigError
from nkat.lm.load import load_model
from tests.conftest import ROOT
from tests.engine.test_compiled import FAMILIES as COMPILED_FAMILIES
from tests.kernels.test_cuda import FAMILIES as CUDA_FAMILIES
from tests.lm.test_transformer import FAMILIES
from tests.support import tiny_models
from tests.support.golden import kept, read_golden
from tests.support.tiny_models import write_tiny_model

GOLDEN = read_golden("tiny_logits")
# Flags that let a tensor or a key be there: a file without it does not notice.
PERMISSIONS = {"rope_factors", "long_rope", "varied", "block_scale"}
# Flags that say how other programs' files are read, and nothing of the forward pass: tests/lm/test_peft.py judges it.
ELSEWHERE = {"permuted_qk"}
FLAGS = [field.name for field in fields(Architecture) if field.type == "bool"]
FLAGS = [flag for flag in FLAGS if flag not in PERMISSIONS | ELSEWHERE]

Agrees = Callable[..., bool]


def largest_error(path: Path, golden: dict[str, Any]) -> float:
    model = load_model(path).model
    with torch.inference_mode():
        logits = kept(golden, model(torch.tensor([GOLDEN["ids"]]))[0, GOLDEN["positions"]])
    return float((logits - torch.tensor(golden["logits"])).abs().max())


@pytest.fixture
def agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Agrees:
    """Whether a model of this variant computes llama.cpp's logits when its row is changed; a refusal is a no."""

    def check(variant: str, **changes: Any) -> bool:
        golden = GOLDEN["variants"][variant]
        arch = golden["arch"]
        path = write_tiny_model(tmp_path / f"{variant}.gguf", arch, golden["seed"], **golden["options"])
        with monkeypatch.context() as patch:
            patch.setitem(ARCHITECTURES, arch, replace(ARCHITECTURES[arch], **changes))
            try:
                return largest_error(path, golden) < 2e-4  # see test_transformer
            except (ConfigError, RuntimeError):  # the latter of a row that contradicts itself
                return False

    return check


# --- every row, and every field of it, is judged


def untested(rows: Iterable[str]) -> dict[str, set[str]]:
    """The rows that lack a test, by kind of test."""
    without_gpu_step = {name for name, row in ARCHITECTURES.items() if not row.has_gpu_step}
    tested = {
        "logits by llama.cpp": {variant["arch"] for variant in GOLDEN["variants"].values()},
        "the model's forward pass": {arch for arch, _ in FAMILIES},
        "the compiled CPU program": {arch for arch, _ in COMPILED_FAMILIES.values()},
        "the GPU step": {arch for arch, _ in CUDA_FAMILIES} | without_gpu_step,
    }
    return {kind: missing for kind, names in tested.items() if (missing := {*rows} - names)}


def test_every_row_is_tested() -> None:
    assert not untested(ARCHITECTURES)
    assert ARCHITECTURES.keys() == tiny_models.ARCHITECTURES.keys()
    assert all(name == row.name for name, row in ARCHITECTURES.items())


def test_a_row_without_tests_would_be_found() -> None:
    assert untested([*ARCHITECTURES, "mamba"]).keys() >= {"logits by llama.cpp", "the compiled CPU program"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_flag_counts(agrees: Agrees, arch: str) -> None:
    """Against llama.cpp's logits the row as it is agrees, and with any flag turned it does not."""
    assert len(FLAGS) >= 5
    assert agrees(arch)
    row = ARCHITECTURES[arch]
    mixtures_only = row.experts is not None and not row.experts.optional  # which have no such weight
    flags = [flag for flag in FLAGS if flag != "fused_gate_up" or not mixtures_only]
    assert [flag for flag in flags if agrees(arch, **{flag: not getattr(row, flag)})] == []


@pytest.mark.parametrize(
    ("variant", "field", "value"),
    [
        ("smollm3", "unturned_period", 0),
        ("smollm3", "unturned_period", 3),
        ("granite_unturned", "reads", SCALES),
        ("olmo2_swa", "window", None),
        ("olmo2_swa", "window", Window(period=4, rope_base=None)),
        ("olmo2_swa", "window", Window(period=4, rope_base=10000.0)),
        ("gemma3_swa", "window", None),
        ("gemma3_swa", "window", Window(period=3, rope_base=10000.0)),
        ("gemma3_swa", "window", Window(period=6, rope_base=500.0)),
        ("gemma3", "attention_scale", lambda sizes: 1.1 * scale_by_head(sizes)),
        ("qwen2", "biases", ()),
        ("llama_rope_factors", "rope_factors", False),
        ("gemma2", "attention_cap", 0.0),
        ("gemma2", "logit_cap", 0.0),
        ("gemma2", "attention_scale", lambda sizes: 1.1 * scale_by_head(sizes)),
        ("gemma2_caps", "reads", ()),
        ("gemma2_caps", "window", Window(period=3, rope_base=None)),
        ("gemma2_caps", "window", Window(period=2, rope_base=500.0)),
        ("gemma4", "varied", False),
        ("gemma4", "block_scale", False),
        ("gemma4", "reads", ()),
        ("gemma4", "experts", Routing()),
        ("gemma4_experts", "experts", None),
        ("gemma4_experts", "experts", Routing(optional=True)),
        ("phi3_short", "long_rope", False),
        ("phi3_long", "long_rope", False),
        ("mistral3_warm", "reads", ()),
        ("llama", "experts", Routing()),
        ("llama_mixtral", "experts", None),
        ("llama_mixtral", "experts", Routing(optional=True)),
        ("mistral3_experts", "experts", None),
        ("granite_experts", "experts", None),
        ("granitemoe", "experts", Routing(own_length=False)),
        ("qwen3moe", "experts", None),
        ("gpt-oss", "biases", QKV),
        ("gpt-oss", "window", None),
        ("gpt-oss", "window", Window(period=3, rope_base=None)),
        ("gpt-oss", "ffn_norm", "ffn_norm"),
        ("qwen35", "recurrent", None),
        ("qwen35", "ffn_norm", "ffn_norm"),
        ("qwen35_still", "reads", ()),
        ("qwen35_still", "recurrent", Recurrent(grouped=True)),
        ("qwen35moe", "experts", None),
        ("qwen35moe", "experts", Routing()),
        ("qwen3next", "recurrent", Recurrent()),
        ("gpt-oss_yarn", "window", Window(period=2, rope_base=10000.0)),
    ],
)
def test_each_other_field_counts(agrees: Agrees, variant: str, field: str, value: object) -> None:
    assert agrees(variant)
    assert not agrees(variant, **{field: value})


def test_one_row_is_all_that_a_further_architecture_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, last = GOLDEN["variants"]["qwen3"], list(ARCHITECTURES)[-1]
    monkeypatch.setitem(tiny_models.ARCHITECTURES, "newcomer", tiny_models.ARCHITECTURES["qwen3"])
    path = write_tiny_model(tmp_path / "newcomer.gguf", "newcomer", golden["seed"], **golden["options"])
    with pytest.raises(ConfigError, match=rf"architecture 'newcomer' is not supported; .* are llama, qwen2, .*{last}$"):
        load_model(path)
    monkeypatch.setitem(ARCHITECTURES, "newcomer", Architecture("newcomer", qk_norm=True))
    assert largest_error(path, golden) < 2e-4
    (tmp_path / "mamba.gguf").write_bytes(path.read_bytes().replace(b"newcomer", b"neocomer"))
    with pytest.raises(ConfigError, match=rf"'neocomer' is not supported; .* {last}, newcomer$"):
        load_model(tmp_path / "mamba.gguf")


def test_norms_and_biases_follow_from_the_row() -> None:
    assert Architecture("plain").block_norms == ("attn_norm", "ffn_norm")
    assert set(ARCHITECTURES["gemma3"].block_norms) == {
        *("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
        *("attn_q_norm", "attn_k_norm"),
    }
    known = {*BLOCK_LINEARS, ROUTER, *STACKS, "output"}
    assert all({*QKV} <= {*row.biases} <= known for row in ARCHITECTURES.values())


@pytest.mark.parametrize(("arch", "blocks"), [("gemma2", 46), ("gemma3", 62)])
def test_only_gemma_27b_scales_attention_by_its_embedding(arch: str, blocks: int) -> None:
    sizes = Sizes(block_count=blocks, embedding_length=5376, head_count=32, head_dim=128)
    assert ARCHITECTURES[arch].attention_scale(sizes) == 168**-0.5
    assert ARCHITECTURES[arch].attention_scale(replace(sizes, block_count=61)) == 128**-0.5
    assert ARCHITECTURES["qwen3"].attention_scale(sizes) == 128**-0.5


# --- no other file knows a name

OTHER_MEANINGS = {
    ("nkat/lm/tokenizer.py", "llama"),  # kinds of vocabulary: SentencePiece, BPE of characters
    ("nkat/lm/tokenizer.py", "gemma4"),
    ("nkat/models.py", "gemma3"),  # a model to fetch
}


def names_in(tree: ast.AST) -> set[str]:
    """Strings in the code that are an architecture's name."""
    return {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)} & {
        *ARCHITECTURES
    }


def comparisons_in(tree: ast.AST) -> list[str]:
    """Comparisons, other than with None, and matches of something called arch or architecture, or of its name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Match) and _is_architecture(node.subject):
            found.append(ast.unparse(node.subject))
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            with_none = any(isinstance(side, ast.Constant) and side.value is None for side in sides)
            if not with_none and any(map(_is_architecture, sides)):
                found.append(ast.unparse(node))
    return found


def _is_architecture(node: ast.expr) -> bool:
    if isinstance(node, ast.Attribute) and node.attr == "name":
        node = node.value
    called = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
    return called in ("arch", "architecture")


def test_no_other_file_compares_an_architecture() -> None:
    names = set()
    for path in sorted((ROOT / "nkat").rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if place not in ("nkat/lm/architectures.py", "nkat/lm/pretokenisers.py"):  # the latter's are pre-tokenisers'
            names |= {(place, name) for name in names_in(tree)}
            assert not comparisons_in(tree), place
    assert names == OTHER_MEANINGS


@pytest.mark.parametrize(
    "code",
    [
        'gemma = arch == "gemma3"',
        'qk_norm = arch in ("qwen3", "gemma3")',
        'biases = {"qwen2": QKV}.get(arch)',
        'match config.architecture.name:\n    case "llama": pass',
        'rope = "llama"',
    ],
)
def test_a_name_in_another_file_would_be_found(code: str) -> None:
    assert names_in(ast.parse(code))


@pytest.mark.parametrize(
    "code", ["config.architecture is GEMMA", "keys.arch in GEMMAS", "config.architecture.name == other", "arch != NAME"]
)
def test_a_comparison_in_another_file_would_be_found(code: str) -> None:
    assert comparisons_in(ast.parse(code))


@pytest.mark.parametrize("code", ["arch is None", "architecture.window is not None", '"output" in architecture.biases'])
def test_asking_the_row_is_no_comparison(code: str) -> None:
    assert not comparisons_in(ast.parse(code))
    assert not names_in(ast.parse(code))
