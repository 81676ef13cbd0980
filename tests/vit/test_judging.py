"""Judging by class: counts by hand and by SciPy's kind of sums, what a checkpoint keeps of the test set, its damage."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from nkat.errors import NKATError
from nkat_vit import checkpoint, judging
from nkat_vit.by_class import ClassFigures, class_table
from nkat_vit.checkpoint import load_model
from nkat_vit.data import load_images
from nkat_vit.judging import (
    Judgement,
    class_accuracies,
    confusion_matrix,
    describe_classes,
    judge,
    judge_once,
    judged_facts,
    kept_judgement,
    most_taken_for,
    top_share,
)
from nkat_vit.judging_plots import plot_confusion
from nkat_vit.model import NKATViT
from nkat_vit.predict import accuracy, predict_logits
from nkat_vit.recipe import make_recipe
from tests.support.vit_data import run_module, write_digits

SMALL = {"dataset": "emnist-digits", "embed_dim": 32, "depth": 1, "heads": 4, "gauge_rank": 2, "validation": 24}
CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has not seen the test set, with its data below it."""
    torch.manual_seed(0)
    recipe = make_recipe(SMALL)
    model = NKATViT(recipe.model)
    with torch.no_grad():
        model.head.weight.mul_(50)  # or it would answer one class for all
    content = {"kind": "weights", "recipe": recipe.values(), "weights": model.state_dict()}
    checkpoint.save(tmp_path / "best.pt", content | {"steps": 5, "epoch": 1, "validation": 0.5})
    write_digits(tmp_path / "data")
    return tmp_path


def test_a_confusion_matrix_counts_pairs() -> None:
    labels, guesses = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 2, 1, 2, 0, 0])
    matrix = confusion_matrix(labels, guesses, 4)
    assert matrix.tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [2, 0, 1, 0], [0, 0, 0, 0]]
    assert class_accuracies(matrix) == [0.5, 1.0, pytest.approx(1 / 3), None]
    assert [most_taken_for(matrix, label) for label in range(4)] == [(2, 0.5), None, (0, pytest.approx(2 / 3)), None]
    assert Judgement(matrix, None, None).accuracy == 0.5
    assert torch.equal(confusion_matrix(guesses, labels, 4), matrix.T)  # control: rows are the labels
    words = describe_classes(matrix, ("a", "b", "c", "d"))
    assert words == "worst c, 33.3 % right (66.7 % taken for a); best b, 100.0 %"


def test_top_five_is_a_sorted_list_of_five() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 9), torch.randint(0, 9, (200,))
    for count in (1, 5, 9):
        expected = [
            int(label) in row.argsort(descending=True)[:count].tolist()
            for row, label in zip(logits, labels, strict=True)
        ]
        assert top_share(logits, labels, count) == sum(expected) / 200
    assert top_share(logits, labels, 1) < top_share(logits, labels, 5) < top_share(logits, labels, 9) == 1.0


