"""PEFT's adapters: run with the logits that PEFT computes, written so that PEFT computes ours, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nkat.errors import NKATError
from nkat.gguf.writer import write_gguf
from nkat.lm.adapters import lora_set, open_adapter
from nkat.lm.architectures import ARCHITECTURES
from nkat.lm.huggingface import inputs_for_gguf, inputs_for_hf, module_name, rows_for_gguf, rows_for_hf, weight_name
from nkat.lm.load import LoadedModel, load_model
from nkat.lm.peft import CONFIG, WEIGHTS, peft_files, read_peft
from nkat.theta.lora import lora_parts
from nkat.theta.set import TermSet
from tests.support.golden import GOLDEN_FOLDER, read_golden
from tests.support.thetas import seeded_theta_set
from tests.support.tiny_models import write_tiny_model

LOGITS = read_golden("exchange/peft_logits")
ARCHS = pytest.mark.parametrize("arch", LOGITS["adapters"])
TOLERANCE = 2e-4  # as of the other tiny models' logits
NAMES = ("llama", "phi3", "glm4", "qwen3", "gemma3", "qwen35")
OPTIONS = {"qwen35": {"interval": 2}}  # a recurrent block, and one with attention


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    folder = tmp_path_factory.mktemp("tiny")
    return lambda arch: load_model(write_tiny_model(folder / f"{arch}.gguf", arch, blocks=2, **OPTIONS.get(arch, {})))


def adapter(arch: str) -> Path:
    return GOLDEN_FOLDER / "exchange" / f"peft_{arch}"


@torch.inference_mode()
def logits(loaded: LoadedModel, terms: TermSet | None, **options: Any) -> torch.Tensor:
    """Of every 7th id, as the goldens have them."""
    other = load_model(
        loaded, thetas={} if terms is None else terms.layers, gamma=1.0 if terms is None else terms.gamma, **options
    )
    return other.model(torch.tensor([LOGITS["ids"]]))[0, :, ::7]


def golden(kind: str, arch: str) -> torch.Tensor:
    return torch.tensor(LOGITS[kind][arch])


def furthest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


@pytest.mark.isa
@ARCHS
def test_logits_of_an_adapter_are_pefts(tiny: Callable[[str], LoadedModel], arch: str) -> None:
    loaded = tiny(arch)
    terms = lora_set([(open_adapter(adapter(arch), loaded.file), 1.0)])
    assert furthest(logits(loaded, None), golden("base", arch)) < TOLERANCE
    assert furthest(logits(loaded, terms), golden("adapters", arch)) < TOLERANCE
    assert furthest(logits(loaded, None), golden("adapters", arch)) > 1000 * TOLERANCE  # control
    half = lora_set([(open_adapter(adapter(arch), loaded.file), 0.5)])
    twice = lora_set([(open_adapter(adapter(arch), loaded.file), 0.5)] * 2)
    assert furthest(logits(loaded, half), golden("adapters", arch)) > 100 * TOLERANCE
    assert furthest(logits(loaded, twice), golden("adapters", arch)) < TOLERANCE


# Tiny models of these architectures are llama's, once what they have of their own is left out.
LIKE_LLAMA: dict[str, dict[str, Any]] = {"mistral3": {}, "smollm3": {"epsilon": 1e-5}, "granite": {"metadata": None}}


@pytest.mark.isa
@pytest.mark.parametrize("arch", [*LOGITS["adapters"], *LIKE_LLAMA])
def test_the_order_of_rows_counts_in_each_architecture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: str
) -> None:
    """Against PEFT's logits the row as it is agrees, and with the flag turned it does not."""
    known = "llama" if arch in LIKE_LLAMA else arch
    options = LIKE_LLAMA.get(arch, OPTIONS.get(arch, {}))
    path = write_tiny_model(tmp_path / "m.gguf", arch, blocks=2, **options)

    def agrees(permuted: bool) -> bool:
        monkeypatch.setitem(ARCHITECTURES, arch, replace(row, permuted_qk=permuted))
        loaded = load_model(path)
        terms = lora_set([(open_adapter(adapter(known), loaded.file), 1.0)])
        return furthest(logits(loaded, terms), golden("adapters", known)) < TOLERANCE

    row = ARCHITECTURES[arch]
    assert [agrees(flag) for flag in (row.permuted_qk, not row.permuted_qk)] == [True, False]


