"""Layer selection by default, by glob and by other checkpoints' names."""

from __future__ import annotations

from pathlib import Path

import pytest

from nkat.errors import NKATError
from nkat.gguf.file import GGUFFile
from nkat.theta.layers import adaptable_layers, gguf_name, select_layers
from tests.support.tiny_models import write_tiny_model


@pytest.fixture
def tensors(tmp_path: Path):
    return GGUFFile.open(write_tiny_model(tmp_path / "t.gguf", "qwen2", blocks=11)).tensors


def test_default_is_the_seven_linear_weights_of_each_block_in_order(tensors) -> None:
    names = adaptable_layers(tensors)
    assert len(names) == 7 * 11
    assert [int(name.split(".")[1]) for name in names] == sorted(7 * list(range(11)))
    assert not any("norm" in name or "embd" in name or name.startswith("output") for name in names)


def test_default_of_recurrent_blocks_and_experts(tmp_path: Path) -> None:
    """What leads into and out of them, and the expert that is every token's; the others where they are named."""
    tensors = GGUFFile.open(write_tiny_model(tmp_path / "t.gguf", "qwen35moe")).tensors
    shared = ["ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"]
    of_block = {
        i: {name.split(".")[2] for name in adaptable_layers(tensors) if name.startswith(f"blk.{i}.")} for i in (0, 3)
    }
    assert of_block[0] == {"attn_qkv", "attn_gate", "ssm_out", *shared}
    assert of_block[3] == {"attn_q", "attn_k", "attn_v", "attn_output", *shared}
    assert len(select_layers(tensors, ["blk.*.ffn_down_exps.weight"])) == 4


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.0.feed_forward.w1.weight", "blk.0.ffn_gate.weight"),
        ("layers.3.feed_forward.w2.weight", "blk.3.ffn_down.weight"),
        ("layers.3.feed_forward.w3.weight", "blk.3.ffn_up.weight"),
        ("layers.0.attention.wq.weight", "blk.0.attn_q.weight"),
        ("layers.1.attention.wk.weight", "blk.1.attn_k.weight"),
        ("layers.1.attention.wv.weight", "blk.1.attn_v.weight"),
        ("layers.1.attention.wo.weight", "blk.1.attn_output.weight"),
        ("model.layers.2.self_attn.q_proj.weight", "blk.2.attn_q.weight"),
        ("model.layers.2.mlp.down_proj.weight", "blk.2.ffn_down.weight"),
        ("blk.4.attn_q.weight", "blk.4.attn_q.weight"),
    ],
)
def test_names_of_other_checkpoints(tensors, pattern: str, expected: str) -> None:
    assert gguf_name(pattern) == expected
    assert select_layers(tensors, [pattern]) == [expected]


def test_globs_select_each_layer_once(tensors) -> None:
    assert len(select_layers(tensors, ["blk.*.attn_q.weight"])) == 11
    assert len(select_layers(tensors, ["layers.*.attention.wq.weight", "blk.1?.attn_q.weight"])) == 11
    assert select_layers(tensors, ["blk.[03].ffn_up.weight"]) == ["blk.0.ffn_up.weight", "blk.3.ffn_up.weight"]


def test_no_match_suggests_the_nearest(tensors) -> None:
    with pytest.raises(NKATError, match=r"no layer matches 'blk.0.atn_q.weight'; the nearest are blk.0.attn_q.weight"):
        select_layers(tensors, ["blk.0.attn_k.weight", "blk.0.atn_q.weight"])
    with pytest.raises(NKATError, match=r"is a tensor of shape 64 that Θ cannot adapt"):
        select_layers(tensors, ["output_norm.weight"])
    with pytest.raises(NKATError, match="nothing to adapt"):
        select_layers({}, None)


def test_of_a_mixture_the_experts_are_chosen_by_name(tmp_path: Path) -> None:
    tensors = GGUFFile.open(write_tiny_model(tmp_path / "t.gguf", "qwen3moe", blocks=2)).tensors
    names = adaptable_layers(tensors)
    assert names == [f"blk.{i}.attn_{n}.weight" for i in range(2) for n in ("q", "k", "v", "output")]
    assert select_layers(tensors, None) == names
    assert select_layers(tensors, ["blk.*.ffn_down_exps.weight", "blk.1.attn_q.weight"]) == [
        *("blk.0.ffn_down_exps.weight", "blk.1.attn_q.weight", "blk.1.ffn_down_exps.weight"),
    ]
    with pytest.raises(NKATError, match=r"tensor of shape 6x64 that Θ cannot adapt"):
        select_layers(tensors, ["blk.0.ffn_gate_inp.weight"])


def test_blocks_that_foretell_later_tokens_get_no_theta(tmp_path: Path) -> None:
    with_draft, without = (
        GGUFFile.open(write_tiny_model(tmp_path / f"{n}.gguf", "glm4", draft=n)).tensors for n in (2, 0)
    )
    assert {"blk.3.attn_q.weight", "blk.4.ffn_up.weight"} <= with_draft.keys()
    assert adaptable_layers(with_draft) == adaptable_layers(without)
    with pytest.raises(NKATError, match=r"blk\.3\.attn_q\.weight"):
        select_layers(with_draft, ["blk.3.attn_q.weight"])
