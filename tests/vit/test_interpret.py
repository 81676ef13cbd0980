"""Interpretation: commutator shares against written-out sums, files of a run, and untrained models."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nkat_vit import checkpoint, interpret_plots
from nkat_vit.interpret import look, without_gauge
from nkat_vit.model import NKATViT, ViTConfig
from nkat_vit.recipe import make_recipe
from tests.support.vit_data import run_module, write_digits

VALUES = {"dataset": "emnist-digits", "embed_dim": 32, "depth": 2, "heads": 4, "gauge_rank": 2, "validation": 24}
CONFIG = ViTConfig(
    embed_dim=32, depth=2, heads=4, color_dim=4, gauge_rank=2, nkat_strength=0.8, dropout_attn=0, dropout_embed=0
)


def test_facts_of_layers_are_what_they_say() -> None:
    model, x = NKATViT(CONFIG).eval(), torch.rand(4, 3, 32, 32)
    logits, attention, flow, facts = look(model, x)
    torch.testing.assert_close(logits, model(x)[0])
    torch.testing.assert_close(flow.sum(-1), torch.ones(4))
    assert all(1 <= layer.keys <= CONFIG.top_k for layer in facts)
    assert all(0 <= e <= 2.6 for layer in facts for e in layer.entropy)  # of at most six keys
    # The scores with and without the term differ by the share that is reported.
    layer = model.blocks[0].attention
    seen: list[tuple] = []
    layer.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[:2]))
    model(x)
    with torch.no_grad():
        q, k, _ = layer.project(*seen[0])
        gauge, layer.gauge = layer.gauge, None
        plain = layer.project(*seen[0])[0] @ k.mT
        layer.gauge = gauge
    share = ((q @ k.mT - plain) ** 2).mean((0, 2, 3)).sqrt() / (plain**2).mean((0, 2, 3)).sqrt()
    torch.testing.assert_close(torch.tensor(facts[0].commutator), share, rtol=1e-3, atol=1e-6)
    assert share.min() > 1e-3
    assert len(attention) == 2


@pytest.mark.isa
def test_taking_the_gauge_out_is_strength_zero_and_is_undone() -> None:
    torch.manual_seed(0)
    model = NKATViT(CONFIG).eval()
    torch.manual_seed(0)
    zero = NKATViT(replace(CONFIG, nkat_strength=0.0)).eval()
    x = torch.rand(4, 3, 32, 32)
    before = model(x)[0]
    assert torch.equal(without_gauge(model, x), zero(x)[0])
    assert torch.equal(model(x)[0], before)
    assert not torch.equal(before, zero(x)[0])
    none = look(zero, x)[3]
    assert [layer.commutator for layer in none] == [[0.0] * 4] * 2


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would be written, by the file's name."""
    kept: dict[str, Any] = {}
    monkeypatch.setattr(interpret_plots, "save_figure", lambda figure, path, **_: kept.update({path.name: figure}))
    return kept


def test_a_sample_says_its_scale_its_layer_and_whose_attention_it_is(figures: dict[str, Any]) -> None:
    """Colours are seen by two of four blocks, as by three of the preset's seven: the last has none to show."""
    config = replace(CONFIG, depth=4, color_layers=2, heads=8, pool="cls")
    model, image = NKATViT(config).eval(), torch.rand(1, 3, 32, 32)
    _, attention, flow, _ = look(model, image)
    weights = [layer[0] for layer in attention]
    for pool, looker in (("cls", "the CLS token looks at"), ("mean", "all tokens look at, the mean")):
        if pool == "mean":
            config = replace(config, pool=pool)
            weights, flow = [w[:, 1:, 1:] for w in weights], flow[:, 1:]
        interpret_plots.plot_sample(Path(pool), image[0], flow[0], weights, config, "a picture")
        figure = figures[pool]
        said = [text.get_text() for text in figure.texts]
        assert said[-3:] == [
            f"what {looker}: each layer, the mean of its heads",
            f"what {looker}: the heads of layer 1",
            f"what {looker}: the heads of layer 3",
        ]
        titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
        colours = ("red", "red", "green", "green", "blue", "blue", "shared", "shared")
        assert titles[-16:-8] == [f"head {head}: {colour}" for head, colour in enumerate(colours)]
        assert titles[-8:] == [f"head {head}" for head in range(8)]
        scales = {}
        for axes in figure.axes:
            if axes.get_title() and axes.get_title() != "picture":
                shown = axes.images[-1]
                scales.setdefault(axes.get_subplotspec().rowspan.start, set()).add(shown.get_clim())
                assert shown.get_array().max() <= shown.get_clim()[1] + 1e-6
        assert sorted(scales) == [0, 1, 2, 3]
        assert all(len(limits) == 1 and next(iter(limits))[0] == 0 for limits in scales.values())  # one a row, from 0
        received = weights[3][:, 0, 1:] if pool == "cls" else weights[3].mean(1)
        assert next(iter(scales[3]))[1] == pytest.approx(received.max().item(), rel=1e-5)
        bars = [axes for axes in figure.axes if axes.get_ylabel() == "weight of a cell"]
        assert [bar.get_ylim()[1] for bar in bars] == [pytest.approx(next(iter(scales[row]))[1]) for row in range(4)]


