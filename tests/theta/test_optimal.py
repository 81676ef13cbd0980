"""What is said of a search's best where it is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nkat.errors import NKATError
from nkat.theta.modelfile import open_model_file
from nkat.theta.optimal import optimal_name


def said(path: Path) -> str:
    with pytest.raises(NKATError) as error:
        open_model_file(path)
    return str(error.value)


def test_names_tell_every_gamma_apart() -> None:
    assert [optimal_name(4, gamma) for gamma in (0.97, 0.9, 0.985, 0.9965)] == [
        f"optimal_rank4_gamma{text}.nkat" for text in ("0.97", "0.90", "0.985", "0.9965")
    ]


def test_another_winner_is_named(tmp_path: Path) -> None:
    setting = {"rank": 2, "gamma": 0.985}
    record = {"file": "elsewhere/optimal_rank2_gamma0.985.nkat", "setting": setting}
    (tmp_path / "optimal.json").write_text(json.dumps(record))
    wanted = tmp_path / "optimal_rank4_gamma0.97.nkat"
    best = f"the best that the search in {tmp_path} found is {tmp_path / 'optimal.nkat'} (rank 2, gamma 0.985)"
    assert said(wanted) == f"{wanted}: no such file: {best}"
    assert "found is" in said(tmp_path / "optimal.nkat")
    assert said(tmp_path / "other.nkat") == f"{tmp_path / 'other.nkat'}: no such file"  # control


def test_why_there_is_none_is_said(tmp_path: Path) -> None:
    wanted = tmp_path / "optimal.nkat"
    assert said(wanted) == f"{wanted}: no such file"
    (tmp_path / "optimal.json").write_text(json.dumps({"file": None, "why_none": "no Θ beats the model without it"}))
    assert said(wanted) == (
        f"{wanted}: no such file: the search in {tmp_path} wrote none, because no Θ beats the model without it"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"file": 3}', '{"file": "x", "setting": 4}'])
def test_what_no_search_wrote_says_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "optimal.json").write_text(content)
    assert said(tmp_path / "optimal.nkat").endswith("optimal.nkat: no such file")