def test_every_permuted_row_is_tested() -> None:
    """granitemoe's rows go as granite's: it has none of llama's feed-forward layers, which these adapters are for."""
    assert {name for name, row in ARCHITECTURES.items() if row.permuted_qk} == {"llama", "granitemoe", *LIKE_LLAMA}


@pytest.mark.isa
@ARCHS
def test_the_kernels_run_an_adapter_as_the_reference_does(tiny: Callable[[str], LoadedModel], arch: str) -> None:
    loaded = tiny(arch)
    terms = lora_set([(open_adapter(adapter(arch), loaded.file), 1.0)])
    assert (
        furthest(logits(loaded, terms, repack=True), golden("adapters", arch)) < 20 * TOLERANCE
    )  # two INT8 a factor: 2e-4 of it


@pytest.mark.isa
@ARCHS
def test_peft_computes_what_theta_does(tiny: Callable[[str], LoadedModel], arch: str) -> None:
    """The golden numbers are PEFT's, of the very tensors that are written here."""
    loaded = tiny(arch)
    theta_set = seeded_theta_set(loaded.tensors)
    files = peft_files(theta_set, theta_set.gamma, loaded.file)
    assert digest(files[WEIGHTS]) == LOGITS["exported_sha256"][arch]
    assert furthest(logits(loaded, theta_set), golden("exported", arch)) < TOLERANCE
    assert furthest(logits(loaded, None), golden("exported", arch)) > 1000 * TOLERANCE  # control