def test_axes_start_at_zero_count_in_whole_numbers_and_legends_are_drawn(figures: dict[str, Any]) -> None:
    model, x = NKATViT(CONFIG).eval(), torch.rand(4, 3, 32, 32)
    gauges = [block.attention.gauge for block in model.blocks]
    interpret_plots.plot_gauges(Path("gauges"), gauges)
    layers = [asdict(layer) for layer in look(model, x)[3]]
    record = {"layers": layers, "accuracy": 0.5, "accuracy_without_gauge": 0.5}
    interpret_plots.plot_summary(Path("summary"), record, "some")
    for figure in figures.values():
        panels = [axes for axes in figure.axes if axes.get_title()]
        for axes in panels:
            if "layer" in (axes.get_xlabel(), axes.get_ylabel()):
                counted = axes.xaxis if axes.get_xlabel() in ("layer", "head") else axes.yaxis
                assert all(tick == int(tick) for tick in counted.get_ticklocs())
            if axes.lines:
                assert axes.get_ylim()[0] == 0
                assert axes.get_legend() is not None
    assert len(figures["summary"].axes) == 4


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder whose best.pt claims a good accuracy."""
    recipe = make_recipe(VALUES)
    torch.manual_seed(0)
    content = {"kind": "weights", "recipe": recipe.values(), "weights": NKATViT(recipe.model).state_dict()}
    checkpoint.save(tmp_path / "best.pt", content | {"steps": 100, "epoch": 3, "validation": 0.9, "train_images": 72})
    return tmp_path


def test_all_pictures_from_a_trained_checkpoint(run: Path) -> None:
    data = write_digits(run / "data")
    out = run / "pictures"
    arguments = ["--checkpoint", run, "--data-root", data, "--output-dir", out, "--pictures", 20]
    arguments += ["--curve-pictures", 6, "--threads", 1, "--output-format", "csv", "--json", run / "record.json"]
    done = run_module("nkat_vit.interpret", *arguments)
    assert done.returncode == 0, done.stderr
    words = "accuracy on 20 validation pictures"  # stdout is the table's
    assert (words in done.stderr, words in done.stdout) == (True, False)
    record = json.loads((run / "record.json").read_text())
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(record["files"])
    assert [
        sum(n.startswith(f"nkat_{kind}_") for n in names) for kind in ("attention_sample", "gauge_parameter_analysis")
    ] == [10, 1]
    assert sum(n.startswith("nkat_interpretability_summary_") for n in names) == 1
    assert all(Image.open(out / name).size[0] > 300 for name in names)
    assert record["pictures"] == 20
    assert len(record["layers"]) == 2
    for kind in ("relevance_samples", "deletion_insertion"):
        assert sum(n.startswith(f"nkat_{kind}_") for n in names) == 1
    found = record["explanation"]
    assert (found["pictures"], found["deletion_to"]) == (6, "black")
    assert found["insertion_from"] == "blurred, sigma 3.5 pixels"
    assert found["orders"].keys() == {"relevance", "rollout", "attention", "random"}
    area = found["orders"]["relevance"]["deletion"]
    row = next(row for row in csv.DictReader(io.StringIO(done.stdout)) if row["order"] == "relevance")
    assert (float(row["deletion"]), float(row["deletion_error"])) == (area["mean"], area["standard_error"])
    assert len(found["orders"]["relevance"]["insertion_curve"]) == len(found["shares"])


@pytest.mark.parametrize("change", [{"steps": 0}, {"validation": 0.12}])
def test_untrained_checkpoints_are_refused(run: Path, change: dict) -> None:
    content = checkpoint.load(run / "best.pt", "weights")
    checkpoint.save(run / "best.pt", content | change)
    done = run_module("nkat_vit.interpret", "--checkpoint", run, "--data-root", run, "--output-dir", run / "out")
    assert done.returncode == 2
    assert "not trained" in done.stderr
    assert not (run / "out").exists()


def test_a_record_that_cannot_be_written_is_known_before_the_work(run: Path) -> None:
    record = run / "record.json"
    record.write_text("kept")
    common = ["--checkpoint", run, "--data-root", run, "--output-dir", run / "out", "--json"]
    done = run_module("nkat_vit.interpret", *common, record)
    assert (done.returncode, "exists already; give --force" in done.stderr) == (2, True)
    done = run_module("nkat_vit.interpret", *common, run / "best.pt", "--force")
    assert "the output is the same file as the input" in done.stderr
    assert record.read_text() == "kept"
    assert not (run / "out").exists()
    done = run_module("nkat_vit.train", "--json", record, "--output", run / "new")
    assert (done.returncode, "exists already; give --force" in done.stderr) == (2, True)
    (run / "last.pt").unlink(missing_ok=True)
    weights = (run / "best.pt").read_bytes()  # a run that is finished keeps this alone, and it is not to be lost
    done = run_module("nkat_vit.train", "--dataset", "mnist", "--output", run)
    assert "holds a run already" in done.stderr
    assert (run / "best.pt").read_bytes() == weights
    done = run_module("nkat_vit.augment", "--dataset", "mnist", "--data-root", run, "--output", record)
    assert "exists already; give --force" in done.stderr