def test_judging_is_accuracy_and_does_not_depend_on_batches(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = load_model(run)
    test = load_images("emnist-digits", run / "data", train=False)
    whole = judge(trained.model, test)
    logits = predict_logits(trained.model, test.images)
    assert whole.accuracy == accuracy(trained.model, test)
    assert whole.confusion.sum() == len(test) == 40
    assert whole.top5 == top_share(logits, test.labels)
    assert whole.confusion.sum(1).tolist() == torch.bincount(test.labels, minlength=10).tolist()
    assert whole.images_per_second is not None
    monkeypatch.setattr("nkat_vit.predict._BATCH", 7)
    parts = judge(trained.model, test)
    assert torch.equal(parts.confusion, whole.confusion)
    few = NKATViT(replace(trained.recipe.model, classes=5)).eval()
    some = test.take((test.labels < 5).nonzero().flatten())
    assert judge(few, some).top5 is None  # of five, all are among the first five


def test_the_test_set_is_read_once_and_what_was_found_is_enough(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_model(run)
    first = judge_once(before, run / "data", CPU)
    monkeypatch.setattr(judging, "load_images", lambda *_, **__: pytest.fail("the test set was read again"))
    again = judge_once(load_model(run), run / "data", CPU)
    assert again.facts == first.facts
    kept = kept_judgement(again)
    assert kept is not None
    assert kept.confusion.tolist() == first.facts["test_confusion"]
    assert (kept.accuracy, kept.top5) == (first.facts["test"], first.facts["test_top5"])
    assert kept_judgement(before) is None
    done = run_module("nkat_vit.evaluate", run, "--data-root", run / "none", "--threads", 1, "--json", "-")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["classes"]["emnist-digits"]["confusion"] == first.facts["test_confusion"]
    assert record["sets"]["emnist-digits"]["top5"]["mean"] == first.facts["test_top5"]
    assert record["runs"][0]["images_per_second"] == first.facts["test_images_per_second"]
    assert "top-5 accuracy" in done.stdout
    assert describe_classes(kept.confusion, "0123456789") in done.stdout


def test_checkpoints_judged_before_say_so_and_are_judged_again_on_request(run: Path) -> None:
    content = checkpoint.load(run / "best.pt", "weights")
    checkpoint.save(run / "best.pt", content | {"test": 0.25, "test_images": 40, "test_sha256": "0"})
    command = ["nkat_vit.evaluate", run, "--data-root", run / "data", "--threads", 1, "--json", "-"]
    old = run_module(*command)
    assert old.returncode == 0, old.stderr
    record = json.loads(old.stdout.splitlines()[-1])
    assert (record["classes"], record["judged_without_classes"]) == ({}, [str(run / "best.pt")])
    assert record["sets"]["emnist-digits"]["accuracy"]["mean"] == 0.25
    assert record["sets"]["emnist-digits"]["top5"] is None
    assert "top-5" not in old.stdout
    assert "judged before figures by class were kept" in old.stderr
    anew = run_module(*command, "--judge-again", "--classes", "--confusion", run / "pictures")
    assert anew.returncode == 0, anew.stderr
    record = json.loads(anew.stdout.splitlines()[-1])
    right = judged_facts(load_model(run), run / "data", CPU, again=True)["test"]
    assert record["sets"]["emnist-digits"]["accuracy"]["mean"] == right
    assert f"the test set was read again: {100 * right:.2f} % right, 25.00 % when it was first judged" in anew.stderr
    assert record["judged_without_classes"] == []
    assert "most taken for" in anew.stdout
    picture = run / "pictures" / "confusion_emnist-digits.png"
    assert Image.open(picture).size[0] > 500
    refused = run_module(*command, "--judge-again", "--confusion", run / "pictures")
    assert (refused.returncode, "exists already; give --force" in refused.stderr) == (2, True)
    assert refused.stdout == ""  # known before anything is measured
    assert checkpoint.load(run / "best.pt", "weights")["test"] == 0.25  # a run is looked at, not changed


@pytest.mark.parametrize(
    "change",
    [
        {"test_confusion": 1},
        {"test_confusion": [[1] * 10] * 9},
        {"test_confusion": [[1] * 9] * 10},
        {"test_confusion": [[0] * 10] * 10},
        {"test_confusion": [[-1] + [1] * 9] * 10},
        {"test_confusion": [[1.0] * 10] * 10},
        {"test_confusion": [[1] * 10] * 10},  # not what the accuracy is of
        {"test_top5": 1.5},
        {"test_top5": "x"},
        {"test_images_per_second": math.nan},
        {"test_images_per_second": -1.0},
        {"test": 0.123},
        {"test_images": 41},
    ],
)
def test_damaged_figures_are_refused(run: Path, change: dict) -> None:
    good = judge_once(load_model(run), run / "data", CPU)
    assert kept_judgement(good) is not None
    with pytest.raises(NKATError, match=r"damaged \(the test set's figures\)"):
        kept_judgement(replace(good, facts=good.facts | change))


def test_runs_of_a_set_are_taken_together() -> None:
    ones = [torch.tensor([[3, 1], [2, 2]]), torch.tensor([[4, 0], [1, 3]])]
    figures = ClassFigures.of("x", ("a", "b"), [Judgement(one, None, None) for one in ones])
    assert figures.confusion.tolist() == [[7, 1], [3, 5]]
    rows = figures.rows()
    assert [row["images"] for row in rows] == [4, 4]  # of a run
    assert rows[0]["mean"] == 0.875
    assert rows[0]["sd"] == pytest.approx(0.125 * math.sqrt(2))
    assert rows[1]["taken_for"] == "a"
    assert rows[1]["taken_share"] == 3 / 8
    assert class_table(figures, "").records()[0]["class"] == "a"
    assert figures.record()["accuracy"][1] == {"mean": 0.625, "sd": pytest.approx(0.125 * math.sqrt(2)), "n": 2}


def test_the_picture_has_rows_that_add_up_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("nkat_vit.judging_plots.save_figure", lambda figure, *_, **__: drawn.append(figure))
    names = ("cat", "dog", "automobile")
    plot_confusion(Path("x"), torch.tensor([[8, 2, 0], [0, 995, 5], [0, 0, 0]]), names, "title", force=False)
    axes = drawn[0].axes[0]
    shown = axes.images[0].get_array()
    assert shown.sum(axis=1).tolist() == [100, 100, 0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(names)
    assert [text.get_text() for text in axes.texts] == ["80", "20", "100", "<1"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "taken for")
    plot_confusion(Path("x"), torch.eye(47, dtype=torch.int64), [str(i) for i in range(47)], "title", force=False)
    assert not drawn[1].axes[0].texts  # no room for numbers