def digest(raw: bytes) -> str:
    """Of names and values, whatever the file's layout."""
    import safetensors.torch

    tensors = safetensors.torch.load(raw)
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode() + tensors[name].numpy().tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize("arch", NAMES)
def test_what_is_exported_comes_back(tiny: Callable[[str], LoadedModel], tmp_path: Path, arch: str) -> None:
    loaded = tiny(arch)
    theta_set = seeded_theta_set(loaded.tensors)
    files = peft_files(theta_set, theta_set.gamma, loaded.file)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    settings = json.loads(files[CONFIG])
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (4, 4, None)
    write_gguf(tmp_path / "lora.gguf", lora_parts(theta_set, loaded.file.require_base()), force=False)
    found = open_adapter(tmp_path, loaded.file).terms
    same = open_adapter(tmp_path / "lora.gguf", loaded.file).terms
    assert found.keys() == same.keys() == theta_set.layers.keys()
    for name, theta in theta_set.layers.items():
        down, up = theta.form(*loaded.tensors[name].shape)
        expected = 0.125 * up @ down
        torch.testing.assert_close(found[name].product(), expected)
        torch.testing.assert_close(same[name].product(), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def test_names_and_rows(tiny: Callable[[str], LoadedModel]) -> None:
    config = tiny("llama").config
    assert module_name("blk.1.ffn_up.weight", config) == "model.layers.1.mlp.up_proj"
    assert module_name("blk.1.ffn_up.weight", tiny("phi3").config) == "model.layers.1.mlp.gate_up_proj"
    assert module_name("output.weight", config) is None
    for prefix in ("", "model.", "model.language_model.", "language_model.model."):
        assert weight_name(f"{prefix}layers.1.self_attn.o_proj") == "blk.1.attn_output.weight"
    assert weight_name("model.vision_tower.encoder.layers.1.self_attn.o_proj") is None
    assert weight_name("lm_head") == "output.weight"
    rows = torch.arange(64.0)[:, None].repeat(1, 2)
    turned = rows_for_gguf("blk.0.attn_q.weight", rows, config)
    assert turned[:4, 0].tolist() == [0.0, 8.0, 1.0, 9.0]  # a head of 16: its halves take turns
    assert torch.equal(rows_for_hf("blk.0.attn_q.weight", turned, config), rows)
    assert torch.equal(rows_for_gguf("blk.0.attn_v.weight", rows, config), rows)
    assert torch.equal(rows_for_gguf("blk.0.attn_q.weight", rows, tiny("qwen3").config), rows)


def test_value_heads_of_recurrent_blocks(tmp_path: Path) -> None:
    """Rows of queries and keys stay, those of values and what they lead to take another order."""
    path = write_tiny_model(tmp_path / "m.gguf", "qwen35", value_heads=6, state=2)
    config = load_model(path).config
    here = torch.arange(8.0 + 12)[:, None]  # two key heads: queries, keys, then three value heads of each in turn
    there = rows_for_hf("blk.0.attn_qkv.weight", here, config)[:, 0].tolist()
    assert there == [*range(8), 8, 9, 12, 13, 16, 17, 10, 11, 14, 15, 18, 19]
    for name, rows in (("attn_qkv", 20), ("attn_gate", 12), ("ssm_beta", 6), ("ssm_alpha", 6), ("ffn_up", 96)):
        values = torch.arange(float(rows))[:, None]
        back = rows_for_gguf(f"blk.0.{name}.weight", rows_for_hf(f"blk.0.{name}.weight", values, config), config)
        assert torch.equal(back, values)
    strengths = rows_for_hf("blk.0.ssm_beta.weight", torch.arange(6.0)[:, None], config)[:, 0].tolist()
    assert strengths == [0, 2, 4, 1, 3, 5]
    columns = torch.arange(12.0)[None]
    turned = inputs_for_hf("blk.0.ssm_out.weight", columns, config)
    assert turned[0].tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
    assert torch.equal(inputs_for_gguf("blk.0.ssm_out.weight", turned, config), columns)
    assert torch.equal(inputs_for_hf("blk.3.attn_output.weight", columns, config), columns)


def test_modules_of_recurrent_blocks(tmp_path: Path) -> None:
    config = load_model(write_tiny_model(tmp_path / "m.gguf", "qwen35moe")).config
    for linear, module in (
        *(("attn_qkv", "linear_attn.in_proj_qkv"), ("attn_gate", "linear_attn.in_proj_z")),
        *(("ssm_out", "linear_attn.out_proj"), ("ffn_gate_shexp", "mlp.shared_expert.gate_proj")),
    ):
        assert module_name(f"blk.0.{linear}.weight", config) == f"model.layers.0.{module}"
        assert weight_name(f"model.layers.0.{module}") == f"blk.0.{linear}.weight"
    assert module_name("blk.3.attn_q.weight", config) == "model.layers.3.self_attn.q_proj"
    loaded = load_model(write_tiny_model(tmp_path / "m.gguf", "qwen3next"))
    assert module_name("blk.0.ssm_ba.weight", loaded.config) == "model.layers.0.linear_attn.in_proj_ba"
    old = load_model(write_tiny_model(tmp_path / "old.gguf", "qwen3next", fused_inputs=True)).config
    assert module_name("blk.0.ssm_in.weight", old) == "model.layers.0.linear_attn.in_proj_qkvz"
    assert weight_name("model.layers.0.linear_attn.in_proj_qkvz") == "blk.0.ssm_in.weight"
    with pytest.raises(NKATError, match=r"blk.0.attn_qkv.weight: .* which it is not in transformers; --export-lora"):
        peft_files(seeded_theta_set(loaded.tensors), 0.5, loaded.file)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter("llama"), tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"use_dora": True}, "use_dora: it scales every row"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "mixture's experts"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model's weights"),
        ({"lora_alpha": "much"}, "not a number"),
        ({"alpha_pattern": {"(": 3}}, "no regular expression"),
    ],
)
def test_settings_that_are_more_than_a_lora_are_refused(
    tiny: Callable[[str], LoadedModel], copied: Path, change: dict[str, Any], message: str
) -> None:
    settings = json.loads((copied / CONFIG).read_text())
    (copied / CONFIG).write_text(json.dumps({**settings, **change}))
    with pytest.raises(NKATError, match=message):
        read_peft(copied, tiny("llama").config)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.mlp.experts.3.up_proj.lora_A.weight", (3, 64), "mixture's experts"),
        ("model.embed_tokens.lora_embedding_A", (3, 64), "of an embedding"),
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", (64,), "DoRA"),
        ("model.layers.0.input_layernorm.weight", (64,), "neither lora_A nor lora_B"),
        ("model.layers.0.mlp.up_proj.lora_B.bias", (64,), "a bias"),
        ("model.layers.7.mlp.up_proj.lora_A.weight", (3, 64), "or none lora_B"),
        ("model.vision_tower.layers.0.fc1.lora_A.weight", (3, 64), "no linear layer of a block"),
    ],
)
def test_tensors_that_are_no_lora_of_a_linear_layer_are_named(
    tiny: Callable[[str], LoadedModel], copied: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    tensors = load_file(copied / WEIGHTS)
    save_file({**tensors, f"base_model.model.{name}": torch.ones(shape)}, copied / WEIGHTS)
    with pytest.raises(NKATError, match=message) as raised:
        open_adapter(copied, tiny("llama").file)
    assert name.rsplit(".lora", 1)[0] in str(raised.value)


def test_other_models_missing_files_and_nothing(tiny: Callable[[str], LoadedModel], copied: Path) -> None:
    with pytest.raises(NKATError, match="which the model does not have"):
        open_adapter(copied, tiny("phi3").file)
    with pytest.raises(NKATError, match="made for another model"):
        open_adapter(copied, load_model(write_tiny_model(copied / "wide.gguf", "llama", feed_forward=128)).file)
    zero = {
        name: torch.zeros_like(value) if "lora_B" in name else value
        for name, value in load_file(copied / WEIGHTS).items()
    }
    save_file(zero, copied / WEIGHTS)
    with pytest.raises(NKATError, match="never trained"):
        lora_set([(open_adapter(copied, tiny("llama").file), 1.0)])
    for raw in (b"", b"{}", np.int64(1 << 40).tobytes() + b"{}"):
        (copied / WEIGHTS).write_bytes(raw)
        with pytest.raises(NKATError, match="cannot be read"):
            read_peft(copied, tiny("llama").config)
    (copied / WEIGHTS).rename(copied / "adapter_model.bin")
    with pytest.raises(NKATError, match=r"adapter_model.bin is there"):
        read_peft(copied, tiny("llama").config)
    (copied / CONFIG).unlink()
    with pytest.raises(NKATError, match="says how strong"):
        read_peft(copied, tiny("llama").config)


def test_strength_by_pattern_and_rank(tiny: Callable[[str], LoadedModel], copied: Path) -> None:
    """The adapter itself has a rank and an alpha of its own for some layers; here the arithmetic alone."""
    settings = json.loads((copied / CONFIG).read_text())
    name, module = "blk.0.ffn_down.weight", "base_model.model.model.layers.0.mlp.down_proj"
    tensors = load_file(copied / WEIGHTS)
    plain = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    for change, scale in (
        ({"use_rslora": False}, 5 / 3),
        ({"use_rslora": True}, 5 / 3**0.5),
        ({"alpha_pattern": {"down_proj": 9}}, 3.0),
        ({"alpha_pattern": {"layers.1.mlp.down_proj": 9}}, 5 / 3),
    ):
        (copied / CONFIG).write_text(json.dumps({**settings, **change}))
        torch.testing.assert_close(read_peft(copied, tiny("llama").config)[name].product(), scale * plain)


def test_a_theta_of_experts_is_no_peft_adapter(tmp_path: Path) -> None:
    loaded = load_model(write_tiny_model(tmp_path / "m.gguf", "qwen3moe", blocks=1))
    theta_set = seeded_theta_set(loaded.tensors)
    theta = next(iter(theta_set.layers.values()))
    from nkat.theta.algebra import of_experts

    theta_set.layers["blk.0.ffn_down_exps.weight"] = of_experts([theta] * 6)
    with pytest.raises(NKATError, match=r"blk.0.ffn_down_exps.weight: .*experts are not"):
        peft_files(theta_set, 0.5, loaded.file)


def test_some_layers_are_named_in_full(tiny: Callable[[str], LoadedModel]) -> None:
    loaded = tiny("llama")
    theta_set = seeded_theta_set(loaded.tensors)
    del theta_set.layers["blk.0.attn_q.weight"]
    settings = json.loads(peft_files(theta_set, 0.5, loaded.file)[CONFIG])
    assert "q_proj" not in settings["target_modules"]
    assert "model.layers.1.self_attn.q_proj" in settings["target_modules"]
    assert "k_proj" in settings["target_modules"]
