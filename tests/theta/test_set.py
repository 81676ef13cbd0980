"""A model's Θ as one thing: cut, scaled by depth, checked against its model and its texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nkat.gguf.file import GGUFError, GGUFFile
from nkat.theta.set import (
    CALIBRATION_KEY,
    GUARD_PREFIX,
    HELDOUT_PREFIX,
    KEEP_KEY,
    ThetaSet,
    check_fits,
    check_judging_text,
    scale_by_depth,
    truncate_rank,
)
from tests.support.tiny_models import write_tiny_model
from tests.theta.test_modelfile import NAMES, make_set


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base.gguf", "llama")


@pytest.fixture
def theta(base: Path) -> ThetaSet:
    return make_set(base)


def test_truncated_rank_keeps_the_first_columns(base: Path) -> None:
    theta_set = make_set(base)
    cut = truncate_rank(theta_set, 2)
    assert cut.rank == 2
    assert torch.equal(cut.layers[NAMES[0]].p, theta_set.layers[NAMES[0]].p[:, :2])
    assert cut.nbytes < theta_set.nbytes


def test_a_cut_forgets_what_all_columns_measured(theta: ThetaSet) -> None:
    measured = {f"{prefix}change_percent": -1.0 for prefix in (HELDOUT_PREFIX, GUARD_PREFIX)}
    noted = replace(theta, notes={**theta.notes, **measured})
    assert truncate_rank(noted, 2).notes == theta.notes
    assert noted.notes != theta.notes  # control


def test_depth_scales_p_alone_and_is_noted(theta: ThetaSet) -> None:
    scaled = scale_by_depth(theta, 0.5)
    for name, factor in zip(NAMES, (1.0, 1.0, 0.5), strict=True):
        torch.testing.assert_close(scaled.layers[name].scale[0], theta.layers[name].scale[0] * factor)
        assert torch.equal(scaled.layers[name].scale[1], theta.layers[name].scale[1])
    assert scaled.notes["nkat.theta.depth_decay"] == 0.5
    assert "nkat.theta.depth_decay" not in theta.notes


def test_a_theta_belongs_to_2d_weights_that_are_there(theta: ThetaSet, base: Path) -> None:
    tensors = GGUFFile.open(base).tensors
    check_fits(theta, tensors, base)
    other = replace(theta, layers={"blk.9.attn_q.weight": theta.layers[NAMES[0]]})
    with pytest.raises(GGUFError, match=r"blk\.9\.attn_q\.weight"):
        check_fits(other, tensors, base)
    with pytest.raises(GGUFError, match="does not fit"):
        check_fits(replace(theta, layers={"blk.0.attn_norm.weight": theta.layers[NAMES[0]]}), tensors, base)


@pytest.mark.parametrize("key", [CALIBRATION_KEY, KEEP_KEY])
def test_the_text_it_was_made_from_does_not_judge_it(theta: ThetaSet, base: Path, key: str) -> None:
    made = replace(theta, notes={key: "a" * 64})
    with pytest.raises(GGUFError, match="made from that very text"):
        check_judging_text(made, "a" * 64, base)
    check_judging_text(made, "b" * 64, base)
