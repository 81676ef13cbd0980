"""The image benchmarks as they are run, on pictures that are learned in moments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import vit_search
from benchmarks.vit_ablation import parse_change, steps_of
from benchmarks.vit_search import draw_shapes
from nkat.errors import NKATError
from nkat_vit import data, search_job
from nkat_vit.recipe import PRESETS
from nkat_vit.search import BASELINE
from tests.conftest import ROOT
from tests.support.vit_data import run_module, write_cifar, write_digits

SMALL = "embed_dim=32,depth=1,heads=4,batch_size=24,lr=3e-3"


def ablate(root: Path, out: Path, *more: object) -> dict | None:
    done = run_module(
        "benchmarks.vit_ablation", "--dataset", "emnist-digits", "--data-root", root, "--output-dir", out,
        "--epochs", 2, "--limit-train", 48, "--validation", 24, "--amp", "off", "--threads", 1, "--seeds", 2, *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if "{" in done.stdout else None


def test_an_ablation_pairs_by_seed_and_can_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "stage2", parse_change(SMALL))
    root = write_digits(tmp_path / "data")
    whole = ablate(root, tmp_path / "a", "nkat_strength=0", "pool=seq", "--ladder")
    assert [step["settings"] for step in whole["steps"]] == [
        {},
        {"nkat_strength": 0},
        {"nkat_strength": 0, "pool": "seq"},
    ]
    for before, step in zip(whole["steps"], whole["steps"][1:], strict=False):
        assert step["change"] == [a - b for a, b in zip(step["accuracy"], before["accuracy"], strict=True)]
    for share in ("0/2", "1/2"):
        assert ablate(root, tmp_path / "b", "nkat_strength=0", "pool=seq", "--ladder", "--share", share) is None
    shared = ablate(root, tmp_path / "b", "nkat_strength=0", "pool=seq", "--ladder")
    assert [step["accuracy"] for step in shared["steps"]] == [step["accuracy"] for step in whole["steps"]]


def test_changes_are_settings() -> None:
    assert parse_change("top_k=0,pool=seq,lr=1e-3") == {"top_k": 0, "pool": "seq", "lr": 1e-3}
    assert parse_change("randaugment=[1,9],top_k=0") == {"randaugment": [1, 9], "top_k": 0}
    assert steps_of(["a=1", "b=2"], ladder=False)[2] == ("b=2", {"b": 2})
    assert steps_of(["a=1", "b=2"], ladder=True)[2] == ("+ b=2", {"a": 1, "b": 2})
    with pytest.raises(NKATError, match="name=value"):
        parse_change("top_k")


def test_shapes_are_drawn_by_seed() -> None:
    shapes = draw_shapes(8, 0, 100)
    assert shapes[0] == BASELINE
    assert shapes == draw_shapes(8, 0, 100)
    assert shapes[1:] != draw_shapes(8, 1, 100)[1:]
    assert len({tuple(shape.values()) for shape in shapes}) == 8


def test_the_ranking_of_short_and_long_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_CONTENTS", {})
    budget = {"epochs": 3, "epoch_size": 128, "limit_train": 0, "validation": 32, "max_tokens": 100, "batch_size": 64}
    monkeypatch.setitem(search_job.BUDGETS, "quick", budget)
    small = BASELINE | {"embed_dim": 16, "depth": 1, "patch_size": 4}
    monkeypatch.setattr(vit_search, "draw_shapes", lambda *_: [small | {"depth": depth} for depth in (1, 2, 3)])
    done = run_module(
        "benchmarks.vit_search", "--data-root", write_cifar(tmp_path / "data", per_batch=80), "--output-dir",
        tmp_path / "out", "--longer", 2, "--amp", "off", "--threads", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert {title: set(of) for title, of in record["rank_correlation"].items()} == {
        "local_tpe": {"1", "3"},
        "accuracy": {"1", "3"},
    }
    assert [len(curve) for curve in record["accuracies"]["longer"]] == [3, 3, 3]


def test_steps_of_two_checkouts_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "fast", parse_change(SMALL) | {"epochs": 2, "warmup": 1})
    common = ["--dataset", "emnist-digits", "--rounds", 1, "--amp", "off", "--threads", 1]
    own = ["--both", "opt=muon,batch_size=8", "--this", "muon_steps=3"]
    done = run_module("benchmarks.vit_against", ROOT, *common, *own)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["batch_size"], record["this"]) == (8, {"muon_steps": 3})
    assert record["ratio"] == record["median_seconds"]["other"] / record["median_seconds"]["this"]
    assert set(record["fastest_seconds"]) == {"other", "this"}
    refused = run_module("benchmarks.vit_against", ROOT / "docs", *common)
    assert refused.returncode == 2
    assert "no checkout" in refused.stderr
    unknown = run_module("benchmarks.vit_against", ROOT, *common, "--this", "muon_step=3")
    assert unknown.returncode == 2
    assert "muon_step" in unknown.stderr
