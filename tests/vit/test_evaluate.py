"""The Stage-2 table: figures from known accuracies, and the command on real runs."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch

from nkat.errors import NKATError
from nkat.host.tables import as_text
from nkat_vit import checkpoint, data
from nkat_vit.evaluate import RunResult, remarks, stage2_rows, stage2_table, summarise, verdicts
from nkat_vit.metrics import Spread, lambda_theory
from nkat_vit.model import NKATViT
from nkat_vit.recipe import make_recipe
from tests.support.vit_data import run_in_process, run_module, write_cifar, write_digits, write_grey

SMALL = {"embed_dim": 32, "depth": 1, "heads": 4, "gauge_rank": 2, "validation": 24, "batch_size": 24, "warmup": 0}


def result(dataset: str, seed: int, accuracy: float, lam: float = 20.0) -> RunResult:
    return RunResult(dataset, seed, accuracy, 100, lam, "")


def shown(summary: dict, robustness: Spread | None) -> str:
    rows = stage2_rows(summary, robustness)
    return as_text(stage2_table(rows, summary["lambda"])) + "\n\n" + "\n".join(remarks(summary))


def test_the_plans_table_comes_out_of_the_plans_accuracies() -> None:
    runs = [result("mnist", 0, 0.91), result("fashion", 0, 0.87), result("emnist", 0, 0.75), result("cifar10", 0, 0.60)]
    summary = summarise(runs)
    assert summary["Global TPE"].mean == pytest.approx((0.91 + 0.87 + 0.75 + 0.60) / 4 / math.log10(21))
    assert summary["Consistency"].mean > 0.8
    text = shown(summary, Spread.of([0.8]))
    lines = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert lines["Global TPE"].endswith("no")
    assert lines["Robustness"].endswith("yes")
    assert lines["CIFAR-10, 100 pictures: accuracy"].endswith("yes")
    assert "(n = 1)" in lines["Global TPE"]


def test_no_target_is_met_by_size_alone() -> None:
    """The smallest model there is a test of: 42,449 parameters at chance have TPE 2.53, and pass nothing."""
    lam = lambda_theory(42_449)
    names = ("mnist", "fashion", "emnist", "cifar10")
    chance = summarise([result(name, 0, 0.105, lam) for name in names])
    assert chance["sets"]["cifar10"]["tpe"].mean == pytest.approx(2.53, abs=0.01)
    sure = Spread.of([1.0])  # what never sees anything is changed by nothing
    met = verdicts(chance, sure)
    assert met["cifar10"] == {"accuracy": "no", "tpe": "not with this accuracy"}
    assert set(met["all"].values()) == {"not with this accuracy"}
    text = shown(chance, sure)
    assert not [line for line in text.splitlines() if line.endswith(" yes")]
    assert re.search(r"cifar10: TPE 2\.5\d+ is bought by size alone: the accuracy, 0\.1050, is below 0\.60", text)
    # One set below its accuracy takes its own TPE along, and the figures over all sets.
    accuracies = dict(zip(names, (0.99, 0.95, 0.90, 0.59), strict=True))
    near = summarise([result(name, 0, accuracy, 14.4) for name, accuracy in accuracies.items()])
    assert near["Global TPE"].mean > 0.70
    met = verdicts(near, Spread.of([0.9]))
    assert met["mnist"] == {"accuracy": "yes", "tpe": "yes"}
    assert met["cifar10"] == {"accuracy": "no", "tpe": "not with this accuracy"}
    assert set(met["all"].values()) == {"not with this accuracy"}
    reached = summarise([result(name, 0, a, 14.4) for name, a in (accuracies | {"cifar10": 0.60}).items()])  # control
    assert set(verdicts(reached, Spread.of([0.9]))["all"].values()) == {"yes"}
    assert verdicts(summarise([result("mnist", 0, 0.911)]), None) == {
        "mnist": {"accuracy": "yes", "tpe": "no"},
        "all": {},
    }


def test_what_global_tpe_takes_is_said() -> None:
    assert (
        "takes a mean accuracy of 0.9256 at lambda 20.00; it is 0.9000"
        in remarks(summarise([result("mnist", 0, 0.9)]))[-1]
    )
    large = remarks(summarise([result("mnist", 0, 0.9, 26.0)]))
    assert large == ["Global TPE 0.70 cannot be reached at lambda 26.00, whatever the accuracy"]
    assert "takes a mean" in remarks(summarise([result("mnist", 0, 0.9, 25.8)]))[-1]  # control


def test_spread_over_common_seeds_only() -> None:
    runs = [result("mnist", s, a) for s, a in ((0, 0.9), (1, 0.8), (2, 0.1))]
    runs += [result("cifar10", s, a, 40.0) for s, a in ((0, 0.5), (1, 0.6))]
    summary = summarise(runs)
    assert summary["lambda"] == 40.0
    assert summary["Global TPE"].n == 2
    assert summary["Global TPE"].mean == pytest.approx(0.7 / math.log10(41))
    assert summary["sets"]["mnist"]["accuracy"].n == 3
    assert summary["sets"]["mnist"]["accuracy"].sd == pytest.approx(torch.tensor([0.9, 0.8, 0.1]).std().item())
    assert "without fashion, emnist" in shown(summary, None)
    apart = summarise([result("mnist", 0, 0.9), result("cifar10", 1, 0.5)])
    assert apart["Global TPE"] == Spread(pytest.approx(0.7 / math.log10(21)), None, 1)
    with pytest.raises(NKATError, match="same seed"):
        summarise([result("mnist", 0, 0.9), result("mnist", 0, 0.9)])


def test_runs_are_trained_once_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", run_in_process)
    root = write_digits(tmp_path / "data")
    config = tmp_path / "c.json"
    config.write_text(json.dumps(SMALL))
    command = ["--train", "--sets", "emnist-digits", "--config", config, "--epochs", 1, "--threads", 1]
    command += ["--data-root", root, "--output", tmp_path / "runs", "--json", "-"]
    first = run_module("nkat_vit.evaluate", *command)
    assert first.returncode == 0, first.stderr
    record = json.loads(first.stdout.splitlines()[-1])
    own = json.loads((tmp_path / "runs" / "emnist-digits-seed0" / "result.json").read_text())
    assert record["sets"]["emnist-digits"]["accuracy"] == {"mean": own["test"], "sd": None, "n": 1}
    assert record["robustness"] is None
    assert record["met"] == {"all": {}}  # this set has no target
    assert record["mean_accuracy"]["mean"] == own["test"]
    again = run_module("nkat_vit.evaluate", *command)
    assert "done already" in again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["runs"] == record["runs"]
    for more, said in ((["--epochs", 2], "epochs 1"), (["--preset", "fast", "--epochs", 1], "was begun with")):
        other = run_module("nkat_vit.evaluate", *command, *more)  # not the runs that were asked for
        assert other.returncode == 2
        assert said in other.stderr
        assert "cannot change" in other.stderr


def test_all_sets_are_checked_before_the_first_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_CONTENTS", {})
    for name in ("mnist", "fashion"):
        write_grey(tmp_path, name, train=60, test=30)
    broken = tmp_path / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    broken.write_bytes(broken.read_bytes()[:-40])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was trained"))
    command = ["--train", "--sets", "mnist", "fashion", "--data-root", tmp_path, "--output", tmp_path / "runs"]
    done = run_module("nkat_vit.evaluate", *command)
    assert done.returncode == 2
    assert f"{broken}: damaged" in done.stderr


def test_robustness_of_a_cifar_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_CONTENTS", {})
    write_cifar(tmp_path)
    recipe = make_recipe(SMALL | {"dataset": "cifar10"})
    torch.manual_seed(0)
    content = {"kind": "weights", "recipe": recipe.values(), "weights": NKATViT(recipe.model).state_dict()}
    checkpoint.save(tmp_path / "best.pt", content | {"steps": 5, "epoch": 1, "validation": 0.5})
    command = [tmp_path, "--data-root", tmp_path, "--robustness-images", 12, "--threads", 1, "--json", "-"]
    done = run_module("nkat_vit.evaluate", *command)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["corruptions"][0]["images"] == 12
    assert len(record["corruptions"][0]["accuracy"]) == 15
    assert record["corruptions"][0]["frost"] == "procedural"
    assert 0 <= record["robustness"]["mean"] <= 1
    assert record["runs"][0]["images"] == 24  # no test accuracy in the checkpoint: measured now
    assert "CIFAR-10-C style, 12 pictures" in done.stdout


def test_nothing_to_judge_is_a_mistake(tmp_path: Path) -> None:
    assert run_module("nkat_vit.evaluate").returncode == 2
    absent = run_module("nkat_vit.evaluate", tmp_path / "x")
    assert absent.returncode == 2
    assert "there is no such file" in absent.stderr
